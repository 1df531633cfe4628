"""Everything about pruning on a GPU in one run of about six minutes: right first, then fast.

    python benchmarks/cuda.py --out OUT             # on a GPU
    python benchmarks/cuda.py --out OUT --small     # a rehearsal of the same on a CPU, which CI runs

Prints what it finds as it goes, a table last, and writes ``OUT/cuda.json`` after every part, so that a run that is cut
off leaves what it had. Needs torch, diffusers and this package; ToMe and DeepCache are timed if tomesd and DeepCache
are there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# In place of this folder, where torch would take this file for NVIDIA's package of the same name.
sys.path[0] = str(Path(__file__).resolve().parents[1] / "src")

import torch

from atedm.costs.architectures import Architecture, architecture, run_once
from atedm.costs.budget import fit_to_budget, run_cost
from atedm.costs.tome import ToMe
from atedm.costs.transformer_calls import timestep_of
from atedm.hosts.diffusers_dit import known_family
from atedm.lab.ablation import variant_of
from atedm.lab.ablation.map_modes import scores_by
from atedm.lab.methods.candidates import Candidate, Dense, Pruning
from atedm.lab.methods.peers import Caching, Merging
from atedm.lab.random_unet import random_unet
from atedm.lab.shared_weights import copy_with_shared_weights
from atedm.method.at_edm import AtEdm
from atedm.method.contract import Place, QueriesAndKeys, View
from atedm.method.cover import lattice, representative
from atedm.method.keep import keep_most_important
from atedm.method.map_scores import scores_of_map, scores_of_rows
from atedm.method.matching import match_by_features
from atedm.method.presets import METHODS, TRANSFORMER_METHODS
from atedm.method.recovery import group_sizes, mean_by_source, update_of_match

COMPILED = ("dense", "paper, auto map", "dagger, auto map", "paper, oracle", "matched")
"""Candidates that are timed once more with compiled blocks; compiling takes most of a minute each."""
PLACE = Place("down", 2, 0, 1, 2, "span")


# --- Is it right? -----------------------------------------------------------------------------------------------------


def check_maps(device: torch.device, dtype: torch.dtype, heads: int, tokens: int) -> dict[str, Any]:
    """Rank by each way to the map on the device, against the whole map in float64 on the CPU."""
    generator = torch.Generator().manual_seed(tokens)
    q, k = (torch.randn(2, heads, tokens, 64, generator=generator).to(dtype) for _ in range(2))
    exact = scores_of_map(q.double(), k.double(), 0.125).importance
    assert exact is not None
    found: dict[str, Any] = {}
    modes = ("full", "blocked", "flash", "triton", "sampled") if device.type == "cuda" else ("full", "blocked", "flash")
    for mode in modes:
        attention = QueriesAndKeys(q.to(device), k.to(device), 0.125)
        width = next(w for w in range(int(tokens**0.5), 0, -1) if tokens % w == 0)
        values = torch.zeros(2, tokens, 8, device=device, dtype=dtype)
        view = View(
            PLACE, (tokens // width, width), tokens // 3, 0, values, lambda a=attention: a, lambda a=attention: a
        )
        try:
            ours = scores_by(mode, view, head_fusion="rms", iterations=3, rows=min(256, tokens))
            again = scores_by(mode, view, head_fusion="rms", iterations=3, rows=min(256, tokens))
            assert ours.importance is not None
            keep = keep_most_important(ours.importance, tokens // 3)
            error = ((ours.importance.double().cpu() - exact).norm() / exact.norm()).item()
            found[mode] = {
                "relative error": error,
                "same twice": bool(torch.equal(ours.importance, again.importance))  # type: ignore[arg-type]
                and bool(torch.equal(ours.source(keep), again.source(keep))),
            }
        except Exception as problem:  # a way that does not run here is a finding, not the end
            found[mode] = {"failed": f"{type(problem).__name__}: {str(problem).splitlines()[0][:150]}"}
    return found


def check_matching(device: torch.device, dtype: torch.dtype, tokens: int) -> dict[str, Any]:
    """Match and average by source on the device, against float64 on the CPU; ties must go to the first."""
    generator = torch.Generator().manual_seed(tokens + 1)
    x = torch.randn(2, tokens, 96, generator=generator).to(dtype)
    keep = keep_most_important(torch.rand(2, tokens, generator=generator), max(1, tokens // 3))
    source = match_by_features(x.to(device), keep.to(device)).source.cpu()
    exact = torch.cdist(x.double(), x.double().gather(1, keep.unsqueeze(-1).expand(-1, -1, 96)))
    chosen, least = exact.gather(2, source.unsqueeze(-1)).squeeze(-1), exact.min(-1).values
    sizes = group_sizes(source.to(device), keep.shape[1])
    means = [mean_by_source(x.to(device), source.to(device), sizes) for _ in range(2)]
    right = torch.zeros(2, keep.shape[1], 96, dtype=torch.float64).index_put(
        (torch.arange(2)[:, None].expand(-1, tokens), source), x.double(), accumulate=True
    ) / sizes.double().cpu().unsqueeze(-1)
    flat = torch.ones(1, tokens, 96, device=device, dtype=dtype)
    tie = match_by_features(flat, keep[:1].to(device)).source.cpu()
    dropped = torch.ones(tokens, dtype=torch.bool).scatter(0, keep[0], False)
    return {
        "worst excess distance": ((chosen - least) / least.clamp_min(1e-9))[least > 1e-6].max().item(),
        "mean, relative error": ((means[0].double().cpu() - right).norm() / right.norm()).item(),
        "same twice": bool(torch.equal(*means)),
        "ties go to the first": bool((tie[0][dropped] == 0).all()),
    }


def check(device: torch.device, small: bool) -> dict[str, Any]:
    """All checks, over odd shapes and three dtypes."""
    shapes = ((1, 77), (3, 250)) if small else ((1, 77), (5, 1000), (10, 1024), (10, 4096), (7, 2303))
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    found: dict[str, Any] = {}
    for dtype, (heads, tokens) in itertools.product(dtypes, shapes):
        name = f"{str(dtype).removeprefix('torch.')}, {heads} heads, {tokens} tokens"
        found[name] = {
            "maps": check_maps(device, dtype, heads, tokens),
            "matching": check_matching(device, dtype, tokens),
        }
        print(name, json.dumps(found[name]), flush=True)
    return found


# --- How long does a step take? ---------------------------------------------------------------------------------------


def candidates(model: str, size: tuple[int, int]) -> dict[str, Candidate]:
    """What is timed beside dense, at the costs they have at this size."""
    paper, dagger, matched = METHODS["paper"], METHODS["dagger"], METHODS["matched"]
    timed: dict[str, Candidate] = {"dense": Dense()}
    for name, method in (("paper", paper), ("dagger", dagger)):
        variant = replace(variant_of(method), schedule="constant")
        for mode in ("auto", "full", "flash", "triton"):
            timed[f"{name}, {mode} map"] = Pruning(replace(variant, map_mode=mode))
    # What the paper calls the desired implementation: a choice that costs nothing, because it is made once.
    timed["paper, oracle"] = Pruning(replace(variant_of(paper), schedule="constant", refresh_every=10**6))
    timed["matched"] = Pruning(matched)
    cost = run_cost(model, matched, size=size)
    timed["ToMe at the cost of matched"] = Merging(fit_to_budget(model, ToMe(), share=cost, size=size))
    timed["DeepCache, every other step"] = Caching(2)
    return timed


def time_steps(
    arch: Architecture,
    model: Any,
    size: tuple[int, int],
    batch: int,
    dtype: torch.dtype,
    repeats: int,
    timed: dict[str, Candidate],
    compiled: bool = False,
) -> dict[str, Any]:
    """Time a late step by every candidate in turns: as it is, and replayed as a CUDA graph where that can be.

    ``compiled`` compiles the transformer blocks, pruned or not. Together with a graph that is the fastest a user has.
    """
    device = model.device
    call = arch.call(size, (1 + arch.guidance) * batch, device=device, dtype=dtype)
    rows: dict[str, Any] = {}
    with ExitStack() as stack, torch.no_grad():
        turns: dict[str, Callable[[], object]] = {}
        for name, candidate in timed.items():
            copied = copy_with_shared_weights(model)
            try:
                pipe, act = _run_of(arch, copied, call)
                stack.enter_context(candidate.applied(pipe))
                if compiled:
                    torch._dynamo.config.recompile_limit = 64  # one class of blocks, many numbers of tokens
                    copied.compile_repeated_blocks(dynamic=False)
                for _ in range(3):
                    act()
                rows[name] = {"peak, MiB": _peak(act, device), "launches": _launches(act, device)}
                turns[name] = act
                if device.type == "cuda" and not isinstance(candidate, Caching | Merging):
                    turns[f"{name} | graph"] = _captured(act)
            except Exception as problem:
                rows.setdefault(name, {})["failed"] = f"{type(problem).__name__}: {str(problem).splitlines()[0][:200]}"
                torch.cuda.empty_cache() if device.type == "cuda" else None
        times: dict[str, list[float]] = {name: [] for name in turns}
        for _ in range(repeats):
            for name, act in turns.items():
                times[name].append(_milliseconds(partial(_twice, act), device) / 2)  # DeepCache works in pairs of steps
    for name, values in times.items():
        plain, _, graph = name.partition(" | ")
        key = "graph, ms" if graph else "eager, ms"
        rows[plain][key] = statistics.median(values)
        dense = times["dense | graph" if graph else "dense"]
        ratios = [ours / theirs for ours, theirs in zip(values, dense, strict=True)]
        rows[plain][key.replace("ms", "dense = 1")] = statistics.median(ratios)
    return rows


def _run_of(arch: Architecture, model: Any, call: dict[str, Any]) -> tuple[Any, Callable[[], object]]:
    """What stands in for a pipeline, and what takes the next late step of its run."""
    steps = torch.linspace(0.999, 0, 2000, device=model.device)[1500:]  # elements of a list, which nobody has to read
    if not arch.is_transformer:
        timesteps = 1000 * steps
        left = iter(itertools.cycle(timesteps))
        pipe = SimpleNamespace(unet=model, scheduler=SimpleNamespace(timesteps=timesteps))
        return pipe, lambda: run_once(model, call, next(left))  # type: ignore[arg-type]
    name = known_family(model).timestep
    factor = timestep_of(arch.config["_class_name"], 1.0)
    left = iter(itertools.cycle(factor * steps))
    return SimpleNamespace(transformer=model), lambda: model(**call | {name: next(left).expand(call[name].shape)})


def _twice(act: Callable[[], object]) -> None:
    act()
    act()


def _captured(act: Callable[[], object]) -> Callable[[], object]:
    """Replay of a step as one CUDA graph: what it takes when starting operations costs nothing."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            act()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        act()
    return graph.replay


