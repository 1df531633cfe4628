"""How far a mode of the attention map agrees with the whole map, measured in dense runs on equal queries and keys."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from atedm.config import PruningConfig
from atedm.evaluation.dense_runs import FirstLayer, dense_blocks, draw_watched, kept_of
from atedm.generate import Progress
from atedm.matching import attention_source
from atedm.pruning import keep_most_important
from atedm.token_ranking import Ranking, rank_tokens


@dataclass(frozen=True)
class Agreement:
    """One mode at one feature level, averaged over blocks, steps and images. All are shares in [0, 1]."""

    mode: str
    level: int
    #: Of the tokens that the whole map keeps, those that the mode keeps too. By chance it is the share kept.
    kept: float
    #: Importance by the whole map of what the mode keeps, of that of the best it could keep.
    importance: float
    #: Of the tokens that the whole map drops, those that the mode has copy the same kept one.
    source: float


@dataclass(frozen=True)
class AgreementReport:
    """All modes at all levels."""

    rows: tuple[Agreement, ...]
    images: int
    steps: int
    pruning_rate: float

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return asdict(self)


def map_agreement(
    pipe: Any,
    prompts: Sequence[str],
    modes: Mapping[str, PruningConfig],
    *,
    steps: int = 20,
    guidance: float = 3.0,
    pruning_rate: float = PruningConfig().pruning_rate,
    seed: int = 0,
    batch: int = 10,
    progress: Progress | None = None,
) -> AgreementReport:
    """Draw dense, and hold on the way what each mode would keep and copy against what the whole map says.

    Args:
        pipe: A text-to-image pipeline, neither patched nor compiled.
        prompts: What to draw; image i has the noise of seed ``seed + i``.
        modes: Configs by name, which rank by self-attention and copy by attention; only their ``map_mode`` and
            ``sampled_rows`` should differ from the default. Their rate is ``pruning_rate``.
        steps: Denoising steps.
        guidance: Guidance scale.
        pruning_rate: Share of the tokens that is dropped.
        seed: Of the first image.
        batch: Images drawn at once.
        progress: Told of every step of every batch.

    Raises:
        TypeError: If the pipeline has no U-Net.
        ValueError: If it is patched or compiled, or there is nothing to draw or nothing dropped.
    """
    if not prompts:
        raise ValueError("there are no prompts to draw")
    blocks = dense_blocks(pipe)
    configs = {name: config.replace(pruning_rate=pruning_rate) for name, config in modes.items()}
    values: defaultdict[tuple[str, int], list[tuple[float, float, float]]] = defaultdict(list)

    def compare(layer: FirstLayer) -> None:
        count = kept_of(layer, pruning_rate)
        whole = _ranked(layer, PruningConfig(map_mode="full"), count)
        for name, config in configs.items():
            found = _compared(whole, _ranked(layer, config, count), count)
            values[name, blocks[layer.block][0].level] += found

    drawn = draw_watched(
        pipe,
        blocks,
        prompts,
        compare,
        steps=steps,
        guidance=guidance,
        seed=seed,
        batch=batch,
        output_type="latent",
        progress=progress,
    )
    for _ in drawn:
        pass  # the images are not looked at
    rows = tuple(
        Agreement(mode, level, *(float(mean) for mean in torch.tensor(found).mean(0)))
        for (mode, level), found in sorted(values.items(), key=lambda item: (list(modes).index(item[0][0]), item[0][1]))
    )
    return AgreementReport(rows, len(prompts), steps, pruning_rate)


def _ranked(layer: FirstLayer, config: PruningConfig, count: int) -> Ranking:
    return rank_tokens(
        config,
        layer.tokens,
        lambda: layer.self_attention,
        lambda: layer.cross_attention,
        step=layer.step,
        size=layer.size,
        count=count,
    )


def _compared(whole: Ranking, ours: Ranking, count: int) -> list[tuple[float, float, float]]:
    """(kept, importance, source) of `Agreement`, for every image."""
    keep, our_keep = (keep_most_important(ranking.importance, count) for ranking in (whole, ours))
    is_kept = torch.zeros_like(whole.importance).scatter(1, keep, 1.0)
    importance = whole.importance.gather(1, our_keep).sum(1) / whole.importance.gather(1, keep).sum(1)
    assert whole.attention_map is not None
    source = attention_source(whole.attention_map, keep)
    our_source = source if ours.source is None else ours.source(keep)  # the whole map itself gives no function
    same = (source == our_source).float() * (1 - is_kept)
    of_dropped = same.sum(1) / (1 - is_kept).sum(1)
    columns = (is_kept.gather(1, our_keep).mean(1), importance, of_dropped)
    return [*zip(*(column.tolist() for column in columns), strict=True)]
