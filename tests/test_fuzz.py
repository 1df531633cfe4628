"""Readers of what users and files give: whatever comes in is read, or refused by an error of our own, never by chance.

`ATEDM_FUZZ_SECONDS=600 pytest -n 0 -s tests/test_fuzz.py` spends ten minutes on each reader and says how many inputs
that was; in every test run each has a second or two.
"""

import csv
import io
import json
import os
import random
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

import atedm
from atedm.config import PRESETS, PruningConfig
from atedm.evaluation.images import SETTINGS, Drawing, claim_folder
from atedm.evaluation.methods import Dense
from atedm.evaluation.methods_by_name import NAMES, method_by_name, parse_methods
from atedm.evaluation.prompts import read_prompts
from atedm.files import read_json
from atedm.request import Request
from atedm.run_file import read_run_file
from faults import broken

SECONDS = float(os.environ.get("ATEDM_FUZZ_SECONDS", "1.5"))
READ: Counter[str] = Counter()
OURS = Path(atedm.__file__).parent


@pytest.fixture(scope="module", autouse=True)
def said() -> Iterator[None]:
    yield
    print("\n" + ", ".join(f"{what}: {count}" for what, count in sorted(READ.items())))


def fuzzed(reader: str, given_: st.SearchStrategy[Any], read: Callable[[Any], Any]) -> None:
    """Read inputs until the time is over; each is read, or refused by a `raise` of ours with a line to show."""
    over = time.monotonic() + SECONDS
    number = 0
    while time.monotonic() < over:
        number += 1

        @seed(number)
        @settings(max_examples=200, deadline=None, database=None, suppress_health_check=[*HealthCheck])
        @given(given_)
        def once(value: Any) -> None:
            READ[f"{reader}, all"] += 1
            try:
                read(value)
            except (ValueError, TypeError, OSError) as refused:
                error = refused
            else:
                return
            READ[f"{reader}, refused"] += 1
            last = traceback.extract_tb(error.__traceback__)[-1]
            meant = Path(last.filename).is_relative_to(OURS) and (last.line or "").startswith("raise ")
            assert meant, f"{type(error).__name__} by chance: {error}"
            assert str(error).strip()

        once()


# --- What is given ----------------------------------------------------------------------------------------------------

NUMBERS = st.one_of(
    st.integers(), st.floats(), st.sampled_from([0, 1, -1, 0.5, 1.0, 2**63, 1e308, float("nan"), float("inf")])
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=12)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
FIELDS = [*PruningConfig.__dataclass_fields__]
WORDS = sorted({str(value) for preset in PRESETS.values() for value in preset.as_dict().values() if value})
SENSIBLE = st.one_of(st.sampled_from(WORDS), NUMBERS, VALUES, st.just([[0, 0.5]]), st.just([[2, 0.8], [3, 1.0]]))


@st.composite
def changed(draw: st.DrawFn, whole: Any) -> Any:
    """Return plain JSON values, some of which were replaced, left out or added at any depth."""
    content = json.loads(json.dumps(whole))
    for _ in range(draw(st.integers(1, 3))):
        place = content
        while isinstance(place, (dict, list)) and place:
            keys = [*place] if isinstance(place, dict) else [*range(len(place))]
            key = draw(st.sampled_from(keys))
            if not isinstance(place[key], (dict, list)) or not place[key] or draw(st.booleans()):
                how = draw(st.sampled_from(["replace", "drop", "add"]))
                if how == "replace":
                    place[key] = draw(VALUES)
                elif how == "drop":
                    del place[key]
                elif isinstance(place, dict):
                    place[draw(st.text(max_size=8))] = draw(VALUES)
                else:
                    place.append(draw(VALUES))
                break
            place = place[key]
    return content


def bytes_of(whole: bytes) -> st.SearchStrategy[bytes]:
    """Bytes of a file that something happened to."""
    damaged = st.integers(0, 2**32).map(lambda number: broken(whole, random.Random(number)))
    return st.one_of(damaged, st.binary(max_size=200), st.just(whole))


# --- Readers ----------------------------------------------------------------------------------------------------------


