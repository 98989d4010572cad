"""The studio in a real browser: the system's chromium, driven by playwright. WANJAX_BROWSER=required makes a skip a
failure."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import samplers
from samplers.files import example

pytestmark = pytest.mark.slow

ROOT = Path(samplers.__file__).parents[1]
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--autoplay-policy=no-user-gesture-required",
)  # fmt: skip
PATIENCE, WARMING = 60_000, 300_000
"""Milliseconds on a busy machine: for a clip, and for a cold compilation."""


def without(reason):
    """Skips, or fails where a browser is required."""
    if os.environ.get("WANJAX_BROWSER") == "required":
        pytest.fail(f"WANJAX_BROWSER=required, and {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        without("there is no chromium: apt-get install chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        without("there is no playwright: pip install playwright")
    with sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=chromium, args=list(FLAGS))
        yield started
        started.close()


class Server:
    """The studio as a user starts it, in a process of its own."""

    def __init__(self, *arguments, folder):
        environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # eight fake devices
        environment |= {"TMPDIR": str(folder), "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, "-m", "samplers.studio", "--port", "0", *arguments]
        self.begun, self.lines, self.folder = time.perf_counter(), [], folder
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
                                        stderr=subprocess.STDOUT)  # fmt: skip
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()
        self.address = self.wait(r"open (http://\S+)")
        self.seconds = time.perf_counter() - self.begun

    def _read(self):
        self.lines += self.process.stdout

    def wait(self, pattern):
        """What a pattern captures in what was printed."""
        until = time.monotonic() + WARMING / 1000
        while time.monotonic() < until and self.process.poll() is None:
            if (found := re.search(pattern, "".join(self.lines))) is not None:
                return found[found.lastindex or 0]
            time.sleep(0.1)
        pytest.fail(f"no {pattern} in: {''.join(self.lines)}")

    def end(self):
        """Ctrl-C, as a user ends it; the exit code."""
        self.process.send_signal(signal.SIGINT)
        code = self.process.wait(90)
        self.reader.join(30)
        self.process.stdout.close()
        return code


@pytest.fixture(scope="module")
def server(browser, tmp_path_factory):
    started = Server(folder=tmp_path_factory.mktemp("tmp"))
    started.wait("warm:")
    yield started
    if started.process.poll() is None:
        started.end()


class Visitor:
    """One person's page, and what its browser complained of or asked for."""

    def __init__(self, browser, address, **options):
        self.context = browser.new_context(viewport={"width": 1500, "height": 1250}, **options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE)
        self.errors, self.outside, self.refused = [], [], []
        self.page.on("console", lambda said: self.errors.append(said.text) if said.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", self._requested)
        self.page.on("response", lambda one: self.refused.append(one.url) if one.status >= 400 else None)
        self.page.goto(address)
        self.page.wait_for_selector("button#make")
        self.page.wait_for_selector("#curves .wj-plot")  # the page has loaded and answered

    def _requested(self, request):
        if not re.match(r"(http://127\.0\.0\.1:|data:|blob:)", request.url):
            self.outside.append(request.url)

    def state(self):
        return self.page.get_attribute(".wj-stage", "data-state")

    def clip(self):
        return self.page.get_attribute(".wj-stage", "data-clip")

    def press(self, button="make"):
        """Presses a button and waits for the next clip; the facts under it."""
        before = self.clip()
        self.page.click(f"button#{button}")
        self.page.wait_for_function(
            "old => { const s = document.querySelector('.wj-stage').dataset;"
            " return s.state == 'failed' || (s.state == 'done' && s.clip != old) }", arg=before)  # fmt: skip
        assert self.state() == "done", self.page.inner_text("#stage")
        return self.page.eval_on_selector(".wj-facts", "e => ({compiled: Number(e.dataset.compiled), "
                                                       "seconds: Number(e.dataset.seconds)})")  # fmt: skip

    def plays(self):
        """Size and length of the clip, once it can be played."""
        self.page.wait_for_function("() => { const v = document.querySelector('.wj-stage video');"
                                    " return v && v.readyState >= 2 && v.videoWidth > 0 }")  # fmt: skip
        return self.page.evaluate("() => { const v = document.querySelector('.wj-stage video');"
                                  " return [v.videoWidth, v.videoHeight, v.duration, v.loop, v.error] }")  # fmt: skip

    def slide(self, name, value):
        """Types a slider's value and waits until the page has it."""
        self.page.fill(f"#{name} input[type=number]", str(value))
        self.page.press(f"#{name} input[type=number]", "Tab")
        self.page.wait_for_timeout(300)

    def tab(self, name):
        self.page.get_by_role("tab", name=name).click()

    def give(self, name, path):
        """A picture in a keyframe's place."""
        if self.page.locator(f"#{name} img").count():
            self.page.hover(f"#{name}")
            self.page.click(f"#{name} .icon-button")
        self.page.set_input_files(f"#{name} input[type=file]", path)

    def leave(self):
        """Closes the page, and says that nothing was wrong."""
        self.context.close()
        assert (self.errors, self.outside, self.refused) == ([], [], [])


@pytest.fixture
def visitor(browser, server):
    one = Visitor(browser, server.address)
    yield one
    one.leave()


def test_it_opens_makes_and_plays(visitor, server, record_property):
    record_property("seconds until the page opens", server.seconds)
    facts = visitor.press()
    assert facts["compiled"] == 0  # warm
    width, height, seconds, loop, error = visitor.plays()
    assert (width, height, loop, error) == (256, 256, True, None) and seconds == pytest.approx(25 / 12, abs=0.1)
    assert visitor.page.locator(".wj-key img").count() == 2
    sheet = visitor.page.locator("#sheet img")
    assert sheet.evaluate("e => e.decode().then(() => e.naturalWidth)") > 500


def test_uploads_and_sliders_without_compiling(visitor, record_property):
    page, pair = visitor.page, example()
    visitor.give("first", pair["first"])
    visitor.give("last", pair["last"])
    page.fill("#prompt textarea", pair["prompt"])
    page.wait_for_timeout(1500)
    clips, times = {visitor.clip()}, []
    visitor.press()
    for name, value in (("strength_end", 2), ("kab_until", 1), ("s_edge", 1.3), ("weight_text", 0.5)):
        visitor.slide(name, value)
        facts = visitor.press()
        assert facts["compiled"] == 0, name
        times.append(facts["seconds"])
        clips.add(visitor.clip())
    visitor.tab("Clip")
    for name, value in (("guidance", 3), ("steps", 17), ("seed", 5)):
        visitor.slide(name, value)
        assert visitor.press()["compiled"] == 0, name
    record_property("seconds of warm clips", times)
    print("seconds of warm clips:", times)
    assert len(clips) == 5
    assert "17 steps" in page.inner_text("#told") and "seed 5" in page.inner_text("#told")
    key = page.locator(".wj-key img").first
    assert key.evaluate("e => [e.naturalWidth, getComputedStyle(e).imageRendering]") == [32, "pixelated"]


def test_keyframes_on_a_time_line(visitor):
    page = visitor.page
    visitor.tab("Time line")
    page.wait_for_function("() => document.querySelectorAll('.wj-line figure').length == 2")
    visitor.give("inner1", example()["first"])
    page.wait_for_function("() => document.querySelectorAll('.wj-line figure').length == 3")
    page.fill("#at1 input", "20")
    page.press("#at1 input", "Tab")
    page.wait_for_function("() => [...document.querySelectorAll('.wj-line figcaption')].map(e => e.textContent).join()"
                           " == '0,20,24'")  # fmt: skip
    page.fill("#at1 input", "24")  # where the last one is
    page.press("#at1 input", "Tab")
    page.wait_for_timeout(500)
    page.click("button#make")
    page.wait_for_selector(".wj-failed [role=alert]")
    assert "keyframes" in page.inner_text(".wj-failed [role=alert] span")


def test_drawing_and_examples(visitor):
    page = visitor.page
    page.locator("#gallery button").nth(3).click()
    page.wait_for_function(
        "() => document.querySelector('#prompt textarea').value.startsWith('an orange cross moves up')"
    )
    page.click("#colour label:has(input[value=cyan])")
    page.wait_for_function("() => document.querySelector('#prompt textarea').value.startsWith('a cyan cross')")
    visitor.slide("x2", 0.2)
    page.wait_for_function(
        "() => document.querySelector('#prompt textarea').value.startsWith('a cyan cross moves up in')"
    )
    assert visitor.press()["compiled"] == 0


def test_nothing_of_the_method_is_active_in_wan(visitor):
    page = visitor.page
    touched = "#method_box input[type=range], #method_box input[type=checkbox], #method_box input[type=number]"
    active = f"() => [...document.querySelectorAll({touched!r})].filter(one => !one.disabled).length"
    assert page.evaluate(active) > 20
    page.click("#method label:has(input[value=wan])")
    page.wait_for_function(f"() => ({active})() == 0")
    assert visitor.press()["compiled"] == 0
    page.click("#method label:has(input[value=release])")
    page.wait_for_function(f"() => ({active})() > 20")
    assert page.input_value("#retro_mode input") == "magnitude"


def test_scrubbing(visitor):
    visitor.press()
    visitor.plays()
    page = visitor.page
    page.evaluate("() => { const s = document.querySelector('.wj-seek'); s.value = 24;"
                  " s.dispatchEvent(new Event('input', {bubbles: true})) }")  # fmt: skip
    page.wait_for_function("() => document.querySelector('.wj-key.wj-on')?.dataset.at == '24'")
    assert page.inner_text(".wj-frame") == "24 / 24"
    assert page.evaluate("() => document.querySelector('.wj-stage video').paused")
    for _ in range(2):
        page.click(".wj-prev")
    page.wait_for_function("() => document.querySelector('.wj-frame').textContent == '22 / 24'")
    page.click(".wj-play")
    page.wait_for_function("() => !document.querySelector('.wj-stage video').paused")


def test_comparing_and_looking(visitor):
    page = visitor.page
    visitor.press()
    visitor.tab("Compare A and B")
    assert visitor.press("compare")["compiled"] == 0
    width, height, *_, error = visitor.plays()
    assert (width, height, error) == (256 * 3 + 16, 256, None)
    assert page.locator(".wj-ab span").all_inner_texts() == ["A: wan", "B: KAB + ReTRo + isolated", "difference × 4"]
    page.click("button#pin")
    page.wait_for_selector("#against label.selected:has(input[value=pinned])")
    visitor.slide("strength_end", 3)
    visitor.press("compare")
    assert "A and B differ by" in page.inner_text("#told")
    visitor.tab("What KAB does")
    page.click("button#look")
    page.wait_for_selector(".wj-heat table")
    assert page.locator(".wj-heat tbody").count() == 3 and page.locator(".wj-strip").count() == 6


def test_settings_from_a_clip(visitor, tmp_path):
    page = visitor.page
    visitor.slide("strength_end", 1.5)
    visitor.press()
    with page.expect_download() as download:
        page.click("#told a[download]")
    download.value.save_as(tmp_path / "mine.mp4")
    visitor.slide("strength_end", 0.1)
    page.fill("#prompt textarea", "something else")
    visitor.tab("Settings")
    with page.expect_file_chooser() as chooser:
        page.click("button#load")
    chooser.value.set_files(tmp_path / "mine.mp4")
    page.wait_for_selector("#loaded .wj-quiet")
    page.wait_for_function("() => document.querySelector('#strength_end input[type=number]').value == '1.5'")
    assert page.input_value("#prompt textarea").startswith("a yellow circle")
    assert visitor.press()["compiled"] == 0


def test_a_bad_upload_is_one_line(visitor, tmp_path):
    (tmp_path / "notes.png").write_text("no image at all")
    visitor.give("first", tmp_path / "notes.png")
    visitor.page.wait_for_selector(".wj-failed [role=alert]")
    told = visitor.page.inner_text(".wj-failed [role=alert] span")
    assert told.startswith("notes.png: ") and "\n" not in told and "/" not in told


def test_stopping(visitor):
    page = visitor.page
    visitor.tab("Clip")
    visitor.slide("steps", 60)
    visitor.tab("Compare A and B")
    page.click("button#compare")
    page.wait_for_selector(".wj-screen .wj-preview", state="attached")  # at work, and shown in the player's place
    page.evaluate("() => document.querySelector('button#stop').click()")  # at once, on however slow a machine
    begun = time.perf_counter()
    page.wait_for_selector(".wj-stopped")
    print("seconds until it stopped:", time.perf_counter() - begun)
    visitor.slide("steps", 4)
    assert visitor.press()["compiled"] == 0


def test_two_people_at_once(visitor, browser, server):
    other = Visitor(browser, server.address)
    visitor.tab("Clip")
    visitor.slide("steps", 60)
    visitor.page.click("button#make")
    visitor.page.wait_for_selector(".wj-working")
    other.page.click("button#make")
    other.page.wait_for_selector(".wj-done")
    visitor.page.wait_for_selector(".wj-done")  # nobody stopped the first
    assert visitor.clip() != other.clip()
    assert "60 steps" in visitor.page.inner_text("#told") and "10 steps" in other.page.inner_text("#told")
    other.leave()


def test_who_leaves_stops_what_he_waits_for(visitor, browser, server):
    other = Visitor(browser, server.address)
    other.tab("Clip")
    other.slide("steps", 60)
    other.page.click("button#make")
    other.page.wait_for_selector(".wj-preview")
    other.leave()
    visitor.press()  # and is served


def test_on_a_phone(browser, server):
    one = Visitor(browser, server.address)
    one.page.set_viewport_size({"width": 420, "height": 900})
    one.press()
    assert one.page.evaluate("() => document.documentElement.scrollWidth") <= 420
    one.leave()


def test_a_token_and_the_end(browser, tmp_path):
    """Bound to every address it wants its token; what is under its folder goes with it, exit code 130."""
    server = Server("--host", "0.0.0.0", "--no-warm-up", folder=tmp_path)
    address, token = re.fullmatch(r"(http://127\.0\.0\.1:\d+/)\?token=(\S{32,})", server.address).groups()
    stranger = browser.new_context().new_page()
    assert stranger.goto(address).status == 401 and "token" in stranger.inner_text("body")
    one = Visitor(browser, f"{address}?token={token}")
    assert one.page.url == address  # the token does not stay in the address
    one.leave()
    (folder,) = tmp_path.glob("wanjax-studio-*")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert server.end() == 130 and not folder.exists()
    assert "Traceback" not in "".join(server.lines)
