"""`atedm lab objects`: whether rankings find the objects, and whether kept tokens represent the dropped."""

from __future__ import annotations

from atedm.cli import lab_options as shared
from atedm.cli.options import DeviceOption

MODEL = "tiny"


def objects(
    device: DeviceOption = None,
    dtype: shared.DtypeOption = None,
    captions: shared.CaptionsOption = 50,
    steps: shared.StepsOption = 20,
    guidance: shared.GuidanceOption = None,
    rate: shared.RateOption = 0.63,
    seed: shared.SeedOption = 0,
    batch: shared.BatchOption = 10,
    json: shared.JsonOption = False,
    plot: shared.PlotOption = None,
) -> None:
    """Compare every ranking with the objects in the images that the shipped model draws, dense.

    AUC is the chance that a token of an object ranks above one of the background: 0.5 is chance. A match is the cosine
    between a dropped token and a kept one: the one most like it, and the one that the paper's rule copies from.
    """
    from atedm.files import check_writable
    from atedm.lab.probes.objects import find_objects
    from atedm.lab.tables import markdown_table
    from atedm.tiny.scenes import held_out_scenes

    check_writable(plot)
    drawing = shared.drawing_of(MODEL, steps, guidance, seed, batch)
    pipe = shared.open_pipeline(MODEL, device, dtype)
    with shared.progress_bar() as tell:
        report = find_objects(pipe, held_out_scenes(captions, seed), drawing, rate=rate, progress=tell)
    names = {"auc": "AUC", "best_match": "best match", "attention_match": "attention's match"}
    columns = [(what, level) for what in names for level in report.levels]
    rows = [
        [ranking, *(f"{report.mean(what, ranking=ranking, level=level):.3f}" for what, level in columns)]
        for ranking in report.rankings
    ]
    head = ["ranking", *(f"{names[what]}, level {level}" for what, level in columns)]
    title = f"{captions} scenes, {steps} steps"
    shared.show(report.as_dict(), markdown_table(head, rows), json, plot, "objects", report, title)
