"""What of ComfyUI the host touches, in a hundred lines of our own, with the same names and signatures.

`tests/comfyui` holds the host to the real application, and these signatures to its own. This is for every run of the
suite: it names what a change of the host would break.
"""

from __future__ import annotations

import copy
import itertools
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

WORDS, CHANNELS, HEADS = 12, 32, 2


class CrossAttention(nn.Module):
    attn_precision = None

    def __init__(self, width: int, context_width: int) -> None:
        super().__init__()
        self.heads, self.dim_head = HEADS, width // HEADS
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k, self.to_v = (nn.Linear(context_width, width, bias=False) for _ in range(2))
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        value: Tensor | None = None,
        mask: Tensor | None = None,
        transformer_options: dict[str, Any] = {},  # noqa: B006 - as there
    ) -> Tensor:
        context = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context if value is None else value)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        mask = None if mask is None else mask.unsqueeze(1)
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.to_out(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class BasicTransformerBlock(nn.Module):
    disable_self_attn = False

    def __init__(self) -> None:
        super().__init__()
        self.attn1, self.attn2 = CrossAttention(CHANNELS, CHANNELS), CrossAttention(CHANNELS, WORDS)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(CHANNELS) for _ in range(3))
        self.ff = nn.Sequential(nn.Linear(CHANNELS, CHANNELS), nn.GELU(), nn.Linear(CHANNELS, CHANNELS))
        self.seen: list[int] = []

    def forward(self, x: Tensor, context: Tensor | None = None, transformer_options: dict[str, Any] = {}) -> Tensor:  # noqa: B006
        self.seen.append(x.shape[1])
        x += self.attn1(self.norm1(x), transformer_options=transformer_options)  # in place, as some releases do
        x += self.attn2(self.norm2(x), context=context, transformer_options=transformer_options)
        x += self.ff(self.norm3(x))
        return x


class SpatialTransformer(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, CHANNELS)
        self.transformer_blocks = nn.ModuleList(BasicTransformerBlock() for _ in range(depth))

    def forward(self, x: Tensor, context: Any = None, transformer_options: dict[str, Any] = {}) -> Tensor:  # noqa: B006
        height, width = x.shape[2:]
        transformer_options["activations_shape"] = list(x.shape)
        tokens = self.norm(x).flatten(2).transpose(1, 2).contiguous()
        for index, block in enumerate(self.transformer_blocks):
            transformer_options["block_index"] = index
            tokens = block(tokens, context=context, transformer_options=transformer_options)
        return x + tokens.transpose(1, 2).unflatten(2, (height, width))  # type: ignore[no-any-return]


class UNetModel(nn.Module):
    """Two levels of one block: no attention on the first, ``depth`` layers on the second and in the middle."""

    num_res_blocks, channel_mult = (1, 1), (1, 1)
    in_channels, model_channels = 4, CHANNELS

    def __init__(self, depth: int = 3) -> None:
        super().__init__()

        def conv(inputs: int, stride: int = 1) -> nn.Module:
            return nn.Conv2d(inputs, CHANNELS, 3, stride, padding=1)

        self.input_blocks = nn.ModuleList(
            [
                nn.Sequential(conv(4)),
                nn.Sequential(conv(CHANNELS)),
                nn.Sequential(conv(CHANNELS, 2)),
                nn.Sequential(conv(CHANNELS), SpatialTransformer(depth)),
            ]
        )
        self.middle_block = nn.Sequential(conv(CHANNELS), SpatialTransformer(depth), conv(CHANNELS))
        self.output_blocks = nn.ModuleList(
            [
                nn.Sequential(conv(2 * CHANNELS), SpatialTransformer(depth)),
                nn.Sequential(conv(2 * CHANNELS), SpatialTransformer(depth), nn.Upsample(scale_factor=2)),
                nn.Sequential(conv(2 * CHANNELS)),
                nn.Sequential(conv(2 * CHANNELS)),
            ]
        )
        self.out = nn.Conv2d(CHANNELS, 4, 3, padding=1)

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor | None = None,
        context: Tensor | None = None,
        y: Tensor | None = None,
        control: dict[str, Any] | None = None,
        transformer_options: dict[str, Any] = {},  # noqa: B006
        **kwargs: Any,
    ) -> Tensor:
        executor = WrapperExecutor(self._forward, self, all_wrappers("diffusion_model", transformer_options))
        return executor(x, timesteps, context, y, control, transformer_options, **kwargs)  # type: ignore[no-any-return]

    def _forward(
        self,
        x: Tensor,
        timesteps: Tensor | None,
        context: Tensor | None,
        y: Tensor | None,
        control: dict[str, Any] | None,
        transformer_options: dict[str, Any],
        **kwargs: Any,
    ) -> Tensor:
        options, skips = transformer_options, []
        for number, block in enumerate(self.input_blocks):
            options["block"] = ("input", number)
            x = _through(block, x, context, options)
            skips.append(x)
        options["block"] = ("middle", 0)
        x = _through(self.middle_block, x, context, options)
        for number, block in enumerate(self.output_blocks):
            options["block"] = ("output", number)
            x = _through(block, torch.cat([x, skips.pop()], 1), context, options)
        return self.out(x)  # type: ignore[no-any-return]


