"""What people run, one case each, on real diffusers classes, and the table of it in docs/reference/support.md."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    AutoPipelineForImage2Image,
    ControlNetModel,
    EulerAncestralDiscreteScheduler,
    LCMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLAdapterPipeline,
    StableDiffusionXLControlNetInpaintPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPAGPipeline,
    T2IAdapter,
)
from peft import LoraConfig
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from transformers import (
    CLIPImageProcessor,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from atedm.hosts.diffusers_dit import OLDEST
from atedm.lab.methods.peers import Caching
from models import TEXT_WIDTH, WIDTH, draw, scheduler, sd1_unet, sdxl_pipeline, sdxl_unet, tokenizer
from single_file import save_as_single_file
from transformer_support import TRANSFORMERS

#: A pipeline and what draws with it.
Made = tuple[Any, Callable[[], Tensor]]

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "support.md"
FOURTH = (16, 32, 48)
"""Channels of what takes a condition to a fourth of its size, as the autoencoder here does."""

HAS_TRANSFORMERS = tuple(map(int, diffusers.__version__.split(".")[:2])) >= OLDEST
"""Whether this diffusers is one whose transformers are pruned."""

SDXL = ("matched", "paper")
FEW_STEPS = ("matched", "turbo")
ONE_LAYER = ("matched",)


@dataclass(frozen=True)
class Case:
    """A line of the table."""

    #: What users call it.
    name: str
    make: Callable[[], Made]
    methods: tuple[str, ...]
    note: str = ""
    #: Which part of the pipeline is pruned in place of the U-Net.
    part: str = "unet"


def picture(channels: int = 3) -> Tensor:
    return torch.rand(1, channels, 64, 64, generator=torch.Generator().manual_seed(7))


def mask() -> Tensor:
    half = torch.zeros(1, 1, 64, 64)
    half[..., 32:] = 1
    return half


def parts_of(pipe: Any, *without: str) -> dict[str, Any]:
    return {name: part for name, part in pipe.components.items() if name not in ("image_encoder", *without)}


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


# --- SDXL -------------------------------------------------------------------------------------------------------------


def text_to_image(**options: Any) -> Made:
    pipe = sdxl_pipeline()
    return pipe, partial(draw, pipe, **options)


def image_to_image() -> Made:
    pipe = quiet(StableDiffusionXLImg2ImgPipeline(**parts_of(sdxl_pipeline())))
    return pipe, partial(draw, pipe, image=picture(), strength=0.8)


def inpaint() -> Made:
    pipe = quiet(StableDiffusionXLInpaintPipeline(**parts_of(sdxl_pipeline())))
    return pipe, partial(draw, pipe, image=picture(), mask_image=mask(), height=64, width=64, strength=0.9)


def refiner() -> Made:
    """Base and refiner, one run in two parts: the refiner is pruned, by where its steps stand in the whole run."""
    base = sdxl_pipeline()
    # Its second half of conditions is five numbers, not six.
    unet = sdxl_unet(seed=1, cross_attention_dim=WIDTH, projection_class_embeddings_input_dim=5 * 8 + WIDTH)
    parts = parts_of(sdxl_pipeline(unet), "text_encoder", "tokenizer") | {"text_encoder": None, "tokenizer": None}
    pipe = quiet(StableDiffusionXLImg2ImgPipeline(**parts, requires_aesthetics_score=True))

    def both() -> Tensor:
        half = draw(base, denoising_end=0.5)
        return draw(pipe, image=half, denoising_start=0.5)

    return pipe, both


def few_steps(plan: Any, steps: int) -> Made:
    pipe = sdxl_pipeline()
    pipe.scheduler = plan.from_config(scheduler().config, timestep_spacing="trailing")
    return pipe, partial(draw, pipe, num_inference_steps=steps, guidance_scale=0.0)


def embeddings() -> Made:
    """What prompt weighting does: embeddings of one's own in place of words."""
    pipe = sdxl_pipeline()
    words, without, pooled, without_pooled = pipe.encode_prompt("a duck")
    given = {
        "prompt": None,
        "prompt_embeds": 1.3 * words,
        "negative_prompt_embeds": without,
        "pooled_prompt_embeds": pooled,
        "negative_pooled_prompt_embeds": without_pooled,
    }
    return pipe, partial(draw, pipe, **given)


