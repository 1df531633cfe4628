"""`atedm lab scaling`: how the cost of attention and ResNet blocks grows with the size of the image."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from atedm.cli import lab_options as shared


def scaling(
    models: Annotated[
        str, typer.Option(help="Names, folders or hub ids, split by commas; see `atedm cost --help`.")
    ] = "sdxl,sd21,sd15",
    sizes: Annotated[str, typer.Option(help="Sides of square images in pixels, split by commas.")] = (
        "512,768,1024,1280,1536,1792,2048"
    ),
    method: shared.MethodOption = "paper",
    json: shared.JsonOption = False,
    plot: shared.PlotOption = None,
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
    with shared.progress_bar() as tell:
        sides = [int(side) for side in sizes.split(",")]
        points = scale(names, sides, shared.method_of(method, names[0]), progress=tell)
    rows = []
    for p in points:
        pruned = "nothing" if p.attention_pruned is None else f"{p.attention_pruned:.4g}"
        parts = (f"{value:.4g}" for value in (p.resnet, p.other))
        rows.append([p.model, p.side, f"{p.attention:.4g}", f"{p.attention_share:.0%}", *parts, pruned])
    head = ["T MACs of a step", "px", "attention", "share", "ResNet", "other", "attention pruned"]
    shared.show([p.as_dict() for p in points], markdown_table(head, rows), json, plot, "scaling", points)
