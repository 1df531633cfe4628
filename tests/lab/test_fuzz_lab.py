"""Fuzzed: method strings, prompts, captions and what runs of an evaluation left behind."""

import csv
import io
import json
from pathlib import Path

from hypothesis import strategies as st
from PIL import Image

from atedm.files import read_json
from atedm.lab.ablation import Variant
from atedm.lab.evaluation.images import SETTINGS, Drawing, claim_folder
from atedm.lab.evaluation.prompts import read_prompts
from atedm.lab.methods.by_name import NAMES, method_by_name, parse_methods
from atedm.lab.methods.candidates import Dense
from fuzzing import NUMBERS, VALUES, bytes_of, changed, fuzzed, json_bytes

FIELDS = [*Variant.__dataclass_fields__, "sample", "spare", "where", "ratio", "interval", "steps", "field"]
WORDS = sorted({str(value) for value in Variant().as_dict().values() if value})


def test_fuzzed_method_strings() -> None:
    names = st.sampled_from([*NAMES, "papre", ""])
    values = st.one_of(st.sampled_from(WORDS), NUMBERS.map(str), VALUES.map(json.dumps), st.text(max_size=8))
    pairs = st.lists(st.tuples(st.sampled_from(FIELDS), values).map("=".join), max_size=3).map(",".join)
    one = st.tuples(names, pairs).map(lambda parts: f"{parts[0]}[{parts[1]}]" if parts[1] else parts[0])
    several = st.lists(one, min_size=1, max_size=3).map("+".join)
    spec = st.one_of(one, several, st.text(alphabet="paper[]=,+.01 \n\0é", max_size=30)).filter(
        lambda text: ":" not in text and "cost" not in text  # those import a function, or count a model
    )

    def read(text: str) -> None:
        for part in parse_methods(text):
            assert method_by_name(part).as_dict()

    fuzzed("method strings", spec | st.lists(spec, max_size=3).map(",".join), read)


def test_fuzzed_prompt_files(tmp_path: Path) -> None:
    cells = st.one_of(
        st.text(max_size=20), st.sampled_from(["prompt", "caption", '"', "a\0b", "\ufeff", "x" * 140_000])
    )

    def written(rows: list[list[str]]) -> bytes:
        text = io.StringIO()
        csv.writer(text, escapechar="\\").writerows(rows)
        return text.getvalue().encode("utf-8", "surrogatepass")

    table = st.lists(st.lists(cells, min_size=1, max_size=3), max_size=5)
    headed = table.map(lambda rows: [["id", "prompt"], *rows])

    def read(file_and_content: tuple[str, bytes]) -> None:
        suffix, content = file_and_content
        file = tmp_path / f"prompts{suffix}"
        file.write_bytes(content)
        for prompt in read_prompts(str(file), None, 0):
            assert prompt.text.strip()

    content = st.one_of(table.map(written), headed.map(written), bytes_of(b"prompt\na duck\n"))
    fuzzed("prompts", st.tuples(st.sampled_from([".csv", ".txt", ".CSV"]), content), read)


def test_fuzzed_caption_files(tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val2017").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "val2017" / "000000000003.jpg")
    file = tmp_path / "annotations" / "captions_val2017.json"
    whole = {
        "info": {},
        "licenses": [],
        "images": [{"id": 3, "file_name": "000000000003.jpg"}, {"id": 4, "file_name": "gone.jpg"}],
        "annotations": [{"id": 4, "image_id": 3, "caption": "A bus."}, {"id": 9, "image_id": 4, "caption": "A dog."}],
    }
    outside = json.loads(json.dumps(whole).replace("gone", "../../outside"))

    def read(content: bytes) -> None:
        file.write_bytes(content)
        for prompt in read_prompts(str(tmp_path), None, 0):
            assert prompt.picture is not None
            assert prompt.picture.parent.resolve().is_relative_to(tmp_path / "val2017")

    text = json_bytes(st.one_of(changed(whole), changed(outside), VALUES))
    fuzzed("captions", text | bytes_of(json.dumps(whole).encode()), read)


def test_fuzzed_settings_of_runs(tmp_path: Path) -> None:
    folder, prompts = tmp_path / "dense", read_prompts("scenes", 3, 0)
    claim_folder(folder, Dense(), Drawing(), prompts, 1)
    (folder / "00000.png").touch()  # where nothing is drawn, nothing stands in the way
    file = folder / SETTINGS
    whole = file.read_bytes()

    def read(content: bytes) -> None:
        file.write_bytes(content)
        assert isinstance(read_json(file), dict)
        claim_folder(folder, Dense(), Drawing(), prompts, 1)
        assert json.loads(file.read_text())["weights"] == 1

    text = json_bytes(st.one_of(changed(json.loads(whole)), VALUES))
    fuzzed("settings of runs", text | bytes_of(whole), read)
