"""Files appear whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from atedm.files import check_writable, remove_partials, save_image, save_json


@pytest.mark.parametrize(("writer", "stays"), [("1", True), ("999999999", False), ("x", False)])
def test_what_another_process_is_writing_is_left_alone(writer: str, stays: bool, tmp_path: Path) -> None:
    partial = tmp_path / f".00000.png.{writer}.partial"
    partial.touch()
    remove_partials(tmp_path)
    assert partial.exists() == stays


def test_files_appear_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.new("RGB", (8, 8))
    save_image(image, tmp_path / "image.png")
    before = (tmp_path / "image.png").read_bytes()

    def break_off(self: Image.Image, file: Path, **_: Any) -> None:
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", break_off)
    with pytest.raises(OSError, match="disk full"):
        save_image(image, tmp_path / "image.png")
    assert (tmp_path / "image.png").read_bytes() == before


def test_links_are_followed_and_pipes_take_what_comes(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "elsewhere" / "it.json")
    save_json([1], tmp_path / "link.json")
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads((tmp_path / "elsewhere" / "it.json").read_text()) == [1]
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        save_json([2], tmp_path / "pipe")
        assert json.loads(os.read(reader, 100)) == [2]
    finally:
        os.close(reader)
    assert (tmp_path / "pipe").is_fifo()
    with pytest.raises(OSError, match="directory"):
        save_json([3], tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="named for two results"):
        check_writable(tmp_path / "a.png", None, tmp_path / "elsewhere" / ".." / "a.png")