def callbacks() -> Made:
    """A callback that turns guidance off half way, which halves the batch."""
    pipe = sdxl_pipeline()

    def end_guidance(pipe: Any, step: int, _: Any, given: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            pipe._guidance_scale = 0.0
            given = {name: value.chunk(2)[-1] for name, value in given.items()}
        return given

    names = ["prompt_embeds", "add_text_embeds", "add_time_ids"]
    return pipe, partial(draw, pipe, callback_on_step_end=end_guidance, callback_on_step_end_tensor_inputs=names)


# --- What is added to it ----------------------------------------------------------------------------------------------


def controlnet(kind: Any = StableDiffusionXLControlNetPipeline, **options: Any) -> Made:
    parts = parts_of(sdxl_pipeline(), "feature_extractor")
    control = ControlNetModel.from_unet(parts["unet"], conditioning_embedding_out_channels=FOURTH)
    for module in (*control.controlnet_down_blocks, control.controlnet_mid_block):
        torch.nn.init.normal_(module.weight, std=0.3)
    pipe = quiet(kind(**parts, controlnet=control.eval()))
    given = {"image": picture(), "height": 64, "width": 64} | options
    return pipe, partial(draw, pipe, **given)


def t2i_adapter() -> Made:
    parts = parts_of(sdxl_pipeline())
    torch.manual_seed(4)
    adapter = T2IAdapter(
        channels=[16, 32, 48, 48], num_res_blocks=1, downscale_factor=8, adapter_type="full_adapter_xl"
    )
    pipe = quiet(StableDiffusionXLAdapterPipeline(**parts, adapter=adapter.eval()))
    return pipe, partial(draw, pipe, image=picture(), height=64, width=64)


def ip_adapter() -> Made:
    """A picture as a prompt, by the pipeline's own loader."""
    pipe = sdxl_pipeline()
    torch.manual_seed(6)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    seer = CLIPVisionConfig(**shape, image_size=32, patch_size=16, projection_dim=12)
    pipe.register_modules(
        image_encoder=CLIPVisionModelWithProjection(seer).eval(),
        feature_extractor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
    )
    words = 4
    projection = {
        "proj.weight": torch.randn(words * TEXT_WIDTH, 12),
        "proj.bias": torch.randn(words * TEXT_WIDTH),
        "norm.weight": torch.ones(TEXT_WIDTH),
        "norm.bias": torch.zeros(TEXT_WIDTH),
    }
    keys = {}
    cross = [name for name in pipe.unet.attn_processors if name.endswith("attn2.processor")]
    for number, name in enumerate(cross):
        channels = pipe.unet.get_submodule(name.removesuffix(".processor")).query_dim
        for part in ("to_k_ip", "to_v_ip"):
            keys[f"{2 * number + 1}.{part}.weight"] = torch.randn(channels, TEXT_WIDTH) * TEXT_WIDTH**-0.5
    weights = {"image_proj": projection, "ip_adapter": keys}
    pipe.load_ip_adapter(weights, subfolder="", weight_name="")
    return pipe, partial(draw, pipe, ip_adapter_image=to_pil_image(picture()[0]))


def loras(fused: bool) -> Made:
    """Two LoRAs at once, by weight; fused into the model or not."""
    pipe = sdxl_pipeline()
    torch.manual_seed(5)
    for name in ("style", "subject"):
        config = LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights="gaussian")
        pipe.unet.add_adapter(config, adapter_name=name)
    for name, parameter in pipe.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    pipe.unet.set_adapters(["style", "subject"], [0.7, 0.4])
    if fused:
        pipe.unet.fuse_lora(adapter_names=["style", "subject"])
    return pipe, partial(draw, pipe)


def perturbed_attention() -> Made:
    pipe = sdxl_pipeline(kind=StableDiffusionXLPAGPipeline, pag_applied_layers="mid")
    return pipe, partial(draw, pipe, pag_scale=3.0)


def freeu() -> Made:
    pipe = sdxl_pipeline()
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.3, b2=1.4)
    return pipe, partial(draw, pipe)


def deepcache() -> Made:
    pipe = sdxl_pipeline()

    def cached() -> Tensor:
        with Caching(2).applied(pipe):
            return draw(pipe)

    return pipe, cached


# --- Checkpoints of one file ------------------------------------------------------------------------------------------


def autoencoder() -> AutoencoderKL:
    """The kind of autoencoder that such files hold."""
    torch.manual_seed(8)
    return AutoencoderKL(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        latent_channels=4,
        layers_per_block=2,
    ).eval()


