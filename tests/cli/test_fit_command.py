"""`atedm fit`: what it prints and writes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from atedm import Matched
from atedm.app.models import load_pipeline
from atedm.plans.fingerprint import fingerprint
from atedm.plans.plan import Plan, read_plan, save_plan


def test_the_command_says_what_each_step_gained_and_writes_a_plan(run: Callable[..., Any], tmp_path: Path) -> None:
    pipe = load_pipeline("tiny-sd3-turbo", device="cpu")
    method = Matched(rate=0.9, level_factors=(), own_update_share=1.0, dense_share=0.5)
    save_plan(Plan(fingerprint(pipe), 3, method=method, guidance=0.0, size=(128, 128)), tmp_path / "plan.json")
    asked = ("fit", "tiny-sd3-turbo", "--plan", "plan.json", "--count")
    said = run(*asked, "12", "--out", "out").stdout
    assert "as it is: " in said
    assert "with step 3 fitted: " in said
    assert said.split()[-1] == str(Path("out", "plan.json"))
    found = read_plan(tmp_path / "out" / "plan.json")
    assert found.found["fit"]["prompts"] == 12
    refused = run(*asked, "3", "--out", "few")
    assert refused.returncode == 2
    assert "8 prompts or more" in refused.stderr
