"""Training of prototype-abs: it widens the certified margin, resumes to the same weights, and is run by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from absynth import data, weight_files, zoo
from absynth.certificates import Certifier, certified_radii
from absynth.errors import InputError
from absynth.exact import exact_distance
from absynth.prototypes import PrototypeABS
from absynth.training import recipes
from absynth.training.augment import Augmentation
from absynth.training.explanations import explanations
from absynth.training.prototypes import PrototypeConfig, train_prototypes
from absynth.training.recipes import train
from absynth.vae import Decoder, VAEConfig
from small_models import candidate_energies, write_all

SMALL = PrototypeConfig(
    count=8, epochs=4, batch_size=32, margin=1.5, latent_rate=0.1, learning_rate=1e-2, refreshed=3,
    augmentation=Augmentation(rotation=3, zoom=0, shear=0, shift=0),
)  # fmt: skip


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    images, labels = data.load("digits", "train")
    chosen = torch.cat([(labels == number).nonzero()[:64, 0] for number in (0, 1, 2)])
    return images[chosen], labels[chosen]


def start() -> tuple[list[Decoder], Tensor]:
    torch.manual_seed(0)
    return [Decoder(VAEConfig()).eval() for _ in range(3)], torch.randn(3, SMALL.count, 8)


def test_it_widens_the_margin_and_resumes(digits: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    images, labels = digits
    decoders, latents = start()
    losses: list[float] = []
    trained, found = train_prototypes(
        decoders, latents, images, labels, VAEConfig(), SMALL,
        progress=lambda _done, _total, text: losses.append(float(text.split()[-1])),
    )  # fmt: skip
    assert sum(losses[-6:]) < 0.6 * sum(losses[:6])
    model = PrototypeABS(trained, found, beta=SMALL.beta)
    assert (model(images).argmax(1) == labels).float().mean() > 0.8  # of three classes, from random weights
    assert all(not parameter.requires_grad for one in trained for parameter in one.parameters())

    file = tmp_path / "prototypes.safetensors"

    def stop(done: int, total: int, text: str) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_prototypes(decoders, latents, images, labels, VAEConfig(), SMALL, checkpoint=file, progress=stop)
    again, resumed = train_prototypes(decoders, latents, images, labels, VAEConfig(), SMALL, checkpoint=file)
    torch.testing.assert_close(resumed, found, rtol=1e-5, atol=1e-5)
    for a, b in zip(again, trained, strict=True):
        torch.testing.assert_close(a.conv_2.weight, b.conv_2.weight, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="config"):
        train_prototypes(
            decoders, latents, images, labels, VAEConfig(), replace(SMALL, margin=2.0), checkpoint=file
        )  # fmt: skip


def test_asking_for_a_ball_proves_more_in_it(digits: tuple[Tensor, Tensor]) -> None:
    images, labels = digits
    decoders, latents = train_prototypes(*start(), images, labels, VAEConfig(), replace(SMALL, epochs=8))
    gentle = replace(SMALL, epochs=8, learning_rate=3e-3, latent_rate=0.03, ball_margin=2.0)
    proved = []
    for balls in ((), (("l0", 12.0, 1.0),)):
        trained, found = train_prototypes(decoders, latents, images, labels, VAEConfig(), replace(gentle, balls=balls))
        model = PrototypeABS(trained, found, beta=SMALL.beta)
        proved.append(certified_radii(model, images[::4], labels[::4], ("l0",))["l0"].double().mean())
    assert proved[1] > proved[0] + 1


def test_settings_out_of_range_are_named() -> None:
    with pytest.raises(InputError, match="at least 1"):
        PrototypeConfig(count=0)
    with pytest.raises(InputError, match="radius"):
        PrototypeConfig(balls=(("l2", 0.0, 1.0),))


@pytest.fixture
def few_prototypes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe with fewer of them, in smaller batches."""
    small = replace(recipes.PROTOTYPES, count=20, epochs=1, batch_size=64)
    monkeypatch.setattr(recipes, "PROTOTYPES", small)


@pytest.mark.usefixtures("few_prototypes")
def test_the_recipe_writes_a_model_that_loads_and_certifies(tmp_path: Path) -> None:
    write_all(tmp_path)
    (tmp_path / "prototype-abs.safetensors").unlink()
    train("prototype-abs", "digits", out=tmp_path)
    model = zoo.load("prototype-abs", folder=tmp_path)
    assert isinstance(model, PrototypeABS)
    header = weight_files.read(tmp_path / "prototype-abs.safetensors").header
    assert header["config"]["decoders_digest"] == weight_files.read(tmp_path / "abs.safetensors").digest
    images, labels = data.load("digits", "test")
    assert (model(images).argmax(1) == labels).double().mean().item() == pytest.approx(header["accuracy"])
    assert not (tmp_path / "prototype-abs.training").exists()
    assert bool((certified_radii(model, images[:3], model(images[:3]).argmax(1))["l2"] > 0).all())


@pytest.mark.usefixtures("few_prototypes")
def test_a_killed_training_goes_on_from_its_centers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_all(tmp_path)
    (tmp_path / "prototype-abs.safetensors").unlink()

    def stop(done: int, total: int, text: str) -> None:
        if text.startswith("prototypes"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train("prototype-abs", "digits", out=tmp_path, progress=stop)
    assert (tmp_path / "prototype-abs.training" / "centers.safetensors").exists()

    def never(*_: object, **__: object) -> None:
        raise AssertionError("explained again")

    monkeypatch.setattr("absynth.training.recipes.explanations", never)
    assert train("prototype-abs", "digits", out=tmp_path).exists()
    assert not (tmp_path / "prototype-abs.training").exists()


def test_explanations_come_in_the_order_of_the_images_from_any_number_of_processes(
    digits: tuple[Tensor, Tensor],
) -> None:
    images, labels = (one[::4] for one in digits)
    decoders, _ = start()
    starts = torch.randn(3, 30, 8, generator=torch.Generator().manual_seed(0))
    one = explanations(decoders, starts, images, labels, VAEConfig(), workers=1)
    two = explanations(decoders, starts, images, labels, VAEConfig(), workers=2)
    for number, (a, b) in enumerate(zip(one, two, strict=True)):
        own = images[labels == number]
        assert torch.equal(a, b) and a.shape == (len(own), 8)
        before = candidate_energies(decoders[number], starts[number], own)
        after = (own - decoders[number](a)).square().flatten(1).sum(1) + a.square().sum(1) / 2  # (N_c,)
        assert (after <= before + 1e-3).all() and after.mean() < before.mean() - 0.1


def test_the_exact_distance_lies_between_certificate_and_adversarial() -> None:
    torch.manual_seed(1)
    decoders = [Decoder(VAEConfig()).eval() for _ in range(2)]
    for decoder in decoders:
        decoder.conv_3.weight.data.mul_(8)
    model = PrototypeABS(decoders, [torch.randn(6, 8), torch.randn(6, 8)])
    certifier = Certifier(model.prototypes())
    image = torch.rand(1, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    label = model(image).argmax(1)
    radius = float(certified_radii(model, image, label)["l2"])
    found = exact_distance(certifier, image.flatten(), int(label))
    assert radius <= found.lower * (1 + 1e-6) and found.lower <= found.upper <= 1.1 * found.lower
    assert found.adversarial is not None
    assert int(model(found.adversarial.float().view(1, 1, 28, 28)).argmax(1)) != int(label)
    with pytest.raises(InputError, match="misclassified"):
        exact_distance(certifier, image.flatten(), 1 - int(label))