def _through(block: Any, x: Tensor, context: Any, options: dict[str, Any]) -> Tensor:
    for module in block:
        x = module(x, context, options) if isinstance(module, SpatialTransformer) else module(x)
    return x


def all_wrappers(kind: str, transformer_options: dict[str, Any]) -> list[Callable[..., Any]]:
    found = transformer_options.get("wrappers", {}).get(kind, {})
    return [wrapper for of_key in found.values() for wrapper in of_key]


class WrapperExecutor:
    def __init__(self, original: Callable[..., Any], class_obj: Any, wrappers: Sequence[Callable[..., Any]]) -> None:
        self.original, self.class_obj, self.wrappers = original, class_obj, wrappers

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.wrappers:
            return self.original(*args, **kwargs)
        return self.wrappers[0](WrapperExecutor(self.original, self.class_obj, self.wrappers[1:]), *args, **kwargs)


class ModelSampling:
    sigma_max = torch.tensor(10.0)

    def timestep(self, sigma: Tensor) -> Tensor:
        return sigma * 100


class BaseModel(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.diffusion_model = network
        self.model_sampling = ModelSampling()

    def apply_model(
        self,
        x: Tensor,
        t: Tensor,
        c_concat: Any = None,
        c_crossattn: Any = None,
        control: Any = None,
        transformer_options: dict[str, Any] = {},  # noqa: B006
        **kwargs: Any,
    ) -> Tensor:
        executor = WrapperExecutor(self._apply_model, self, all_wrappers("apply_model", transformer_options))
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)  # type: ignore[no-any-return]

    def _apply_model(
        self, x: Tensor, t: Tensor, c_concat: Any, c_crossattn: Any, control: Any, transformer_options: dict[str, Any]
    ) -> Tensor:
        out: Tensor = self.diffusion_model(
            x / (1 + t.view(-1, 1, 1, 1)),
            t,
            context=c_crossattn,
            control=control,
            transformer_options=transformer_options,
        )
        return out


def get_attr(owner: Any, path: str) -> Any:
    for name in path.split("."):
        owner = getattr(owner, name)
    return owner


def set_attr(owner: Any, path: str, value: Any) -> Any:
    *parents, name = path.split(".")
    owner = get_attr(owner, ".".join(parents)) if parents else owner
    before = getattr(owner, name)
    setattr(owner, name, value)
    return before


