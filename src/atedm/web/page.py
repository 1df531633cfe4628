"""The page: what happens when something on it is pressed."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr
from PIL import Image

from atedm.app.pictures.maps import importance_overlay, kept_overlay
from atedm.record import Recording
from atedm.web.job import ImageDone, StepDone, Stopped
from atedm.web.layout import KEPT, Controls, Results, cost_slider
from atedm.web.messages import complaint, figures, hint, message, progress
from atedm.web.service import MAX_SEED, Service

GALLERY = 24  # images of a visitor that are shown again
QUEUE = 16  # visitors that may wait
LARGE = 512  # pixels a side up to which small pictures are enlarged

Shown = tuple[Image.Image, Recording]
"""The picture that a visitor looks at, and what was kept while it was drawn."""


@dataclass(frozen=True)
class Page:
    """The components, and what is remembered of each visitor."""

    service: Service
    controls: Controls
    results: Results
    #: `Shown`, or None.
    shown: gr.State
    #: (file, caption) of every image, newest first.
    drawn: gr.State

    def draw(
        self,
        prompt: str,
        model: str,
        method: str,
        cost: int,
        steps: int,
        guidance: float,
        seed: int,
        drawn: list[tuple[str, str]],
        request: gr.Request,
    ) -> Iterator[dict[Any, Any]]:
        """Draw, and yield what changes on the page."""
        controls, results = self.controls, self.results
        idle = {controls.draw: gr.Button(interactive=True), controls.cancel: gr.Button(interactive=False)}
        dense: Image.Image | None = None
        try:
            asked = self.service.request(model, prompt, method, cost, steps, guidance, seed)
            busy = {controls.draw: gr.Button(interactive=False), controls.cancel: gr.Button(interactive=True)}
            yield busy | {controls.status: progress(StepDone("dense", 0, asked.dense_steps))}
            for event in self.service.draw(str(request.session_hash), model, asked):
                if isinstance(event, StepDone):
                    yield {controls.status: progress(event)}
                elif isinstance(event, ImageDone):
                    image = _large(event.image)
                    dense = dense or image
                    yield {results.compared: (dense, image)}
                    if event.recording is not None and event.recording.observations:
                        yield self._about_blocks(image, event.recording)
                else:
                    made, folder = event.result, event.folder
                    captions = {
                        str(made.file): f"pruned, seed {made.seed}: {made.prompt}",
                        str(made.dense_file): f"dense, seed {made.seed}",
                    }
                    drawn = [*((str(folder / file), caption) for file, caption in captions.items()), *drawn][:GALLERY]
                    yield idle | {
                        controls.status: message("Done."),
                        results.figures: figures(made, cost),
                        results.gallery: drawn,
                        results.run_file: gr.DownloadButton(value=str(folder / "run.json"), interactive=True),
                        self.drawn: drawn,
                    }
        except Stopped as reason:
            yield idle | {controls.status: message(f"Cancelled: {reason}.")}
        except (ValueError, TypeError, OSError, RuntimeError) as error:
            yield idle | {controls.status: complaint(str(error))}

    def _about_blocks(self, image: Image.Image, recording: Recording) -> dict[Any, Any]:
        """Change what can be seen block by block to a new image."""
        results = self.results
        block, last = recording.blocks[0], max(seen.step for seen in recording.observations)
        return {
            results.block: gr.Dropdown([*recording.blocks], value=block),
            results.step: gr.Slider(0, max(1, last), last, label=f"Step, from 0 to {last}"),
            results.overlay: overlay((image, recording), block, last, KEPT),
            results.overlay_of: KEPT,
            self.shown: (image, recording),
        }

    def choose_model(self, model: str) -> dict[Any, Any]:
        """Change what the controls offer to what suits another model."""
        controls = self.controls
        try:
            suiting, methods = self.service.suits(model), self.service.methods(model)
        except (ValueError, TypeError, OSError) as error:
            return {controls.status: complaint(str(error))}
        method = next(iter(methods.values()))
        return {
            controls.prompt: suiting.prompts[0],
            controls.method: gr.Radio([*methods.items()], value=method),
            controls.steps: suiting.steps,
            controls.guidance: suiting.guidance,
            **self.choose_method(model, method, suiting.steps),
        }

    def choose_method(self, model: str, method: str, steps: int) -> dict[Any, Any]:
        """Change the slider to what runs with another method can cost."""
        try:
            return {
                self.controls.cost: cost_slider(self.service, model, method, steps),
                self.controls.status: hint(model, self.service.plan_of(method)),
            }
        except (ValueError, TypeError, OSError) as error:
            return {self.controls.status: complaint(str(error))}

    def cancel(self, request: gr.Request) -> None:
        """End what this visitor is drawing."""
        self.service.stop(str(request.session_hash))

    def wire(self) -> None:
        """Connect what is pressed with what happens."""
        on, results = self.controls, self.results
        private: dict[str, Any] = {"api_visibility": "private"}
        asked = [on.prompt, on.model, on.method, on.cost, on.steps, on.guidance, on.seed, self.drawn]
        told = [on.draw, on.cancel, on.status, self.shown, self.drawn, *vars(results).values()]
        # One image at a time, whoever asks; the others see their place in the queue.
        one_by_one: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "drawing", **private}
        for trigger in (on.draw.click, on.prompt.submit):
            trigger(self.draw, asked, told, show_progress_on=[on.status], **one_by_one)
        on.cancel.click(self.cancel, None, None, queue=False, **private)
        offered = [on.prompt, on.method, on.steps, on.guidance, on.cost, on.status]
        on.model.input(self.choose_model, on.model, offered, **private)
        on.another_seed.click(lambda: random.randint(0, MAX_SEED), None, on.seed, **private)
        at_once: dict[str, Any] = {"show_progress": "hidden", "trigger_mode": "always_last", **private}
        for control in (on.method, on.steps):
            control.input(self.choose_method, [on.model, on.method, on.steps], [on.cost, on.status], **at_once)
        results.wipe.input(
            lambda position: gr.ImageSlider(slider_position=position), results.wipe, results.compared, **at_once
        )
        looked_at = [self.shown, results.block, results.step, results.overlay_of]
        for control in (results.block, results.step, results.overlay_of):
            control.input(overlay, looked_at, results.overlay, **at_once)


def build_page(service: Service) -> gr.Blocks:
    """Return the page of a service, not launched. Opens its first model."""
    blocks: gr.Blocks
    with gr.Blocks(title="atedm", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        gr.Markdown(
            "# atedm\nThe same noise twice: dense, and with tokens pruned. Choose what a run may cost, and compare."
        )
        shown, drawn = gr.State(None), gr.State([])
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                controls = Controls(service, service.models[0])
            with gr.Column(scale=3, min_width=300):
                results = Results()
        page = Page(service, controls, results, shown, drawn)
        page.wire()
        blocks.unload(page.cancel)
    blocks.queue(max_size=QUEUE)
    return blocks


def overlay(shown: Shown | None, block: str, step: int, what: str) -> Image.Image | None:
    """Lay over the picture what one block kept in one step, or how important it found each token."""
    if shown is None:
        return None
    image, recording = shown
    for seen in recording.observations:
        if (seen.block, seen.step) == (block, step):
            return kept_overlay(image, seen) if what == KEPT else importance_overlay(image, seen)
    return image  # spared: all was kept


def _large(image: Image.Image) -> Image.Image:
    """Enlarge a small picture by a whole factor, so that its tokens can be seen."""
    factor = max(1, LARGE // max(image.size))
    return image.resize((factor * image.width, factor * image.height), Image.Resampling.BICUBIC)
