"""`atedm lab objects`: whether rankings find the objects, and whether kept tokens represent the dropped."""

from __future__ import annotations

from typing import TYPE_CHECKING

from atedm.cli.lab.options import (
    BatchOption,
    CaptionsOption,
    DtypeOption,
    GuidanceOption,
    JsonOption,
    PlotOption,
    RateOption,
    SeedOption,
    StepsOption,
    checked_rate,
    open_pipeline,
    progress_bar,
    show,
)
from atedm.cli.options import DeviceOption

if TYPE_CHECKING:
    from PIL.Image import Image


def objects(
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    captions: CaptionsOption = 50,
    steps: StepsOption = 20,
    guidance: GuidanceOption = None,
    rate: RateOption = 0.63,
    seed: SeedOption = 0,
    batch: BatchOption = 10,
    json: JsonOption = False,
    plot: PlotOption = None,
) -> None:
    """Compare every ranking with the objects in the images that the shipped model draws, dense.

    AUC is the chance that a token of an object ranks above one of the background: 0.5 is chance. A match is the cosine
    between a dropped token and a kept one: the one most like it, and the one that the paper's rule copies from.
    """
    from atedm.files import check_writable
    from atedm.lab.evaluation.images import Drawing
    from atedm.lab.probes.objects import find_objects
    from atedm.lab.tables import markdown_table
    from atedm.suits import TINY, suits
    from atedm.tiny.scenes import held_out_scenes

    check_writable(plot)
    checked_rate(rate)
    drawing = Drawing(TINY, steps, suits(TINY).guidance if guidance is None else guidance, seed, batch)
    pipe = open_pipeline(TINY, device, dtype)
    with progress_bar() as tell:
        report = find_objects(pipe, held_out_scenes(captions, seed), drawing, rate=rate, progress=tell)

    def draw() -> Image:
        from atedm.lab.charts.objects import objects_chart

        return objects_chart(report, f"{captions} scenes, {steps} steps")

    names = {"auc": "AUC", "best_match": "best match", "attention_match": "attention's match"}
    columns = [(what, level) for what in names for level in report.levels]
    rows = [
        [ranking, *(f"{report.mean(what, ranking=ranking, level=level):.3f}" for what, level in columns)]
        for ranking in report.rankings
    ]
    head = ["ranking", *(f"{names[what]}, level {level}" for what, level in columns)]
    show(report.as_dict(), markdown_table(head, rows), json, plot, draw)