class ModelPatcher:
    def __init__(self, model: BaseModel) -> None:
        self.model = model
        self.object_patches: dict[str, Any] = {}
        self.object_patches_backup: dict[str, Any] = {}
        self.model_options: dict[str, Any] = {"transformer_options": {}}
        self.attachments: dict[str, Any] = {}
        self.wrappers: dict[str, dict[str, list[Callable[..., Any]]]] = {}

    def clone(self) -> ModelPatcher:
        other = ModelPatcher(self.model)
        other.object_patches = self.object_patches.copy()
        other.object_patches_backup = self.object_patches_backup
        other.model_options = copy.deepcopy(self.model_options)
        other.attachments = self.attachments.copy()
        other.wrappers = {kind: {key: [*of] for key, of in keys.items()} for kind, keys in self.wrappers.items()}
        return other

    def add_object_patch(self, name: str, obj: Any) -> None:
        self.object_patches[name] = obj

    def get_model_object(self, name: str) -> Any:
        for known in (self.object_patches, self.object_patches_backup):
            if name in known:
                return known[name]
        return get_attr(self.model, name)

    def set_attachments(self, key: str, attachment: Any) -> None:
        self.attachments[key] = attachment

    def get_attachment(self, key: str) -> Any:
        return self.attachments.get(key)

    def add_wrapper_with_key(self, wrapper_type: str, key: str, wrapper: Callable[..., Any]) -> None:
        self.wrappers.setdefault(wrapper_type, {}).setdefault(key, []).append(wrapper)

    def set_model_patch_replace(self, patch: Any, name: str, block_name: str, number: int) -> None:
        replace = self.model_options["transformer_options"].setdefault("patches_replace", {})
        replace.setdefault(name, {})[block_name, number] = patch

    def patch_model(self) -> None:
        for name, patch in self.object_patches.items():
            before = set_attr(self.model, name, patch)
            self.object_patches_backup.setdefault(name, before)

    def unpatch_model(self) -> None:
        for name, before in self.object_patches_backup.items():
            set_attr(self.model, name, before)
        self.object_patches_backup.clear()


class Guider:
    """Draws with Euler's method: as `CFGGuider`, and what it calls, hand options down."""

    def __init__(self, model_patcher: ModelPatcher, contexts: Sequence[Tensor], *, together: bool = True) -> None:
        self.model_patcher, self.contexts, self.together = model_patcher, contexts, together
        self.model_options = copy.deepcopy(model_patcher.model_options)
        self.model_options["transformer_options"]["wrappers"] = model_patcher.wrappers
        self.control: dict[str, Any] | None = None

    def sample(self, noise: Tensor, sigmas: Tensor) -> Tensor:
        wrappers = all_wrappers("outer_sample", self.model_options["transformer_options"])
        return WrapperExecutor(self.outer_sample, self, wrappers)(noise, torch.zeros_like(noise), None, sigmas)  # type: ignore[no-any-return]

    @torch.no_grad()
    def outer_sample(self, noise: Tensor, latent_image: Tensor, sampler: Any, sigmas: Tensor, **_: Any) -> Tensor:
        self.uuids = [uuid.uuid4() for _ in self.contexts]
        self.model_patcher.patch_model()
        try:
            x = latent_image + noise * sigmas[0]
            for sigma, after in itertools.pairwise(sigmas):
                x = x + self.predict(x, sigma, sigmas) * (after - sigma)
        finally:
            self.model_patcher.unpatch_model()
        return x

    def predict(self, x: Tensor, sigma: Tensor, sigmas: Tensor) -> Tensor:
        """The mean over the conditions, in one batch or one after another, the last one first."""
        signs = [*range(len(self.contexts))]
        batches = [signs] if self.together else [[sign] for sign in reversed(signs)]
        total = torch.zeros_like(x)
        for batch in batches:
            options = dict(self.model_options["transformer_options"])
            options |= {"cond_or_uncond": batch, "uuids": [self.uuids[sign] for sign in batch], "sigmas": sigma.view(1)}
            options["sample_sigmas"] = sigmas
            contexts = torch.cat([self.contexts[sign].expand(len(x), -1, -1) for sign in batch])
            out = self.model_patcher.model.apply_model(
                torch.cat([x] * len(batch)),
                sigma.view(1),
                c_crossattn=contexts,
                control=self.control,
                transformer_options=options,
            )
            total += sum(out.chunk(len(batch)))
        return total / len(signs)