def sdxl_of_one_file_parts() -> Any:
    """SDXL whose second text encoder is the wider and has ten layers at least, by which diffusers knows it."""
    wide = WIDTH + 32
    torch.manual_seed(9)
    pipe = sdxl_pipeline(
        sdxl_unet(cross_attention_dim=WIDTH + wide, projection_class_embeddings_input_dim=6 * 8 + wide)
    )
    config = copy.deepcopy(pipe.text_encoder_2.config)
    config.update({"hidden_size": wide, "projection_dim": wide, "num_hidden_layers": 10, "num_attention_heads": 4})
    pipe.register_modules(text_encoder_2=CLIPTextModelWithProjection(config).eval(), vae=autoencoder())
    return pipe


def sd1_of_one_file_parts() -> Any:
    pipe, _ = stable_diffusion()
    pipe.register_modules(vae=autoencoder())
    return pipe


def single_file(parts: Callable[[], Any]) -> Made:
    """One ``.safetensors`` file in the original layout, opened with the configuration of its kind of model."""
    made = parts()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        save_as_single_file(made, file)
        made.save_pretrained(Path(folder) / "configuration")
        pipe = type(made).from_single_file(str(file), config=str(Path(folder) / "configuration"))
    return quiet(pipe), partial(draw, pipe)


# --- Others -----------------------------------------------------------------------------------------------------------


def stable_diffusion(kind: Any = StableDiffusionPipeline, unet: Any = None, **options: Any) -> Made:
    parts = sdxl_pipeline()
    pipe = kind(
        vae=parts.vae,
        text_encoder=copy.deepcopy(parts.text_encoder),
        tokenizer=tokenizer(),
        unet=sd1_unet(cross_attention_dim=WIDTH) if unet is None else unet,
        scheduler=parts.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **{name: value for name, value in options.items() if name == "controlnet"},
    )
    given = {name: value for name, value in options.items() if name != "controlnet"}
    return quiet(pipe), partial(draw, pipe, **given)


def stable_diffusion_2() -> Made:
    pipe, _ = stable_diffusion(
        unet=sd1_unet(cross_attention_dim=WIDTH, use_linear_projection=True, attention_head_dim=(1, 2, 2))
    )
    pipe.scheduler.register_to_config(prediction_type="v_prediction")
    return pipe, partial(draw, pipe)


def sd1_controlnet() -> Made:
    unet = sd1_unet(cross_attention_dim=WIDTH)
    control = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=FOURTH)
    for module in (*control.controlnet_down_blocks, control.controlnet_mid_block):
        torch.nn.init.normal_(module.weight, std=0.3)
    return stable_diffusion(
        StableDiffusionControlNetPipeline, unet, controlnet=control.eval(), image=picture(), height=64, width=64
    )


def auto_pipeline() -> Made:
    pipe = quiet(AutoPipelineForImage2Image.from_pipe(sdxl_pipeline()))
    return pipe, partial(draw, pipe, image=picture(), strength=0.8)


