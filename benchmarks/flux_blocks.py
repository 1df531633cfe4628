"""What pruning saves in blocks of FLUX.1 at their real size, with random weights: all of it does not fit everywhere.

    python benchmarks/flux_blocks.py --out benchmarks/flux-blocks-1024-cpu-bfloat16.json

Times a span of double blocks and a span of single blocks, method after method in turns: dense; matched pruning; the
same number of tokens chosen for nothing, which is what pruning would take if choosing and refilling were free; and ToMe
in every block, by the matching of tomesd, with as many tokens left. Prints a table of ratios to dense.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

# In place of this folder, where torch would take cuda.py for NVIDIA's package of the same name.
sys.path[0] = str(Path(__file__).resolve().parents[1] / "src")

import torch
from torch import Tensor, nn

from atedm.costs.architectures import Architecture, architecture
from atedm.costs.budget import profile_of
from atedm.costs.spans import step_macs
from atedm.files import save_json
from atedm.hosts.diffusers_dit import find_transformer_spans
from atedm.hosts.models import attach, detach
from atedm.lab.random_unet import random_unet
from atedm.lab.setup import processor_of
from atedm.lab.tables import markdown_table
from atedm.lab.timing import Spread, Stopwatch
from atedm.method.contract import Cut, Method, View
from atedm.method.keep import keep_count
from atedm.method.matched import Matched

SMALL = {"num_attention_heads": 2, "attention_head_dim": 16, "axes_dims_rope": [4, 4, 8], "joint_attention_dim": 64}


@dataclass(frozen=True)
class Free(Matched):
    """Keeps the first tokens, and drops and refills without any work."""

    def drop(self, view: View) -> Cut:
        """Take a slice."""
        keep = torch.arange(view.count, device=view.tokens.device).expand(view.tokens.shape[0], -1)
        rest = view.tokens[:, view.count :]
        tokens = view.tokens[:, : view.count].contiguous()
        return Cut(tokens, keep, tokens[..., 0], lambda kept: torch.cat([kept, rest], dim=1))


@contextmanager
def merged(model: nn.Module, size: tuple[int, int], merging: int) -> Iterator[None]:
    """Merge image tokens in every block of the spans, by tomesd's matching, and copy them back after it."""
    from tomesd.merge import bipartite_soft_matching_random2d

    height, width = size
    undo: list[Callable[[Tensor], Tensor]] = []

    def before(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        tokens = kwargs["hidden_states"]
        merge, unmerge = bipartite_soft_matching_random2d(tokens, width, height, 2, 2, merging, no_rand=True)
        undo.append(unmerge)
        text = kwargs["encoder_hidden_states"].shape[1]
        tables = tuple(torch.cat([table[:text], merge(table[None, text:])[0]]) for table in kwargs["image_rotary_emb"])
        return args, kwargs | {"hidden_states": merge(tokens), "image_rotary_emb": tables}

    def after(_: nn.Module, __: Any, returned: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return returned[0], undo.pop()(returned[1])

    hooks = []
    for _, blocks in find_transformer_spans(model).values():
        for block in blocks:
            hooks += [block.register_forward_pre_hook(before, with_kwargs=True), block.register_forward_hook(after)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def pruned(model: nn.Module, method: Method) -> Iterator[None]:
    """Prune for the length of a block, without counting costs."""
    attach(model, method)
    try:
        yield
    finally:
        detach(model)


def time_spans(model: nn.Module, call: dict[str, Any], device: torch.device) -> float:
    """Milliseconds that the spans take in one call."""
    watch: list[Stopwatch] = []

    def start(*_: Any) -> None:
        watch.append(Stopwatch(device))

    def stop(*_: Any) -> None:
        watch[-1].lap("span")

    hooks = []
    for _, blocks in find_transformer_spans(model).values():
        hooks += [blocks[0].register_forward_pre_hook(start, prepend=True), blocks[-1].register_forward_hook(stop)]
    with torch.no_grad():
        model(**call)
    for hook in hooks:
        hook.remove()
    return sum(lap.read()["span"] for lap in watch)


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--rate", type=float, default=0.63, help="share of the image tokens dropped")
    parser.add_argument("--double", type=int, default=2, help="double blocks in the span")
    parser.add_argument("--single", type=int, default=4, help="single blocks in the span")
    parser.add_argument("--size", type=int, default=1024, help="pixels a side")
    parser.add_argument("--repeats", type=int, default=3, help="rounds, after one to warm up")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--small", action="store_true", help="narrow blocks at 256 px: a rehearsal")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, options.dtype)
    config = architecture("flux").config | {
        "num_layers": options.double + 1,  # the first block runs dense
        "num_single_layers": options.single,
        **(SMALL if options.small else {}),
    }
    side = 256 if options.small else options.size
    arch = Architecture("FLUX.1 blocks", config, (side, side), 8, guidance=False, words=512)
    profile = profile_of(arch)
    model = random_unet(arch, dtype, device)
    call = arch.call(device=device, dtype=dtype)
    call |= {name: value.float() for name, value in call.items() if name in ("timestep", "guidance", "img_ids")}
    method = Matched(rate=options.rate, level_factors=())
    tokens = profile.shapes[0].tokens
    kept = keep_count(tokens, options.rate)
    ways: dict[str, Callable[[], Any]] = {
        "dense": nullcontext,
        "matched pruning": partial(pruned, model, method),
        "the same tokens, chosen for nothing": partial(pruned, model, Free(rate=options.rate, level_factors=())),
        "ToMe in every block": partial(merged, model, arch.grid(), tokens - kept),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(options.repeats + 1):
        for name, way in ways.items():
            with way():
                took = time_spans(model, call, device)
            print(f"round {turn}: {name} {took:.0f} ms", flush=True)
            if turn:
                times[name].append(took)
    ratios = {
        name: Spread.of([one / dense for one, dense in zip(times[name], times["dense"], strict=True)]) for name in ways
    }
    dense_macs, macs = (step_macs(profile.shapes, way) for way in (None, method))
    arithmetic = {"all": macs.exact / dense_macs.exact, "blocks": (macs.exact - macs.overhead) / dense_macs.exact}
    found = {
        "device": processor_of(str(device)),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": options.dtype,
        "size": side,
        "blocks": {"double": options.double, "single": options.single},
        "tokens": tokens,
        "kept": kept,
        "milliseconds": times,
        "ratio": {name: spread._asdict() for name, spread in ratios.items()},
        "arithmetic": arithmetic,
    }
    save_json(found, options.out)
    rows = [[name, f"{spread.median:.3f} ({spread.low:.3f} to {spread.high:.3f})"] for name, spread in ratios.items()]
    print(
        f"{tokens} image tokens, {kept} kept; arithmetic of matched pruning {arithmetic['all']:.3f} of dense, "
        f"{arithmetic['blocks']:.3f} but for choosing and refilling"
    )
    print(markdown_table(["way", "time, dense = 1"], rows))


if __name__ == "__main__":
    main()
