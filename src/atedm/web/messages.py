"""What the page says: where a job stands, what went wrong, what was saved."""

from __future__ import annotations

import html

from atedm.request import Made
from atedm.web.job import Step


def message(text: str) -> str:
    """Return a line for the status, read aloud by screen readers when it changes."""
    return f'<p role="status" aria-live="polite">{html.escape(text)}</p>'


def complaint(text: str) -> str:
    """Return a line that says what went wrong."""
    return f'<p role="alert" style="color: #b3261e">{html.escape(text)}</p>'


def progress(at: Step) -> str:
    """Return a bar over both runs, dense and then pruned."""
    done = at.step + (at.steps if at.way == "pruned" else 0)
    line = message(f"Drawing {at.way}, step {at.step} of {at.steps}.")
    whole = 2 * at.steps
    bar = f'role="progressbar" aria-valuemin="0" aria-valuemax="{whole}" aria-valuenow="{done}"'
    return f'{line}<div class="bar" {bar}><div style="width: {done / whole:.1%}"></div></div>'


def figures(made: Made, cost: int) -> str:
    """Return in Markdown what was saved, and what it did to the image."""
    assert made.dense_seconds is not None
    assert made.psnr_to_dense is not None
    ratio = made.seconds / made.dense_seconds
    return (
        f"| | dense | pruned |\n|---|---|---|\n"
        f"| arithmetic | 100 % | **{cost} %** |\n"
        f"| time | {made.dense_seconds:.2f} s | **{made.seconds:.2f} s**, {100 * ratio:.0f} % |\n"
        f"| tokens at the end of a block, mean | 100 % | {100 * made.kept_share:.0f} % |\n"
        f"| distance to the dense image | | {made.psnr_to_dense:.1f} dB |\n"
    )


def hint(model: str) -> str:
    """Return what to do first."""
    small = " It is so small that pruning saves it arithmetic and no time." if model == "tiny" else ""
    return message(f"Press Draw, or Enter in the prompt. The model is {model}.{small}")
