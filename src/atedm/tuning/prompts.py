"""What a plan is found on where the user gives no prompts."""

from __future__ import annotations

import numpy as np

from atedm.tiny import SHIPPED, objects_of
from atedm.tiny.scenes import sample_scene

PICTURES = (
    "a red fox sitting in fresh snow, morning light",
    "a bowl of ramen with a soft boiled egg, top view",
    "an old lighthouse on a cliff in a storm, oil painting",
    "portrait of an elderly fisherman, freckles, window light",
    "a narrow street in a medieval town after rain, neon signs",
    "a chess board in the middle of a game, shallow depth of field",
    "a watercolour map of an island with mountains and a harbour",
    "a child in a yellow raincoat jumping into a puddle",
    "a stack of old books with a brass key on top, studio light",
    "a herd of elephants crossing a river at sunset, aerial view",
    "a glass greenhouse full of ferns, isometric drawing",
    "a steam locomotive on a stone bridge, winter forest",
    "a macro photo of a bee on a lavender flower",
    "an astronaut playing a violin on a small planet, comic style",
    "a wooden table with bread, cheese and grapes, still life",
    "a city skyline at night seen from the water, long exposure",
)


def tuning_prompts(model: str, count: int) -> list[str]:
    """Return the first ``count`` prompts of the set that suits a model; they repeat where it holds fewer.

    For the models that ship these are scenes that its held-out captions, which judge a plan, do not hold.
    """
    if model in SHIPPED:
        rng = np.random.default_rng([0, 78])
        return [sample_scene(rng, held_out=False, names=objects_of(model)).caption for _ in range(count)]
    return [PICTURES[index % len(PICTURES)] for index in range(count)]
