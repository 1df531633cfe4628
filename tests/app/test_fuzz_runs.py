"""Fuzzed: methods and run files as they come from JSON."""

import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

import atedm
from atedm.app.request import Request
from atedm.app.run_file import read_run_file
from atedm.method.presets import method_from_dict
from atedm.plans.plan import read_plan, save_plan
from fuzzing import NUMBERS, VALUES, bytes_of, changed, fuzzed, json_bytes

METHODS = [method.as_dict() for method in atedm.METHODS.values()]
FIELDS = sorted({field for method in METHODS for field in method})
WORDS = ["at-edm", "matched", "everywhere", "not-second-level", "F-L", {"share": 0.3, "pairing": "L-F"}, [[2, 0.8]]]


def test_fuzzed_methods() -> None:
    def read(values: dict[str, Any]) -> None:
        method = method_from_dict(values)
        assert method_from_dict(json.loads(json.dumps(method.as_dict()))) == method

    sensible = st.one_of(st.sampled_from(WORDS), NUMBERS, VALUES)
    some = st.dictionaries(st.sampled_from(FIELDS), sensible, max_size=4)
    named = st.tuples(st.sampled_from(["at-edm", "matched"]), some).map(lambda pair: {"method": pair[0]} | pair[1])
    fuzzed("methods", st.one_of(some, named, *map(changed, METHODS)), read)


def test_fuzzed_run_files(tmp_path: Path) -> None:
    request = {
        "prompts": ["a duck"], "method": METHODS[1], "steps": 4, "guidance": 3.0, "width": 128, "height": None,
        "seed": 3, "other": METHODS[0], "protect": None,
    }  # fmt: skip
    run = {"atedm": "1", "model": "tiny", "request": request, "images": []}
    file = tmp_path / "run.json"

    def read(content: bytes) -> None:
        file.write_bytes(content)
        model, asked = read_run_file(file)
        assert isinstance(model, str)
        assert isinstance(asked, Request)
        assert asked.method.as_dict()

    text = json_bytes(st.one_of(changed(run), changed({"model": "tiny", "request": request}), VALUES))
    fuzzed("run files", text | bytes_of(json.dumps(run).encode()), read)


def test_fuzzed_plans(tmp_path: Path) -> None:
    plan = {
        "plan": 1, "model": {"unet": "UNet2DConditionModel"}, "steps": 9, "scheduler": "dpm++", "method": METHODS[0],
        "cache": {"full": 4, "bend": 1.2, "branch": 1}, "guidance": 3.0, "size": [128, 128], "lora": "lora",
        "found": {"budget": 0.5, "dense_steps": 20},
    }  # fmt: skip
    file = tmp_path / "plan.json"

    def read(content: bytes) -> None:
        file.write_bytes(content)
        found = read_plan(file)
        assert found.full_steps()[0] == 0
        assert found.what()
        save_plan(found, file)
        assert read_plan(file) == found

    fuzzed("plans", json_bytes(st.one_of(changed(plan), VALUES)) | bytes_of(json.dumps(plan).encode()), read)
