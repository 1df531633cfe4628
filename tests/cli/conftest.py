"""The command line in this process."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from atedm.cli import main


class Ended(NamedTuple):
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., Ended]:
    """Run a command in an empty folder, as its script would."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["atedm", *arguments])
        status = 0
        try:
            main()
        except SystemExit as end:
            status = int(end.code or 0)
        return Ended(status, *capsys.readouterr())

    return command


@pytest.fixture
def refused(run: Callable[..., Ended], tmp_path: Path) -> Callable[..., str]:
    """Run a command that must end with status 2 and no picture, and give the one line that says why."""

    def command(*arguments: str) -> str:
        done = run(*arguments)
        assert done.returncode == 2, done.stderr
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("atedm: ")
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "out").exists() or not any((tmp_path / "out").rglob("*.png"))
        return last

    return command
