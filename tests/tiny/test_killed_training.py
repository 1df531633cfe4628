"""Training that is killed goes on from the last whole state."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from atedm.tiny import weights_folder
from faults import ended, faults, in_child, killed


def sitting(out: Path) -> None:
    """A few seconds of training."""
    from atedm.tiny.train import train

    small = {"canvas": 64, "batch": 2, "scenes": 32, "start_from": weights_folder(), "eager": True}
    train(out, minutes=0.005, lr=1e-4, floor=0.02, autoencoder_minutes=0.0, reversed_share=1.0, seed=0, **small)


def test_half_a_folder_is_not_taken_for_a_whole_one(tmp_path: Path) -> None:
    def killed_at_the_second_copy() -> None:
        copied = []

        def copy_one(*names: Any, **options: Any) -> Any:
            copied.append(names)
            if len(copied) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return copyfile(*names, **options)

        copyfile, shutil.copyfile = shutil.copyfile, copy_one
        sitting(tmp_path)

    assert ended(in_child(killed_at_the_second_copy)) == -9
    assert not (tmp_path / "tokenizer").exists()
    assert ended(in_child(lambda: sitting(tmp_path))) == 0


def test_training_that_is_killed_goes_on_from_the_last_whole_state(tmp_path: Path) -> None:
    def seen(out: Path) -> int:
        file = out / "state.safetensors"
        return int(load_file(file)["seen"]) if file.exists() else 0

    out = tmp_path / "run"
    for chance in faults("train killed", 0.06):
        before = seen(out)
        killed(lambda: sitting(out), 1 if before else 4, 4.0, chance)
        assert seen(out) >= before
    before = seen(out)
    assert ended(in_child(lambda: sitting(out))) == 0
    assert seen(out) > before
