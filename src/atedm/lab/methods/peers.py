"""The peers of pruning, each by the package of its authors: ToMe (tomesd) and DeepCache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from atedm.costs.tome import ToMe
from atedm.hosts.runs import step_position
from atedm.hosts.unet_spans import find_spans
from atedm.lab.extra import optional
from atedm.lab.methods.candidates import EveryStep
from atedm.words import is_whole


@dataclass(frozen=True)
class Merging(EveryStep):
    """ToMe, token merging."""

    tome: ToMe

    @property
    def kind(self) -> str:
        """ToMe, with or without the paper's schedule over it."""
        return "ToMe, DSAP" if self.tome.early_share > 0 else "ToMe"

    def applied(self, pipe: Any, seed: int = 0) -> AbstractContextManager[Any]:
        """Merge tokens."""
        return with_tomesd(pipe.unet, self.tome, seed)

    def as_dict(self) -> dict[str, Any]:
        """Return the setting."""
        return {"kind": "merging", **asdict(self.tome)}


@dataclass(frozen=True)
class Caching(EveryStep):
    """DeepCache: most of the U-Net runs in every ``interval``-th step only.

    It needs several steps a run: with few-step models it has nothing to reuse.

    Raises:
        ValueError: If a value is out of its range.
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

    @property
    def kind(self) -> str:
        """DeepCache."""
        return "DeepCache"

    @property
    def cycle(self) -> int:
        """The interval."""
        return self.interval

    @contextmanager
    def applied(self, pipe: Any, seed: int = 0) -> Iterator[None]:
        """Cache. The package wraps ``forward`` of the U-Net's parts, and looks the step up in the scheduler."""
        before = {name: "forward" in vars(module) for name, module in pipe.unet.named_modules()}
        helper = optional("DeepCache", "peers").DeepCacheSDHelper(pipe=pipe)
        helper.set_params(cache_interval=self.interval, cache_branch_id=self.branch)
        helper.enable()
        try:
            yield
        finally:
            helper.disable()
            for name, module in pipe.unet.named_modules():  # disable leaves it on every module it wrapped
                if not before[name]:
                    vars(module).pop("forward", None)

    def as_dict(self) -> dict[str, Any]:
        """Return the setting."""
        return {"kind": "caching", **asdict(self)}


@contextmanager
def with_tomesd(unet: UNet2DConditionModel, tome: ToMe, seed: int = 0) -> Iterator[None]:
    """Run a U-Net with ToMe for the length of a ``with`` block.

    Args:
        unet: Not patched by ``tomesd``.
        tome: The setting.
        seed: Of the destinations that ToMe draws in every layer of every step.

    Raises:
        ImportError: If ``tomesd`` is not installed.
    """
    tomesd = optional("tomesd", "peers")
    everything = tome.merge == "everything"
    tomesd.apply_patch(
        unet,
        ratio=tome.ratio,
        max_downsample=1 if tome.levels == "highest" else 8,
        merge_attn=True,
        merge_crossattn=everything,
        merge_mlp=everything,
    )
    info = unet._tome_info
    # A generator of its own: by default it is a copy of the global one, which depends on what ran before.
    info["args"]["generator"] = torch.Generator("cpu").manual_seed(seed)
    try:
        if tome.early_share > 0:
            info["hooks"].append(_spare_early(unet, tome))
        yield
    finally:
        tomesd.remove_patch(unet)
        for module in unet.modules():  # remove_patch leaves it behind
            vars(module).pop("_tome_info", None)


def _spare_early(unet: UNet2DConditionModel, tome: ToMe) -> Any:
    """Give the spared blocks a setting of their own, whose ratio is 0 in early steps."""
    info = unet._tome_info
    own: dict[str, Any] = {"size": None, "hooks": [], "args": dict(info["args"])}
    for place, block in find_spans(unet).values():
        if tome.spare.spares(place):
            for layer in block.transformer_blocks:
                layer._tome_info = own

    def before_forward(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        early = tome.spare.is_early(step_position(timestep).share)
        own["size"] = info["size"]
        own["args"]["ratio"] = 0.0 if early else tome.ratio

    return unet.register_forward_pre_hook(before_forward, with_kwargs=True)
