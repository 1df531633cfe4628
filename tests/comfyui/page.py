"""Draw what the docs show of ComfyUI: start the application, open its page, run workflows, and keep what they give.

    COMFYUI_PATH=... python tests/comfyui/page.py

It writes the example workflows with pictures that carry them, and the pictures of docs/how-to/comfyui.md. It needs
Chromium, and is run by the Python that has what ComfyUI asks for.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from shutil import which
from typing import Any

import workflows
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).parents[2]
EXAMPLES, IMAGES = ROOT / "comfyui" / "example_workflows", ROOT / "docs" / "images"
#: Files that the example workflows name. They are empty here: these workflows are shown, not run.
MODELS = (
    "checkpoints/sd_xl_base_1.0",
    "diffusion_models/flux1-dev",
    "vae/ae",
    "text_encoders/clip_l",
    "text_encoders/t5xxl_fp16",
)


def base_folder(folder: Path) -> Path:
    """A folder for the application: these nodes, nodes for the model that ships, and what the workflows name."""
    (folder / "custom_nodes").mkdir()
    (folder / "custom_nodes" / "token-pruning").symlink_to(ROOT / "comfyui")
    (folder / "custom_nodes" / "shipped_nodes.py").symlink_to(ROOT / "tests" / "comfyui" / "shipped_nodes.py")
    for model in MODELS:
        file = folder / "models" / f"{model}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return folder


def start(base: Path) -> tuple[subprocess.Popen[bytes], str]:
    """Start the application, and give it and its address once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["main.py", "--cpu", "--port", str(port), "--base-directory", str(base), "--disable-api-nodes"]
    with (base / "log.txt").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, *arguments], cwd=os.environ["COMFYUI_PATH"], stdout=log, stderr=subprocess.STDOUT
        )
    address = f"http://127.0.0.1:{port}"
    for _ in range(120):
        try:
            urllib.request.urlopen(f"{address}/object_info/AtedmTokenPruning").close()
        except OSError:
            time.sleep(1)
        else:
            return server, address
    server.terminate()
    raise SystemExit((base / "log.txt").read_text())


def lay_out(page: Page, prompt: dict[str, Any], places: workflows.Places) -> dict[str, Any]:
    """Open a workflow in the page, and give it in the page's own format."""
    found: dict[str, Any] = page.evaluate(
        """async ([prompt, places]) => {
            const app = window.app
            await app.loadApiJson(prompt, "workflow")
            for (const node of app.graph.nodes) {
                for (const widget of node.widgets ?? []) {
                    if (widget.name === "control_after_generate") widget.value = "fixed"
                }
                node.pos = places[node.id]
                node.size = node.computeSize().map((side, axis) => Math.max(side, axis ? 0 : 320))
                if (["SaveImage", "PreviewImage"].includes(node.type)) node.size = [320, 380]
                if (node.type === "CLIPTextEncode" || node.type === "ShippedModel") node.size = [340, 200]
            }
            app.graph.setDirtyCanvas(true, true)
            return app.graph.serialize()
        }""",
        [prompt, {key: [*place] for key, place in places.items()}],
    )
    return found


def show(page: Page, file: Path) -> None:
    """Bring all nodes into view, and take a picture of them."""
    box = page.evaluate(
        """() => {
            const canvas = window.app.canvas, scale = 0.7
            const nodes = window.app.graph.nodes
            const left = Math.min(...nodes.map(node => node.pos[0])), top = Math.min(...nodes.map(node => node.pos[1]))
            const right = Math.max(...nodes.map(node => node.pos[0] + node.size[0]))
            const bottom = Math.max(...nodes.map(node => node.pos[1] + node.size[1]))
            canvas.ds.scale = scale
            canvas.ds.offset = [150 - left, 190 - top]
            canvas.setDirty(true, true)
            return [(right - left) * scale, (bottom - top) * scale]
        }"""
    )
    page.wait_for_timeout(1500)
    clip = {"x": 140, "y": 145, "width": box[0] + 60, "height": box[1] + 70}
    page.screenshot(path=file, clip=clip)


def carry(file: Path, workflow: dict[str, Any]) -> None:
    """Let a picture carry a workflow, as ComfyUI's own do: dropped on the page, it opens."""
    info = PngInfo()
    info.add_text("workflow", json.dumps(workflow))
    with Image.open(file) as picture:
        plain = picture.convert("RGB")
    plain.quantize(128).save(file, pnginfo=info, optimize=True)
    plain.resize((plain.width // 2, plain.height // 2)).save(file.with_suffix(".jpg"), quality=80)  # in the menu


def run_shipped(page: Page, base: Path) -> None:
    """Draw with the model that ships, and keep the graph with its picture and the kept tokens."""
    lay_out(page, workflows.SHIPPED, workflows.SHIPPED_PLACES)
    page.evaluate("() => window.app.queuePrompt(0)")
    for _ in range(180):
        if [*(base / "output").glob("pruned*.png")] and [*(base / "temp").glob("*.png")]:
            break
        page.wait_for_timeout(1000)
    else:
        raise SystemExit((base / "log.txt").read_text())
    page.wait_for_timeout(3000)
    show(page, IMAGES / "comfyui-graph.png")


def main() -> None:
    """Write everything."""
    EXAMPLES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        base = base_folder(Path(folder))
        server, address = start(base)
        try:
            browser = playwright.chromium.launch(executable_path=which("chromium"), args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1700, "height": 1100})
            page.goto(address)
            page.wait_for_function("() => window.app?.graph && window.app.canvas", timeout=120_000)
            page.wait_for_timeout(5000)
            page.keyboard.press("Escape")
            for name in ("SDXL", "FLUX"):
                workflow = lay_out(page, getattr(workflows, name), getattr(workflows, f"{name}_PLACES"))
                file = EXAMPLES / f"token_pruning_{name.lower()}"
                file.with_suffix(".json").write_text(json.dumps(workflow) + "\n")
                show(page, file.with_suffix(".png"))
                carry(file.with_suffix(".png"), workflow)
            run_shipped(page, base)
            browser.close()
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
