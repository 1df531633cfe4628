"""One picture, drawn dense and pruned in a thread of its own. It reports progress and can be stopped."""

import queue
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from atedm.app.generate import generate
from atedm.app.request import ImageResult, Request
from atedm.record import Recording


class StepDone(NamedTuple):
    """A denoising step is done."""

    #: "dense" or "pruned".
    kind: str
    step: int
    steps: int


class ImageDone(NamedTuple):
    """An image is done."""

    kind: str
    image: Image.Image
    recording: Recording | None


class JobDone(NamedTuple):
    """Everything is done, and in the folder."""

    result: ImageResult
    folder: Path


Event = StepDone | ImageDone | JobDone


class Stopped(Exception):
    """The job was stopped; nothing of it is left."""


def run_job(pipe: Any, request: Request, folder: Path, model: str, stop: threading.Event) -> Iterator[Event]:
    """Draw one prompt dense and pruned into ``folder``, and yield what happens.

    If the job is stopped, raises, or nobody listens any more, the thread ends with the step it is in, the pipeline is
    as before, and the folder, which is made for this job, is gone. ``stop`` is set from another thread to end it, which
    raises `Stopped` here.
    """
    events: queue.Queue[Event | BaseException] = queue.Queue()

    def on_step(what: str, step: int, steps: int) -> None:
        kind = what.split()[0]
        if stop.is_set():
            raise Stopped(f"stopped at step {step} of {steps}, {kind}")
        events.put(StepDone(kind, step, steps))

    def on_image(kind: str, image: Image.Image, recording: Recording | None) -> None:
        events.put(ImageDone(kind, image, recording))

    def work() -> None:
        try:
            (result,) = generate(pipe, request, folder, compare=True, model=model, progress=on_step, watch=on_image)
            if stop.is_set():
                raise Stopped("stopped after the last step")
            events.put(JobDone(result, folder))
        except BaseException as error:
            events.put(error)

    thread = threading.Thread(target=work, name="atedm-job", daemon=True)
    thread.start()
    event: Event | BaseException | None = None
    try:
        while not isinstance(event, JobDone):
            event = events.get()
            if isinstance(event, BaseException):
                raise event
            yield event
    finally:
        if not isinstance(event, JobDone):
            stop.set()
            thread.join()
            shutil.rmtree(folder, ignore_errors=True)
