"""Certificates through a ramp against brute force over the box, in dimensions where every image can be tried."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from absynth.certificates import Certifier, certified_radii
from absynth.least import Box, least_l2_joint, least_norm
from absynth.norms import NORMS
from absynth.prototypes import PrototypeABS, SaturatingPrototypeABS
from absynth.responses import Ramp
from absynth.vae import Decoder, VAEConfig
from test_certificates import ALL, Model, brute_force, grid, random_model


class Seen(Model):
    """The same prototypes, compared with the image's response."""

    def __init__(self, plain: Model, ramp: Ramp) -> None:
        self.given, self.ramp = replace(plain.given, response=ramp, slack=1e-6), ramp

    def label_losses(self, images: Tensor) -> Tensor:
        return super().label_losses(self.ramp(images.double()))


@pytest.mark.parametrize("norm", ALL)
@pytest.mark.parametrize("seed", range(5))
def test_no_point_of_the_box_breaks_a_certificate(seed: int, norm: str) -> None:
    model = Seen(random_model(seed, pixels=3), Ramp((0.1, 0.2, 0.25, 0.3, 0.4)[seed % 5]))
    points = grid(3, 21)  # 0.1, 0.2, 0.25, 0.3, 0.4 and their mirror images are on it: the ramp's ends
    images = points[torch.randperm(len(points), generator=torch.Generator().manual_seed(seed))[:8]].float()
    images[0, 0], images[1, 1] = 0.0, 1.0
    labels = model.label_losses(images).argmin(1)
    radii = certified_radii(model, images[:, None, None], labels, (norm,))[norm]
    found = 0
    for image, label, radius in zip(images, labels, radii, strict=True):
        nearest = brute_force(model, image, int(label), points, norm)
        found += math.isfinite(nearest)
        assert float(radius) <= nearest + 1e-6
    assert found


@pytest.mark.parametrize("seed", range(6))
def test_linf_with_one_prototype_a_class_is_the_distance(seed: int) -> None:
    levels = 201
    model = Seen(random_model(seed, pixels=2, each=1, classes=2), Ramp(0.25))
    points = grid(2, levels)
    images = torch.rand(6, 2, generator=torch.Generator().manual_seed(100 + seed)).float()
    images[0, 0] = 0.0
    labels = model.label_losses(images).argmin(1)
    radii = certified_radii(model, images[:, None, None], labels, ("linf",))["linf"]
    for image, label, radius in zip(images, labels, radii, strict=True):
        nearest = brute_force(model, image, int(label), points, "linf")
        if math.isfinite(nearest):
            assert nearest - 4 / levels <= float(radius) <= nearest + 1e-6
        else:
            assert float(radius) > 0.3


@pytest.mark.parametrize("seed", range(4))
def test_l0_counts_the_pixels_that_an_attack_needs(seed: int) -> None:
    pixels = 6
    generator = torch.Generator().manual_seed(seed)
    plain = Model(torch.rand(2, pixels, generator=generator), torch.zeros(2), torch.arange(2))
    model = Seen(plain, Ramp(0.3))
    images = torch.rand(5, pixels, generator=generator)
    labels = model.label_losses(images).argmin(1)
    radii = certified_radii(model, images[:, None, None], labels, ("l0",))["l0"]
    for image, label, radius in zip(images, labels, radii, strict=True):
        fewest = math.inf
        for mask in (torch.tensor(chosen) for chosen in itertools.product([False, True], repeat=pixels)):
            corners = torch.tensor(list(itertools.product([0.0, 1.0], repeat=int(mask.sum()))))
            changed = image.expand(len(corners), -1).clone()
            changed[:, mask] = corners
            losses = model.label_losses(changed)
            if bool((losses[:, 1 - int(label)] <= losses[:, int(label)]).any()):
                fewest = min(fewest, int(mask.sum()))
        assert float(radius) == fewest


def problems(seed: int, pixels: int = 8) -> tuple[Tensor, Tensor, Box, Tensor, Ramp]:
    """Slopes (R,N), thresholds (R,), the box, the image (N,) and its ramp: pixels on both flat parts and between."""
    generator = torch.Generator().manual_seed(seed)
    ramp = Ramp(0.25)
    image = torch.rand(pixels, generator=generator, dtype=torch.float64)
    image[:3] = torch.tensor([0.0, 1.0, 0.1])
    enter_up, up = ramp.moves(image, up=True)
    enter_down, down = ramp.moves(image, up=False)
    box = Box(up, down, enter_up, enter_down)
    slopes = torch.randn(20, pixels, generator=generator, dtype=torch.float64)
    reach = (slopes.abs() * box.room(slopes)).sum(1)
    return slopes, reach * torch.linspace(0.05, 0.95, 20, dtype=torch.float64), box, image, ramp


