"""Distil the model that ships to few steps: a LoRA by latent consistency distillation (Luo et al., 2023, LCM-LoRA).

    python -m atedm.tiny.distill RUN --images 18000 --canvas 256 --crop 128 --lr 7e-4

The teacher is the run's averaged model under guidance, which the student learns to do without. At a noisy time the
student says what the picture is; some steps of the teacher along its path lead to a less noisy time, where the student
must say the same. The LoRA opens by ``pipe.load_lora_weights`` and draws in four steps by the sampler of
`atedm.tiny.few_steps`.
"""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import AutoencoderTiny, StableDiffusion3Pipeline, StableDiffusionXLPipeline
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTokenizer

from atedm.files import written_whole
from atedm.tiny.checkpoint import averaged_weights, denoiser_of
from atedm.tiny.data import ScenePool
from atedm.tiny.download import load_atlas
from atedm.tiny.few_steps import LORA, TEACHER_STEPS
from atedm.tiny.models import TRANSFORMER, UNET, build_model
from atedm.tiny.noise_paths import NoisePath
from atedm.tiny.objects import FEWER_OBJECTS, OBJECTS
from atedm.tiny.scenes import CANVAS

STATE = "distillation.safetensors"
_LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
_OF_TEXT = ["add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff_context.net.0.proj", "ff_context.net.2"]
_LAYERS_OF = {UNET: ["proj_in", "proj_out"], TRANSFORMER: _OF_TEXT}
_HOP = 5
"""Steps of the teacher from a time to the one where the student must say the same: as far as one of four steps.
Single steps need many times as long, because what is right at the clean end has to pass through all of them."""
_AVERAGE_DECAY = 0.95


