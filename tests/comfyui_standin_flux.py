"""What of ComfyUI's FLUX the host touches, with the same names and signatures; see `comfyui_standin`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from comfyui_standin import WORDS

WIDTH, HEADS = 24, 2


def turned(x: Tensor, pe: Tensor) -> Tensor:
    pairs = x.unflatten(-1, (-1, 1, 2))
    return (pe[..., 0] * pairs[..., 0] + pe[..., 1] * pairs[..., 1]).flatten(-2)


def attention(q: Tensor, k: Tensor, v: Tensor, pe: Tensor, mask: Tensor | None) -> Tensor:
    out = scaled_dot_product_attention(turned(q, pe), turned(k, pe), v, attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


class DoubleStreamBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.txt_qkv = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.seen: list[tuple[int, int]] = []

    def forward(
        self,
        img: Tensor,
        txt: Tensor,
        vec: Tensor,
        pe: Tensor,
        attn_mask: Tensor | None = None,
        modulation_dims_img: Any = None,
        modulation_dims_txt: Any = None,
        transformer_options: dict[str, Any] = {},  # noqa: B006 - as there
    ) -> tuple[Tensor, Tensor]:
        self.seen.append((txt.shape[1], img.shape[1]))
        joint = torch.cat([self.txt_qkv(txt), self.qkv(img)], 1).unflatten(-1, (3, HEADS, -1))
        q, k, v = joint.permute(2, 0, 3, 1, 4)
        out = self.out(attention(q, k, v, pe, attn_mask))
        img = img + vec[:, None] * out[:, txt.shape[1] :]
        txt += out[:, : txt.shape[1]]  # in place, as there
        return img, txt


class SingleStreamBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.seen: list[int] = []

    def forward(
        self,
        x: Tensor,
        vec: Tensor,
        pe: Tensor,
        attn_mask: Tensor | None = None,
        modulation_dims: Any = None,
        transformer_options: dict[str, Any] = {},  # noqa: B006
    ) -> Tensor:
        self.seen.append(x.shape[1])
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x += vec[:, None] * self.out(attention(q, k, v, pe, attn_mask))  # in place, as there
        return x


class Flux(nn.Module):
    patch_size = 2

    def __init__(self, depth: int = 3, depth_single_blocks: int = 4, turn: float = 1.0) -> None:
        super().__init__()
        self.turn = turn
        self.img_in, self.txt_in = nn.Linear(16, WIDTH), nn.Linear(WORDS, WIDTH)
        self.final_layer = nn.Linear(WIDTH, 16)
        self.double_blocks = nn.ModuleList(DoubleStreamBlock() for _ in range(depth))
        self.single_blocks = nn.ModuleList(SingleStreamBlock() for _ in range(depth_single_blocks))

    def pe_embedder(self, batch: int, words: int, height: int, width: int) -> Tensor:
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        places = torch.cat([torch.zeros(words, 2), torch.stack([y, x], -1).flatten(0, 1)])
        angle = self.turn * places.repeat_interleave(WIDTH // HEADS // 4, 1)
        turns = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1)
        return turns.unflatten(-1, (2, 2)).expand(batch, 1, -1, -1, -1, -1)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        y: Any = None,
        guidance: Any = None,
        ref_latents: Any = None,
        control: dict[str, Any] | None = None,
        transformer_options: dict[str, Any] = {},  # noqa: B006
        **kwargs: Any,
    ) -> Tensor:
        height, width = x.shape[2] // 2, x.shape[3] // 2
        img = self.img_in(nn.functional.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2))
        txt, vec = self.txt_in(context), torch.ones(len(x), WIDTH)
        pe = self.pe_embedder(len(x), txt.shape[1], height, width)
        replace = transformer_options.get("patches_replace", {}).get("dit", {})
        same = {"vec": vec, "pe": pe, "attn_mask": None, "transformer_options": transformer_options}
        for i, block in enumerate(self.double_blocks):
            img, txt = _run(block, replace.get(("double_block", i)), {"img": img, "txt": txt} | same)
            for added in [] if control is None else control["input"][i : i + 1]:
                img[:, : added.shape[1]] += added
        img = torch.cat([txt, img], 1)
        for i, block in enumerate(self.single_blocks):
            img = _run(block, replace.get(("single_block", i)), {"img": img} | same)
        out = self.final_layer(img[:, txt.shape[1] :]).transpose(1, 2).unflatten(2, (height, width))
        return nn.functional.pixel_shuffle(out, 2)


def _run(block: nn.Module, replaced: Callable[..., dict[str, Any]] | None, args: dict[str, Any]) -> Any:
    double = isinstance(block, DoubleStreamBlock)

    def original_block(args: dict[str, Any]) -> dict[str, Any]:
        if not double:
            return {"img": block(args["img"], **{name: args[name] for name in args if name != "img"})}
        return dict(zip(("img", "txt"), block(**args), strict=True))

    out = original_block(args) if replaced is None else replaced(args, {"original_block": original_block})
    return (out["img"], out["txt"]) if double else out["img"]
