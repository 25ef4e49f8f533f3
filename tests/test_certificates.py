"""Certificates against brute force over the box, in dimensions where every image can be tried."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from absynth.baselines import NearestNeighbor
from absynth.certificates import Certifier, certified_radii
from absynth.errors import InputError
from absynth.exact import exact_distance
from absynth.least import Box, least_norm
from absynth.norms import NORMS
from absynth.planes import Prototypes

ALL = ("l0", "l1", "l2", "linf")


class Model:
    """A classifier of images of N pixels in a row, by prototypes given as they are."""

    def __init__(self, points: Tensor, costs: Tensor, labels: Tensor, slack: float = 0.0) -> None:
        order = labels.argsort(stable=True)
        self.given = Prototypes(points[order].float(), costs[order].float(), labels[order], slack)

    def prototypes(self) -> Prototypes:
        return self.given

    def label_losses(self, images: Tensor) -> Tensor:
        """f (B,K) of images (B,N), float64."""
        p = self.given
        f = (images[:, None].double() - p.points.double()).square().sum(2) + p.costs.double()
        return torch.stack([f[:, p.labels == c].amin(1) for c in range(int(p.labels.max()) + 1)], dim=1)


def random_model(seed: int, pixels: int, each: int = 3, classes: int = 3) -> Model:
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand(each * classes, pixels, generator=generator)
    costs = 0.1 * torch.rand(each * classes, generator=generator)
    return Model(points, costs, torch.arange(classes).repeat(each))


def grid(pixels: int, levels: int) -> Tensor:
    axis = torch.linspace(0, 1, levels, dtype=torch.float64)
    return torch.stack([one.flatten() for one in torch.meshgrid(*[axis] * pixels, indexing="ij")], dim=1)


def brute_force(model: Model, image: Tensor, label: int, points: Tensor, norm: str) -> float:
    """The distance from image (N,) to the nearest of the grid's points (G,N) that gets another label."""
    losses = model.label_losses(points)
    mine = losses[:, label].clone()
    losses[:, label] = math.inf
    broken = points[losses.amin(1) <= mine]
    if not len(broken):
        return math.inf
    delta = broken - image.double()
    if norm == "l0":
        return float((delta.abs() > 1e-9).sum(1).min())
    order = {"l1": 1, "l2": 2, "linf": math.inf}[norm]
    return float(torch.linalg.vector_norm(delta, ord=order, dim=1).min())


@pytest.mark.parametrize("norm", ALL)
@pytest.mark.parametrize("seed", range(12))
def test_no_point_of_the_box_breaks_a_certificate(seed: int, norm: str) -> None:
    model = random_model(seed, pixels=3)
    points = grid(3, 26)
    images = points[torch.randperm(len(points), generator=torch.Generator().manual_seed(seed))[:8]].float()
    labels = model.label_losses(images).argmin(1)
    radii = certified_radii(model, images[:, None, None], labels, (norm,))[norm]
    for image, label, radius in zip(images, labels, radii, strict=True):
        assert float(radius) <= brute_force(model, image, int(label), points, norm) + 1e-6


@pytest.mark.parametrize("norm", ("l1", "l2", "linf"))
@pytest.mark.parametrize("seed", range(6))
def test_with_one_prototype_a_class_the_certificate_is_the_distance(seed: int, norm: str) -> None:
    model = random_model(seed, pixels=2, each=1, classes=2)
    levels = 401
    points = grid(2, levels)
    images = torch.rand(4, 2, generator=torch.Generator().manual_seed(100 + seed)).float()
    images[0, 0] = 0.0  # a pixel that can only rise
    labels = model.label_losses(images).argmin(1)
    radii = certified_radii(model, images[:, None, None], labels, (norm,))[norm]
    for image, label, radius in zip(images, labels, radii, strict=True):
        nearest = brute_force(model, image, int(label), points, norm)
        if math.isinf(nearest):  # the other class owns at most a corner between the grid's points
            assert float(radius) > 0.5
        else:
            assert nearest - 4 / levels <= float(radius) <= nearest + 1e-6


