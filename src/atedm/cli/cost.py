"""`atedm cost`: what a model costs and what pruning saves, without its weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from atedm.cli import options, running

if TYPE_CHECKING:
    from atedm.costs.report import CostReport
    from atedm.costs.tome import ToMe
    from atedm.method.contract import Method


def cost(
    model: Annotated[
        str,
        options.MODEL(
            "**sdxl**, **sdxl-turbo**, **sd15**, **sd21**, **flux**, **sd35-large**, **sd35-medium**, **qwen-image**, "
            "**z-image**, **pixart-sigma** or **tiny**, which need no download; a diffusers folder or a hub id, of "
            "which only the config is read."
        ),
    ] = "sdxl",
    method: options.Method = None,
    rate: options.Rate = None,
    budget: options.Budget = None,
    size: options.Size = None,
    batch: options.Batch = 1,
    guidance: options.IsGuided = None,
    steps: options.Steps = None,
    tome_ratio: Annotated[
        float, options.OUTPUT("Share of the tokens that ToMe merges, which is shown beside; up to 0.75.")
    ] = 0.5,
    json: options.Json = False,
    plot: options.Plot = None,
) -> None:
    """Print what a model costs at a size and what pruning saves, without its weights.

    Figures are multiply-accumulates (MACs), counted in two ways. **exact** is everything that torch counts, with what
    pruning adds. **paper** is Linear, convolution and self-attention, as in the paper's tables, without what pruning
    adds. Cost is the share of the dense MACs over a run.

    Examples:
    `atedm cost` is SDXL at 1024 px with our own method.

    `atedm cost --method paper --size 2048x2048`

    `atedm cost --model flux --steps 4`

    `atedm cost --budget 0.7` solves for the rate at which a run costs 70 % of the dense one.
    """
    from atedm.app.equal_cost import method_at
    from atedm.app.models import quiet_libraries
    from atedm.costs.architectures import architecture
    from atedm.costs.budget import fit_to_budget
    from atedm.costs.macs import CONVENTIONS
    from atedm.costs.report import cost as cost_of
    from atedm.costs.tome import LEVELS, MERGES, ToMe
    from atedm.files import check_writable
    from atedm.suits import suits

    check_writable(plot)
    options.refuse_rate_and_budget(rate, budget)
    quiet_libraries()
    steps = suits(model).steps if steps is None else steps
    is_transformer = architecture(model).is_transformer
    chosen = method_at(suits(model).method if method is None else method.value, rate, transformer=is_transformer)
    tomes = [] if is_transformer else [ToMe(tome_ratio, merge, levels) for levels in LEVELS for merge in MERGES]
    run: dict[str, Any] = {"size": options.pixels(size), "guidance": guidance, "steps": steps}
    with running.status(f"counting {model}"):
        if budget is not None:
            chosen = fit_to_budget(model, chosen, share=budget, **run)
        report = cost_of(model, chosen, batch=batch, **run)
    beside = [vars(tome) | {name: report.with_tome(tome, name).as_dict() for name in CONVENTIONS} for tome in tomes]
    content = report.as_dict() | {"tome": beside}
    running.show(content, tables(report, tomes), json, plot, "cost.stage_chart", report)


def tables(report: CostReport, tomes: Sequence[ToMe]) -> str:
    """Show what steps, blocks and the run cost, with settings of ToMe beside."""
    from atedm.costs.macs import CONVENTIONS
    from atedm.lab.tables import markdown_table

    method: Method = report.method  # type: ignore[assignment]
    run, (width, height) = report.figures(), report.size
    unit, scale = ("T", 1e12) if run.dense >= 1e11 else ("G", 1e9)
    named = {f"{method.name}, {convention}": report.figures(convention) for convention in CONVENTIONS}
    for tome in tomes:
        parts = "all parts" if tome.merge == "everything" else "self-attention"
        levels = "all levels" if tome.levels == "all" else "highest level"
        named[f"ToMe {tome.ratio:.0%}, {parts}, {levels}"] = report.with_tome(tome)
    steps = [[name, *(f"{macs / scale:.3f}" for macs in f), f"{f.mean / f.dense:.1%}"] for name, f in named.items()]
    blocks = []
    for span in report.spans:
        place, kept = span.shape.place, f"{span.kept}{', early all' if span.spared else ''}"
        shares = (f"{100 * step.exact / run.dense:.1f}" for step in (span.dense, span.normal_step))
        blocks.append([place.name, place.layers, span.shape.tokens, kept, *shares])
    what = "blocks" if report.spans[0].shape.place.is_stretch else "attention block"
    return (
        f"{report.model}, {width} x {height} px, batch {report.batch} {'with' if report.guidance else 'without'} "
        f"guidance; {report.steps} steps, {report.early_steps} of them early; {method.name}, rate {method.rate:.4g}\n\n"
        f"{markdown_table([f'{unit} MACs of a step', 'dense', 'normal', 'early', 'mean', 'cost'], steps)}\n\n"
        f"{markdown_table([what, 'layers', 'tokens', 'kept', 'dense, %', 'normal, %'], blocks)}\n\n"
        f"The method adds {report.overhead() / scale:.3f} {unit} MACs to a normal step.\n"
        f"A run of {report.steps} steps: {report.steps * run.dense / scale:.1f} {unit} MACs dense, "
        f"{report.steps * run.mean / scale:.1f} pruned, a cost of {run.mean / run.dense:.1%} (exact)."
    )
