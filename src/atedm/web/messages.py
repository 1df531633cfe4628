"""What the page says: how far a job is, what went wrong, what was saved."""

import html

from atedm.app.request import ImageResult
from atedm.plans.plan import Plan
from atedm.web.job import StepDone


def message(text: str) -> str:
    """Return a line for the status, read aloud by screen readers when it changes."""
    return f'<p role="status" aria-live="polite">{html.escape(text)}</p>'


def complaint(text: str) -> str:
    """Return a line that says what went wrong."""
    return f'<p role="alert" style="color: #b3261e">{html.escape(text)}</p>'


def progress(at: StepDone) -> str:
    """Return a bar over both images, dense and then pruned."""
    done = at.step + (at.steps if at.kind == "pruned" else 0)
    line = message(f"Drawing {at.kind}, step {at.step} of {at.steps}.")
    whole = 2 * at.steps
    bar = f'role="progressbar" aria-valuemin="0" aria-valuemax="{whole}" aria-valuenow="{done}"'
    return f'{line}<div class="bar" {bar}><div style="width: {done / whole:.1%}"></div></div>'


def figures(result: ImageResult, cost: int) -> str:
    """Return in Markdown what was saved, and how far the image is from the dense one."""
    assert result.dense_seconds is not None
    assert result.psnr_to_dense is not None
    return (
        f"| | dense | pruned |\n|---|---|---|\n"
        f"| arithmetic | 100 % | **{cost} %** |\n"
        f"| time | {result.dense_seconds:.2f} s | **{result.seconds:.2f} s**, "
        f"{100 * result.seconds / result.dense_seconds:.0f} % |\n"
        f"| tokens left at the end of a block, on average | 100 % | {100 * result.kept_share:.0f} % |\n"
        f"| distance to the dense image | | {result.psnr_to_dense:.1f} dB |\n"
    )


def hint(model: str, plan: Plan | None = None) -> str:
    """Return what to do first, and what a plan does if it is chosen."""
    planned = "" if plan is None else f" The plan: {plan.what()}, whatever the steps below say."
    return message(f"Press Draw, or Enter in the prompt. The model is {model}.{planned}")