@pytest.mark.parametrize("seed", range(6))
def test_l0_counts_the_pixels_that_an_attack_needs(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    pixels = 6
    model = Model(torch.rand(2, pixels, generator=generator), torch.zeros(2), torch.arange(2))
    images = torch.rand(5, pixels, generator=generator)
    labels = model.label_losses(images).argmin(1)
    radii = certified_radii(model, images[:, None, None], labels, ("l0",))["l0"]
    for image, label, radius in zip(images, labels, radii, strict=True):
        fewest = math.inf
        for chosen in itertools.product([False, True], repeat=pixels):
            mask = torch.tensor(chosen)
            corners = torch.tensor(list(itertools.product([0.0, 1.0], repeat=int(mask.sum()))), dtype=torch.float32)
            changed = image.expand(len(corners), -1).clone()
            changed[:, mask] = corners
            losses = model.label_losses(changed)
            if bool((losses[:, 1 - int(label)] <= losses[:, int(label)]).any()):
                fewest = min(fewest, int(mask.sum()))
        assert float(radius) == fewest


def test_inside_the_box_l2_is_the_distance_to_the_bisecting_plane() -> None:
    points = torch.tensor([[0.4, 0.5, 0.5], [0.6, 0.5, 0.5]])
    model = Model(points, torch.zeros(2), torch.arange(2))
    image = torch.tensor([[0.42, 0.3, 0.9]])[:, None, None]
    radii = certified_radii(model, image, torch.tensor([0]))
    for norm in ("l1", "l2", "linf"):
        assert float(radii[norm]) == pytest.approx(0.08, abs=1e-6)
    assert float(radii["l0"]) == 1


def test_a_wall_of_the_box_makes_the_radius_larger() -> None:
    # the rival differs in two pixels, of which the first has no room left
    model = Model(torch.tensor([[0.0, 0.2], [-0.0, 0.8]]) + torch.tensor([[0.2, 0.0], [0.0, 0.0]]), torch.zeros(2),
                  torch.arange(2))  # fmt: skip
    image = torch.tensor([[0.0, 0.2]])[:, None, None]
    radii = certified_radii(model, image, torch.tensor([0]), ("l2",))
    threshold = ((0.6**2) - (0.2**2)) / 2
    assert float(radii["l2"]) == pytest.approx(threshold / 0.6, rel=1e-5)
    assert float(radii["l2"]) > threshold / math.hypot(0.6, 0.2)


def test_misclassified_images_and_ties_have_radius_0() -> None:
    model = Model(torch.tensor([[0.25], [0.75]]), torch.zeros(2), torch.arange(2))
    images = torch.tensor([[0.9], [0.5], [0.1]])[:, None, None]
    radii = certified_radii(model, images, torch.zeros(3, dtype=torch.int64))
    for norm in ALL:
        assert radii[norm][:2].tolist() == [0.0, 0.0]
        assert float(radii[norm][2]) > 0


@pytest.mark.parametrize("seed", [0, 1, 9, 29, 39])  # with the last three a sum fell short by its rounding
def test_a_tie_in_the_corner_of_the_box_is_within_reach(seed: int) -> None:
    """At 1 - p both f are 784, exactly: what float64 sums make of that must not turn it into what is never reached."""
    generator = torch.Generator().manual_seed(seed)
    p = (torch.rand(784, generator=generator) < 0.5).float()
    model = Model(torch.stack([1 - p, p]), torch.tensor([784.0, 0.0]), torch.tensor([0, 1]))
    image = 0.9 * p + 0.1 * torch.rand(784, generator=generator)
    for norm, radius in certified_radii(model, image.view(1, 1, 28, 28), torch.tensor([1])).items():
        distance = float(NORMS[norm].distance((1 - p).view(1, 1, 28, 28), image.view(1, 1, 28, 28)))
        assert 0.999 * distance < float(radius) <= distance


def test_prototypes_that_are_all_the_same_have_radius_0() -> None:
    model = Model(torch.zeros(2, 2), torch.zeros(2), torch.tensor([0, 1]))
    radii = certified_radii(model, torch.full((1, 1, 1, 2), 0.25), torch.tensor([0]))
    assert [float(radius) for radius in radii.values()] == [0] * 4


def test_exactly_unreachable_and_nearly_tied() -> None:
    far = Model(torch.tensor([[1.0, 1.0], [0.5, 1.0]]), torch.tensor([0.0, 3.0]), torch.tensor([0, 1]))
    found = exact_distance(Certifier(far.prototypes()), torch.zeros(2), 0)
    assert (found.lower, found.upper, found.adversarial) == (math.inf, math.inf, None)
    # so close to the middle that float32 bounds say nothing
    points = torch.rand(2, 784, generator=torch.Generator().manual_seed(0))
    near = Model(points, torch.zeros(2), torch.tensor([0, 1]))
    image = points.mean(0) + 1e-4 * (points[0] - points[1])
    found = exact_distance(Certifier(near.prototypes()), image, 0)
    apart = float((points[0] - points[1]).norm())
    assert 0 < found.lower <= 1.01e-4 * apart and found.upper == pytest.approx(1e-4 * apart, rel=0.2)


def test_slack_lowers_the_radius_by_what_it_is_worth() -> None:
    points, labels = torch.tensor([[0.0, 0.5], [1.0, 0.5]]), torch.arange(2)
    image = torch.tensor([[0.25, 0.5]])[:, None, None]
    plain = certified_radii(Model(points, torch.zeros(2), labels), image, torch.tensor([0]), ("l2",))["l2"]
    cautious = certified_radii(Model(points, torch.zeros(2), labels, 0.1), image, torch.tensor([0]), ("l2",))["l2"]
    assert float(plain - cautious) == pytest.approx(0.05, abs=1e-6)


@pytest.mark.parametrize("norm", ALL)
def test_least_norm_is_reached_and_not_undercut(norm: str) -> None:
    """Against random search: no random perturbation does it for less, and scaling the answer's own reaches it."""
    generator = torch.Generator().manual_seed(3)
    slopes = torch.randn(20, 8, generator=generator, dtype=torch.float64)
    image = torch.rand(8, generator=generator, dtype=torch.float64)
    image[:2] = torch.tensor([0.0, 1.0])
    box = Box(1 - image, image)
    reach = (slopes.abs() * box.room(slopes)).sum(1)
    thresholds = reach * torch.linspace(0.05, 0.95, 20, dtype=torch.float64)
    found = least_norm(slopes, thresholds, box, norm)
    tries = torch.rand(20000, 8, generator=generator, dtype=torch.float64)
    keep = torch.rand(20000, 8, generator=generator, dtype=torch.float64) < torch.rand(
        20000, 1, generator=generator, dtype=torch.float64
    )
    delta = torch.where(keep, tries - image, 0.0)
    sizes = NORMS[norm].size(delta[:, None, None].double())
    for row in range(20):
        works = delta @ slopes[row] >= thresholds[row]
        if bool(works.any()):
            assert float(found[row]) <= float(sizes[works].min()) + 1e-9
    assert bool(torch.isinf(least_norm(slopes, reach * 1.01, box, norm)).all())
    assert least_norm(slopes, -thresholds, box, norm).tolist() == [0.0] * 20


def test_nearest_neighbor_can_be_certified_and_holds_under_random_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    stored = (torch.rand(60, 1, 4, 4, generator=generator) * 255).round() / 255
    labels = torch.arange(60) % 3
    model = NearestNeighbor(stored, labels)
    images = torch.rand(5, 1, 4, 4, generator=generator)
    predicted = model(images).argmax(1)
    radii = certified_radii(model, images, predicted)
    noise = torch.randn(2000, 1, 4, 4, generator=generator)
    for image, label, radius in zip(images, predicted, radii["l2"], strict=True):
        moved = (image + noise / noise.flatten(1).norm(dim=1)[:, None, None, None] * float(radius) * 0.999).clamp(0, 1)
        assert bool((model(moved).argmax(1) == label).all())
    assert bool((radii["linf"] <= radii["l2"]).all()) and bool((radii["l2"] <= radii["l1"]).all())


def test_bad_input_is_named() -> None:
    model = random_model(0, pixels=4)
    image, label = torch.rand(1, 1, 1, 4), torch.tensor([0])
    with pytest.raises(InputError, match="norm is 'l3'"):
        certified_radii(model, image, label, ("l3",))
    with pytest.raises(InputError, match="prototype-abs and nearest-neighbor"):
        certified_radii(torch.nn.Flatten(), image, label)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="label is 7"):
        certified_radii(model, image, torch.tensor([7]))
    with pytest.raises(InputError, match="3 values"):
        certified_radii(model, torch.rand(1, 1, 1, 3), label)
    with pytest.raises(InputError, match="NaN"):
        certified_radii(model, image * math.nan, label)


