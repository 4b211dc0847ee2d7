"""The page at `/` in headless Chromium: streaming, stopping, dense beside sparse, errors, the keyboard, its looks."""

import shutil
import time
from pathlib import Path

import pytest

from tests.serve.running import serving

pytestmark = [pytest.mark.browser, pytest.mark.filterwarnings("default")]
SHOTS = Path(__file__).parent.parent.parent / "build" / "page"
WIDTHS, SCHEMES = (400, 1280), ("light", "dark")


@pytest.fixture(scope="module")
def server():
    with serving() as running:
        yield running


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # playwright's own where the machine has none; root needs no-sandbox
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, server):
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    complaints = []
    page.on("pageerror", lambda error: complaints.append(error))  # playwright marks what it calls
    page.set_default_timeout(20_000)
    page.goto(server.url)
    page.wait_for_function("() => document.getElementById('model').textContent.includes('tiny')")
    page.fill("#most", "20")
    yield page
    page.close()
    server.wait_until_idle()
    assert not complaints


def say(page, text, answers=1):
    """Send by the keyboard, and wait for the answers' figures."""
    page.fill("#input", text)
    before = page.locator(".answer").count()
    page.press("#input", "Enter")
    done = "(count) => document.getElementById('send').textContent === 'Send'"
    done += " && document.querySelectorAll('.answer').length === count"
    page.wait_for_function(done, arg=before + answers)


def slow_down(server, monkeypatch, seconds=0.1):
    decode = server.scheduler.slots.decode

    def wait(limit):
        time.sleep(seconds)
        return decode(1)

    monkeypatch.setattr(server.scheduler.slots, "decode", wait)


def test_a_typed_message_is_answered_with_figures(page):
    say(page, "Once")
    assert page.locator(".user .text").inner_text() == "Once"
    assert "tokens/s" in page.locator(".answer .figures").inner_text()
    assert page.evaluate("document.activeElement.id") == "input"
    say(page, "and again")
    assert page.locator(".answer").count() == 2
    page.click("#anew")
    assert page.locator(".turn").count() == 0


def test_an_answer_streams_and_escape_stops_it(page, server, monkeypatch):
    slow_down(server, monkeypatch)
    page.fill("#most", "150")
    page.fill("#input", "A long answer")
    page.press("#input", "Enter")
    page.wait_for_function("() => document.querySelector('.answer .text')?.textContent.length > 2")
    seen = page.locator(".answer .text").inner_text()
    page.wait_for_function("(size) => document.querySelector('.answer .text').textContent.length > size", arg=len(seen))
    assert page.locator("#send").inner_text() == "Stop"
    page.keyboard.press("Escape")
    page.wait_for_function("() => document.querySelector('.answer .figures').textContent.includes('stopped')")
    assert page.locator("#send").inner_text() == "Send"
    server.wait_until_idle(5)


def test_dense_and_sparse_stand_beside_each_other(page):
    page.select_option("#mode", "both")
    say(page, "x" * 90, answers=2)
    figures = page.locator(".answer .figures").all_inner_texts()
    assert len(figures) == 2 and "100.0 % of the cache read" in figures[1] and "100.0 %" not in figures[0]
    page.select_option("#mode", "dense")
    say(page, "y")
    assert "100.0 %" in page.locator(".answer .figures").last.inner_text()


def test_an_error_is_shown_and_the_talk_goes_on(page):
    say(page, "x" * 400)
    assert "at most 300" in page.locator(".error").inner_text()
    say(page, "short")
    assert "tokens/s" in page.locator(".answer .figures").last.inner_text()


def test_the_keyboard_reaches_everything_and_shift_enter_makes_a_line(page):
    page.focus("#input")
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    assert page.input_value("#input") == "one\ntwo"
    page.focus("#anew")
    reached = []
    for _ in range(8):
        reached.append(page.evaluate("document.activeElement.id"))
        page.keyboard.press("Tab")
    assert [name for name in reached if name][:7] == ["anew", "talk", "mode", "temperature", "most", "input", "send"]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_cut_off_at_any_width(page, width, scheme):
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 800})
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / f"empty-{width}-{scheme}.png")
    page.select_option("#mode", "both")
    say(page, "Why is the sky blue? Tell me in one long sentence, please.", answers=2)
    page.select_option("#mode", "sparse")
    say(page, "x" * 400)
    page.screenshot(path=SHOTS / f"talk-{width}-{scheme}.png")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    error, footer = page.locator(".error").bounding_box(), page.locator("footer").bounding_box()
    assert error["y"] >= 0 and error["y"] + error["height"] <= footer["y"], "the error is in sight"
    assert footer["height"] < 180
    for name in ("input", "send", "anew", "mode"):
        box = page.locator(f"#{name}").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width and box["y"] + box["height"] <= 800, name
        assert box["height"] >= 40, name
