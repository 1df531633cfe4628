"""One image after another: nothing of one leaks into the next, and batches are but several images."""

import copy
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPAGPipeline,
)
from torch import Tensor

import atedm
from atedm import AtEdm
from atedm.method.contract import Method
from models import (
    EARLY,
    LATE,
    TEXT_WIDTH,
    WIDTH,
    distance,
    draw,
    inputs,
    run,
    scheduler,
    sd1_unet,
    sdxl_pipeline,
    sdxl_unet,
    small_unet,
    tokenizer,
    watched,
)

TEXT, IMAGE, INPAINT = "text-to-image", "image-to-image", "inpaint"
KINDS = {IMAGE: StableDiffusionXLImg2ImgPipeline, INPAINT: StableDiffusionXLInpaintPipeline}


def random_image(height: int, width: int) -> Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(7))


def draw_kind(pipe: Any, kind: str, plan: str, height: int, width: int, **options: Any) -> Tensor:
    """One image of any of three kinds, by the parts of a text-to-image pipeline."""
    pipe.scheduler = getattr(diffusers, plan).from_config(scheduler().config)
    if kind == TEXT:
        return draw(pipe, height=height, width=width, **options)
    other = KINDS[kind](**{name: part for name, part in pipe.components.items() if name != "image_encoder"})
    other.set_progress_bar_config(disable=True)
    options["image"] = random_image(height, width)
    if kind == INPAINT:
        mask = torch.zeros(1, 1, height, width)
        mask[..., width // 2 :] = 1
        options |= {"mask_image": mask, "height": height, "width": width}
    return draw(other, **options)


def by_words(view: atedm.View) -> Tensor:
    """A ranking by cross-attention."""
    q, k, scale = view.cross_attention()
    return torch.softmax(scale * q.float() @ k.float().mT, -1).square().sum(-1).mean(1)


def by_step(view: atedm.View) -> Tensor:
    """A ranking that is another one in every step."""
    return torch.sin(view.tokens.float().square().mean(-1) * (1 + view.step))


def with_the_mean(to_refill: atedm.ToRefill) -> Tensor:
    mean = to_refill.kept.mean(1, keepdim=True).expand_as(to_refill.before)
    return mean.scatter(1, to_refill.keep.unsqueeze(-1).expand_as(to_refill.kept), to_refill.kept)


# Sizes, step counts, schedulers, strengths, guidance and kinds, one unlike the next.
IMAGES: list[tuple[str, str, int, int, dict[str, Any]]] = [
    (TEXT, "EulerDiscreteScheduler", 64, 64, {"num_inference_steps": 4}),
    (TEXT, "HeunDiscreteScheduler", 40, 72, {"num_inference_steps": 3}),
    (IMAGE, "EulerDiscreteScheduler", 64, 48, {"num_inference_steps": 6, "strength": 0.5}),
    (TEXT, "PNDMScheduler", 72, 56, {"num_inference_steps": 4, "guidance_scale": 1.0}),
    (INPAINT, "DPMSolverMultistepScheduler", 48, 64, {"num_inference_steps": 5, "strength": 0.9}),
    (IMAGE, "UniPCMultistepScheduler", 64, 64, {"num_inference_steps": 5, "strength": 0.3}),
    (TEXT, "EulerAncestralDiscreteScheduler", 64, 64, {"num_inference_steps": 2, "num_images_per_prompt": 2}),
    (TEXT, "EulerDiscreteScheduler", 64, 64, {"num_inference_steps": 4}),
]


@pytest.mark.parametrize(
    "method", ["paper", AtEdm(rank=by_step, refill=with_the_mean), "matched"], ids=["paper", "own functions", "matched"]
)
def test_an_image_made_after_others_is_that_of_a_freshly_patched_twin(method: Method | str) -> None:
    used = sdxl_pipeline(small_unet())
    atedm.apply(used, method)
    made = []
    for image in IMAGES:
        fresh = sdxl_pipeline(small_unet())
        atedm.apply(fresh, method)
        expected = draw_kind(fresh, *image[:4], **image[4])
        made.append(draw_kind(used, *image[:4], **image[4]))
        assert torch.equal(made[-1], expected), image
    assert torch.equal(made[0], made[-1])
    atedm.remove(used)
    assert not torch.equal(draw_kind(used, *IMAGES[0][:4], **IMAGES[0][4]), made[0])


def test_an_image_after_an_interrupted_one_is_that_of_a_freshly_patched_twin() -> None:
    used, fresh = sdxl_pipeline(small_unet()), sdxl_pipeline(small_unet())
    atedm.apply(used)
    atedm.apply(fresh)

    def interrupt(pipe: Any, step: int, timestep: Any, kwargs: Any) -> Any:
        if step == 2:
            raise KeyboardInterrupt
        return kwargs

    with pytest.raises(KeyboardInterrupt):
        draw(used, num_inference_steps=5, callback_on_step_end=interrupt)
    assert torch.equal(draw(used), draw(fresh))


@pytest.mark.parametrize("method", ["paper", "matched"])
def test_calls_of_any_size_and_step_in_any_order_are_those_of_a_fresh_twin(method: str) -> None:
    used = sdxl_unet()
    atedm.apply(used, method)
    timesteps = torch.tensor([981.0, 600.0, 300.0, 20.0])
    for size, timestep in [
        ((9, 13), timesteps[3]),
        ((16, 16), timesteps[0]),
        ((13, 9), 500),
        ((5, 4), timesteps[1].expand(2)),
        ((2, 2), 1),
        ((1, 3), 1.0),
        ((16, 16), torch.tensor([999, 1])),
        ((9, 13), timesteps[3]),
    ]:
        fresh = sdxl_unet()
        dense = run(fresh, timestep, size=size)
        atedm.apply(fresh, method)
        expected = run(fresh, timestep, size=size)
        assert expected.shape[-2:] == size
        assert torch.equal(run(used, timestep, size=size), expected)
        assert torch.equal(expected, dense) == (size == (2, 2))  # one token on all levels with attention


# --- batches and guidance ---------------------------------------------------------------------------------------------

# Sums in another order differ in the last digits, which the blocks enlarge, so these run in double precision. Another
# token kept differs by 0.1 and more.
CLOSE = {"rtol": 0.0, "atol": 1e-6}


@pytest.mark.parametrize("method", ["paper", "matched"])
def test_each_image_of_a_batch_is_pruned_on_its_own(method: str) -> None:
    pipe = sdxl_pipeline().to(torch.float64)
    atedm.apply(pipe, method)
    prompts = ["a duck", "a rose", "a duck"]
    options: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "latent"}
    options |= {"height": 64, "width": 64}
    together = pipe(prompts, generator=[torch.Generator().manual_seed(seed) for seed in range(3)], **options).images
    for seed, prompt in enumerate(prompts):
        alone = pipe(prompt, generator=torch.Generator().manual_seed(seed), **options).images
        torch.testing.assert_close(together[seed : seed + 1], alone, **CLOSE)
        assert distance(together[seed - 1 : seed or 3], alone) > 1


