"""What the site needs beyond Markdown: pages link to files beside docs/, which are copied into it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
OUTSIDE = re.compile(r"\]\(((?:\.\./)+)((?:src|tests|benchmarks|comfyui|\.github)/[^)#]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add every file outside of docs/ that a page links to."""
    for page in Path(config.docs_dir).rglob("*.md"):
        for _, name in OUTSIDE.findall(page.read_text()):
            if files.get_file_from_path(_inside(name)) is None:
                files.append(File.generated(config, _inside(name), abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Point links at the copies: one folder up less, because they lie in the site."""
    return OUTSIDE.sub(lambda link: f"]({link[1].removeprefix('../')}{_inside(link[2])})", markdown)


def _inside(name: str) -> str:
    return f"files/{name}.txt" if name.endswith(".py") else f"files/{name}"
