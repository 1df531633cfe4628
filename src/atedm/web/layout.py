"""What is on the page, and where."""

from __future__ import annotations

from dataclasses import dataclass

import gradio as gr

from atedm.web.messages import hint
from atedm.web.service import MAX_GUIDANCE, MAX_PROMPT, MAX_SEED, MAX_STEPS, Service

KEPT, IMPORTANCE = OVERLAYS = ("tokens kept", "importance")


@dataclass(frozen=True)
class Controls:
    """What a visitor sets."""

    prompt: gr.Textbox
    cost: gr.Slider
    method: gr.Radio
    draw: gr.Button
    cancel: gr.Button
    status: gr.HTML
    model: gr.Dropdown
    steps: gr.Slider
    guidance: gr.Slider
    seed: gr.Number
    another_seed: gr.Button


@dataclass(frozen=True)
class Results:
    """What a visitor is shown."""

    compared: gr.ImageSlider
    wipe: gr.Slider
    figures: gr.Markdown
    block: gr.Dropdown
    step: gr.Slider
    overlay_of: gr.Radio
    overlay: gr.Image
    gallery: gr.Gallery
    run_file: gr.DownloadButton


def cost_slider(service: Service, model: str, method: str, steps: int) -> gr.Slider:
    """Return the slider of what runs with a method can cost, set to the method as it is."""
    offered = service.cost_range(model, method, steps)
    label = "Cost, % of the dense arithmetic"
    return gr.Slider(offered.lowest, offered.highest, offered.usual, step=1, label=label, elem_id="cost")


def build_controls(service: Service, model: str) -> Controls:
    """Lay out what a visitor sets, for the model that is chosen at first."""
    suiting, methods = service.suits(model), service.methods(model)
    method = next(iter(methods.values()))
    prompt = gr.Textbox(
        suiting.prompts[0],
        label="Prompt",
        lines=1,
        max_lines=4,
        max_length=MAX_PROMPT,
        elem_id="prompt",
        autofocus=True,
    )
    cost = cost_slider(service, model, method, suiting.steps)
    how = gr.Radio([*methods.items()], value=method, label="Pruned by", elem_id="method")
    with gr.Row():
        draw = gr.Button("Draw", variant="primary", elem_id="draw", min_width=120)
        cancel = gr.Button("Cancel", variant="stop", elem_id="cancel", min_width=120, interactive=False)
    status = gr.HTML(hint(model), elem_id="status")
    with gr.Accordion("Model, steps, guidance, seed", open=False, elem_id="more"):
        which = gr.Dropdown([*service.models], value=model, label="Model", elem_id="model")
        steps = gr.Slider(1, MAX_STEPS, suiting.steps, step=1, label="Steps", elem_id="steps")
        guidance = gr.Slider(0, MAX_GUIDANCE, suiting.guidance, step=0.5, label="Guidance", elem_id="guidance")
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, elem_id="seed")
        another = gr.Button("Another seed", size="sm", elem_id="another-seed")
    gr.Examples([[text] for text in suiting.prompts], prompt, label="Prompts that suit the model")
    return Controls(prompt, cost, how, draw, cancel, status, which, steps, guidance, seed, another)


def build_results() -> Results:
    """Lay out what a visitor is shown, still empty."""
    compared = gr.ImageSlider(
        label="Dense on the left, pruned on the right",
        type="pil",
        format="png",
        interactive=False,
        elem_id="compared",
    )
    wipe = gr.Slider(0, 100, 50, step=5, label="Wipe, % of dense that is shown", elem_id="wipe")
    figures = gr.Markdown(elem_id="figures")
    with gr.Accordion("What was kept, block by block and step by step", elem_id="kept"):
        with gr.Row():
            block = gr.Dropdown([], label="Block", elem_id="block", interactive=True, min_width=200)
            overlay_of = gr.Radio([*OVERLAYS], value=KEPT, label="Show", elem_id="overlay-of", min_width=200)
        step = gr.Slider(0, 1, 0, step=1, label="Step", elem_id="step", interactive=True)
        overlay = gr.Image(interactive=False, show_label=False, format="png", elem_id="overlay", buttons=["download"])
    gallery = gr.Gallery(
        label="Drawn in this visit",
        columns=4,
        height=220,
        object_fit="contain",
        fit_columns=False,
        format="png",
        elem_id="gallery",
    )
    run_file = gr.DownloadButton("Run file", interactive=False, elem_id="run-file", size="sm")
    return Results(compared, wipe, figures, block, step, overlay_of, overlay, gallery, run_file)
