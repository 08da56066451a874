"""The page in a browser: what a person clicks, points at and types, and what then stands there."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("there is no Chromium to open the page in")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any, whole_run: Path) -> Iterator[Open]:
    """Opens the page; at the end nothing may have been logged or requested."""
    wrong: list[str] = []
    contexts = []

    def start(width: int = 1280, **options: Any) -> Any:
        contexts.append(browser.new_context(viewport={"width": width, "height": 800}, **options))
        page = contexts[-1].new_page()
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: wrong.append(request.url) if request.url.startswith("http") else None)
        page.goto((whole_run / "report.html").as_uri())
        return page

    yield start
    for context in contexts:
        context.close()
    assert wrong == []


def at(page: Any, name: str) -> Any:
    return page.locator(f"[data-{name}]")


def test_pointing_at_a_patch_shows_it_in_every_layer(open_page: Open) -> None:
    page = open_page()
    box = at(page, "stage").bounding_box()
    at(page, "stage").hover(position={"x": box["width"] * 0.9, "y": box["height"] * 0.3})
    assert at(page, "where").inner_text() == "Patch in row 2 of 4, column 4 of 4"
    rows = page.locator(".gate")
    assert rows.count() == 2 and all("points" in rows.nth(i).inner_text() for i in range(2))
    before = rows.nth(0).inner_html()
    at(page, "stage").hover(position={"x": box["width"] * 0.1, "y": box["height"] * 0.9})
    assert at(page, "where").inner_text() == "Patch in row 4 of 4, column 1 of 4"
    assert rows.nth(0).inner_html() != before


def test_a_click_holds_the_patch_and_a_second_one_lets_go(open_page: Open) -> None:
    page = open_page()
    stage, where = at(page, "stage"), at(page, "where")
    stage.click(position={"x": 5, "y": 5})
    stage.hover(position={"x": 300, "y": 300})
    assert where.inner_text() == "Patch in row 1 of 4, column 1 of 4, held"
    stage.click(position={"x": 5, "y": 5})
    stage.hover(position={"x": 470, "y": 470})
    assert where.inner_text() == "Patch in row 4 of 4, column 4 of 4"


def test_the_keyboard_reaches_everything(open_page: Open) -> None:
    page = open_page()
    page.locator("[data-images] [tabindex='0']").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("[data-images] [aria-checked=true]").get_attribute("title") == "1"
    assert at(page, "about").inner_text().startswith("1: ")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.tagName") == "SELECT"
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "expert 0"
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    assert not at(page, "overlay").is_checked()
    page.keyboard.press("Tab")
    for key in ("Home", "ArrowLeft", "ArrowLeft", "ArrowLeft", "ArrowUp", "ArrowUp", "ArrowUp", "ArrowRight", "Enter"):
        page.keyboard.press(key)
    assert at(page, "where").inner_text() == "Patch in row 1 of 4, column 2 of 4, held"
    page.keyboard.press("Escape")
    assert at(page, "where").inner_text() == "Patch in row 1 of 4, column 2 of 4"


def test_an_expert_has_its_vocabulary(open_page: Open) -> None:
    page = open_page()
    assert page.locator("[data-words] .line").count() == 4
    page.get_by_role("radio", name="expert 2").click()
    assert at(page, "words-title").inner_text() == "What expert 2 likes most"
    crops = page.locator("[data-words] .crops li")
    assert crops.count() == 24
    assert "class " in crops.first.get_attribute("title") and "points" in crops.first.get_attribute("title")
    first = crops.first.get_attribute("title")
    at(page, "layer").select_option("blocks.4.mlp_channels")
    assert page.get_by_role("radio", name="expert 2").get_attribute("aria-checked") == "true"
    assert crops.first.get_attribute("title") != first
    assert "all 200 images" in at(page, "words-lead").inner_text()


def test_choosing_changes_what_is_drawn(open_page: Open) -> None:
    page = open_page()

    def drawn() -> str:
        return page.evaluate("document.querySelector('[data-canvas]').toDataURL()")

    seen = {drawn()}
    for act in (
        lambda: page.locator("[data-images] button").nth(3).click(),
        lambda: page.get_by_role("radio", name="expert 1").click(),
        lambda: page.locator(".gate").first.click(),
        lambda: at(page, "overlay").uncheck(),
    ):
        act()
        assert drawn() not in seen
        seen.add(drawn())
    assert at(page, "layer").input_value() == "blocks.4.mlp_channels"


def test_every_token_mixing_expert_has_its_filters(open_page: Open) -> None:
    page = open_page()
    assert page.locator("[data-filters] [role=img]").count() == 8
    assert page.get_by_label("spatial filters of expert 7 in blocks.5.mlp_tokens").locator("canvas").count() == 24
    at(page, "filter-layer").select_option("blocks.4.mlp_tokens")
    assert page.get_by_label("spatial filters of expert 7 in blocks.4.mlp_tokens").count() == 1


def test_a_narrow_window_and_a_finger(open_page: Open) -> None:
    page = open_page(390, has_touch=True, is_mobile=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    box = at(page, "stage").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 390
    at(page, "stage").tap(position={"x": box["width"] * 0.6, "y": box["height"] * 0.9})
    assert at(page, "where").inner_text() == "Patch in row 4 of 4, column 3 of 4, held"


def test_without_javascript_the_figures_are_there(open_page: Open) -> None:
    page = open_page(java_script_enabled=False)
    assert not page.locator("#explorer").is_visible()
    assert page.locator("noscript .note").is_visible()
    assert page.locator("#patches .sample").first.is_visible()


def test_with_javascript_they_are_folded(open_page: Open) -> None:
    page = open_page()
    assert not page.locator("#patches .sample").first.is_visible()
    page.get_by_text("All images at a glance").click()
    assert page.locator("#patches .sample").first.is_visible()