@pytest.mark.parametrize("norm", ALL)
def test_least_norm_is_not_undercut(norm: str) -> None:
    """No random perturbation, many of them of the kind that attacks make, gains as much for less."""
    slopes, thresholds, box, image, ramp = problems(3)
    generator = torch.Generator().manual_seed(4)
    tries = torch.rand(40000, len(image), generator=generator, dtype=torch.float64)
    tries = torch.where(tries < 0.2, 0.25 + tries, tries)  # just inside the ramp
    keep = torch.rand(tries.shape, generator=generator) < torch.rand(len(tries), 1, generator=generator)
    delta = torch.where(keep, tries - image, 0.0)
    gained = (ramp(image + delta) - ramp(image)) / ramp.slope
    found = least_norm(slopes, thresholds, box, norm)
    sizes = NORMS[norm].size(delta[:, None, None])
    worked = 0
    for row in range(20):
        works = gained @ slopes[row] >= thresholds[row]
        worked += bool(works.any())
        if bool(works.any()):
            assert float(found[row]) <= float(sizes[works].min()) + 1e-9
    assert worked > 15
    assert bool(torch.isinf(least_norm(slopes, (slopes.abs() * box.room(slopes)).sum(1) * 1.01, box, norm)).all())


def test_l2_dual_leaves_little_where_pixels_are_many() -> None:
    """A feasible perturbation that the multiplier suggests is hardly longer than the bound."""
    slopes, thresholds, box, image, ramp = problems(5, pixels=400)
    thresholds = thresholds / 3
    lower = least_norm(slopes, thresholds, box, "l2")
    ways = torch.logspace(-3, 1.5, 1500, dtype=torch.float64)[:, None]
    for row in range(20):
        pull = slopes[row].abs() * ways
        room, entry = box.room(slopes[row]), box.entry(slopes[row])
        assert entry is not None
        delta = torch.minimum(pull, entry + room)
        delta = torch.where(2 * pull * (delta - entry) > delta.square(), delta, 0.0)
        moved = (image + slopes[row].sign() * delta).clamp(0, 1)
        enough = (ramp(moved) - ramp(image)) @ slopes[row] / ramp.slope >= thresholds[row]
        upper = float(delta.norm(dim=1)[enough].min())
        assert float(lower[row]) <= upper <= 1.1 * float(lower[row])


def test_several_planes_ask_for_at_least_as_much_as_one_and_are_not_undercut() -> None:
    slopes, thresholds, box, image, ramp = problems(6)
    single = least_norm(slopes, thresholds * 0.4, box, "l2").view(10, 2)
    joint, _ = least_l2_joint(slopes.view(10, 2, -1), (thresholds * 0.4).view(10, 2), box, steps=300)
    assert bool((joint >= single.amax(1) * 0.9).all()) and bool((joint > single.amax(1) * 1.02).any())
    tries = torch.rand(50000, len(image), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gained = ((ramp(tries) - ramp(image)) / ramp.slope) @ slopes.T  # (tries,20)
    works = (gained >= thresholds * 0.4).view(-1, 10, 2).all(2)
    sizes = (tries - image).norm(dim=1)
    for row in range(10):
        if bool(works[:, row].any()):
            assert float(joint[row]) <= float(sizes[works[:, row]].min()) + 1e-9


def test_a_ramp_from_0_to_1_certifies_what_no_ramp_does() -> None:
    plain = random_model(1, pixels=12, each=4)
    images = torch.rand(6, 1, 1, 12, generator=torch.Generator().manual_seed(2))
    labels = plain.label_losses(images.flatten(1)).argmin(1)
    with_ramp = certified_radii(Seen(plain, Ramp(0.0)), images, labels)
    for norm, radii in certified_radii(plain, images, labels).items():
        torch.testing.assert_close(with_ramp[norm], radii, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def decoded() -> tuple[PrototypeABS, SaturatingPrototypeABS]:
    """Prototypes of random decoders, and the same behind a ramp."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        decoders = [Decoder(VAEConfig(28, 1, 8)).eval() for _ in range(3)]
        latents = [2 * torch.randn(6, 8) for _ in range(3)]
    return PrototypeABS(decoders, latents), SaturatingPrototypeABS(decoders, latents, response=Ramp(0.25))


def test_the_saturating_model_is_the_plain_one_on_the_response(
    decoded: tuple[PrototypeABS, SaturatingPrototypeABS],
) -> None:
    plain, saturating = decoded
    images = torch.rand(5, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    seen = saturating.response(images)
    assert torch.equal(saturating(images), plain(seen))
    assert torch.equal(saturating.analyze(images).energies, plain.analyze(seen).energies)
    images.requires_grad_(True)
    (gradient,) = torch.autograd.grad(saturating(images)[:, 0].sum(), images)
    flat = (images < 0.25) | (images > 0.75)
    assert bool((gradient[flat] == 0).all()) and bool((gradient[~flat] != 0).all())


def test_screening_loses_no_rival(decoded: tuple[PrototypeABS, SaturatingPrototypeABS]) -> None:
    """The radius is the smallest over all rivals, each measured in full."""
    _, model = decoded
    certifier = Certifier(model.prototypes(), joint=0)
    image = model.points[2].clone().lerp(torch.zeros(784), 0.3)
    label = int(model(image.view(1, 1, 28, 28)).argmax())
    planes = certifier.planes(image, label)
    rivals = (model.prototypes().labels != label).nonzero()[:, 0]
    slopes, thresholds = planes.exactly(rivals, planes.best(rivals))
    for norm in ALL:
        every = least_norm(slopes.flatten(0, 1), thresholds.flatten(), planes.box, norm).view(thresholds.shape)
        expected = float(every.amax(1).min())
        got = float(certifier.radii(image.view(1, 1, 28, 28), torch.tensor([label]), (norm,))[norm])
        assert got == pytest.approx(expected, rel=1e-6) and expected > 0