def _milliseconds(act: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        began = time.perf_counter()
        act()
        return 1e3 * (time.perf_counter() - began)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    act()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end))


def _peak(act: Callable[[], object], device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    act()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _launches(act: Callable[[], object], device: torch.device) -> int:
    """Kernels and copies that the device runs; on a CPU, operations."""
    on_gpu = device.type == "cuda"
    kind = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as profiler:
        act()
        if on_gpu:
            torch.cuda.synchronize()
    asked = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    return sum(event.device_type == asked for event in profiler.events() or ())


# --- Where does the time of pruning go? -------------------------------------------------------------------------------


def time_parts(device: torch.device, dtype: torch.dtype, channels: int, side: int, repeats: int) -> dict[str, Any]:
    """Microseconds and launches of each part of both methods in one block (supplement Fig. 4)."""
    tokens, heads = side * side, channels // 64
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, tokens, channels, generator=generator).to(device, dtype)
    q, k = (torch.randn(2, heads, tokens, 64, generator=generator).to(device, dtype) for _ in range(2))
    count = max(1, round(0.37 * tokens))
    cover = lattice((side, side), device=device)
    rows = keep_most_important(cover.unsqueeze(0), min(256, tokens))[0]
    whole, sampled = scores_of_map(q, k, 0.125), scores_of_rows(q, k, 0.125, rows)
    assert whole.importance is not None
    keep = keep_most_important(whole.importance, count)
    source = match_by_features(x, keep).source
    sizes = group_sizes(source, count)
    kept = mean_by_source(x, source, sizes)
    parts: dict[str, Callable[[], object]] = {
        "AT-EDM: whole map and ranking": lambda: scores_of_map(q, k, 0.125),
        "AT-EDM: sampled map and ranking": lambda: scores_of_rows(q, k, 0.125, rows),
        "AT-EDM: choose": lambda: keep_most_important(whole.importance, count),  # type: ignore[arg-type]
        "AT-EDM: whom to copy, whole map": lambda: whole.source(keep),
        "AT-EDM: whom to copy, sampled": lambda: sampled.source(keep),
        "matched: represent": lambda: representative(x, cover, count, 0.4),
        "matched: match": lambda: match_by_features(x, keep),
        "matched: mean": lambda: mean_by_source(x, source, sizes),
        "matched: update": lambda: update_of_match(kept, kept, source),
    }
    found = {}
    for name, act in parts.items():
        act()
        times = [_milliseconds(act, device) for _ in range(repeats)]
        found[name] = {"microseconds": 1e3 * statistics.median(times), "launches": _launches(act, device)}
        print(f"{channels} channels, {tokens} tokens: {name}: {found[name]}", flush=True)
    return found