@pytest.mark.parametrize("timestep", [999, 1])
@pytest.mark.parametrize("method", ["paper", AtEdm(rank=by_words), "matched"], ids=["self", "cross", "matched"])
def test_with_and_without_prompt_in_one_call_or_in_two_is_the_same(method: Method | str, timestep: int) -> None:
    unet = sdxl_unet().double()
    dense = run(unet, timestep)
    atedm.apply(unet, method)
    call = inputs(unet)
    call["sample"] = call["sample"][:1].repeat(2, 1, 1, 1)  # as in guidance, only the words differ
    with torch.no_grad(), watched(unet) as calls:
        together = unet(**call, timestep=timestep).sample
        halves = []
        for half in (slice(0, 1), slice(1, 2)):
            added = {key: value[half] for key, value in call["added_cond_kwargs"].items()}
            part = {"sample": call["sample"][half], "encoder_hidden_states": call["encoder_hidden_states"][half]}
            halves.append(unet(**part, added_cond_kwargs=added, timestep=timestep).sample)
    torch.testing.assert_close(torch.cat(halves), together, **CLOSE)
    assert distance(together[0], together[1]) > 0.1
    assert distance(together, dense) > 0.1
    for name, importance in calls[0].importance.items():
        torch.testing.assert_close(importance[:1], calls[1].importance[name], rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(importance[1:], calls[2].importance[name], rtol=1e-5, atol=1e-8)


def test_without_guidance_a_step_is_one_image() -> None:
    pipe = sdxl_pipeline(small_unet())
    dense = draw(pipe, guidance_scale=1.0)
    atedm.apply(pipe)
    with watched(pipe.unet) as calls:
        pruned = draw(pipe, guidance_scale=1.0)
    assert {importance.shape[0] for call in calls for importance in call.importance.values()} == {1}
    assert distance(pruned, dense) > 0.1


# --- ways to call -----------------------------------------------------------------------------------------------------


def test_arguments_by_name_by_position_and_as_a_tuple_are_the_same() -> None:
    unet = sdxl_unet()
    atedm.apply(unet, "paper")
    call = inputs(unet)
    x, words = call["sample"], call["encoder_hidden_states"]
    added = {"added_cond_kwargs": call["added_cond_kwargs"]}
    timesteps = torch.linspace(999, 0, 5)
    for t, other in ((999, LATE), (timesteps[1], LATE), (timesteps[4], EARLY)):
        ways = [
            lambda t=t: unet(x, t, words, **added).sample,
            lambda t=t: unet(x, encoder_hidden_states=words, timestep=t, **added).sample,
            lambda t=t: unet(**call, timestep=t, return_dict=False)[0],
        ]
        named = run(unet, t)
        for way in ways:
            run(unet, other)
            with torch.no_grad():
                assert torch.equal(way(), named)
        assert not torch.equal(run(unet, other), named)


def test_padded_words_can_be_masked() -> None:
    unet = sdxl_unet().double()
    words = inputs(unet)["encoder_hidden_states"]
    padded = torch.cat([words, torch.randn(2, 3, words.shape[2]).double()], dim=1)
    mask = torch.ones(2, 10)
    mask[:, 7:] = 0
    for method in ("paper", "matched"):
        with atedm.pruned(unet, method):
            masked = run(unet, encoder_hidden_states=padded, encoder_attention_mask=mask)
            torch.testing.assert_close(masked, run(unet), **CLOSE)
            assert distance(masked, run(unet, encoder_hidden_states=padded)) > 0.1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_masked_words_do_not_rank(dtype: torch.dtype) -> None:
    unet = sdxl_unet().to(dtype)
    words = inputs(unet)["encoder_hidden_states"]
    mask = torch.ones(2, 10)
    mask[:, 7:] = 0
    some, other = (scale * torch.randn(2, 3, words.shape[2]).to(dtype) for scale in (1, 3))
    with atedm.pruned(unet, AtEdm(rank=by_words)):
        a, b = (
            run(unet, encoder_hidden_states=torch.cat([words, padding], dim=1), encoder_attention_mask=mask)
            for padding in (some, other)
        )
        assert torch.equal(a, b)
        if dtype == torch.float64:
            torch.testing.assert_close(a, run(unet), **CLOSE)


def test_residuals_of_a_controlnet_are_added() -> None:
    unet = sdxl_unet()
    torch.manual_seed(3)
    with atedm.pruned(unet):
        control = ControlNetModel.from_unet(unet)  # copies the weights, not the patch
    for module in (*control.controlnet_down_blocks, control.controlnet_mid_block):
        torch.nn.init.normal_(module.weight, std=0.3)
    call = inputs(unet)
    with torch.no_grad():
        down, mid = control(**call, timestep=LATE, controlnet_cond=torch.rand(2, 3, 128, 128), return_dict=False)
    residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    dense = run(unet, **residuals)
    atedm.apply(unet)
    pruned = run(unet, **residuals)
    assert distance(pruned, dense) > 0.1
    assert distance(pruned, run(unet)) > 0.1
    assert torch.equal(run(unet, **residuals), pruned)


def test_perturbed_attention_guidance_is_pruned_too() -> None:
    pipe = sdxl_pipeline(kind=StableDiffusionXLPAGPipeline, pag_applied_layers="mid")
    dense = draw(pipe, pag_scale=3.0)
    atedm.apply(pipe)
    with watched(pipe.unet) as calls:
        pruned = draw(pipe, pag_scale=3.0)
    assert {importance.shape[0] for call in calls for importance in call.importance.values()} == {3}
    assert distance(pruned, dense) > 0.1
    atedm.remove(pipe)
    assert torch.equal(draw(pipe, pag_scale=3.0), dense)


@pytest.mark.parametrize("guidance_scale", [3.0, 0.0], ids=["guided", "unguided"])
def test_what_is_perturbed_leaves_attention_that_counts_to_the_others(guidance_scale: float) -> None:
    """With next to no weight on the perturbed part, the image is the one without it, though it is in the batch."""
    plain = sdxl_pipeline()
    perturbed = sdxl_pipeline(kind=StableDiffusionXLPAGPipeline, pag_applied_layers=["down", "mid", "up"])
    for pipe in (plain, perturbed):
        atedm.apply(pipe, "matched")
    options = {"guidance_scale": guidance_scale, "num_images_per_prompt": 2}
    expected = draw(plain, **options)
    assert distance(draw(perturbed, pag_scale=1e-9, **options), expected) < 1e-3
    assert distance(draw(perturbed, pag_scale=1.0, **options), expected) > 0.1


def test_grounded_attention_takes_part() -> None:
    unet = sdxl_unet(attention_type="gated").double()
    boxes = {
        "boxes": torch.rand(2, 4, 4),
        "masks": torch.ones(2, 4),
        "positive_embeddings": torch.randn(2, 4, TEXT_WIDTH),
    }
    boxes = {name: value.double() for name, value in boxes.items()}
    for module in unet.modules():
        if hasattr(module, "alpha_attn"):
            torch.nn.init.constant_(module.alpha_attn, 0.5)
            torch.nn.init.constant_(module.alpha_dense, 0.5)
    given = {"cross_attention_kwargs": {"gligen": boxes}}
    dense = run(unet, **given)
    for method in ("paper", "matched"):
        with atedm.pruned(unet, method):
            pruned = run(unet, **given)
            assert distance(pruned, run(unet)) > 0.05
        assert distance(pruned, dense) > 0.1


def test_stable_diffusion_1_is_pruned_by_matched_pruning() -> None:
    parts = sdxl_pipeline()
    pipe = StableDiffusionPipeline(
        vae=parts.vae,
        text_encoder=copy.deepcopy(parts.text_encoder),
        tokenizer=tokenizer(),
        unet=sd1_unet(cross_attention_dim=WIDTH),
        scheduler=parts.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    dense = draw(pipe)
    with pytest.raises(ValueError, match=r'nothing to prune.*"matched"'):
        atedm.apply(pipe, "paper")
    with atedm.pruned(pipe):
        pruned = draw(pipe)
        assert torch.equal(draw(pipe), pruned)
    assert distance(pruned, dense) > 0.1
    assert torch.equal(draw(pipe), dense)
