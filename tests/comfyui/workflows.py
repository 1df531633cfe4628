"""The example workflows, in the format of ComfyUI's API, and where their nodes lie on the page."""

from __future__ import annotations

from typing import Any

#: (x, y) of the nodes of a workflow.
Places = dict[str, tuple[int, int]]


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def _shown(pruned: str, sampler: str, image: str) -> dict[str, Any]:
    """The pruned image, and the tokens that were kept."""
    return {
        "20": node("SaveImage", images=[image, 0], filename_prefix="pruned"),
        "21": node("AtedmKeptTokens", model=[pruned, 0], samples=[sampler, 0], block=0, step=-1, image=[image, 0]),
        "22": node("PreviewImage", images=["21", 0]),
    }


SDXL = {
    "1": node("CheckpointLoaderSimple", ckpt_name="sd_xl_base_1.0.safetensors"),
    "2": node("AtedmTokenPruning", model=["1", 0], method="matched", rate=0.5, early_strength=1.0),
    "3": node("CLIPTextEncode", clip=["1", 1], text="a red fox sitting in fresh snow, morning light"),
    "4": node("CLIPTextEncode", clip=["1", 1], text="blurry, low quality"),
    "5": node("EmptyLatentImage", width=1024, height=1024, batch_size=1),
    "6": node(
        "KSampler",
        model=["2", 0],
        positive=["3", 0],
        negative=["4", 0],
        latent_image=["5", 0],
        seed=1,
        steps=30,
        cfg=6.0,
        sampler_name="dpmpp_2m",
        scheduler="karras",
        denoise=1.0,
    ),
    "7": node("VAEDecode", samples=["6", 0], vae=["1", 2]),
    **_shown("2", "6", "7"),
}
SDXL_PLACES: Places = {
    "1": (0, 0),
    "2": (380, -60),
    "3": (380, 140),
    "4": (380, 390),
    "5": (380, 640),
    "6": (850, 0),
    "7": (1240, 0),
    "21": (1240, 160),
    "20": (1620, 0),
    "22": (1620, 450),
}

FLUX = {
    "1": node("UNETLoader", unet_name="flux1-dev.safetensors", weight_dtype="default"),
    "2": node("AtedmTokenPruning", model=["1", 0], method="matched", rate=0.4, early_strength=0.5),
    "3": node("DualCLIPLoader", clip_name1="clip_l.safetensors", clip_name2="t5xxl_fp16.safetensors", type="flux"),
    "4": node("CLIPTextEncode", clip=["3", 0], text="an old lighthouse on a cliff in a storm, oil painting"),
    "5": node("FluxGuidance", conditioning=["4", 0], guidance=3.5),
    "8": node("ConditioningZeroOut", conditioning=["4", 0]),
    "9": node("EmptySD3LatentImage", width=1024, height=1024, batch_size=1),
    "6": node(
        "KSampler",
        model=["2", 0],
        positive=["5", 0],
        negative=["8", 0],
        latent_image=["9", 0],
        seed=1,
        steps=20,
        cfg=1.0,
        sampler_name="euler",
        scheduler="simple",
        denoise=1.0,
    ),
    "10": node("VAELoader", vae_name="ae.safetensors"),
    "7": node("VAEDecode", samples=["6", 0], vae=["10", 0]),
    **_shown("2", "6", "7"),
}
FLUX_PLACES: Places = {
    "1": (0, -60),
    "2": (380, -60),
    "3": (0, 140),
    "4": (380, 140),
    "5": (380, 390),
    "8": (380, 510),
    "9": (380, 600),
    "10": (0, 390),
    "6": (850, 0),
    "7": (1240, 0),
    "21": (1240, 160),
    "20": (1620, 0),
    "22": (1620, 450),
}

SHIPPED = {
    "1": node("ShippedModel", prompt="a butterfly above a rose in a green meadow"),
    "2": node("AtedmTokenPruning", model=["1", 0], method="matched", rate=0.7, early_strength=1.0),
    "3": node("KSamplerSelect", sampler_name="euler"),
    "6": node(
        "SamplerCustom",
        model=["2", 0],
        positive=["1", 1],
        negative=["1", 2],
        latent_image=["1", 3],
        sigmas=["1", 4],
        sampler=["3", 0],
        add_noise=True,
        noise_seed=11,
        cfg=3.0,
    ),
    "7": node("ShippedDecode", samples=["6", 1]),
    **_shown("2", "6", "7"),
}
SHIPPED_PLACES: Places = {
    "1": (0, 0),
    "2": (420, -60),
    "3": (420, 140),
    "6": (850, 0),
    "7": (1240, 0),
    "21": (1240, 160),
    "20": (1620, 0),
    "22": (1620, 450),
}
