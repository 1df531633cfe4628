"""`atedm lab variance`, `errors`, `objects` and `agreement`: what is seen in dense runs."""

from dataclasses import asdict, astuple
from typing import Annotated

import typer

from atedm.cli import options, running

METHODS = {
    "AT-EDM": "paper",
    "AT-EDM, kept at random": "paper[rank=uniform-random]",
    "matched by a lattice": "matched[own_update_share=0,rank=lattice]",
    "matched by a lattice that stays": "matched[own_update_share=0,rank=lattice,refresh_every=1000]",
    "matched, no own update": "matched[own_update_share=0]",
    "matched": "matched",
}
"""The paper's, a control, and ours: with a kept set that moves and one that stays, and as it is."""
a_threshold = options.checked("above 0 and below 1", lambda threshold: 0 < threshold < 1)


def variance(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(help="One image each. Without any, a good set for the model.", show_default=False),
    ] = None,
    model: options.Model = "tiny",
    device: options.Device = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    size: options.Size = None,
    seed: options.Seed = 0,
    threshold: Annotated[
        float, options.PLAIN("Variance to look for; the paper's by default.", callback=a_threshold)
    ] = 1e-5,
    json: options.Json = False,
    plot: options.Plot = None,
) -> None:
    """Print the variance of the attention maps in each denoising step, dense: the reason to prune less early.

    The paper finds it above 1e-5 after the first 15 of 50 steps (Fig. 5). The entries of a map average 1 / tokens, so
    a threshold says something about one number of tokens; the relative variance, times tokens squared, compares.
    """
    from atedm.files import check_writable
    from atedm.lab.probes.variance import attention_variance
    from atedm.suits import suits

    check_writable(plot)
    drawing = running.drawing_of(model, steps, guidance, seed, 1, size)
    pipe = running.open_pipeline(model, device)
    with running.progress_bar() as tell:
        report = attention_variance(pipe, list(prompts or suits(model).prompts), drawing, progress=tell)
    content = {"model": model, **report.as_dict(threshold)}
    drawn = (report, threshold, f"{model}, {report.images} images, dense")
    running.show(content, report.table(threshold), json, plot, "over_steps.variance_chart", *drawn)


def errors(
    methods: Annotated[
        str | None,
        typer.Argument(help="Ways to prune, as in `atedm evaluate`; by default of both kinds.", show_default=False),
    ] = None,
    model: options.Model = "tiny",
    device: options.Device = None,
    dtype: options.Dtype = None,
    prompts: options.Prompts = "scenes",
    captions: options.Captions = 50,
    steps: options.StepsOfProbe = 20,
    guidance: options.Guidance = None,
    seed: options.Seed = 0,
    batch: options.Batch = 10,
    json: options.Json = False,
    plot: options.Plot = None,
) -> None:
    """Prune beside dense runs, and see where it errs and whether the errors of a run cancel or add up.

    A block's error is that of what it adds to the same features; a step's that of the guided prediction; and the image
    is moved by the sum of all steps' errors, each times its step in sigma.
    """
    from atedm.files import check_writable
    from atedm.lab.evaluation.prompts import read_prompts
    from atedm.lab.methods.by_name import parse_methods
    from atedm.lab.probes.errors import find_errors
    from atedm.tiny import objects_of

    check_writable(plot)
    asked = METHODS if methods is None else {spec: spec for spec in parse_methods(methods)}
    chosen = {name: running.method_of(spec, model, steps) for name, spec in asked.items()}
    texts = [prompt.text for prompt in read_prompts(prompts, None, seed, at_most=captions, objects=objects_of(model))]
    drawing = running.drawing_of(model, steps, guidance, seed, batch)
    pipe = running.open_pipeline(model, device, dtype)
    with running.progress_bar() as tell:
        report = find_errors(pipe, texts, chosen, drawing, progress=tell)
    title = f"{len(texts)} images, {steps} steps"
    running.show(asdict(report), report.table(), json, plot, "over_steps.errors_chart", report, title)


def objects(
    device: options.Device = None,
    dtype: options.Dtype = None,
    captions: options.Captions = 50,
    steps: options.StepsOfProbe = 20,
    guidance: options.Guidance = None,
    rate: options.RateOfProbe = 0.63,
    seed: options.Seed = 0,
    batch: options.Batch = 10,
    json: options.Json = False,
    plot: options.Plot = None,
) -> None:
    """Compare every ranking with the objects in the images that the shipped model draws, dense.

    AUC is the chance that a token of an object ranks above one of the background: 0.5 is chance. A match is the cosine
    between a dropped token and a kept one: the one most like it, and the one that the paper's rule copies from.
    """
    from atedm.files import check_writable
    from atedm.lab.probes.objects import find_objects
    from atedm.tiny.scenes import held_out_scenes

    check_writable(plot)
    drawing = running.drawing_of("tiny", steps, guidance, seed, batch)
    pipe = running.open_pipeline("tiny", device, dtype)
    with running.progress_bar() as tell:
        report = find_objects(pipe, held_out_scenes(captions, seed), drawing, rate=rate, progress=tell)
    title = f"{captions} scenes, {steps} steps"
    running.show(asdict(report), report.table(), json, plot, "over_steps.objects_chart", report, title)


def agreement(
    modes: Annotated[
        str, typer.Argument(help="Of **blocked**, **flash**, **triton** and **sampled**, with its rows: sampled/64.")
    ] = "blocked,flash,sampled/64,sampled/32,sampled/16",
    device: options.Device = None,
    dtype: options.Dtype = None,
    captions: options.Captions = 20,
    steps: options.StepsOfProbe = 20,
    guidance: options.Guidance = None,
    rate: options.RateOfProbe = 0.63,
    seed: options.Seed = 0,
    batch: options.Batch = 10,
    json: options.Json = False,
) -> None:
    """Compare modes of the attention map with the whole map, on what the shipped model compares in dense runs.

    *Kept* is the share of the whole map's kept tokens that the mode keeps too; *importance* what those it keeps carry,
    of the most that could be; *source* the share of dropped tokens that copy the same kept token.
    """
    from atedm.lab.probes.agreement import map_agreement, variant_of_mode
    from atedm.lab.tables import markdown_table
    from atedm.tiny.scenes import held_out_scenes

    variants = {name: variant_of_mode(name) for name in modes.replace(" ", "").split(",")}
    texts = [scene.caption for scene in held_out_scenes(captions, seed)]
    drawing = running.drawing_of("tiny", steps, guidance, seed, batch)
    pipe = running.open_pipeline("tiny", device, dtype)
    with running.progress_bar() as tell:
        found = map_agreement(pipe, texts, variants, drawing, rate=rate, progress=tell)
    rows = [[mode, level, *(f"{share:.3f}" for share in shares)] for mode, level, *shares in map(astuple, found)]
    head = ["map", "level", "kept", "importance", "source"]
    running.show([asdict(row) for row in found], markdown_table(head, rows), json)
