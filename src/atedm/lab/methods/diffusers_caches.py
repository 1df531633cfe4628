"""The caches that diffusers ships for transformers: first block, TaylorSeer, pyramid attention broadcast."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import hooks
from diffusers.models.cache_utils import CacheMixin
from torch import nn

from atedm.hosts.models import find_model, is_transformer
from atedm.lab.methods.candidates import Candidate
from atedm.words import check_whole, is_number


class TransformerCache(Candidate, ABC):
    """A cache of diffusers over the blocks of a transformer. Afterwards they are as before."""

    #: Names of its hooks in the registry of diffusers.
    hooks: ClassVar[tuple[str, ...]]

    @abstractmethod
    def _lay_over(self, model: nn.Module, timestep: Callable[[], float]) -> None:
        """Register the hooks; ``timestep`` returns the one of the current call, from 1000 down to 0."""

    @contextmanager
    def applied(self, pipe: Any, seed: int = 0) -> Iterator[None]:
        """Cache. Nothing is carried from one run to the next.

        Raises a `ValueError` if the pipeline has no transformer.
        """
        model = find_model(pipe)
        if not is_transformer(model):
            raise ValueError(f"the {self.kind} of diffusers is for transformers; a U-Net has deepcache")
        # Pipelines of other classes neither name their calls nor clear the caches, so it is done here.
        left_alone = not isinstance(model, CacheMixin)
        where = [*inspect.signature(type(model).forward).parameters].index("timestep") - 1
        now = 0.0

        def follow(_: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            nonlocal now
            given = named["timestep"] if "timestep" in named else arguments[where]
            at = float(torch.as_tensor(given).flatten()[0])
            if at > now and left_alone:
                CacheMixin._reset_stateful_cache(model)  # which forgets the name
                naming.enter_context(CacheMixin.cache_context(model, "call"))
            now = at

        self._lay_over(model, lambda: 1000 * now if now <= 1 else now)
        watch = model.register_forward_pre_hook(follow, with_kwargs=True)
        try:
            with ExitStack() as naming:
                naming.enter_context(CacheMixin.cache_context(model, "call"))
                yield
        finally:
            watch.remove()
            registry = hooks.HookRegistry.check_if_exists_or_initialize(model)
            for hook in self.hooks:
                registry.remove_hook(hook, recurse=True)


@dataclass(frozen=True)
class FirstBlockCache(TransformerCache):
    """Where the first block changes by less than ``threshold`` since the last whole step, the others are skipped.

    Raises a `ValueError` if the threshold is negative, or where it is applied to SD3.
    """

    threshold: float = 0.1

    kind = "first-block cache"
    hooks = ("fbc_leader_block_hook", "fbc_block_hook")

    def __post_init__(self) -> None:
        if not is_number(self.threshold) or self.threshold < 0:
            raise ValueError(f"threshold must be 0 or more, not {self.threshold!r}")

    def _lay_over(self, model: nn.Module, timestep: Callable[[], float]) -> None:
        if any(getattr(block, "context_pre_only", False) for block in model.modules()):
            raise ValueError("the first-block cache of diffusers does not run on SD3, whose last block returns no text")
        hooks.apply_first_block_cache(model, hooks.FirstBlockCacheConfig(threshold=self.threshold))


@dataclass(frozen=True)
class TaylorSeer(TransformerCache):
    """Attention runs in every ``interval``-th step, and is extrapolated in the others.

    The first ``warmup`` steps run whole; ``order`` is that of the extrapolation. Raises a `ValueError` if a value is
    out of its range.
    """

    interval: int = 3
    warmup: int = 3
    order: int = 1

    kind = "TaylorSeer"
    hooks = ("taylorseer_cache",)

    def __post_init__(self) -> None:
        check_whole("interval", self.interval)
        check_whole("warmup", self.warmup)
        check_whole("order", self.order, least=0)

    def _lay_over(self, model: nn.Module, timestep: Callable[[], float]) -> None:
        config = hooks.TaylorSeerCacheConfig(
            cache_interval=self.interval,
            disable_cache_before_step=self.warmup,
            max_order=self.order,
            taylor_factors_dtype=torch.float32,
        )
        hooks.apply_taylorseer_cache(model, config)


@dataclass(frozen=True)
class PyramidBroadcast(TransformerCache):
    """Pyramid attention broadcast: attention runs in every ``interval``-th step of the middle of a run.

    Raises a `ValueError` if the interval is below 1.
    """

    interval: int = 2

    kind = "pyramid attention broadcast"
    hooks = ("pyramid_attention_broadcast",)

    def __post_init__(self) -> None:
        check_whole("interval", self.interval)

    def _lay_over(self, model: nn.Module, timestep: Callable[[], float]) -> None:
        config = hooks.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=self.interval, current_timestep_callback=timestep
        )
        hooks.apply_pyramid_attention_broadcast(model, config)


CACHES = {"first-block-cache": FirstBlockCache, "taylorseer": TaylorSeer, "pyramid": PyramidBroadcast}
"""Those of diffusers by the names that users write."""