def time_flux(device: torch.device, small: bool) -> dict[str, Any]:
    """Time late steps of FLUX.1 at its real size, 24 GB of random weights; narrow and short in a rehearsal."""
    arch = architecture("flux")
    if small:
        narrow = {"num_attention_heads": 2, "attention_head_dim": 16, "axes_dims_rope": [4, 4, 8], "num_layers": 3}
        arch = replace(arch, config=arch.config | narrow | {"num_single_layers": 3}, default_size=(128, 128))
    dtype = torch.float32 if small else torch.bfloat16
    timed: dict[str, Candidate] = {
        "dense": Dense(),
        "matched, 40 % kept": Pruning(TRANSFORMER_METHODS["matched"]),
        "matched, 37 % kept": Pruning(replace(TRANSFORMER_METHODS["matched"], rate=0.63)),  # type: ignore[type-var]
        "AT-EDM, 37 % kept": Pruning(AtEdm(spare=None)),
    }
    return time_steps(arch, random_unet(arch, dtype, device), arch.default_size, 1, dtype, 2 if small else 7, timed)


# --- All of it --------------------------------------------------------------------------------------------------------


def main() -> None:
    """Run the parts in the order of what matters most, and stop when the time is up."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for cuda.json")
    parser.add_argument("--small", action="store_true", help="a rehearsal on a CPU, in a minute")
    parser.add_argument("--seconds", type=float, default=360, help="no further part is begun after so many")
    asked = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() and not asked.small else "cpu")
    began = time.monotonic()
    asked.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
    }

    def keep(name: str, found: Any) -> None:
        report[name] = found
        report["seconds"] = round(time.monotonic() - began, 1)
        (asked.out / "cuda.json").write_text(json.dumps(report, indent=2) + "\n")

    keep("correctness", check(device, asked.small))
    model = "tiny" if asked.small else "sdxl"
    arch = architecture(model)
    keep(
        "parts",
        {
            f"{channels} x {side * side}": time_parts(device, torch.float16, channels, side, 3 if asked.small else 20)
            for channels, side in (((64, 16),) if asked.small else ((640, 64), (1280, 32)))
        }
        if device.type == "cuda"
        else {"64 x 256": time_parts(device, torch.float32, 64, 16, 3)},
    )
    configs = (
        [(torch.float32, 128, 1)]
        if asked.small
        else [
            (torch.float16, 1024, 1),
            (torch.bfloat16, 1024, 1),
            (torch.float16, 2048, 1),
            (torch.float16, 1024, 4),
            (torch.float16, 512, 1),
            (torch.float16, 512, 4),
            (torch.bfloat16, 2048, 4),
        ]
    )
    steps: dict[str, Any] = {}
    for dtype, side, batch in configs:
        if time.monotonic() - began > asked.seconds:
            break
        unet = random_unet(arch, dtype, device)
        size = (side, side)
        timed = candidates(model, size)
        name = f"{str(dtype).removeprefix('torch.')}, {side} px, batch {batch} with guidance"
        steps[name] = time_steps(arch, unet, size, batch, dtype, 2 if asked.small else 7, timed)
        keep("steps", steps)
        print(name, json.dumps(steps[name]), flush=True)
        if (dtype, side, batch) == configs[0]:  # the size and dtype that the goals are set for
            few = {way: timed[way] for way in COMPILED}
            steps[f"{name}, compiled"] = time_steps(arch, unet, size, batch, dtype, 7, few, compiled=True)
            keep("steps", steps)
        del unet
    if time.monotonic() - began < asked.seconds:
        name = "FLUX.1, narrow, float32, 128 px, batch 1" if asked.small else "FLUX.1, bfloat16, 1024 px, batch 1"
        steps[name] = time_flux(device, asked.small)
        keep("steps", steps)
    for name, rows in steps.items():
        print(f"\n{name}, {report['device']}\n| method | eager | graph | peak, MiB | launches |\n|---|---|---|---|---|")
        for method, row in rows.items():
            cells = [
                row.get("eager, dense = 1"),
                row.get("graph, dense = 1"),
                row.get("peak, MiB"),
                row.get("launches"),
            ]
            shown = [
                "" if cell is None else f"{cell:.3f}" if isinstance(cell, float) and cell < 10 else f"{cell:.0f}"
                for cell in cells
            ]
            print(f"| {method} | {' | '.join(shown)} | {row.get('failed', '')}")
    print(f"\n{report['seconds']} s in all")


if __name__ == "__main__":
    main()