TWO_PROMPTS = {"prompt": ["a duck", "a castle"], "num_images_per_prompt": 2}
CASES = (
    Case("SDXL, text to image", text_to_image, SDXL),
    Case("SDXL, image to image", image_to_image, SDXL),
    Case("SDXL, inpainting", inpaint, SDXL),
    Case("SDXL, base and refiner", refiner, SDXL, "Apply to either or both; steps count within the whole run."),
    Case("SDXL by `AutoPipeline`", auto_pipeline, SDXL),
    Case("SDXL-Turbo, Lightning", partial(few_steps, EulerAncestralDiscreteScheduler, 2), FEW_STEPS),
    Case("SDXL with LCM", partial(few_steps, LCMScheduler, 4), FEW_STEPS),
    Case("Several prompts, several images each", partial(text_to_image, **TWO_PROMPTS), SDXL),
    Case("Embeddings in place of prompts (prompt weighting)", embeddings, SDXL),
    Case("Callbacks that change guidance on the way", callbacks, SDXL),
    Case("ControlNet", controlnet, SDXL),
    Case("The ControlNet itself", controlnet, SDXL, "`atedm.apply(pipe.controlnet)`.", part="controlnet"),
    Case(
        "ControlNet, inpainting",
        partial(
            controlnet,
            StableDiffusionXLControlNetInpaintPipeline,
            control_image=picture(),
            mask_image=mask(),
            strength=0.9,
        ),
        SDXL,
    ),
    Case("T2I-Adapter", t2i_adapter, SDXL),
    Case("IP-Adapter", ip_adapter, SDXL, "Its masks are refused."),
    Case("Several LoRAs", partial(loras, False), SDXL),
    Case("Several LoRAs, fused", partial(loras, True), SDXL),
    Case("Perturbed attention guidance", perturbed_attention, SDXL),
    Case("FreeU", freeu, SDXL),
    Case("DeepCache on top", deepcache, SDXL, "Apply pruning first."),
    Case("SDXL of one `.safetensors` file", partial(single_file, sdxl_of_one_file_parts), SDXL),
    Case("SD 1.5", stable_diffusion, ONE_LAYER, "One layer a block, and AT-EDM runs the first on all tokens."),
    Case(
        "SD 1.5, image to image",
        partial(stable_diffusion, StableDiffusionImg2ImgPipeline, image=picture(), strength=0.8),
        ONE_LAYER,
    ),
    Case("SD 1.5 with ControlNet", sd1_controlnet, ONE_LAYER),
    Case("SD 1.5 of one `.safetensors` file", partial(single_file, sd1_of_one_file_parts), ONE_LAYER),
    Case("SD 2.1", stable_diffusion_2, ONE_LAYER),
    *(Case(name, make, SDXL, note, part="transformer") for name, make, note in TRANSFORMERS if HAS_TRANSFORMERS),
)


def table() -> str:
    """Return docs/reference/support.md."""
    lines = [
        "# What it works with",
        "",
        "Every line is a test on the diffusers class named, with small random weights in the model's own shape",
        "([the cases](../../tests/support.py)). With each method the image is pruned in every block it should be, it",
        "is the same when it is drawn again, and after `atedm.remove` it is the dense image bit for bit.",
        "",
        "| what | pipeline | methods | |",
        "|---|---|---|---|",
    ]
    for case in CASES:
        pipe, _ = case.make()
        lines.append(f"| {case.name} | `{type(pipe).__name__}` | {', '.join(case.methods)} | {case.note} |")
    lines += [
        "",
        "Other tests cover more. [Models](../../tests/hosts/test_unet_models.py): IP-Adapters loaded before and after",
        "pruning is applied, offload, fused projections, 8-bit layers, copies and pickles.",
        "[Images](../../tests/hosts/test_unet_images.py): GLIGEN and ControlNet residuals.",
        "[Steps](../../tests/hosts/test_unet_steps.py): every scheduler of diffusers.",
        "[`torch.compile`](../../tests/hosts/test_unet_compile.py): the whole model, or its blocks.",
        "[Export](../../tests/hosts/test_export.py): `torch.export`, AOTInductor, ONNX.",
        "[Refusals](../../tests/hosts/test_unet_refusals.py), with the reason: U-Nets without cross-attention blocks,",
        "attention masks over tokens, AT-EDM on SD 1.x and 2.x.",
        "",
        "**Code that is not diffusers' own leaves a block dense**, in a transformer the whole call, and a line in",
        "the log says which. It may read tokens by their place, append the keys of another image, or keep an",
        "output for the next step, and kept tokens have other places and another number. That holds for attention",
        "processors (self-attention guidance, Attend-and-Excite, prompt-to-prompt, DAAM, regional prompting,",
        "cross-frame attention), for a `forward` laid over a layer or its attention (reference-only generation,",
        "T-GATE), and for diffusers' own caches of attention outputs (pyramid attention broadcast). A processor",
        "that works on any number of tokens can be trusted:",
        "`atedm.hosts.attention.TRUSTED_PROCESSORS.add(ItsClass)`.",
        "[Tests](../../tests/hosts/test_unet_relatives.py), also of AnimateDiff's U-Net, ControlNet-XS and",
        "subclasses.",
        "",
        "In transformers, [each family](../../tests/hosts/test_dit_families.py): positions and masks go along.",
        "[Calls](../../tests/hosts/test_dit_calls.py): ControlNets, skipped layers and caches of attentions run dense;",
        "caches of blocks go on top; LoRA, bfloat16, `torch.compile` and protected regions work. Refused, with the",
        "reason: Sana, gradient checkpointing, context parallelism.",
        "",
        "Written by",
        "",
        "```bash",
        "PYTHONPATH=tests .venv/bin/python tests/support.py",
        "```",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(table())
