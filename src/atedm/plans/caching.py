"""DeepCache by the package of its authors: in any steps, and gone without a trace."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


@contextmanager
def deep_cached(pipe: Any, full: Callable[[int], Sequence[int]], branch: int = 0) -> Iterator[None]:
    """Run the whole U-Net of a pipeline in some steps only, for the length of a ``with`` block.

    The package wraps ``forward`` of the U-Net's parts, and looks the step up in the scheduler.

    Args:
        pipe: Anything with a ``unet`` and a ``scheduler``.
        full: Says of a number of steps which of them run the whole U-Net, the first one among them.
        branch: Which skip connection is the last to be computed in the others, counted from the shallowest.

    Raises:
        ImportError: If the package is not installed.
    """
    try:
        from DeepCache import DeepCacheSDHelper
    except ImportError as error:
        raise ImportError(f"this needs DeepCache: pip install 'atedm[peers]' ({error})") from error

    start, last = 0, sys.maxsize

    class Helper(DeepCacheSDHelper):  # type: ignore[misc]
        """Asks ``full`` in place of an interval."""

        def is_skip_step(self, block_i: int, layer_i: int, blocktype: str = "down") -> bool:
            nonlocal start, last
            step: int = self.cur_timestep
            if step < last:  # a run begins, not always with the first of the list
                start = step
            last = step
            if step - start in full(len(self.pipe.scheduler.timesteps) - start):
                return False
            return bool(super().is_skip_step(block_i, layer_i, blocktype))

    before = {name: "forward" in vars(module) for name, module in pipe.unet.named_modules()}
    helper = Helper(pipe=pipe)
    helper.set_params(cache_branch_id=branch, skip_mode="chosen")
    helper.enable()
    try:
        yield
    finally:
        helper.disable()
        for name, module in pipe.unet.named_modules():  # disable leaves it on every module it wrapped
            if not before.get(name, False):
                vars(module).pop("forward", None)
