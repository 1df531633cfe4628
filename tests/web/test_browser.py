"""The page in a real Chromium: draws, compares, scrubs, cancels, queues, complains, by keyboard and on a phone."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from atedm.web.serve import Served, serve

pytestmark = pytest.mark.xdist_group("web")  # two pages at once would look for the same port

LONG = 60_000
"""Milliseconds that drawing may take on a busy machine."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = serve(["tiny"], tmp_path_factory.mktemp("web"))
    yield served
    served.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        message = "no Chromium on this machine: apt-get install chromium"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    alone = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=[*alone, "--disable-sync"])
        yield opened
        opened.close()


@pytest.fixture
def page(served: Served, browser: Browser) -> Iterator[Page]:
    yield from visitor(served, browser)


def visitor(served: Served, browser: Browser, **view: Any) -> Iterator[Page]:
    context = browser.new_context(accept_downloads=True, **view)
    page = context.new_page()
    page.goto(served.url)
    page.wait_for_selector("#draw")
    yield page
    context.close()


def type_number(page: Page, where: str, value: int) -> None:
    box = page.locator(f"{where} input[type=number]")
    box.fill(str(value))
    box.press("Tab")


def set_number(page: Page, where: str, value: int) -> None:
    """Give a slider a number, again if it was not yet listening: the rail beside the number shows what it took."""
    rail = page.locator(f"{where} input[type=range]")
    for _ in range(20):
        type_number(page, where, value)
        page.wait_for_timeout(100)
        if rail.input_value() == str(value):
            return
    raise AssertionError(f"{where} does not take {value}")


def set_steps(page: Page, steps: int) -> None:
    page.click("#more button")
    set_number(page, "#steps", steps)


def status(page: Page) -> Any:
    return expect(page.locator("#status"))


def test_it_draws_compares_scrubs_and_gives_the_run_file(page: Page) -> None:
    outside: list[str] = []
    page.on("request", lambda request: outside.append(request.url) if "127.0.0.1" not in request.url else None)
    set_steps(page, 4)
    set_number(page, "#cost", 72)
    page.click("#draw")
    status(page).to_contain_text("Done.", timeout=LONG)
    expect(page.locator("#figures")).to_contain_text("72 %")
    expect(page.locator("#compared img")).to_have_count(2)
    expect(page.locator("#gallery img")).to_have_count(2)
    seen = {overlay(page)}
    for step in (0, 1):
        set_number(page, "#step", step)
        seen.add(next_overlay(page, seen))
    page.get_by_label("importance").check()
    seen.add(next_overlay(page, seen))
    assert len(seen) == 4
    with page.expect_download() as download:
        page.click("#run-file")
    run = json.loads(Path(download.value.path()).read_text())
    assert (run["request"]["steps"], len(run["images"])) == (4, 1)
    assert not [url for url in outside if not url.startswith(("data:", "blob:"))]


def overlay(page: Page) -> str:
    page.wait_for_selector("#overlay img")
    return str(page.locator("#overlay img").get_attribute("src"))


def next_overlay(page: Page, seen: set[str]) -> str:
    """Wait for a picture that was not there yet."""
    image = page.locator("#overlay img")
    expect(image).not_to_have_attribute("src", re.compile("|".join(map(re.escape, seen))), timeout=LONG)
    return overlay(page)


def test_it_works_by_keyboard(page: Page) -> None:
    set_steps(page, 2)
    page.focus("#prompt textarea")
    page.keyboard.press("Enter")
    status(page).to_contain_text("Done.", timeout=LONG)
    wiped = page.locator("#compared").evaluate("element => element.outerHTML")
    page.focus("#wipe input[type=range]")
    page.keyboard.press("ArrowLeft")
    page.wait_for_function("was => document.querySelector('#compared').outerHTML !== was", arg=wiped)
    page.focus("#step input[type=range]")
    before = overlay(page)
    page.keyboard.press("ArrowLeft")
    assert next_overlay(page, {before}) != before


def test_cancel_ends_it_and_the_next_one_draws(page: Page) -> None:
    set_steps(page, 100)
    page.click("#draw")
    status(page).to_contain_text(re.compile(r"step [1-9]\d* of 100"), timeout=LONG)
    page.click("#cancel")
    status(page).to_contain_text("Cancelled: stopped at step", timeout=LONG)
    expect(page.locator("#cancel")).to_be_disabled()
    set_number(page, "#steps", 1)
    page.click("#draw")
    status(page).to_contain_text("Done.", timeout=LONG)


def test_a_second_visitor_waits_in_the_queue(served: Served, browser: Browser, page: Page) -> None:
    set_steps(page, 100)
    page.click("#draw")
    status(page).to_contain_text("Drawing dense", timeout=LONG)
    for second in visitor(served, browser):
        set_steps(second, 1)
        second.click("#draw")
        expect(second.get_by_text(re.compile(r"queue: 1/1")).first).to_be_visible(timeout=LONG)
        page.click("#cancel")
        status(page).to_contain_text("Cancelled", timeout=LONG)
        status(second).to_contain_text("Done.", timeout=LONG)


def test_bad_input_is_told_without_a_stack_trace(page: Page) -> None:
    page.fill("#prompt textarea", " ")
    page.click("#draw")
    status(page).to_contain_text("The prompt is empty: write what to draw", timeout=LONG)
    page.click("#more button")
    type_number(page, "#seed", 2**40)
    page.fill("#prompt textarea", "a duck")
    page.click("#draw")
    expect(page.locator("body")).to_contain_text(re.compile("greater than maximum|must be from"), timeout=LONG)
    expect(page.locator("body")).not_to_contain_text("Traceback")
    expect(page.locator("#draw")).to_be_enabled()


def test_a_prompt_is_text_and_not_markup(page: Page) -> None:
    dialogs: list[str] = []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    set_steps(page, 1)
    page.fill("#prompt textarea", "<img src=x onerror=alert(1)> & <b>circle</b>")
    page.click("#draw")
    status(page).to_contain_text("Done.", timeout=LONG)
    expect(page.locator("#gallery img")).to_have_count(2)
    page.wait_for_timeout(300)
    assert dialogs == []
    assert page.locator("img[src=x]").count() == 0


def test_another_method_offers_other_costs(page: Page) -> None:
    slider = page.locator("#cost input[type=range]")
    matched = (slider.get_attribute("min"), slider.input_value())
    page.get_by_label("AT-EDM†").check()
    expect(slider).not_to_have_attribute("min", str(matched[0]), timeout=LONG)
    assert int(slider.get_attribute("min") or 0) <= int(slider.input_value()) < 100


def test_it_fits_a_phone(served: Served, browser: Browser) -> None:
    for page in visitor(served, browser, viewport={"width": 390, "height": 844}, has_touch=True):
        set_steps(page, 1)
        page.tap("#draw")
        status(page).to_contain_text("Done.", timeout=LONG)
        widths = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert widths[0] <= widths[1]
        for control in ("#draw", "#compared", "#overlay", "#gallery"):
            box = page.locator(control).bounding_box()
            assert box is not None
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= 390
