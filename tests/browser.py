"""A real browser: headless Chromium, driven by Selenium, on the explorer as a server on this machine."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException
from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

from absynth.explorer.app import create_app
from absynth.explorer.guard import Limits
from absynth.explorer.serve import listen, server
from absynth.explorer.shelf import Shelf

PATIENCE = 120  # seconds: small machines that do much else

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"),
    *("--disable-extensions", "--disable-default-apps", "--force-color-profile=srgb"),
)


@contextlib.contextmanager
def serving(shelf: Shelf, limits: Limits | None = None) -> Iterator[str]:
    """The address of an explorer that runs as long as the block."""
    bound = listen(0)
    running = server(create_app(shelf, limits), limits)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    until = time.monotonic() + PATIENCE
    while not running.started:
        assert thread.is_alive() and time.monotonic() < until, "the server did not start"
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        running.should_exit = True
        thread.join(PATIENCE)
        bound.close()


@contextlib.contextmanager
def chromium(profile: Path) -> Iterator[Chrome]:
    """Debian's Chromium with a fresh profile. Missing, it fails the tests of continuous integration, skips others."""
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or driver is None:
        missing = "no chromium and chromedriver: apt-get install chromium chromium-driver"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    options = ChromeOptions()
    options.binary_location = program
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = Chrome(options=options, service=ChromeService(driver))
    try:
        yield browser
    finally:
        browser.quit()


def resize(browser: Chrome, width: int, height: int, *, scale: float = 1, touch: bool = False) -> None:
    """The page in a window of this size; ``touch``: as a phone."""
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": touch},
    )
    browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": touch})


def shade(browser: Chrome, scheme: str) -> None:
    """``scheme``: "light" or "dark", as the reader's system prefers it."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def find(browser: Chrome, selector: str) -> WebElement:
    return browser.find_element(By.CSS_SELECTOR, selector)


def text(browser: Chrome, selector: str) -> str:
    return find(browser, selector).text


def wait(browser: Chrome, selector: str, *words: str, patience: float = PATIENCE) -> str:
    """The text of an element once it holds one of ``words`` (none: any text)."""
    until = time.monotonic() + patience
    while True:
        try:
            shown = text(browser, selector)
        except (NoSuchElementException, StaleElementReferenceException):  # not there yet
            shown = ""
        if shown and (not words or any(word in shown for word in words)):
            return shown
        if time.monotonic() > until:
            pytest.fail(f"{selector} says {shown!r} after {patience} s, expected one of {words}")
        time.sleep(0.05)


def opened(browser: Chrome, address: str) -> None:
    """Load the page and wait until it is ready."""
    browser.get(address)
    until = time.monotonic() + PATIENCE
    while browser.execute_script("return document.body.dataset.state") != "open":
        assert time.monotonic() < until, text(browser, "body")
        time.sleep(0.05)


def draw(browser: Chrome, points: list[tuple[float, float]], *, touch: bool = False) -> None:
    """One stroke on the pad through ``points``, in shares of its sides, by real input events."""
    box = browser.execute_script("return document.getElementById('pad').getBoundingClientRect().toJSON()")
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
    steps = [
        (a[0] + (b[0] - a[0]) * k / 6, a[1] + (b[1] - a[1]) * k / 6)
        for a, b in itertools.pairwise(places)
        for k in range(1, 7)
    ]
    if touch:
        for kind, spots in [("touchStart", [places[0]]), *(("touchMove", [step]) for step in steps), ("touchEnd", [])]:
            found = [{"x": x, "y": y} for x, y in spots]
            browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": found})
        return
    mouse = [("mousePressed", places[0]), *(("mouseMoved", step) for step in steps), ("mouseReleased", steps[-1])]
    for kind, (x, y) in mouse:
        browser.execute_cdp_cmd(
            "Input.dispatchMouseEvent",
            {"type": kind, "x": x, "y": y, "button": "left", "buttons": 1, "clickCount": 1},
        )


SEVEN = [(0.25, 0.22), (0.75, 0.22), (0.45, 0.82)]
