"""Training that is killed goes on from the last whole state.

Each test is a process of its own, which forks: where autograd has run before, a fork cannot train.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from atedm.tiny import weights_folder
from faults import ended, faults, in_child, killed
from painted_objects import keep_discs


def sitting(out: Path) -> None:
    """A few steps of training."""
    from atedm.tiny.train import train

    keep_discs(out / "objects")
    small = {"canvas": 64, "batch": 2, "pool": 32, "start_from": weights_folder(), "eager": True}
    train(out, images=seen(out) + 6, lr=1e-4, sample_minutes=0, save_minutes=0, archive=None, seed=0, **small)


def seen(out: Path) -> int:
    """How many images the run has seen."""
    file = out / "state.safetensors"
    return int(load_file(file)["seen"]) if file.exists() else 0


def half_a_folder_is_not_taken_for_a_whole_one(out: Path) -> None:
    def killed_at_the_second_copy() -> None:
        copied = []

        def copy_one(*names: Any, **options: Any) -> Any:
            copied.append(names)
            if len(copied) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return copyfile(*names, **options)

        copyfile, shutil.copyfile = shutil.copyfile, copy_one
        sitting(out)

    assert ended(in_child(killed_at_the_second_copy)) == -9
    assert not (out / "tokenizer").exists()
    assert ended(in_child(lambda: sitting(out))) == 0


def training_goes_on_from_the_last_whole_state(out: Path) -> None:
    for chance in faults("train killed", 0.06):
        before = seen(out)
        killed(lambda: sitting(out), 1 if before else 4, 4.0, chance)
        assert seen(out) >= before
    before = seen(out)
    assert ended(in_child(lambda: sitting(out))) == 0
    assert seen(out) > before


CASES: dict[str, Callable[[Path], None]] = {
    case.__name__: case
    for case in (half_a_folder_is_not_taken_for_a_whole_one, training_goes_on_from_the_last_whole_state)
}


@pytest.mark.parametrize("name", CASES)
def test_in_a_process_of_its_own(name: str, tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, __file__, name, str(tmp_path / "run")],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    CASES[sys.argv[1]](Path(sys.argv[2]))