def test_configs() -> None:
    def read(fields: dict[str, Any]) -> None:
        config = PruningConfig(**fields)
        again = PruningConfig(**json.loads(json.dumps(config.as_dict())))
        assert again == config

    some = st.dictionaries(st.sampled_from(FIELDS), SENSIBLE, max_size=4)
    fuzzed("config", some | changed(PRESETS["matched"].as_dict()).filter(lambda c: set(c) <= set(FIELDS)), read)


def test_methods() -> None:
    names = st.sampled_from([*NAMES, "papre", ""])
    fields = st.sampled_from([*FIELDS, "ratio", "interval", "steps", "prune_less_share", "field"])
    values = st.one_of(st.sampled_from(WORDS), NUMBERS.map(str), VALUES.map(json.dumps), st.text(max_size=8))
    pairs = st.lists(st.tuples(fields, values).map("=".join), max_size=3).map(",".join)
    one = st.tuples(names, pairs).map(lambda parts: f"{parts[0]}[{parts[1]}]" if parts[1] else parts[0])
    several = st.lists(one, min_size=1, max_size=3).map("+".join)
    spec = st.one_of(one, several, st.text(alphabet="paper[]=,+.01 \n\0é", max_size=30)).filter(
        lambda text: ":" not in text and "cost" not in text  # those import a function, or count a model
    )

    def read(text: str) -> None:
        for part in parse_methods(text):
            assert method_by_name(part).as_dict()

    fuzzed("method", spec | st.lists(spec, max_size=3).map(",".join), read)


def test_run_files(tmp_path: Path) -> None:
    request = {
        "prompts": ["a red circle"], "config": PRESETS["paper"].as_dict(), "steps": 4, "guidance": 3.0, "width": 128,
        "height": None, "seed": 3, "beside": PRESETS["matched"].as_dict(), "protect": None,
    }  # fmt: skip
    run = {"atedm": "1", "model": "tiny", "request": request, "images": []}
    file = tmp_path / "run.json"

    def read(content: bytes) -> None:
        file.write_bytes(content)
        model, asked = read_run_file(file)
        assert isinstance(model, str)
        assert isinstance(asked, Request)
        assert isinstance(asked.config, PruningConfig)

    text = st.one_of(changed(run), changed({"model": "tiny", "request": request}), VALUES).map(
        lambda content: json.dumps(content).encode()
    )
    fuzzed("run file", text | bytes_of(json.dumps(run).encode()), read)


def test_prompt_files(tmp_path: Path) -> None:
    cells = st.one_of(
        st.text(max_size=20), st.sampled_from(["prompt", "caption", '"', "a\0b", "\ufeff", "x" * 140_000])
    )

    def written(rows: list[list[str]]) -> bytes:
        text = io.StringIO()
        csv.writer(text, escapechar="\\").writerows(rows)
        return text.getvalue().encode("utf-8", "surrogatepass")

    table = st.lists(st.lists(cells, min_size=1, max_size=3), max_size=5)
    headed = table.map(lambda rows: [["id", "prompt"], *rows])
    suffix = st.sampled_from([".csv", ".txt", ".CSV"])

    def read(given_: tuple[str, bytes]) -> None:
        file = tmp_path / f"prompts{given_[0]}"
        file.write_bytes(given_[1])
        for prompt in read_prompts(str(file), None, 0):
            assert prompt.text.strip()

    content = st.one_of(table.map(written), headed.map(written), bytes_of(b"prompt\na red circle\n"))
    fuzzed("prompts", st.tuples(suffix, content), read)


def test_caption_files(tmp_path: Path) -> None:
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

    text = st.one_of(changed(whole), changed(outside), VALUES).map(lambda content: json.dumps(content).encode())
    fuzzed("captions", text | bytes_of(json.dumps(whole).encode()), read)


def test_files_of_runs(tmp_path: Path) -> None:
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

    text = st.one_of(changed(json.loads(whole)), VALUES).map(lambda content: json.dumps(content).encode())
    fuzzed("JSON of runs", text | bytes_of(whole), read)
