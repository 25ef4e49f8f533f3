"""Training of the baselines: learning, determinism, resuming, and checkpoints that survive anything."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from absynth.baselines import CNN, Binarized, MadryCNN
from absynth.errors import InputError
from absynth.training import multinorm, recipes
from absynth.training.augment import Augmentation, augment
from absynth.training.checkpoint import load_checkpoint, save_checkpoint
from absynth.training.classifiers import (
    CNNConfig,
    MadryConfig,
    accuracy,
    perturb,
    robust_accuracy,
    train_cnn,
    train_madry,
)
from absynth.training.run import Run

STILL = Augmentation(rotation=0, zoom=0, shear=0, shift=0)
TINY = CNNConfig(classes=3, maps=(8, 8, 8), epochs=3, batch_size=16, learning_rate=1e-2, averaging=0.9)


def bars(count: int, size: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Three classes: a bright horizontal bar, a vertical bar, or both, at a random place, with noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    images = torch.rand((count, 1, size, size), generator=generator) * 0.2
    places = torch.randint(1, size - 4, (count,), generator=generator)
    for image, label, place in zip(images[:, 0], labels.tolist(), places.tolist(), strict=True):
        if label in (0, 2):
            image[place : place + 3, 1:-1] = 0.9
        if label in (1, 2):
            image[1:-1, place : place + 3] = 0.9
    return images, labels


def same_weights(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small are fastest so."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Stopped(Exception):
    """Raised by a progress callback, in place of Ctrl-C."""


@pytest.mark.parametrize("binarized", [False, True])
def test_cnn_learns(binarized: bool) -> None:
    config = replace(TINY, binarized=binarized, epochs=8)
    model = train_cnn(*bars(240), config)
    assert isinstance(model, Binarized if binarized else CNN)
    assert not model.training
    assert accuracy(model, *bars(90, seed=1)) > 0.95


def test_madry_learns_to_resist() -> None:
    data, unseen = bars(240, size=8), bars(60, size=8, seed=1)
    config = MadryConfig(
        classes=3, epochs=5, batch_size=16, epsilon=0.2, steps=2, strong_steps=3, averaging=0.9, augmentation=STILL
    )
    hardened = train_madry(*data, config)
    assert isinstance(hardened, MadryCNN)
    attack = {"epsilon": 0.2, "step_size": 0.02, "steps": 10, "seed": 0}
    plain = train_madry(*data, replace(config, epsilon=0.0))
    assert accuracy(plain, *unseen) > 0.95
    assert robust_accuracy(hardened, *unseen, **attack) > robust_accuracy(plain, *unseen, **attack) + 0.2


def test_same_seed_same_weights_whatever_the_global_state() -> None:
    data = bars(48)
    torch.manual_seed(1)
    first = train_cnn(*data, TINY)
    state = torch.random.get_rng_state()
    torch.manual_seed(2)
    assert same_weights(first, train_cnn(*data, TINY))
    assert not same_weights(first, train_cnn(*data, replace(TINY, seed=1)))
    torch.manual_seed(1)
    assert torch.equal(torch.random.get_rng_state(), state)  # training leaves the global generator alone


Train = Callable[..., nn.Module]


def _madry(images: Tensor, labels: Tensor, **options: object) -> nn.Module:
    config = MadryConfig(classes=3, epochs=3, batch_size=16, steps=1, strong_steps=2)
    return train_madry(images, labels, config, **options)  # type: ignore[arg-type]


def _cnn(images: Tensor, labels: Tensor, **options: object) -> nn.Module:
    return train_cnn(images, labels, TINY, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("train", "size"), [(_cnn, 16), (_madry, 8)])
@pytest.mark.parametrize("stop_at", [1, 3, 5, 8])  # steps of 9: in each epoch, and exactly after one
def test_stopped_and_resumed_is_bit_identical(train: Train, size: int, stop_at: int, tmp_path: Path) -> None:
    data = bars(48, size)
    whole = train(*data)

    def stop(done: int, total: int, text: str) -> None:
        assert total == 9
        if done == stop_at:
            raise Stopped

    checkpoint = tmp_path / "deep" / "model.ckpt"
    with pytest.raises(Stopped):
        train(*data, checkpoint=checkpoint, progress=stop)
    seen = []
    resumed = train(*data, checkpoint=checkpoint, progress=lambda done, total, text: seen.append(done))
    assert same_weights(whole, resumed)
    assert seen[-1] == 9
    assert seen[0] == (1 if stop_at <= 3 else 3 if stop_at <= 6 else 6)  # what was done is not done again
    # a finished training is only loaded
    assert same_weights(whole, train(*data, checkpoint=checkpoint, progress=lambda *_: None))
    assert [file.name for file in checkpoint.parent.iterdir()] == ["model.ckpt"]


def test_kill_9_in_the_middle_loses_at_most_an_epoch(tmp_path: Path) -> None:
    checkpoint = tmp_path / "model.ckpt"
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
torch.set_num_threads(1)
from test_training_classifiers import TINY, bars, train_cnn
def say(done, total, text):
    print(done, flush=True)
    if done == 8:
        sys.stdin.read()
train_cnn(*bars(48), TINY, checkpoint={str(checkpoint)!r}, progress=say)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == "8":
                process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    seen: list[int] = []
    resumed = train_cnn(*bars(48), TINY, checkpoint=checkpoint, progress=lambda done, total, text: seen.append(done))
    assert seen[0] == 6
    assert same_weights(resumed, train_cnn(*bars(48), TINY))


def test_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    data, checkpoint = bars(48), tmp_path / "model.ckpt"
    train_cnn(*data, replace(TINY, epochs=1), checkpoint=checkpoint)
    before = checkpoint.read_bytes()
    with pytest.raises(InputError, match=r"has config .* delete it to start over"):
        train_cnn(*data, replace(TINY, epochs=1, seed=1), checkpoint=checkpoint)
    with pytest.raises(InputError, match="has data_digest"):
        train_cnn(*bars(48, seed=1), replace(TINY, epochs=1), checkpoint=checkpoint)
    with pytest.raises(InputError, match=r"has (config|model)"):
        _madry(*data, checkpoint=checkpoint)
    assert checkpoint.read_bytes() == before


def test_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    checkpoint = tmp_path / "model.ckpt"
    save_checkpoint(checkpoint, {"a": torch.arange(100.0)}, {"epoch": 1})
    content = checkpoint.read_bytes()
    for damaged in (content[:-1], content[:20], b"", b"not a checkpoint at all"):
        checkpoint.write_bytes(damaged)
        with pytest.raises(InputError, match=r"model\.ckpt is unreadable"):
            load_checkpoint(checkpoint)
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, checkpoint)
    with pytest.raises(InputError, match="no checkpoint of a training"):
        load_checkpoint(checkpoint)


def test_checkpoint_round_trip(tmp_path: Path) -> None:
    tensors = {
        "channels_last": torch.rand(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "view": torch.arange(10.0)[::2],
        "step": torch.tensor(3),
    }
    tensors["shared"] = tensors["step"]
    save_checkpoint(tmp_path / "a.ckpt", tensors, {"sizes": (1, 2), "text": "ünï"})
    loaded = load_checkpoint(tmp_path / "a.ckpt", expect={"sizes": (1, 2)})
    assert loaded is not None
    assert loaded[0].keys() == tensors.keys()
    assert all(torch.equal(loaded[0][name], value) for name, value in tensors.items())
    assert loaded[1] == {"sizes": [1, 2], "text": "ünï"}
    assert load_checkpoint(tmp_path / "none.ckpt") is None


def test_failed_write_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tmp_path / "a.ckpt"
    save_checkpoint(checkpoint, {"a": torch.zeros(2)}, {"epoch": 1})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left on device; choose a writable folder"):
        save_checkpoint(checkpoint, {"a": torch.ones(2)}, {"epoch": 2})
    loaded = load_checkpoint(checkpoint)
    assert loaded is not None and loaded[1] == {"epoch": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["a.ckpt"]
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write checkpoint"):
        save_checkpoint(tmp_path / "file" / "a.ckpt", {}, {})


def test_held_out_accuracy_is_reported() -> None:
    texts: list[str] = []
    train_cnn(*bars(48), TINY, held_out=bars(30, seed=1), progress=lambda done, total, text: texts.append(text))
    assert texts[0] == "" and texts[-1].startswith("held out ")
    config = MadryConfig(classes=3, epochs=1, batch_size=16, steps=1, strong_epochs=0, epsilon_warm_up=0)
    train_madry(
        *bars(48, size=8),
        config,
        held_out=bars(30, size=8, seed=1),
        progress=lambda done, total, text: texts.append(text),
    )
    assert "attacked" in texts[-1]


def test_bad_data_and_configurations_are_refused() -> None:
    images, labels = bars(12)
    for bad_images, bad_labels, message in (
        (images * 255, labels, "divide by 255"),
        (images[:, 0], labels, "expected"),
        (images, labels[:5], r"expected int64 \(12,\)"),
        (images, labels.float(), "float32"),
        (images, labels + 1, "labels run from 1 to 3"),
    ):
        with pytest.raises(InputError, match=message):
            train_cnn(bad_images, bad_labels, TINY)
    for options in ({"epochs": 0}, {"batch_size": 0}, {"classes": 1}, {"seed": -1}):
        with pytest.raises(InputError):
            CNNConfig(**options)


def test_perturb_stays_in_the_ball_and_raises_the_loss() -> None:
    images, labels = bars(12, size=8)
    model = train_madry(images, labels, MadryConfig(classes=3, epochs=1, epsilon=0, augmentation=STILL))
    moved = perturb(model, images, labels, 0.1, 0.04, 5, torch.Generator().manual_seed(0))
    assert (moved - images).abs().max() <= 0.1 + 1e-6
    assert moved.min() >= 0 and moved.max() <= 1
    loss = nn.functional.cross_entropy
    assert loss(model(moved), labels) > loss(model(images), labels)
    assert not moved.requires_grad


def test_augmentation_moves_each_image_by_itself() -> None:
    images = torch.zeros(200, 1, 29, 29)
    images[:, :, 14, 14] = 1.0  # the center, which only a shift moves
    generator = torch.Generator().manual_seed(0)
    moved = augment(images, Augmentation(rotation=10, zoom=0.1, shear=6, shift=0), generator)
    assert (moved[:, 0, 14, 14] > 0.99).all()
    images[:, :, 14, 14], images[:, :, 14, 24] = 0.0, 1.0  # 10 pixels to the right
    rows, columns = torch.meshgrid(torch.arange(29.0), torch.arange(29.0), indexing="ij")

    def place(amount: Augmentation) -> tuple[Tensor, Tensor]:
        mass = augment(images, amount, torch.Generator().manual_seed(1))[:, 0]
        weight = mass.sum((1, 2))
        return (mass * rows).sum((1, 2)) / weight - 14, (mass * columns).sum((1, 2)) / weight - 14

    down, right = place(replace(STILL, shift=2))
    assert down.min() < -1.5 and down.max() > 1.5 and down.abs().max() < 2.01
    assert (right - 10).abs().max() < 2.01 and (right - 10).abs().max() > 1.5
    down, right = place(replace(STILL, zoom=0.1))
    assert 8.8 < right.min() < 9.4 and 10.6 < right.max() < 11.2 and down.abs().max() < 0.05
    down, right = place(replace(STILL, rotation=10))
    degrees = torch.rad2deg(torch.atan2(down, right))
    assert 8 < degrees.max() < 10.5 and -10.5 < degrees.min() < -8
    assert augment(images, STILL, generator) is images
    assert (augment(images, Augmentation(), torch.Generator().manual_seed(2)).amax() <= 1).all()


@pytest.mark.parametrize(
    "name, module, function",
    [
        ("cnn", recipes, "train_cnn"),
        ("madry", recipes, "train_madry"),
        ("l2-adversarial", multinorm, "train_in_balls"),
        ("msd", multinorm, "train_in_balls"),
        ("smoothed-cnn", multinorm, "train_noisy"),
    ],
)
def test_networks_are_trained_on_the_device_asked_for(
    name: str, module: ModuleType, function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Reached(Exception):
        pass

    def placed(run: Run, split: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return split[0].to("meta"), split[1].to("meta")

    def reached(images: Tensor, labels: Tensor, *_: object, held_out: tuple[Tensor, Tensor], **__: object) -> None:
        assert {one.device.type for one in (images, labels, *held_out)} == {"meta"}
        raise Reached

    monkeypatch.setattr(Run, "placed", placed)
    monkeypatch.setattr(module, function, reached)
    with pytest.raises(Reached):
        recipes.train(name, "digits", out=tmp_path, effort=0.01)