def distill(
    run: Annotated[Path, typer.Argument(help="Folder of a training run; the LoRA goes to its folder 'lora'.")],
    images: Annotated[int, typer.Option(help="Stop after so many images, earlier sittings counted.")],
    canvas: Annotated[int, typer.Option(help="Pixels a side.")] = CANVAS,
    crop: Annotated[int | None, typer.Option(help="Learn squares around an object, of so many pixels a side.")] = None,
    batch: Annotated[int, typer.Option(help="Images a step.")] = 16,
    rank: Annotated[int, typer.Option(help="Rank of the LoRA.")] = 16,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 5e-4,
    guidance: Annotated[float, typer.Option(help="Guidance scale of the teacher, which the student takes over.")] = 3.0,
    pool: Annotated[int, typer.Option(help="Encoded scenes held.")] = 1024,
    uses: Annotated[int, typer.Option(help="How often a scene is used; 1 on a GPU.")] = 4,
    seed: Annotated[int, typer.Option(help="Seed of scenes and noise.")] = 0,
    eager: Annotated[bool, typer.Option("--eager", help="Do not compile.")] = False,
) -> None:
    """Distil one sitting; the same command goes on where it was."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = CLIPTokenizer.from_pretrained(run / "tokenizer")
    autoencoder = AutoencoderTiny.from_pretrained(run / "vae").to(device)
    weights = averaged_weights(run)
    part = denoiser_of(weights)
    teacher, path, _ = build_model(part, tokenizer, device, compiled=not eager)
    teacher.eval().requires_grad_(False)
    teacher.load_state_dict(weights)
    student = copy.deepcopy(teacher)
    layers = _LAYERS + _LAYERS_OF[part]
    getattr(student, part).add_adapter(
        LoraConfig(r=rank, lora_alpha=rank, target_modules=layers, init_lora_weights=True)
    )
    target = copy.deepcopy(student).requires_grad_(False)
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    learning, averaged = getattr(student, part), getattr(target, part)
    seen = _resume(run, learning, averaged)
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    scenes = ScenePool(
        load_atlas(run / "objects").to(device),
        autoencoder,
        tokenizer,
        canvas,
        size=pool,
        uses=uses,
        seed=seed + seen,
        crop=crop,
        names=FEWER_OBJECTS if part == TRANSFORMER else tuple(OBJECTS),
    )
    times = path.grid(TEACHER_STEPS)
    began, shown, saved, steps, total = *([time.monotonic()] * 3), 0, 0.0
    while seen < images:
        torch.manual_seed(hash((seed, seen)) % 2**31)
        clean, ids, sizes, _ = scenes.draw(batch)
        later = torch.randint(1, TEACHER_STEPS + 1, (batch,), device=device)
        t = times[later]
        noisy = path.noised(clean, torch.randn_like(clean), t)
        keep = torch.ones(batch, device=device)
        with torch.autocast(device.type, torch.bfloat16):
            said, _ = path.read(noisy, student(noisy, t, ids, keep, sizes).float(), t)
            with torch.no_grad():
                nearer = noisy
                for step in range(_HOP):  # from -1, the clean picture, a step leads nowhere
                    start, end = (times[(later - n).clamp_min(0)] for n in (step, step + 1))
                    nearer = _teacher_step(teacher, nearer, start, end, ids, path, sizes, guidance)
                expected, _ = path.read(nearer, target(nearer, end.clamp_min(0), ids, keep, sizes).float(), end)
                expected = torch.where((later <= _HOP)[:, None, None, None], nearer, expected)
        loss = functional.huber_loss(said, expected, delta=0.1)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_([*_lora(averaged)], [*_lora(learning)], 1 - _AVERAGE_DECAY)
        steps, seen, total = steps + 1, seen + batch, total + float(loss.detach())
        now = time.monotonic()
        if steps % 50 == 0:
            speed = 50 * batch / (now - shown)
            print(
                f"{(now - began) / 60:6.1f} min  seen {seen}  loss {total / 50:.5f}  {speed:.0f} images/s", flush=True
            )
            total, shown = 0.0, now
        if now - saved > 300:
            _save(run, learning, averaged, seen, part)
            saved = now
    _save(run, learning, averaged, seen, part)


def _teacher_step(
    teacher: nn.Module,
    noisy: Tensor,
    t: Tensor,
    before: Tensor,
    ids: Tensor,
    path: NoisePath,
    sizes: Tensor,
    scale: float,
) -> Tensor:
    """One guided DDIM (of a flow: Euler) step from ``t`` to ``before``."""
    count = len(noisy)
    keep = torch.cat([torch.zeros(count), torch.ones(count)]).to(noisy.device)
    twice = t.clamp_min(0).repeat(2)
    both = teacher(noisy.repeat(2, 1, 1, 1), twice, ids.repeat(2, 1), keep, sizes.repeat(2, 1)).float()
    without, with_caption = both.chunk(2)
    picture, noise = path.read(noisy, without + scale * (with_caption - without), t)
    return path.noised(picture, noise, before)


def _lora(model: nn.Module) -> list[Tensor]:
    return [parameter for name, parameter in model.named_parameters() if "lora_" in name]


def _save(run: Path, learning: Any, average: Any, seen: int, part: str) -> None:
    """Write what a sitting is resumed from, and the averaged LoRA as diffusers opens it."""
    now, averaged = (get_peft_model_state_dict(model) for model in (learning, average))
    tensors = {f"now.{name}": value for name, value in now.items()}
    tensors |= {f"average.{name}": value for name, value in averaged.items()}
    with written_whole(run / STATE) as partial:
        save_file({name: value.contiguous() for name, value in tensors.items()} | {"seen": torch.tensor(seen)}, partial)
    kind = StableDiffusion3Pipeline if part == TRANSFORMER else StableDiffusionXLPipeline
    layers = {name: value.half() for name, value in averaged.items()}
    kind.save_lora_weights(run / LORA, **{f"{part}_lora_layers": layers})


def _resume(run: Path, learning: Any, average: Any) -> int:
    if not (run / STATE).exists():
        return 0
    tensors = load_file(run / STATE)
    for prefix, model in (("now.", learning), ("average.", average)):
        part = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        set_peft_model_state_dict(model, part)
    return int(tensors["seen"])


if __name__ == "__main__":
    typer.run(distill)
