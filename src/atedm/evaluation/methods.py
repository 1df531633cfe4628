"""What is compared, behind one interface: dense, AT-EDM in any setting, ToMe, DeepCache, and one on top of another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import reduce
from typing import Any, Protocol

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from atedm.checks import is_number, is_whole
from atedm.config import PruningConfig
from atedm.costs.counting import flop_counter
from atedm.costs.tome import ToMe
from atedm.costs.tomesd_patch import with_tomesd
from atedm.patching.apply import pruned


class Method(Protocol):
    """A way to make images cheaper, or none."""

    def applied(self, pipe: Any, seed: int = 0) -> AbstractContextManager[Any]:
        """Change a pipeline for the length of a ``with`` block; ``seed`` is for methods that draw at random."""
        ...

    def as_dict(self) -> dict[str, Any]:
        """Return everything that makes a difference as plain JSON values."""
        ...

    def steps_of(self, steps: int) -> int:
        """Denoising steps it takes where ``steps`` are asked for."""
        ...


class _AllSteps:
    """A method that takes as many denoising steps as are asked for."""

    def steps_of(self, steps: int) -> int:
        """Return ``steps``."""
        return steps


@dataclass(frozen=True)
class Dense:
    """The model as it is, or with fewer steps: what anyone can do without a method."""

    #: Share of the denoising steps that are taken, in (0, 1].
    steps_share: float = 1.0

    def __post_init__(self) -> None:
        """Check the share."""
        if not is_number(self.steps_share) or not 0 < self.steps_share <= 1:
            raise ValueError(f"steps_share must be above 0 and at most 1, not {self.steps_share!r}")

    def steps_of(self, steps: int) -> int:
        """Return the share of ``steps``, at least one."""
        return max(1, round(self.steps_share * steps))

    def applied(self, pipe: Any, seed: int = 0) -> AbstractContextManager[Any]:
        """Change nothing."""
        return nullcontext()

    def as_dict(self) -> dict[str, Any]:
        """Return the kind."""
        return {"kind": "dense"} if self == Dense() else {"kind": "dense", **asdict(self)}


@dataclass(frozen=True)
class Pruning(_AllSteps):
    """AT-EDM in any setting, its ablations and controls."""

    config: PruningConfig

    def applied(self, pipe: Any, seed: int = 0) -> AbstractContextManager[Any]:
        """Prune; ``seed`` is the config's own."""
        return pruned(pipe, self.config)

    def as_dict(self) -> dict[str, Any]:
        """Return the config."""
        return {"kind": "pruning", **self.config.as_dict()}


@dataclass(frozen=True)
class Merging(_AllSteps):
    """ToMe, by the package of its authors."""

    tome: ToMe

    def applied(self, pipe: Any, seed: int = 0) -> AbstractContextManager[Any]:
        """Merge tokens."""
        return with_tomesd(pipe.unet, self.tome, seed)

    def as_dict(self) -> dict[str, Any]:
        """Return the setting."""
        return {"kind": "merging", **asdict(self.tome)}


@dataclass(frozen=True)
class Caching(_AllSteps):
    """DeepCache, by the package of its authors: most of the U-Net runs every ``interval`` steps only.

    It calls the U-Net's parts by wrapping their ``forward``, looks the timestep up in the pipeline's scheduler, and
    keeps the deep half between steps, so it needs several steps a run: with few-step models it has nothing to reuse.
    """

    interval: int = 2
    #: Which skip connection is the last to be computed, counted from the shallowest.
    branch: int = 0

    def __post_init__(self) -> None:
        """Check every value."""
        whole = is_whole(self.interval) and is_whole(self.branch)
        if not whole or self.interval < 1 or self.branch < 0:
            raise ValueError(
                "interval must be a whole number from 1 and branch one from 0, "
                f"not {self.interval!r} and {self.branch!r}"
            )

    def applied(self, pipe: Any, seed: int = 0) -> AbstractContextManager[Any]:
        """Cache."""
        return _deepcache(pipe, self.interval, self.branch)

    def as_dict(self) -> dict[str, Any]:
        """Return the setting."""
        return {"kind": "caching", **asdict(self)}


