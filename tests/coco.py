"""A folder laid out as MS-COCO comes."""

import json
from pathlib import Path

import numpy as np
from PIL import Image


def coco_folder(folder: Path) -> Path:
    (folder / "annotations").mkdir()
    (folder / "val2017").mkdir()
    images = [{"id": n, "file_name": f"{n:012d}.jpg", "height": 60, "width": 90} for n in (7, 3, 5)]
    captions = [
        {"id": 10, "image_id": 3, "caption": "A second caption."},
        {"id": 4, "image_id": 3, "caption": " A red\n bus. "},
        {"id": 11, "image_id": 7, "caption": "A dog."},
        {"id": 12, "image_id": 5, "caption": "Its picture is missing."},
    ]
    content = {"images": images, "annotations": captions, "info": {}, "licenses": []}
    (folder / "annotations" / "captions_val2017.json").write_text(json.dumps(content))
    stripes = np.zeros((60, 90, 3), np.uint8)
    stripes[:, 15:75] = 255  # the middle square is white
    for n in (3, 7):
        Image.fromarray(stripes).save(folder / "val2017" / f"{n:012d}.jpg")
    return folder