@pytest.mark.parametrize("norm", ALL)
def test_screening_claims_no_more_than_what_is_measured(norm: str) -> None:
    """The bounds by which rivals are passed over lie below what they ask for, pixel by pixel at the ends or between."""
    model = random_model(7, pixels=60, each=150)
    certifier = Certifier(model.prototypes())
    generator = torch.Generator().manual_seed(1)
    points, labels = certifier.prototypes.points, certifier.prototypes.labels
    image = points[5].lerp(points[6], 0.2)
    image = torch.where(torch.rand(60, generator=generator) < 0.3, image.round(), image)
    label = int(model.label_losses(image[None]).argmin())
    planes = certifier.planes(image, label)
    rivals = (labels != label).nonzero()[:, 0]
    slopes, thresholds = planes.exactly(rivals, planes.own[planes.first[rivals]][:, None])
    exact = least_norm(slopes[:, 0], thresholds[:, 0], planes.box, norm)
    compared = exact.isfinite() & (exact > 0)
    assert int(compared.sum()) > 64
    for bounds in (planes.coarse(norm)[rivals], planes.fine(norm, rivals, math.inf)):
        assert bool((bounds.double()[compared] <= exact[compared]).all())
    # and they say something: on average at least a fifth
    assert float((planes.fine(norm, rivals, math.inf).double() / exact)[compared].mean()) > 0.2


def test_what_the_bounds_do_not_hold_for_is_refused() -> None:
    good = {"points": torch.rand(4, 3), "costs": torch.zeros(4), "labels": torch.tensor([0, 0, 1, 1])}
    Prototypes(**good, slack=0.1)
    for bad, named in (
        ({"points": torch.tensor([[0.0, 1.5]]).expand(4, 2)}, "1.5"),
        ({"points": torch.full((4, 3), torch.nan)}, "nan"),
        ({"costs": torch.full((4,), torch.inf)}, "finite"),
        ({"costs": torch.tensor([0.0, 1.0, -0.25, 0.0])}, "costs down to -0.25"),
        ({"slack": -1.0}, "slack is -1"),
    ):
        with pytest.raises(InputError, match=named):
            Prototypes(**{**good, **bad})
