"""``absynth train``: Ctrl-C and ``kill -9`` lose nothing that matters."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from absynth import data, weight_files
from small_models import save_picture

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def two_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures: 12 zeros, 12 ones."""
    folder = tmp_path_factory.mktemp("two")
    images, labels = data.load("digits", "train")
    for digit in (0, 1):
        (folder / str(digit)).mkdir()
        for number, image in enumerate(images[labels == digit][:12]):
            save_picture(folder / str(digit) / f"{number}.png", image, scale=1)
    return folder


def start(*arguments: object) -> subprocess.Popen[str]:
    """``absynth train`` in a session of its own, so that a signal can reach all of it as from a terminal."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-c", "from absynth.cli import main; main()", "train", *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 600
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def finish(*arguments: object) -> str:
    """What was said on stderr."""
    process = start(*arguments)
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err
    assert "of the test images right" in out
    return err


def test_interrupted_and_killed(two_classes: Path, tmp_path: Path) -> None:
    arguments = ("cnn", "--data", two_classes, "--effort", 8)
    finish(*arguments, "--out", tmp_path / "through")

    out = tmp_path / "stopped"
    checkpoint = out / "cnn.training" / "last.safetensors"
    process = start(*arguments, "--out", out)
    wait_for(checkpoint, process)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith(f"stopped: what was trained is kept in {out}/cnn.training; the same command")
    assert checkpoint.exists()
    assert not (out / "cnn.safetensors").exists()

    before = checkpoint.stat().st_mtime_ns
    process = start(*arguments, "--out", out)
    while checkpoint.stat().st_mtime_ns == before:
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.communicate(timeout=600)
    assert not (out / "cnn.safetensors").exists()

    said = finish(*arguments, "--out", out).splitlines()
    assert said[0].startswith(f"going on from {checkpoint} (epoch ")
    files = [tmp_path / folder / "cnn.safetensors" for folder in ("through", "stopped")]
    assert weight_files.read(files[0]).digest == weight_files.read(files[1]).digest
    assert not checkpoint.parent.exists()


def test_weights_of_another_training_are_not_replaced(two_classes: Path, tmp_path: Path) -> None:
    arguments = ("cnn", "--data", two_classes, "--out", tmp_path)
    assert "going on" not in finish(*arguments, "--effort", 0.1)
    header = weight_files.read(tmp_path / "cnn.safetensors").header
    assert header["command"].endswith(" --seed 0 --effort 0.1")
    for options, message in (
        (("--effort", 0.2), "effort 0.1, this training has effort 0.2"),
        (("--effort", 0.1, "--seed", 1), "seed 0, this training has seed 1"),
    ):
        process = start(*arguments, *options)
        _, err = process.communicate(timeout=600)
        assert process.returncode == 2 and len(err.splitlines()) == 1
        assert f"cnn.safetensors holds weights trained with {message}: give another folder" in err
    finish(*arguments, "--effort", 0.1)  # the same again is no other
    assert weight_files.read(tmp_path / "cnn.safetensors").digest == header["digest"]


def test_interrupted_workers(two_classes: Path, tmp_path: Path) -> None:
    """ABS trains in several processes: Ctrl-C ends them all, quietly."""
    arguments = ("abs", "--data", two_classes, "--effort", 0.2, "--out", tmp_path)
    process = start(*arguments)
    wait_for(tmp_path / "abs.training", process)
    deadline = time.monotonic() + 600
    while not list((tmp_path / "abs.training").glob("class-*.safetensors")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("stopped: what was trained is kept in")
    while time.monotonic() < deadline:  # the helpers of multiprocessing end a moment after their parent
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("a process of the session is left")


def test_killed_workers(two_classes: Path, tmp_path: Path) -> None:
    """After ``kill -9`` of the parent the workers end by themselves."""
    process = start("abs", "--data", two_classes, "--effort", 0.5, "--out", tmp_path)
    deadline = time.monotonic() + 600
    while not list((tmp_path / "abs.training").glob("class-*.safetensors")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.wait(timeout=600)
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.05)
    else:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail("workers outlived their parent")
    process.communicate()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("cn",), "did you mean cnn"),
        (("cnn", "--data", "digit"), "did you mean digits"),
        (("cnn", "--data", "digits", "--effort", "0"), "effort is 0"),
        (("cnn", "--data", "digits", "--seed", "-1"), "seed is -1"),
    ],
)
def test_errors(
    arguments: tuple[str, ...], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from absynth.cli import main

    monkeypatch.setattr(sys, "argv", ["absynth", "train", *arguments, "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert expected in capsys.readouterr().err


def test_unwritable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from absynth.cli import main

    (tmp_path / "file").write_text("")
    monkeypatch.setattr(sys, "argv", ["absynth", "train", "cnn", "--data", "digits", "--out", str(tmp_path / "file")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "choose a writable folder" in capsys.readouterr().err


def test_checkpoint_of_other_data(
    two_classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A training is never continued from another one's checkpoint."""
    from absynth.cli import main
    from absynth.training.checkpoint import save_checkpoint

    meta = {"model": "cnn", "config": {}, "data_digest": "other"}
    save_checkpoint(tmp_path / "cnn.training" / "last.safetensors", {"x": torch.zeros(1)}, meta)
    monkeypatch.setattr(sys, "argv", ["absynth", "train", "cnn", "--data", str(two_classes), "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "delete it to start over" in capsys.readouterr().err
