"""The settings compared in the ablation table, each one change away from the paper's."""

from __future__ import annotations

from atedm.config import PRESETS, PruningConfig
from atedm.patching.summary import PatchSummary

DENSE = "dense"


def variants(paper: PatchSummary, steps: int) -> dict[str, PruningConfig | None]:
    """Return the rows of the table by name; None is the model as it is.

    Args:
        paper: Summary of the paper's setting on the model at hand. Schedules are compared at its mean cost, so their
            pruning rates are solved for; every other row has the paper's rate.
        steps: Steps of the run whose cost is meant.
    """
    base = PRESETS["paper"]
    return {
        DENSE: None,
        "paper preset": base,
        "dagger preset": PRESETS["dagger"],
        "heads averaged": base.replace(head_fusion="mean-map"),
        "attention received": base.replace(ranking="attention-received"),
        "cross-attention, entropy": base.replace(ranking="cross-attention-entropy"),
        "cross-attention, power": base.replace(ranking="cross-attention-power"),
        "cross-attention, soft clip": base.replace(ranking="cross-attention-soft-clip"),
        "cross-attention, hard clip": base.replace(ranking="cross-attention-hard-clip"),
        "random ranking": base.replace(ranking="uniform-random"),
        "zero padding": base.replace(recovery="zero-padding"),
        "bicubic interpolation": base.replace(recovery="bicubic"),
        "direct copy": base.replace(recovery="direct-copy"),
        "copy by feature cosine": base.replace(similarity="cosine"),
        "random ranking, copy by cosine": base.replace(ranking="uniform-random", similarity="cosine"),
        "before feed-forward": base.replace(place="before-feed-forward"),
        "constant schedule, equal cost": paper.at_equal_cost(base.replace(schedule="constant"), steps),
        "mirrored schedule, equal cost": paper.at_equal_cost(base.replace(schedule="prune-more-early"), steps),
        "after self-attention": base.replace(place="after-self-attention"),
    }
