"""`atedm agreement`: whether ways around the whole attention map keep and copy what the map would."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from atedm.cli.evaluation_options import BatchOption, DtypeOption, GuidanceOption, SeedOption, StepsOption, opened_alone
from atedm.cli.options import DeviceOption, JsonOption
from atedm.cli.progress import rounds_shown

if TYPE_CHECKING:
    from atedm.evaluation.agreement import AgreementReport


def agreement(
    modes: Annotated[
        str,
        typer.Argument(
            help="Of **blocked**, **flash**, **triton** and **sampled**, with the number of rows: sampled/64."
        ),
    ] = "blocked,flash,sampled/64,sampled/32,sampled/16",
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    captions: Annotated[int, typer.Option(help="How many held-out scenes to draw.", rich_help_panel="Images")] = 20,
    steps: StepsOption = 20,
    guidance: GuidanceOption = None,
    pruning_rate: Annotated[
        float, typer.Option(help="Share of the tokens that is dropped.", rich_help_panel="Images")
    ] = 0.63,
    seed: SeedOption = 0,
    batch: BatchOption = 10,
    json: JsonOption = False,
) -> None:
    """Hold modes of the attention map against the whole map, on what the shipped model compares in dense runs.

    *Kept* is the share of the whole map's kept tokens that the mode keeps too; *importance* what those it keeps carry,
    of the most that could be; *source* the share of dropped tokens that copy the same kept token.
    """
    from json import dumps

    from rich.console import Console

    from atedm.config import PruningConfig
    from atedm.evaluation.agreement import map_agreement
    from atedm.pipelines import habits
    from atedm.tiny.scenes import held_out_scenes

    if captions < 1:
        raise ValueError(f"captions must be at least 1, not {captions}")
    if not 0 < pruning_rate < 1:
        raise ValueError(
            f"pruning_rate must be above 0, for there to be dropped tokens, and below 1, not {pruning_rate}"
        )
    configs = {}
    for name in modes.split(","):
        mode, _, rows = name.strip().partition("/")
        if rows and not rows.isdecimal():
            raise ValueError(f"a number of rows follows the slash, as in sampled/64, not {rows!r}")
        if rows and mode != "sampled":
            raise ValueError(f"only a sample has a number of rows, as in sampled/64, not {name.strip()!r}")
        config = PruningConfig(map_mode=mode)
        configs[name.strip()] = config.replace(sampled_rows=int(rows)) if rows else config
    console = Console(stderr=True)
    pipe = opened_alone("tiny", device, dtype, console)
    with rounds_shown(console, -(-captions // batch)) as on_call:
        report = map_agreement(
            pipe,
            [scene.caption for scene in held_out_scenes(captions, seed)],
            configs,
            steps=steps,
            guidance=habits("tiny").guidance if guidance is None else guidance,
            pruning_rate=pruning_rate,
            seed=seed,
            batch=batch,
            progress=on_call,
        )
    if json:
        typer.echo(dumps(report.as_dict(), indent=2))
        return
    for line in _table(report):
        typer.echo(line)


def _table(report: AgreementReport) -> list[str]:
    lines = ["| map | level | kept | importance | source |", "|---|---|---|---|---|"]
    for row in report.rows:
        lines.append(f"| {row.mode} | {row.level} | {row.kept:.3f} | {row.importance:.3f} | {row.source:.3f} |")
    return lines
