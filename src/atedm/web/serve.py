"""Serve the page to this machine alone, or to others behind a password."""

import ipaddress
import os
import secrets
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported

import gradio as gr

from atedm.plans.plan import Plan
from atedm.web.page import build_page
from atedm.web.service import Service

USER = "atedm"


class Served(NamedTuple):
    """A page that is being served."""

    page: gr.Blocks
    url: str
    #: What visitors are asked for, if anything.
    password: str | None

    def wait(self) -> None:
        """Serve until it is interrupted."""
        self.page.block_thread()

    def close(self) -> None:
        """Take it down."""
        self.page.close(verbose=False)


def serve(
    models: Sequence[str],
    out: Path,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    password: str | None = None,
    device: str | None = None,
    plan: Plan | None = None,
) -> Served:
    """Open the page and return once it is up.

    Visitors choose among ``models``, names as `atedm.load_pipeline`; the first one is opened at once, and ``plan`` is
    offered for it. Each run has a folder in ``out``, and nothing else is served. No ``port`` is the first free one from
    7860. No ``password`` asks for none on this machine, and makes one up elsewhere.

    Raises:
        OSError: If the port is taken, or the address is not of this machine.
        ValueError: If the password is empty, the address is of IPv6, no model is named, or the first one cannot be
            opened, or is not the one that the plan is for.
    """
    if password is not None and not password.strip():
        raise ValueError("the password is empty; leave it out, or give one")
    _check_address(host, port)
    service = Service(tuple(models), out.resolve(), device, plan)
    service.folder.mkdir(parents=True, exist_ok=True)
    if password is None and not is_loopback(host):
        password = secrets.token_urlsafe(12)
    page = build_page(service)
    _, url, _ = page.launch(
        server_name=host,
        server_port=port,
        auth=None if password is None else (USER, password),
        allowed_paths=[str(service.folder)],
        max_file_size=0,
        prevent_thread_lock=True,
        ssr_mode=False,
        share=False,
        show_error=False,
        quiet=True,
        theme=gr.themes.Base(),
        css=_CSS,
        footer_links=[],
    )
    return Served(page, url, password)


def _check_address(host: str, port: int | None) -> None:
    """Check that the address and port are free, before a model is opened."""
    if ":" in host:
        raise ValueError(f"{host} is an address of IPv6, where the page cannot be served; give a name or four numbers")
    try:
        with socket.create_server((host, port or 0)):
            pass
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (while")[0]
        where = host if port is None else f"{host}, port {port}"
        raise OSError(f"cannot listen at {where}: {reason}; give another --host or --port") from error


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


_CSS = """
#figures table { width: 100%; }
#figures th, #figures td:not(:first-child) { white-space: nowrap; }
#status { padding: 0 .25rem; }
.bar { height: .5rem; border-radius: .25rem; background: var(--border-color-primary); overflow: hidden; }
.bar > div { height: 100%; background: var(--color-accent); transition: width .2s; }
@media (max-width: 640px) { .gradio-container { padding: 8px !important; } }
"""
