"""The peers of pruning, each by the package of its authors: ToMe (tomesd) and DeepCache."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from atedm.costs.tome import ToMe
from atedm.hosts.models import find_model, is_transformer
from atedm.hosts.runs import step_position
from atedm.hosts.unet_spans import find_spans
from atedm.lab.extra import optional
from atedm.lab.methods.candidates import Candidate
from atedm.lab.methods.transformer_merging import merged_blocks
from atedm.plans.caching import deep_cached
from atedm.words import check_whole


@dataclass(frozen=True)
class Merging(Candidate):
    """ToMe, token merging."""

    tome: ToMe

    @property
    def kind(self) -> str:  # type: ignore[override]
        """ToMe, with or without the paper's schedule (DSAP) over it."""
        return "ToMe, DSAP" if self.tome.early_share > 0 else "ToMe"

    @contextmanager
    def applied(self, pipe: Any, seed: int = 0) -> Iterator[None]:
        """Merge tokens. ToMe draws its destinations in every layer of every step, from ``seed``.

        Raises a `ValueError` where it is not written for the model, or not in this setting.
        """
        tomesd, model = optional("tomesd", "peers"), find_model(pipe)
        if is_transformer(model):
            if self.tome != ToMe(self.tome.ratio):
                raise ValueError(f"in a transformer ToMe has a ratio and nothing else, and this is {self.tome}")
            with merged_blocks(model, self.tome.ratio, seed):
                yield
            return
        unet = _unet_of(pipe, "tomesd")
        everything = self.tome.merge == "everything"
        tomesd.apply_patch(
            unet,
            ratio=self.tome.ratio,
            max_downsample=1 if self.tome.levels == "highest" else 8,
            merge_crossattn=everything,
            merge_mlp=everything,
        )
        info = unet._tome_info
        # A generator of its own: by default it is a copy of the global one, which depends on what ran before.
        info["args"]["generator"] = torch.Generator("cpu").manual_seed(seed)
        try:
            if self.tome.early_share > 0:
                info["hooks"].append(_spare_early(unet, self.tome))
            yield
        finally:
            tomesd.remove_patch(unet)
            for module in unet.modules():  # remove_patch leaves it behind
                vars(module).pop("_tome_info", None)

    def is_early(self, share: float) -> bool:
        """Whether some blocks are spared."""
        return self.tome.early_share > 0 and self.tome.spare.is_early(share)

    def as_dict(self) -> dict[str, Any]:
        """Return the setting."""
        return {"kind": "merging", **asdict(self.tome)}


@dataclass(frozen=True)
class Caching(Candidate):
    """DeepCache: most of the U-Net runs in every ``interval``-th step only.

    It needs several steps a run: with few-step models it has nothing to reuse. Raises a `ValueError` if a value is out
    of its range.
    """

    interval: int = 2
    branch: int = 0  #: Which skip connection is the last to be computed, counted from the shallowest.

    kind = "DeepCache"
    filed_as = "caching"

    def __post_init__(self) -> None:
        check_whole("interval", self.interval)
        check_whole("branch", self.branch, least=0)

    @property
    def cycle(self) -> int:  # type: ignore[override]
        """The interval."""
        return self.interval

    def applied(self, pipe: Any, seed: int = 0) -> AbstractContextManager[None]:
        """Cache."""
        _unet_of(pipe, "DeepCache")
        return deep_cached(pipe, lambda steps: range(0, steps, self.interval), self.branch)


def _unet_of(pipe: Any, peer: str) -> Any:
    """Return the U-Net of a pipeline, or raise a `ValueError` that names the peer which needs one."""
    if getattr(pipe, "unet", None) is None:
        raise ValueError(f"{peer} works on U-Nets only, and this pipeline has a transformer")
    return pipe.unet


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
        own["size"] = info["size"]
        own["args"]["ratio"] = 0.0 if tome.spare.is_early(step_position(timestep).share) else tome.ratio

    return unet.register_forward_pre_hook(before_forward, with_kwargs=True)