@dataclass(frozen=True)
class Stacked:
    """Several at once, the first one applied first. Pruning has to come before caching, which wraps what it finds.

    Raises:
        ValueError: If there are two of a kind, something after caching, or ToMe and pruning among them: it merges over
            a whole grid, which pruning takes apart.
    """

    methods: tuple[Method, ...]

    def __post_init__(self) -> None:
        """Refuse what cannot go together."""
        kinds = [type(method) for method in self.methods]
        if {Pruning, Merging} <= set(kinds):
            raise ValueError(
                "ToMe and pruning do not go together: ToMe merges over a whole grid of tokens, which pruning takes "
                "apart; stack either with deepcache or fewer steps"
            )
        if len(set(kinds)) < len(kinds):
            raise ValueError("two methods of one kind do not stack; each changes the same part of the model")
        after_caching = kinds[kinds.index(Caching) + 1 :] if Caching in kinds else []
        if {Pruning, Merging} & set(after_caching):
            raise ValueError("deepcache comes last in a stack, because it wraps what it finds, as in matched+deepcache")

    @contextmanager
    def applied(self, pipe: Any, seed: int = 0) -> Iterator[None]:
        """Apply all of them."""
        with ExitStack() as stack:
            for method in self.methods:
                stack.enter_context(method.applied(pipe, seed))
            yield

    def steps_of(self, steps: int) -> int:
        """Return what is left of ``steps`` after all of them."""
        return reduce(lambda left, method: method.steps_of(left), self.methods, steps)

    def as_dict(self) -> dict[str, Any]:
        """Return what each of them says."""
        return {"kind": "stacked", "methods": [method.as_dict() for method in self.methods]}


def completed(stored: dict[str, Any]) -> dict[str, Any]:
    """Fill in what a stored `Method.as_dict` does not say, because it was written before that was a choice.

    A choice that is added leaves things as they were by default, so a run of an earlier version goes on.
    """
    if stored.get("kind") == "stacked":
        return {**stored, "methods": [completed(method) for method in stored["methods"]]}
    defaults: dict[str, Method] = {
        "pruning": Pruning(PruningConfig()),
        "merging": Merging(ToMe()),
        "caching": Caching(),
    }
    default = defaults.get(stored.get("kind", ""))
    return stored if default is None else {**default.as_dict(), **stored}


@contextmanager
def _deepcache(pipe: Any, interval: int, branch: int) -> Iterator[None]:
    try:
        from DeepCache import DeepCacheSDHelper
    except ImportError as error:
        raise ImportError("DeepCache needs its package: pip install 'atedm[peers]'") from error
    before = {name: "forward" in vars(module) for name, module in pipe.unet.named_modules()}
    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=interval, cache_branch_id=branch)
    helper.enable()
    try:
        yield
    finally:
        helper.disable()
        for name, module in pipe.unet.named_modules():  # which disable leaves on every module it wrapped
            if not before[name]:
                vars(module).pop("forward", None)


def counted_run(
    pipe: Any, method: Method, prompt: str, *, steps: int, guidance: float, width: int | None, height: int | None
) -> int:
    """MACs that the U-Net takes for one image with a method, as torch counts them on a whole run.

    Args:
        pipe: A text-to-image pipeline.
        method: What is applied.
        prompt: Of the image.
        steps: Denoising steps.
        guidance: Guidance scale.
        width: In pixels; None leaves it to the pipeline.
        height: Likewise.
    """
    counters: list[FlopCounterMode] = []

    def start(*_: Any) -> None:
        counters.append(flop_counter())
        counters[-1].__enter__()  # type: ignore[no-untyped-call]

    def stop(*_: Any) -> None:
        counters[-1].__exit__(None, None, None)  # type: ignore[no-untyped-call]

    hooks = [pipe.unet.register_forward_pre_hook(start), pipe.unet.register_forward_hook(stop)]
    try:
        with method.applied(pipe), sdpa_kernel(SDPBackend.MATH):
            pipe(
                prompt,
                num_inference_steps=method.steps_of(steps),
                guidance_scale=guidance,
                width=width,
                height=height,
                generator=torch.Generator("cpu").manual_seed(0),
                output_type="latent",
            )
    finally:
        for hook in hooks:
            hook.remove()
    return sum(int(counter.get_total_flops()) for counter in counters) // 2
