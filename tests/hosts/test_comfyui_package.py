"""The folder that ComfyUI installs, built and loaded where nothing else of the project is."""

import importlib.util
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import atedm

ROOT = Path(__file__).parents[2]
NAME = "atedm-token-pruning"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("nodes")
    subprocess.run([sys.executable, ROOT / ".ci" / "nodes", "--zip", out], check=True, capture_output=True)
    return out


def test_it_holds_what_the_registry_asks_for(built: Path) -> None:
    tomllib = pytest.importorskip("tomllib")  # since Python 3.11
    settings: dict[str, Any] = tomllib.loads((built / NAME / "pyproject.toml").read_text())
    project = settings["project"]
    assert project["name"] == NAME
    assert "comfyui" not in project["name"].lower()
    assert project["version"] == atedm.__version__
    assert project["dependencies"] == []
    assert settings["tool"]["comfy"]["DisplayName"]
    names = zipfile.ZipFile(built / f"{NAME}-{atedm.__version__}.zip").namelist()
    for file in ("LICENSE", "__init__.py", "lib/atedm/method/matched.py", "web/docs/AtedmTokenPruning.md"):
        assert f"{NAME}/{file}" in names
    assert not any(name.endswith((".safetensors", ".pyc")) for name in names)


def test_it_loads_by_itself_with_what_comfyui_has(built: Path) -> None:
    """As ComfyUI loads a folder, an old one that has no ``comfy_api``, and prunes a stand-in of its model."""
    code = f"""
import importlib.util, pathlib, sys
for name in ("diffusers", "transformers", "accelerate", "typer", "comfy_api"):
    sys.modules[name] = None
path = {str(built / NAME)!r}
sys.path = [entry for entry in sys.path if not (pathlib.Path(entry or ".") / "atedm").is_dir()]
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
spec = importlib.util.spec_from_file_location(path.replace(".", "_x_"), path + "/__init__.py")
module = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = module
spec.loader.exec_module(module)
import atedm
assert atedm.__file__.startswith(path), atedm.__file__
assert sorted(module.NODE_CLASS_MAPPINGS) == ["AtedmKeptTokens", "AtedmTokenPruning", "AtedmTokenPruningPlan"]
assert module.WEB_DIRECTORY == "./web"
sys.path.insert(0, {str(ROOT / "tests")!r})
import torch, comfyui_standin as standin
node = module.NODE_CLASS_MAPPINGS["AtedmTokenPruning"]()
kinds = node.INPUT_TYPES()["required"]
defaults = {{name: kind[1].get("default", kind[0][0]) for name, kind in kinds.items() if name != "model"}}
(clone,) = getattr(node, node.FUNCTION)(standin.ModelPatcher(standin.BaseModel(standin.UNetModel())), **defaults)
sigmas = torch.tensor([3.0, 1.0, 0.0])
standin.Guider(clone, [torch.randn(1, 5, standin.WORDS)]).sample(torch.randn(2, 4, 16, 16), sigmas)
shower = module.NODE_CLASS_MAPPINGS["AtedmKeptTokens"]()
image, line = getattr(shower, shower.FUNCTION)(clone, None, block=0, step=-1)
assert image.shape == (2, 512, 512, 3), image.shape
print(line)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "input_blocks.3.1: 8×8 tokens, 61 % of them kept, 2 steps"


@pytest.mark.parametrize("name", ["sdxl", "flux"])
def test_example_workflows_hold_what_the_nodes_take_and_their_pictures_carry_them(name: str) -> None:
    file = ROOT / "comfyui" / "example_workflows" / f"token_pruning_{name}.json"
    workflow: dict[str, Any] = json.loads(file.read_text())
    with Image.open(file.with_suffix(".png")) as picture:
        assert json.loads(picture.info["workflow"]) == workflow
    spec = importlib.util.spec_from_file_location("nodes_of_comfyui", ROOT / "comfyui" / "nodes.py")
    assert spec is not None
    assert spec.loader is not None
    nodes = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = nodes
    spec.loader.exec_module(nodes)
    of_kind = {node["type"]: node for node in workflow["nodes"]}
    assert [entry["name"] for entry in of_kind["AtedmTokenPruning"]["inputs"]] == [
        "model",
        "method",
        "rate",
        "early_strength",
    ]
    method, rate, early_strength = of_kind["AtedmTokenPruning"]["widgets_values"]
    assert method in nodes.METHODS
    assert nodes.RATE.least <= rate <= nodes.RATE.most
    assert nodes.EARLY.least <= early_strength <= nodes.EARLY.most
    assert of_kind["AtedmKeptTokens"]["widgets_values"] == [nodes.BLOCK.default, nodes.STEP.default]
