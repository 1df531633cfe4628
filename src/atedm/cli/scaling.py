"""`atedm scaling`: how the cost of attention and ResNet blocks grows with the size of the image."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated

import typer

from atedm.cli.options import RateOption


def scaling(
    models: Annotated[
        str, typer.Option(help="Names, folders or hub ids, split by commas; see `atedm cost --help`.")
    ] = "sdxl,sd21,sd15",
    sizes: Annotated[str, typer.Option(help="Sides of square images in pixels, split by commas.")] = (
        "512,768,1024,1280,1536,1792,2048"
    ),
    preset: Annotated[str, typer.Option(help="What pruning is shown beside.", rich_help_panel="Pruning")] = "paper",
    pruning_rate: RateOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.", rich_help_panel="Output")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw it to this PNG.", rich_help_panel="Output")] = None,
) -> None:
    """Show how the cost of a step grows with the image, in T MACs as torch counts them.

    The last column is attention where it is pruned; "nothing" where the paper's place has nothing to prune.

    Examples:
    `atedm scaling --plot scaling.png`

    `atedm scaling --models sdxl --sizes 1024,2048 --preset dagger`
    """
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from atedm.cli.options import pruning_config
    from atedm.costs.scaling import scaling as scale
    from atedm.files import check_writable, save_image
    from atedm.pictures.cost_chart import scaling_chart
    from atedm.pipelines import quiet_libraries

    check_writable(plot)
    quiet_libraries()
    if not re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", sizes):
        raise ValueError(f"sizes must be whole numbers of pixels split by commas, such as 512,1024, not {sizes!r}")
    names = [name.strip() for name in models.split(",") if name.strip()]
    if not names:
        raise ValueError("models must name at least one model")
    with Console(stderr=True).status("counting") as status:
        points = scale(
            names,
            [int(side) for side in sizes.split(",")],
            pruning_config(preset, pruning_rate),
            progress=lambda name, side: status.update(f"counting {escape(name)} at {side} px"),
        )
    if plot is not None:
        save_image(scaling_chart(points), plot)
    if as_json:
        typer.echo(json.dumps([point.as_dict() for point in points], indent=2))
        return
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("T MACs of a step", overflow="fold")
    for name in ("px", "attention", "share", "ResNet", "other", "pruned"):
        table.add_column(name, justify="right", no_wrap=True)
    for point in points:
        pruned = "nothing" if point.attention_pruned is None else f"{point.attention_pruned:.4g}"
        table.add_row(
            escape(point.model),
            str(point.side),
            f"{point.attention:.4g}",
            f"{point.attention_share:.0%}",
            f"{point.resnet:.4g}",
            f"{point.other:.4g}",
            pruned,
        )
    Console().print(table)
    if plot is not None:
        typer.echo(str(plot))
