"""The page in a real browser: nothing fetched, no errors, values under pointer and keys, no overflow."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_report import HOSTILE, TRAINED, write_run

from minqlora.report import comparison_page, read_run, run_page

CANDIDATES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium; skips with the reason where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install '.[browser]'")
    with playwright.sync_playwright() as driver:
        own = Path(driver.chromium.executable_path)
        installed = filter(None, map(shutil.which, CANDIDATES))
        path = str(own) if own.exists() else next(installed, None)
        if path is None:
            pytest.skip("no Chromium: `playwright install chromium`, or a system's package, brings one")
        # Without a sandbox, which containers do not allow; it sees nothing but our own files.
        chromium = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The page of a run with everything in it, and one that compares it with others."""
    folder = tmp_path_factory.mktemp("runs")
    texts = ["a " * 400, "word" * 100, HOSTILE]
    samples = [{"step": step, "prompt": text, "text": text} for step in (0, 5, 10) for text in texts]
    a = write_run(folder / ("long-name-" * 6), TRAINED, samples=samples, model=HOSTILE, seed="x" * 200)
    (a / "memory.json").write_text('{"planned": {"activations_of_a_long_name": 9e9, "head": 1}}')
    (a / "data_check.json").write_text('{"rows_with_a_supervised_end_token": 123456789}')
    (a / "sanity.json").write_text('{"gradient_norms": {"down_proj": 123.4, "q_proj": 0.1}}')
    others = [read_run(write_run(folder / f"run-{i}", TRAINED, lora_r=i)) for i in range(7)]
    made = {"run": run_page(read_run(a)), "comparison": comparison_page([read_run(a), *others])}
    for name, text in made.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in made}


@pytest.fixture
def visit(browser: Any, pages: dict[str, Path]) -> Iterator[Callable[..., Any]]:
    """A function that opens a page; at the end nothing may have been said, raised, or fetched."""
    contexts: list[Any] = []
    heard: list[str] = []

    def open_page(name: str, width: int = 1280, **options: Any) -> Any:
        contexts.append(browser.new_context(viewport={"width": width, "height": 800}, **options))
        page = contexts[-1].new_page()
        page.on("console", lambda message: heard.append(message.text))
        page.on("pageerror", lambda error: heard.append(str(error)))
        page.on("dialog", lambda dialog: (heard.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: heard.append(request.url) if request.url != address else None)
        address = pages[name].as_uri()
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert heard == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 768, 320])
@pytest.mark.parametrize("name", ["run", "comparison"])
def test_nothing_reaches_beyond_the_screen(
    visit: Callable[..., Any], name: str, width: int, scheme: str
) -> None:
    page = visit(name, width, color_scheme=scheme)
    page.evaluate("() => document.querySelectorAll('details').forEach((d) => (d.open = true))")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    beyond = page.evaluate(
        """() => [...document.querySelectorAll("body *")]
            .filter((e) => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest(".scroll, svg"))
            .map((e) => e.outerHTML.slice(0, 100))"""
    )
    assert beyond == []


def test_dark_mode_is_dark(visit: Callable[..., Any]) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    assert visit("run", color_scheme="light").evaluate(background) == "rgb(252, 252, 250)"
    assert visit("run", color_scheme="dark").evaluate(background) == "rgb(22, 24, 28)"


def test_every_chart_is_drawn_where_its_numbers_are(visit: Callable[..., Any]) -> None:
    page = visit("run")
    assert page.locator("figure.chart").count() == 5
    for path in page.locator("svg path.line, svg path.dots:not(.points)").all():
        if path.get_attribute("d"):
            box = path.bounding_box()
            assert box["width"] > 100
    # Held out, 4 at step 0 and 3 at step 10; the axis goes from 3 to 5.
    plot = page.locator(".plot").first.bounding_box()
    dots = page.locator("path.dots:not(.points):not(.at)").first.bounding_box()
    assert abs(dots["x"] - plot["x"]) < 2 and abs(dots["width"] - plot["width"]) < 2
    assert abs(dots["y"] - (plot["y"] + plot["height"] / 2)) < 2
    assert abs(dots["height"] - plot["height"] / 2) < 2


def values(page: Any) -> list[str]:
    return page.locator("figure").first.locator("output").all_text_contents()


def test_the_pointer_brings_the_values_under_it_and_takes_them_away(visit: Callable[..., Any]) -> None:
    page = visit("run")
    at_rest = values(page)
    assert at_rest[0] == "4" and at_rest[2] == "3"
    box = page.locator(".plot").first.bounding_box()
    page.mouse.move(box["x"] + 0.51 * box["width"], box["y"] + 20)  # step 5 of 10
    assert values(page)[0] == "4.500" and values(page)[2] == "4 at 0"
    assert page.locator(".axis").first.text_content() == "step 5"
    page.mouse.move(5, 5)
    assert values(page) == at_rest and page.locator(".axis").first.text_content() == "optimizer step"


def test_the_arrow_keys_move_along_a_chart_and_say_so(visit: Callable[..., Any]) -> None:
    page = visit("run")
    plot = page.locator(".plot").first
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "plot"
    for key, step in [
        ("Home", "0"),
        ("ArrowRight", "1"),
        ("ArrowRight", "2"),
        ("ArrowLeft", "1"),
        ("End", "10"),
    ]:
        page.keyboard.press(key)
        assert plot.get_attribute("aria-valuenow") == step
    assert plot.get_attribute("role") == "slider"
    said = plot.get_attribute("aria-valuetext")
    assert said.startswith("step 10, each step 4, smoothed ") and said.endswith("held out 3")


def test_a_finger_does_as_a_pointer(visit: Callable[..., Any]) -> None:
    page = visit("run", 360, has_touch=True, is_mobile=True)
    plot = page.locator(".plot").first
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    page.touchscreen.tap(box["x"] + box["width"] - 1, box["y"] + 20)
    assert page.locator(".axis").first.text_content() == "step 10"


def test_without_a_script_the_last_values_stand_there(visit: Callable[..., Any]) -> None:
    page = visit("run", java_script_enabled=False)
    assert values(page)[2] == "3"
