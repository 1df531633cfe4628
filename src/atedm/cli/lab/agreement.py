"""`atedm lab agreement`: whether ways around the whole attention map keep and copy what the map would."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from atedm.cli import lab_options as shared
from atedm.cli.options import DeviceOption

if TYPE_CHECKING:
    from atedm.lab.ablation import Variant

MODEL = "tiny"


def agreement(
    modes: Annotated[
        str,
        typer.Argument(
            help="Of **blocked**, **flash**, **triton** and **sampled**, with the number of rows: sampled/64."
        ),
    ] = "blocked,flash,sampled/64,sampled/32,sampled/16",
    device: DeviceOption = None,
    dtype: shared.DtypeOption = None,
    captions: shared.CaptionsOption = 20,
    steps: shared.StepsOption = 20,
    guidance: shared.GuidanceOption = None,
    rate: shared.RateOption = 0.63,
    seed: shared.SeedOption = 0,
    batch: shared.BatchOption = 10,
    json: shared.JsonOption = False,
) -> None:
    """Compare modes of the attention map with the whole map, on what the shipped model compares in dense runs.

    *Kept* is the share of the whole map's kept tokens that the mode keeps too; *importance* what those it keeps carry,
    of the most that could be; *source* the share of dropped tokens that copy the same kept token.
    """
    from dataclasses import asdict, astuple

    from atedm.lab.probes.agreement import map_agreement
    from atedm.lab.tables import markdown_table
    from atedm.tiny.scenes import held_out_scenes

    variants = {name: variant_of_mode(name) for name in modes.replace(" ", "").split(",")}
    texts = [scene.caption for scene in held_out_scenes(captions, seed)]
    pipe = shared.open_pipeline(MODEL, device, dtype)
    with shared.progress_bar() as tell:
        drawing = shared.drawing_of(MODEL, steps, guidance, seed, batch)
        found = map_agreement(pipe, texts, variants, drawing, rate=rate, progress=tell)
    rows = [[mode, level, *(f"{share:.3f}" for share in shares)] for mode, level, *shares in map(astuple, found)]
    head = ["map", "level", "kept", "importance", "source"]
    shared.show([asdict(row) for row in found], markdown_table(head, rows), json)


def variant_of_mode(name: str) -> Variant:
    """Read a map mode, with the number of rows of a sample, such as "sampled/64"."""
    from atedm.lab.ablation import Variant

    mode, _, rows = name.partition("/")
    if rows and not rows.isdecimal():
        raise ValueError(f"a number of rows follows the slash, as in sampled/64, not {rows!r}")
    if rows and mode != "sampled":
        raise ValueError(f"only a sample has a number of rows, as in sampled/64, not {name!r}")
    return Variant(map_mode=mode, sampled_rows=int(rows)) if rows else Variant(map_mode=mode)
