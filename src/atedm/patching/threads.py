"""One thread at a time in a patched U-Net: what a step is told would otherwise be told to another thread's step."""

from __future__ import annotations

import sys
import threading
from types import FrameType

from diffusers import UNet2DConditionModel

PATCHING = threading.Lock()
"""Held while a U-Net is patched, unpatched, or told of a step."""


def refuse_another_thread(unet: UNet2DConditionModel, caller: int | None) -> None:
    """Raise if the thread that called ``unet`` last is another one, and still in the middle of that call.

    Nothing has to be told when a call ends, so that a call that was interrupted leaves nothing behind: where the two
    threads differ, the other one's stack is looked at.

    Args:
        unet: The patched U-Net.
        caller: Who called it last, as `threading.get_ident`.

    Raises:
        RuntimeError: If so.
    """
    if caller is None or caller == threading.get_ident():
        return
    frame: FrameType | None = sys._current_frames().get(caller)
    while frame is not None:
        if frame.f_code.co_name in ("_call_impl", "forward") and frame.f_locals.get("self") is unet:
            raise RuntimeError(
                "this patched U-Net is in the middle of a step in another thread; call it from one thread at a time, "
                "or give each its own: copy.deepcopy(pipe.unet), before or after atedm.apply"
            )
        frame = frame.f_back
