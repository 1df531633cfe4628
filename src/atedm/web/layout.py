"""What is on the page, and where."""

import gradio as gr

from atedm.web.messages import hint
from atedm.web.service import MAX_GUIDANCE, MAX_PROMPT, MAX_SEED, MAX_STEPS, Service

KEPT, IMPORTANCE = OVERLAYS = ("tokens kept", "importance")


def cost_slider(service: Service, model: str, method: str, steps: int) -> gr.Slider:
    """Return the slider of what runs with a method can cost, set to the method as it is."""
    lowest, highest, usual = service.cost_range(model, method, steps)
    label, planned = "Cost, % of the dense arithmetic", service.plan_of(method) is not None
    if planned:
        lowest, highest, label = 0, 100, f"{label}: the plan's"
    return gr.Slider(lowest, highest, usual, step=1, label=label, interactive=not planned, elem_id="cost")


class Controls:
    """What a visitor sets."""

    def __init__(self, service: Service, model: str) -> None:
        """Lay it out for the model that is chosen at first."""
        suiting, methods = service.suits(model), service.methods(model)
        method = next(iter(methods.values()))
        self.prompt = gr.Textbox(
            suiting.prompts[0], label="Prompt", max_lines=4, max_length=MAX_PROMPT, elem_id="prompt", autofocus=True
        )
        self.cost = cost_slider(service, model, method, suiting.steps)
        self.method = gr.Radio([*methods.items()], value=method, label="Pruned by", elem_id="method")
        with gr.Row():
            self.draw = gr.Button("Draw", variant="primary", elem_id="draw", min_width=120)
            self.cancel = gr.Button("Cancel", variant="stop", elem_id="cancel", min_width=120, interactive=False)
        self.status = gr.HTML(hint(model, service.plan_of(method)), elem_id="status")
        with gr.Accordion("Model, steps, guidance, seed", open=False, elem_id="more"):
            self.model = gr.Dropdown([*service.models], value=model, label="Model", elem_id="model")
            self.steps = gr.Slider(1, MAX_STEPS, suiting.steps, step=1, label="Steps", elem_id="steps")
            self.guidance = gr.Slider(0, MAX_GUIDANCE, suiting.guidance, step=0.5, label="Guidance", elem_id="guidance")
            self.seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, elem_id="seed")
            self.another_seed = gr.Button("Another seed", size="sm", elem_id="another-seed")
        gr.Examples([[text] for text in suiting.prompts], self.prompt, label="Prompts that suit the model")


class Results:
    """What a visitor is shown, at first empty."""

    def __init__(self) -> None:
        """Lay it out."""
        label = "Dense on the left, pruned on the right"
        self.compared = gr.ImageSlider(label=label, type="pil", format="png", interactive=False, elem_id="compared")
        self.wipe = gr.Slider(0, 100, 50, step=5, label="Wipe, % of dense that is shown", elem_id="wipe")
        self.figures = gr.Markdown(elem_id="figures")
        with gr.Accordion("What was kept, block by block and step by step", elem_id="kept"):
            with gr.Row():
                self.block = gr.Dropdown([], label="Block", elem_id="block", interactive=True, min_width=200)
                self.overlay_of = gr.Radio([*OVERLAYS], value=KEPT, label="Show", elem_id="overlay-of", min_width=200)
            self.step = gr.Slider(0, 1, 0, step=1, label="Step", elem_id="step", interactive=True)
            self.overlay = gr.Image(
                interactive=False, show_label=False, format="png", elem_id="overlay", buttons=["download"]
            )
        layout = {"columns": 4, "height": 220, "object_fit": "contain", "fit_columns": False}
        self.gallery = gr.Gallery(label="Drawn in this visit", format="png", elem_id="gallery", **layout)
        self.run_file = gr.DownloadButton("Run file", interactive=False, elem_id="run-file", size="sm")
