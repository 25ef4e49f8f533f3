"""Makes docs/explorer.png, the explorer with the shipped models in a real browser: python docs/explorer_picture.py."""

from __future__ import annotations

import io
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import browser as real  # noqa: E402 (tests/browser.py: Chromium and the server)
from absynth.explorer.guard import Limits  # noqa: E402
from absynth.explorer.shelf import Shelf  # noqa: E402

WIDTH = 1180
PATIENCE = 1500


def main() -> None:
    """A test image, attacked with the CNN as the victim."""
    limits = Limits(attack_seconds=PATIENCE)
    with real.serving(Shelf(), limits) as address, real.chromium(Path(tempfile.mkdtemp())) as browser:
        browser.command_executor.client_config.timeout = PATIENCE
        real.resize(browser, WIDTH, 900)
        real.shade(browser, "light")
        real.opened(browser, address)
        real.find(browser, "#next").click()
        real.wait(browser, "#sure", "sure", patience=PATIENCE)
        real.find(browser, "#victim [value=cnn]").click()
        real.find(browser, "#start").click()
        print(real.wait(browser, "#attack-status", "Found", "Stopped", patience=PATIENCE), flush=True)
        real.wait(browser, "#attack-answers [data-model=saturating-prototype-abs] .share", "%", patience=PATIENCE)
        time.sleep(1)
        browser.execute_script("document.activeElement.blur(); document.getElementById('compare').hidden = true")
        height = browser.execute_script("return document.querySelector('main').getBoundingClientRect().bottom + 20")
        real.resize(browser, WIDTH, int(height))
        time.sleep(1)
        shot = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
    # a palette: the page is flat areas and grays, and the file stays small
    shot.quantize(255).save(ROOT / "docs" / "explorer.png", optimize=True)


if __name__ == "__main__":
    main()
