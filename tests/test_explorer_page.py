"""The explorer's page in a real browser: clicked, drawn on, attacked and read, large and small, light and dark."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from absynth import data, zoo
from absynth.certificates import certified_radii
from absynth.explorer.guard import Limits
from absynth.explorer.shelf import Shelf
from browser import PATIENCE, SEVEN, chromium, draw, find, opened, resize, serving, shade, text, wait
from small_models import write_all

NN = "nearest-neighbor"
SHOTS = os.environ.get("ABSYNTH_SCREENSHOTS")  # a folder: keep pictures of what was seen


def models_at_hand(weights: Path) -> list[str]:
    return [name for name in zoo.names() if zoo.path_of(name, weights).exists()]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def address(weights: Path) -> Iterator[str]:
    with serving(Shelf(weights), Limits(attack_seconds=600)) as address:  # a busy machine is slow
        yield address


@pytest.fixture(scope="module")
def chrome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def browser(chrome: Any, address: str) -> Iterator[Any]:
    """The page, open, in a large light window; afterwards it must have had nothing to complain about."""
    resize(chrome, 1280, 900)
    shade(chrome, "light")
    opened(chrome, address)
    yield chrome
    assert [entry for entry in chrome.get_log("browser") if entry["level"] == "SEVERE"] == []


def choose(browser: Any, model: str) -> None:
    find(browser, f"#model [value={model}]").click()


def shoot(browser: Any, name: str) -> None:
    if SHOTS:
        Path(SHOTS).mkdir(exist_ok=True)
        browser.save_screenshot(str(Path(SHOTS) / f"{name}.png"))


def painted(browser: Any, canvas: str) -> np.ndarray:
    """The gray values (28,28) of a canvas."""
    values = browser.execute_script(
        "const c = document.getElementById(arguments[0]);"
        "return Array.from(c.getContext('2d').getImageData(0, 0, 28, 28).data.filter((_, i) => i % 4 === 0))",
        canvas,
    )
    return np.array(values).reshape(28, 28)


def upright(seen: np.ndarray) -> bool:
    return bool((seen.max(1) > 100).sum() >= 18 and 0 < (seen.max(0) > 100).sum() <= 5)


def test_empty_then_drawn_then_cleared(browser: Any) -> None:
    assert "draw a digit" in text(browser, "#sure")
    assert find(browser, "#hint").is_displayed() and not find(browser, "#start").is_enabled()
    shoot(browser, "empty")
    draw(browser, SEVEN)
    assert "sure" in wait(browser, "#sure", "sure", "explains")
    assert text(browser, "#label") in list("0123456789")
    assert not find(browser, "#hint").is_displayed() and find(browser, "#start").is_enabled()
    seen = painted(browser, "seen")
    assert seen.max() == 255 and seen[:5].max() < 255  # framed: black around the ink
    assert len(browser.find_elements("css selector", "#explanations figure.best")) == 1
    energies = [float(one.text) for one in browser.find_elements("css selector", "#explanations span")]
    best = find(browser, "#explanations figure.best b").text
    assert energies[int(best)] == min(energies) and best == text(browser, "#label")
    shoot(browser, "drawn")
    find(browser, "#undo").click()
    wait(browser, "#sure", "draw a digit")
    assert text(browser, "#label") == "–" and not find(browser, "#start").is_enabled()


def test_drawing_by_keys(browser: Any) -> None:
    choose(browser, NN)
    pad = find(browser, "#pad")
    pad.send_keys(" " + "\ue015" * 12 + " ")  # pen down, 12 times arrow down, pen up: a one
    # The stroke is upright: a line of ink, 20 pixels high. What is seen follows the pen.
    until = time.monotonic() + PATIENCE
    while not upright(painted(browser, "seen")):
        assert time.monotonic() < until, painted(browser, "seen")
        time.sleep(0.1)
    pad.send_keys("\ue003")  # backspace
    wait(browser, "#sure", "draw a digit")


def test_test_images_pictures_and_their_errors(browser: Any, weights: Path, tmp_path: Path) -> None:
    images, labels = data.load("digits", "test")
    model = zoo.load(NN, folder=weights)
    choose(browser, NN)
    index = find(browser, "#index")
    index.clear()
    index.send_keys("7\n")
    wait(browser, "#source-note", f"Test image 7 of digits: a {labels[7]}.")
    wait(browser, "#label", str(int(model(images[7:8]).argmax())))
    assert np.abs(painted(browser, "seen") - 255 * images[7, 0].numpy()).max() <= 1
    assert "Proven" in wait(browser, "#certified", "Proven") and "L2" in text(browser, "#certified")
    chips = [chip.text for chip in browser.find_elements("css selector", "#certified .chip")]
    proven = certified_radii(model, images[7:8], model(images[7:8]).argmax(1), ("l2", "linf"))
    for name, norm in (("L2", "l2"), ("L∞", "linf")):
        shown = next(float(chip.removeprefix(name)) for chip in chips if chip.startswith(name))
        assert 0.99 * float(proven[norm]) <= shown <= float(proven[norm])  # never rounded up
    find(browser, "#next").click()
    wait(browser, "#source-note", "Test image 8 of digits")
    choose(browser, "cnn")
    wait(browser, "#certified button", "prove one")
    assert "cannot say" in text(browser, "#sure") and not find(browser, "#explained").is_displayed()
    find(browser, "#certified button").click()
    wait(browser, "#look-title", "prototype-abs")
    wait(browser, "#certified", "Proven")

    paper = np.full((1500, 1200), 255, np.uint8)
    paper[300:1200, 550:650] = 0
    Image.fromarray(paper).save(tmp_path / "one.png")
    (tmp_path / "broken.png").write_text("no picture")
    find(browser, "#file").send_keys(str(tmp_path / "one.png"))
    wait(browser, "#source-note", "Your picture, one.png.")
    browser.get_log("browser")
    find(browser, "#file").send_keys(str(tmp_path / "broken.png"))
    assert "is not a picture" in wait(browser, "#source-note", "not a picture")
    shoot(browser, "error")
    browser.get_log("browser")  # the refusal, which Chromium logs


def test_attack_difference_morph_and_the_others(browser: Any, weights: Path) -> None:
    choose(browser, NN)
    find(browser, "#next").click()
    wait(browser, "#sure", "sure")
    find(browser, "#norm-l2, [name=norm][value=l2]").send_keys(" ")
    before = text(browser, "#label")
    find(browser, "#start").click()
    assert "L2" in wait(browser, "#attack-status", "Found")
    wait(browser, "#adversarial-says", "%")
    assert text(browser, "#clean-says").startswith(before)
    after = text(browser, "#adversarial-says").split(",")[0]
    assert after != before and text(browser, "#distance").startswith("L2 ")
    wait(browser, "#between-says", f"says {after}")
    assert (painted(browser, "adversarial") != painted(browser, "clean")).any()
    there = models_at_hand(weights)
    wait(browser, f"#attack-answers [data-model={there[-1]}] .share", "%")
    rows = browser.find_elements("css selector", "#attack-answers .answer")
    assert [row.get_attribute("data-model") for row in rows] == there
    answers = text(browser, "#attack-answers")
    choose(browser, "abs")  # another model to look with changes nothing below
    assert text(browser, "#attack-answers") == answers
    choose(browser, NN)
    shoot(browser, "attacked")
    slider = find(browser, "#slider")
    slider.send_keys("\ue011")  # home: back to the image
    wait(browser, "#share", "0 %")
    wait(browser, "#between-says", f"says {before}")
    assert (painted(browser, "between") == painted(browser, "clean")).all()
    # A target that is the label already is refused in words.
    find(browser, f"#target [value='{before}']").click()
    find(browser, "#start").click()
    assert "already" in wait(browser, "#attack-status", "already")
    assert find(browser, "#start").text == "Attack"


def test_an_attack_can_be_stopped(browser: Any) -> None:
    choose(browser, "abs")
    find(browser, "#next").click()
    wait(browser, "#sure", "sure", "explains")
    find(browser, "[name=norm][value=l0]").send_keys(" ")
    find(browser, "#start").click()
    wait(browser, "#start", "Stop")
    wait(browser, "#attack-status", "Searching")
    shoot(browser, "busy")
    find(browser, "#start").click()
    assert "topped" in wait(browser, "#attack-status", "Stopped", "Found")
    wait(browser, "#start", "Attack")


@pytest.mark.parametrize("kind", ["scribble", "noise", "letter"])
def test_compare(browser: Any, weights: Path, kind: str) -> None:
    find(browser, f"[data-sample={kind}]").click()
    wait(browser, "#compare-status", "models that can refuse")
    rows = browser.find_elements("css selector", "#compare-answers .answer")
    assert [row.get_attribute("data-model") for row in rows] == models_at_hand(weights)
    assert all("%" in row.text for row in rows)
    assert painted(browser, "compared").max() > 200


def test_on_a_phone_in_the_dark_by_touch(browser: Any) -> None:
    light = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    resize(browser, 375, 740, scale=2, touch=True)
    shade(browser, "dark")
    dark = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert sum(map(int, light[4:-1].split(","))) > 600 and sum(map(int, dark[4:-1].split(","))) < 90
    choose(browser, NN)
    draw(browser, SEVEN, touch=True)
    wait(browser, "#label", *"0123456789")
    assert painted(browser, "seen").max() == 255
    find(browser, "#start").click()
    wait(browser, "#attack-status", "Found")
    shoot(browser, "phone")
    # Nothing sticks out sideways, and what is to be touched is large enough for a finger.
    assert browser.execute_script("return document.documentElement.scrollWidth") == 375
    small = browser.execute_script(
        "return [...document.querySelectorAll('button:not(.link), select, #index')]"
        ".filter((one) => one.offsetParent && one.getBoundingClientRect().height < 38).map((one) => one.id)"
    )
    assert small == []


def test_a_server_that_is_gone_is_said_so(chrome: Any, weights: Path) -> None:
    with serving(Shelf(weights)) as address:
        resize(chrome, 1280, 900)
        opened(chrome, address)
    draw(chrome, SEVEN)
    assert "absynth explore" in wait(chrome, "#look-status", "does not answer")
    assert find(chrome, "#look-status button").text == "Try again"
    shoot(chrome, "gone")
    chrome.get_log("browser")
