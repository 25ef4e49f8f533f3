"""Fixtures every test can ask for."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from command_line import Result, Run

# A runner in the background may ignore Ctrl-C, and the commands that the tests interrupt would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
# More threads only oversubscribe the small machines the tests run on. Two processes of tests take a core each, and so
# do the commands they call: threads that wait for one another spin, and two such pairs on two cores stand still.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
else:
    torch.set_num_threads(2)

Split = tuple[Tensor, Tensor]


def _mnist(split: str) -> Split:
    """MNIST where it is at hand. Continuous integration fails without it; elsewhere the test is skipped."""
    from absynth import data

    if not data.at_hand("mnist", split) and not os.environ.get("CI"):
        pytest.skip("MNIST is not at hand: set ABSYNTH_DATA to a folder with its four files")
    return data.load("mnist", split)


@pytest.fixture(scope="session")
def mnist_train() -> Split:
    """The 60,000 training images (N,1,28,28) float32 in [0, 1] and labels (N,) int64. Shared, so read only."""
    return _mnist("train")


@pytest.fixture(scope="session")
def mnist_test() -> Split:
    """The 10,000 test images and labels, like ``mnist_train``."""
    return _mnist("test")


@pytest.fixture
def generator() -> Callable[[int], torch.Generator]:
    """A seeded generator: ``generator(3)``."""
    return lambda seed=0: torch.Generator().manual_seed(seed)


# For commands


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small models of every name, which are right about nothing."""
    from small_models import write_all

    return write_all(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    from absynth import data
    from small_models import save_picture

    folder = tmp_path_factory.mktemp("pictures")
    images, _ = data.load("digits", "test")
    return [save_picture(folder / f"{number}.png", images[number]) for number in range(2)]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process."""

    from absynth.cli import main

    def call(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["absynth", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return Result(int(ended.value.code or 0), *capsys.readouterr())

    return call
