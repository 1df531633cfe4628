"""`atedm lab latency`, `memory` and `scaling`: what pruning takes and saves, without real weights."""

import re
from enum import Enum
from typing import Annotated

import typer

from atedm.cli import options, running

Attention = Enum("Attention", {"fused": "fused", "plain": "plain"})


def latency(
    model: options.TimedModel = "tiny",
    device: options.Device = None,
    dtype: options.Dtype = None,
    method: options.MethodText = "paper",
    size: options.Size = None,
    batch: options.Batch = 1,
    guidance: options.IsGuided = None,
    repeats: options.Repeats = 5,
    json: options.Json = False,
    plot: options.Plot = None,
) -> None:
    """Print what the parts of AT-EDM take in a run, in milliseconds and as a share of the dense run (Fig. S4).

    Each way to the attention map is timed: the whole map one head at a time, or all heads at once; and the modes that
    do without, in which "get map" is all of the ranking. Weights are random.
    """
    from atedm.files import check_writable
    from atedm.lab.probes.latency import latency as measure
    from atedm.suits import suits

    check_writable(plot)
    setup = running.setup_of(model, size, dtype, device=device, batch=batch, guidance=guidance, repeats=repeats)
    with running.progress_bar() as tell:
        report = measure(setup, running.method_of(method, model), suits(model).steps, tell)
    text = report.text(method if model == "sdxl" else "")
    running.show(report.as_dict(), text, json, plot, "times.latency_chart", report)


def memory(
    method: Annotated[
        str, typer.Argument(help="**matched**, **paper**, **dagger**, **turbo** or **tome**, with changes in brackets.")
    ] = "paper",
    model: options.TimedModel = "sdxl",
    dtype: Annotated[options.Precision, options.MODEL(None)] = options.Precision.float16,
    attention: Annotated[Attention, options.MODEL("**plain** holds whole attention maps.")] = Attention.fused,
    size: options.Size = None,
    batch: options.Batch = 1,
    guidance: options.IsGuided = None,
    json: options.Json = False,
) -> None:
    """Print what activations take in a step, traced without computing (supplement D).

    Every tensor counts from the operation that makes it to its last reference. Time is that of a roofline of an A100.
    """
    import torch

    from atedm.app.models import quiet_libraries
    from atedm.lab.methods.by_name import method_by_name
    from atedm.lab.probes.memory import memory as trace

    quiet_libraries()
    candidate, sides, precision = method_by_name(method, model), options.pixels(size), getattr(torch, dtype.value)
    report = trace(
        model, candidate, size=sides, batch=batch, guidance=guidance, dtype=precision, attention=attention.value
    )
    running.show(report.as_dict(), report.text(), json)


def scaling(
    models: Annotated[
        str, options.PLAIN("Names, folders or hub ids, split by commas; see `atedm cost --help`.")
    ] = "sdxl,sd21,sd15",
    sizes: Annotated[
        str, options.PLAIN("Sides of square images in pixels, split by commas.")
    ] = "512,768,1024,1280,1536,1792,2048",
    method: options.MethodText = "paper",
    json: options.Json = False,
    plot: options.Plot = None,
) -> None:
    """Show how the cost of a step grows with the image, in T MACs as torch counts them (supplement Fig. 2).

    The last column is attention where it is pruned; "nothing" where the method has nothing to prune.
    """
    from atedm.app.models import quiet_libraries
    from atedm.files import check_writable
    from atedm.lab.probes.scaling import scaling as scale
    from atedm.lab.tables import markdown_table

    check_writable(plot)
    quiet_libraries()
    if not re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", sizes):
        raise ValueError(f"sizes must be whole numbers of pixels split by commas, such as 512,1024, not {sizes!r}")
    names = [name.strip() for name in models.split(",") if name.strip()]
    if not names:
        raise ValueError("models must name at least one model")
    with running.progress_bar() as tell:
        sides = [int(side) for side in sizes.split(",")]
        points = scale(names, sides, running.method_of(method, names[0]), progress=tell)
    rows = []
    for p in points:
        pruned = "nothing" if p.attention_pruned is None else f"{p.attention_pruned:.4g}"
        parts = (f"{value:.4g}" for value in (p.resnet, p.other))
        rows.append([p.model, p.side, f"{p.attention:.4g}", f"{p.attention_share:.0%}", *parts, pruned])
    head = ["T MACs of a step", "px", "attention", "share", "ResNet", "other", "attention pruned"]
    content = [p.as_dict() for p in points]
    running.show(content, markdown_table(head, rows), json, plot, "cost.scaling_chart", points)
