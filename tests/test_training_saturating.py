"""Training of the saturating models and of the baselines beside them, on a handful of images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from absynth import data, weight_files, zoo
from absynth.classifiers import ABS
from absynth.errors import InputError
from absynth.norms import L1, L2, LINF
from absynth.prototypes import SaturatingPrototypeABS
from absynth.responses import Ramp
from absynth.smoothing import Smoothed
from absynth.training import candidates, saturating
from absynth.training.multinorm import BallsConfig, NoisyConfig, steepest_of, train_in_balls, train_noisy
from absynth.training.recipes import train
from absynth.training.saturating import RAMPS
from absynth.vae import Decoder, VAEConfig
from small_models import save_picture, write


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder of pictures, 18 zeros and 18 ones, and a folder of weights with an untrained ABS of two classes."""
    pictures, weights = tmp_path_factory.mktemp("two"), tmp_path_factory.mktemp("weights")
    images, labels = data.load("digits", "train")
    for digit in (0, 1):
        (pictures / str(digit)).mkdir()
        for number, image in enumerate(images[labels == digit][:18]):
            save_picture(pictures / str(digit) / f"{number}.png", image, scale=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tensors = {"candidates": torch.randn(2, 6, 8).half()}
        for number in range(2):
            for name, value in Decoder(VAEConfig()).state_dict().items():
                if not name.endswith("num_batches_tracked"):
                    tensors[f"{number}.decoder.{name}"] = value
    config = {"classes": 2, "image_size": 28, "channels": 1, "latent_size": 8, "beta": 1.0}
    write(weights, "abs", tensors, {**config, "alpha": 440.0, "eta": 1e-6, "refusal": 0.2})
    return pictures, weights


def test_saturating_models_are_trained_and_loaded(folder: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    pictures, weights = folder
    monkeypatch.setattr(saturating, "BALLS", {L2: 0.02, LINF: 0.001})  # what so little training proves
    monkeypatch.setattr(candidates, "BLIND", 20)
    train("saturating-abs", pictures, out=weights, effort=0.01)  # and the prototypes first
    model, prototypes = zoo.load("saturating-abs", folder=weights), zoo.load("saturating-prototype-abs", folder=weights)
    assert isinstance(model, ABS) and isinstance(model.response, Ramp) and model.response.a in RAMPS
    assert isinstance(prototypes, SaturatingPrototypeABS) and prototypes.response.a == model.response.a
    shares = weight_files.read(weights / "saturating-prototype-abs.safetensors").header["config"]["ramps"]
    assert list(shares) == [f"{a:g}" for a in RAMPS] and max(shares.values()) == shares[f"{model.response.a:g}"]
    before = zoo.load("abs", folder=weights)
    assert isinstance(before, ABS)
    changed = [
        not torch.equal(a, b) for a, b in zip(before.decoders.parameters(), model.decoders.parameters(), strict=True)
    ]
    assert any(changed)
    images, labels = data.load(pictures, "test")
    header = weight_files.read(weights / "saturating-abs.safetensors").header
    # so few steps teach nothing; but what the header says is what the model does
    assert (model(images).argmax(1) == labels).double().mean().item() == pytest.approx(header["accuracy"])


@pytest.mark.parametrize("name", ["binary-abs", "prototype-abs", "saturating-abs"])
def test_a_training_does_not_begin_with_weights_of_other_data(
    folder: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    """They may have been trained on what is held out here."""
    pictures, weights = folder
    file = weight_files.read(weights / "abs.safetensors")
    weight_files.write(tmp_path / "abs.safetensors", file.tensors, {**file.header, "data": "mnist", "data_digest": "0"})
    with pytest.raises(InputError, match=r"abs\.safetensors holds weights trained on mnist"):
        train(name, pictures, out=tmp_path, effort=0.01)
    assert not (tmp_path / f"{name}.safetensors").exists()


def test_models_are_loaded_and_trained_without_touching_the_global_generator(
    folder: tuple[Path, Path], tmp_path: Path
) -> None:
    pictures, weights = folder
    before = torch.random.get_rng_state()
    zoo.load("abs", folder=weights)
    train("nearest-neighbor", pictures, out=tmp_path)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_step_in_several_balls_stays_inside_one_of_them() -> None:
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(6, 1, 28, 28, generator=generator), torch.arange(6) % 3
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 3))
    balls = {LINF: 0.1, L2: 1.0, L1: 4.0}
    moved = steepest_of(model, images, labels, balls, 6, 2.0)
    assert moved.min() >= 0 and moved.max() <= 1
    inside = torch.stack([norm.distance(moved, images) <= radius * (1 + 1e-5) for norm, radius in balls.items()])
    assert inside.any(0).all()
    loss = torch.nn.functional.cross_entropy
    with torch.no_grad():
        assert loss(model(moved), labels) > loss(model(images), labels) + 0.1
        # the worst of the norms at each step is at least as bad as one of them alone, on a linear model
        alone = [
            float(loss(model(steepest_of(model, images, labels, {n: r}, 6, 2.0)), labels)) for n, r in balls.items()
        ]
        assert float(loss(model(moved), labels)) >= min(alone) - 1e-4


def test_networks_in_balls_and_under_noise_learn_two_digits() -> None:
    images, labels = data.load("digits", "train")
    some = (labels < 2).nonzero().squeeze(1)[:96]
    images, labels = images[some], labels[some]
    small = {"classes": 2, "batch_size": 16, "seed": 0}
    balls = train_in_balls(
        images,
        labels,
        BallsConfig(**small, epochs=3, steps=2, radii=(("l2", 1.0), ("linf", 0.1)), warm_up_epochs=1.0),  # type: ignore[arg-type]
    )
    assert (balls(images).argmax(1) == labels).float().mean() > 0.8
    network = train_noisy(images, labels, NoisyConfig(**small, epochs=4, maps=(4, 4, 8)))  # type: ignore[arg-type]
    votes = Smoothed(network, 0.5, 20)
    assert (votes(images).argmax(1) == labels).float().mean() > 0.8
    with pytest.raises(InputError, match="radii"):
        BallsConfig(radii=(("l3", 1.0),))


def test_votes_are_a_pure_function_of_the_image() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 4))
    model = Smoothed(network, 0.5, 50)
    images = torch.rand(5, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    first = model(images)
    torch.manual_seed(7)
    assert torch.equal(model(images.flip(0)).flip(0), first) and torch.equal(model(images[2:3]), first[2:3])
    images[1, 0, 0, 0] = 0.0
    zeros = images.clone()
    zeros[1, 0, 0, 0] = -0.0  # the same image
    assert torch.equal(model(zeros), model(images)) and torch.equal(model._noise(zeros[1]), model._noise(images[1]))
    first = model(images)
    shares = first.exp() * (50 + 2) - 0.5
    torch.testing.assert_close(shares.sum(1), torch.full((5,), 50.0))
    torch.testing.assert_close(shares, shares.round(), rtol=0, atol=1e-3)
    images.requires_grad_(True)
    (gradient,) = torch.autograd.grad(model(images)[:, 0].sum(), images)
    assert bool((gradient != 0).any())
    with pytest.raises(InputError, match="sigma"):
        Smoothed(network, 0.0)
