"""What is drawn and what it is held against: read, refused, and written once."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from atedm.lab.evaluation.images import image_file
from atedm.lab.evaluation.prompts import read_prompts
from atedm.lab.evaluation.references import write_references
from atedm.tiny import objects_of
from atedm.tiny.objects import FEWER_OBJECTS, OBJECTS
from coco import coco_folder


def test_coco_gives_one_caption_a_picture_cropped_to_the_middle(tmp_path: Path) -> None:
    prompts = read_prompts(str(coco_folder(tmp_path)))
    assert [prompt.text for prompt in prompts] == ["A red bus.", "A dog."]
    assert list(write_references(prompts, tmp_path / "reference", (32, 32))) == [0, 1]
    with Image.open(tmp_path / "reference" / "00000.png") as picture:
        assert picture.size == (32, 32)
        assert np.asarray(picture).min() > 200
    (tmp_path / "val2017" / "000000000003.jpg").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"cannot read the image .*000000000003\.jpg"):
        list(write_references(prompts, tmp_path / "again", (32, 32)))


def test_real_pictures_are_those_of_the_prompts_size_and_seed_at_hand(tmp_path: Path) -> None:
    def written(folder: Path, count: int, seed: int = 0, size: tuple[int, int] = (64, 64)) -> list[bytes]:
        list(write_references(read_prompts("scenes", count, seed), folder, size, seed))
        return [image_file(folder, index).read_bytes() for index in range(count)]

    def fresh(*args: Any) -> list[bytes]:
        return written(tmp_path / f"fresh-{len(list(tmp_path.iterdir()))}", *args)

    used = tmp_path / "used"
    assert written(used, 3) == fresh(3)
    first = image_file(used, 0).stat().st_mtime_ns
    assert written(used, 5) == fresh(5)
    assert written(used, 2) == fresh(2)
    assert image_file(used, 0).stat().st_mtime_ns == first  # they stay where they are the same
    assert written(used, 4, 1) == fresh(4, 1)
    assert written(used, 4) == fresh(4)
    assert written(used, 4, 0, (32, 32)) == fresh(4, 0, (32, 32))
    stopped = write_references(read_prompts("scenes", 4), used, (64, 64))
    next(stopped)  # and no more
    assert written(used, 4, 0, (32, 32)) == fresh(4, 0, (32, 32))
    (used / "settings.json").unlink()
    image_file(used, 2).write_bytes(b"of who knows what")
    assert written(used, 4) == fresh(4)


def test_files_of_prompts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a cat\n\n  a dog \n")
    assert [prompt.text for prompt in read_prompts(str(tmp_path / "a.txt"))] == ["a cat", "a dog"]
    assert len(read_prompts(str(tmp_path / "a.txt"), at_most=50)) == 2
    assert len(read_prompts(str(tmp_path / "a.txt"), at_most=1)) == 1
    (tmp_path / "b.txt").write_bytes("a cat\u2028on a mat\x85\r\na dog\r\n".encode())
    assert [prompt.text for prompt in read_prompts(str(tmp_path / "b.txt"))] == ["a cat\u2028on a mat", "a dog"]
    (tmp_path / "a.csv").write_text('number,Prompt\n1,"a cat,\n asleep"\n2,\n3,a dog\n')
    assert [prompt.text for prompt in read_prompts(str(tmp_path / "a.csv"))] == ["a cat, asleep", "a dog"]
    assert len(read_prompts(str(tmp_path / "a.csv"), 1)) == 1
    scenes = read_prompts("scenes", 5)
    assert scenes == read_prompts("scenes", 9)[:5]
    assert all(prompt.scene is not None and prompt.scene.caption == prompt.text for prompt in scenes)
    fewer = read_prompts("scenes", 30, objects=objects_of("tiny-sd3"))
    assert {name for prompt in fewer if prompt.scene for name in prompt.scene.objects} <= set(FEWER_OBJECTS)
    assert objects_of("tiny-turbo") == objects_of("some/model") == tuple(OBJECTS)


def test_what_holds_no_prompts_is_told_so(tmp_path: Path) -> None:
    def refused(source: Path | str, message: str, count: int | None = None) -> None:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            read_prompts(str(source), count)

    refused(tmp_path / "gone.txt", "no prompts at")
    refused(tmp_path, "is no folder of MS-COCO")
    (tmp_path / "empty.txt").write_text("\n\n")
    refused(tmp_path / "empty.txt", "holds no prompts")
    (tmp_path / "a.csv").write_text("text\nx\n")
    refused(tmp_path / "a.csv", "no column 'prompt' or 'caption', but text")
    (tmp_path / "a.csv").write_text("prompt\n" + 140_000 * "x")
    refused(tmp_path / "a.csv", "is no CSV: field larger than")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00\x01")
    refused(tmp_path / "bytes.txt", "not text in UTF-8")
    (tmp_path / "one.txt").write_text("x")
    refused(tmp_path / "one.txt", "holds 1 prompts, fewer than the 2", 2)
    refused("scenes", "captions must be at least 1", 0)
    folder = coco_folder(tmp_path)
    captions = folder / "annotations" / "captions_val2017.json"
    whole = captions.read_text()
    captions.write_text(whole.replace("000000000003.jpg", "../../secret.jpg"))
    refused(folder, r"names a picture outside of its folder: \.\./\.\./secret\.jpg")
    captions.write_text(whole.replace('"file_name"', '"name"'))
    refused(folder, "captions_val2017.json is no caption file of MS-COCO")
    captions.write_text(whole)
    for picture in (folder / "val2017").iterdir():
        picture.unlink()
    refused(folder, "captions of 3 pictures, but none of them")
    (folder / "annotations" / "captions_val2017.json").write_text("[]")
    refused(folder, "no caption file of MS-COCO")
