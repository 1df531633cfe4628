"""The real application, without a server: brings up ComfyUI from a checkout and runs workflows through its executor.

Nothing of it is in this repository. ``COMFYUI_PATH`` says where a checkout is; what that needs must be installed.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PATH = os.environ.get("COMFYUI_PATH")
WITHOUT = "set COMFYUI_PATH to a checkout of Comfy-Org/ComfyUI, with its requirements installed, to run these"

if PATH is None:
    pytest.skip(WITHOUT, allow_module_level=True)
sys.path.insert(0, PATH)

import utils.extra_config  # noqa: E402, F401 - before another module of that name is found
from comfy.cli_args import args  # noqa: E402

args.cpu = True

import execution  # noqa: E402
import nodes  # noqa: E402


def at_once(found: Any) -> Any:
    """What a function of ComfyUI gives, which older releases give at once and newer ones when awaited."""
    return asyncio.run(found) if inspect.isawaitable(found) else found


def _known(function: Any, **options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name in inspect.signature(function).parameters}


_without = _known(nodes.init_extra_nodes, init_custom_nodes=False, init_api_nodes=False)
at_once(nodes.init_extra_nodes(**_without))
assert at_once(nodes.load_custom_node(str(ROOT / "comfyui"))), "the nodes of this repository did not load"


class Server:
    """What the executor asks of a server, to hear what happens."""

    client_id: str | None = "test"
    last_node_id: str | None = None
    last_prompt_id: str | None = None

    def __init__(self) -> None:
        self.heard: list[tuple[str, Any]] = []

    def send_sync(self, event: str, data: Any, client: str | None = None) -> None:
        self.heard.append((event, data))


class Engine:
    """Runs workflows one after another, with ComfyUI's cache between them."""

    def __init__(self) -> None:
        self.server = Server()
        self.executor = execution.PromptExecutor(self.server)

    def run(self, prompt: dict[str, Any]) -> list[tuple[str, Any]]:
        """Run a workflow in the format of the API, and give what the executor said."""
        known = _known(execution.validate_prompt, prompt_id="1", prompt=prompt, partial_execution_list=None)
        valid, error, outputs, node_errors = at_once(execution.validate_prompt(**known))
        assert valid, (error, node_errors)
        self.executor.execute(prompt, "1", {}, outputs)
        return self.executor.status_messages
