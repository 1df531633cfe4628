"""Draw the picture of the page in docs/tutorial.md: open it in Chromium, draw the second prompt, show what was kept.

    python tests/web/picture.py

It needs Chromium.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from shutil import which

from PIL import Image
from playwright.sync_api import expect, sync_playwright

from atedm.web.serve import serve

FILE = Path(__file__).parents[2] / "docs" / "images" / "web.png"
COST = 60
"""Percent of the dense arithmetic."""


def main() -> None:
    """Write the picture."""
    with tempfile.TemporaryDirectory() as out, sync_playwright() as playwright:
        served = serve(["tiny"], Path(out))
        browser = playwright.chromium.launch(executable_path=which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1180, "height": 1000})
        page.goto(served.url)
        page.get_by_text("a frog left of a castle").click()
        box = page.locator("#cost input[type=number]")
        box.fill(str(COST))
        box.press("Tab")
        page.wait_for_timeout(500)
        page.click("#draw")
        expect(page.locator("#status")).to_contain_text("Done.", timeout=600_000)
        page.wait_for_selector("#overlay img")
        page.wait_for_timeout(2000)
        page.screenshot(path=FILE, full_page=True)
        browser.close()
        served.close()
    with Image.open(FILE) as picture:
        small = picture.convert("RGB").quantize(255)
    small.save(FILE, optimize=True)


if __name__ == "__main__":
    main()
