"""Attacks on models with a ramp: where plain gradients vanish, against distances known exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from absynth.attacks.base import Attack, Goal, Problem, Proposals
from absynth.attacks.binary import Thresholded
from absynth.attacks.boundary_projection import BoundaryProjection
from absynth.attacks.catalog import ATTACKS, lookup
from absynth.attacks.gradient import ProjectedGradient
from absynth.attacks.ramp import OnTheRamp, Straight, Tightened, onto_halfspace, through
from absynth.attacks.ramp_projection import RampGreedy, RampProjection
from absynth.attacks.search import SmallestRadius
from absynth.certificates import certified_radii
from absynth.evaluation.plan import choose_attacks
from absynth.least import Box, least_norm
from absynth.norms import L0, L1, L2, LINF, NORMS, Norm
from absynth.planes import Prototypes
from absynth.responses import Ramp, Threshold, ramp_of

SIDE = 6


class Linear(torch.nn.Module):
    """Two classes, by the sign of weights . t(x) + offset: the boundary is flat in the response."""

    def __init__(self, seed: int, a: float = 0.25) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weights = torch.randn(SIDE * SIDE, generator=generator)
        self.offset = 0.0
        self.response = Ramp(a)

    def forward(self, images: Tensor) -> Tensor:
        score = self.response(images).flatten(1) @ self.weights + self.offset
        return torch.stack([score, -score], dim=1)

    def problem(self, count: int = 6) -> tuple[Tensor, Tensor]:
        """Images (B,1,S,S), most of their pixels black or white, and their labels (B,): all of class 0, by some way."""
        generator = torch.Generator().manual_seed(1)
        images = torch.rand(count, SIDE * SIDE, generator=generator)
        images = torch.where(images < 0.5, images * 0.2, torch.where(images > 0.75, 1.0, images))
        scores = self.response(images) @ self.weights
        self.offset = float(1.5 - scores.min())
        return images.view(count, 1, SIDE, SIDE), torch.zeros(count, dtype=torch.int64)

    def exact(self, image: Tensor, norm: Norm) -> float:
        """The distance of an image (1,S,S) of class 0 to the boundary: exact in L0 and L-infinity, otherwise at least
        that far (a dual bound)."""
        pixels = image.flatten().double()
        score = self.response(pixels) @ self.weights.double() + self.offset
        enter_up, up = self.response.moves(pixels, up=True)
        enter_down, down = self.response.moves(pixels, up=False)
        slopes = -self.weights.double()[None] * self.response.slope
        return float(least_norm(slopes, score[None], Box(up, down, enter_up, enter_down), str(norm)))


AWARE = {
    "ramp-projection-l0": RampProjection(L0),
    "ramp-projection-l1": RampProjection(L1),
    "ramp-projection-l2": RampProjection(L2),
    "ramp-projection-linf": RampProjection(LINF),
    "with restarts": RampProjection(L2, restarts=2),
    "ramp-greedy-l0": RampGreedy(),
    "pgd-straight-linf": Straight(
        SmallestRadius(ProjectedGradient(LINF, steps=40, relative_step=0.0625, restarts=1), first=0.1)
    ),
}


@pytest.mark.parametrize("name", AWARE)
@pytest.mark.parametrize("seed", range(3))
def test_found_distances_lie_between_the_exact_one_and_a_little_more(name: str, seed: int) -> None:
    attack, model = AWARE[name], Linear(seed)
    images, labels = model.problem()
    result = attack(model, images, Goal.untargeted(labels), torch.arange(len(images)))
    assert result.found.all()
    assert Goal.untargeted(labels).met(model(result.images)).all()
    assert result.images.min() >= 0 and result.images.max() <= 1
    for image, found in zip(images, attack.norm.distance(result.images, images).tolist(), strict=True):
        exact = model.exact(image, attack.norm)
        allowed = 1.35 if attack.norm == L1 else 1.25  # in L1 the bound leaves a gap where pixels are few
        assert exact * (1 - 1e-5) <= found <= allowed * exact, f"{found:.4f} against {exact:.4f}"


@pytest.mark.parametrize("norm", [L0, L2, LINF], ids=str)
def test_where_the_plain_gradient_is_0_the_aware_attack_finds_the_adversarial(norm: Norm) -> None:
    model = Linear(0)
    images = torch.where(torch.rand(3, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) < 0.5, 0.0, 1.0)
    model.offset = float(1.0 - (model.response(images).flatten(1) @ model.weights).min())
    goal, seeds = Goal.untargeted(torch.zeros(3, dtype=torch.int64)), torch.arange(3)
    assert not BoundaryProjection(norm)(model, images, goal, seeds).found.any()
    assert RampProjection(norm)(model, images, goal, seeds).found.all()


class Steps(Linear):
    """The same behind a threshold: a pixel that helps costs its distance from 1/2, and gives its whole weight."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.response = Threshold()  # type: ignore[assignment]

    def exact(self, image: Tensor, norm: Norm) -> float:
        """The distance of an image (1,S,S) of class 0; in L2 a lower bound, pixels taken in part."""
        pixels = image.flatten().double()
        seen = self.response(pixels)
        need = float(seen @ self.weights.double() + self.offset)  # a pixel that flips changes the score by its weight
        gains = torch.where(seen > 0, self.weights.double(), -self.weights.double()).clamp(min=0)
        costs = {L2: (pixels - 0.5).square(), LINF: (pixels - 0.5).abs(), L0: torch.ones_like(pixels)}[norm]
        order = (gains if norm == L0 else -costs if norm == LINF else gains / costs.clamp(min=1e-12)).argsort().flip(0)
        total = gains[order].cumsum(0)
        last = int((total < need).sum())
        if norm == LINF:
            return float(costs[order[last]])
        if norm == L0:
            return last + 1.0
        part = (need - float(total[last] - gains[order[last]])) / float(gains[order[last]])
        return float(costs[order[:last]].sum() + part * costs[order[last]]) ** 0.5


@pytest.mark.parametrize("norm", [L0, L2, LINF], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_a_threshold_is_a_steep_ramp(norm: Norm, seed: int) -> None:
    model = Steps(seed)
    images, labels = model.problem()
    attack = Thresholded(RampProjection(norm))
    result = attack(model, images, Goal.untargeted(labels), torch.arange(len(images)))
    assert result.found.all() and Goal.untargeted(labels).met(model(result.images)).all()
    found = norm.distance(result.images, images)
    exact = torch.tensor([model.exact(image, norm) for image in images], dtype=torch.float64)
    assert (exact * (1 - 1e-5) <= found).all()
    assert found.sum() <= 1.2 * exact.sum()  # where two pixels do it, taking a part of one is much less


def test_the_gradient_through_a_threshold_is_that_of_its_steep_ramp() -> None:
    model = Steps(0)
    images, labels = model.problem()
    aware, ramp = through(Problem(model, images, Goal.untargeted(labels), torch.arange(len(images)), L2))
    margins, gradients = aware.margin_and_gradient(images)
    torch.testing.assert_close(margins, aware.goal.margin(model(images)))
    expected = (2 * ramp.slope * model.weights).expand(len(images), -1)  # of both logits
    torch.testing.assert_close(gradients.flatten(1), expected)


def test_the_strong_suite_knows_thresholds_and_the_quick_one_stays_quick() -> None:
    strong = {attack.name for attack in choose_attacks("strong", ("l0", "l2", "linf"), Steps(0))}
    aware = {name for name in strong if "ramp" in name or "straight" in name}
    assert aware == {"ramp-greedy-refined-l0", *(f"ramp-projection-refined-{norm}" for norm in ("l0", "l2", "linf"))}
    quick = choose_attacks("quick", ("l0", "l2", "linf"), Steps(0))
    assert {attack.family for attack in quick} == {"boundary-projection-refined"}


def test_planted_adversarials_are_found() -> None:
    """Black images, and a pattern of a few pixels just inside the ramp that changes the class and nothing else does."""
    ramp = Ramp(0.25)
    pattern = torch.zeros(SIDE * SIDE)
    pattern[[3, 8, 21]] = 1.0

    class Planted(torch.nn.Module):
        response = ramp

        def forward(self, images: Tensor) -> Tensor:
            seen = ramp(images).flatten(1)
            score = 0.5 - seen @ pattern + 2 * seen @ (1 - pattern)
            return torch.stack([score, -score], dim=1)

    images = torch.zeros(2, 1, SIDE, SIDE)
    goal, seeds = Goal.untargeted(torch.zeros(2, dtype=torch.int64)), torch.arange(2)
    # one pixel has to gain 1/2, or each of the 3 has to gain 1/6: a + (1 - 2a) / 6; in L2 two are 6 % worse than one
    expected = {L2: 0.5, LINF: 0.25 + 0.5 / 6, L0: 1.0, L1: 0.5}
    for norm, distance in expected.items():
        result = RampProjection(norm)(Planted(), images, goal, seeds)
        assert result.found.all()
        torch.testing.assert_close(
            norm.distance(result.images, images), torch.full((2,), distance, dtype=torch.float64), rtol=0.07, atol=0
        )


@pytest.mark.parametrize("norm", NORMS.values(), ids=str)
def test_projection_reaches_what_it_says_at_the_least_norm(norm: Norm) -> None:
    generator = torch.Generator().manual_seed(2)
    ramp = Ramp(0.3)
    images = torch.rand(8, 1, SIDE, SIDE, generator=generator)
    images[:4] = (images[:4] > 0.5).float()
    gradient = torch.randn(images.shape, generator=generator)
    need = torch.linspace(0.2, 2.5, 8).double()
    delta, reached = onto_halfspace(norm, ramp, images, gradient, need)
    assert reached.all()
    moved = (ramp((images + delta).double()) - ramp(images.double())) / ramp.slope
    gained = -(moved * gradient.double()).flatten(1).sum(1)
    assert bool((gained >= need * (1 - 1e-4)).all())
    for row in range(8):
        pixels = images[row].flatten().double()
        (enter_up, up), (enter_down, down) = ramp.moves(pixels, up=True), ramp.moves(pixels, up=False)
        box = Box(up, down, enter_up, enter_down)
        least = float(least_norm(-gradient[row].flatten().double()[None], need[row][None], box, str(norm)))
        size = float(norm.size(delta[row][None].double()))
        # in L1 and L2 what is known is a lower bound: it may miss what the last pixel pays to enter
        most = least + ramp.a if norm == L1 else least * (1.3 if norm == L2 else 1.0001) + 1e-6
        assert least * (1 - 1e-5) <= size <= most
    beyond, reached = onto_halfspace(norm, ramp, images, gradient, torch.full((8,), 1e6))
    assert not reached.any()
    ends = ramp((images + beyond).clamp(0, 1))
    assert bool((((ends - (gradient < 0).float()).abs() < 1e-5) | (ends == ramp(images))).all())


class Nearest(torch.nn.Module):
    """The nearest of three random prototypes a class, of the response: certified, and so attacks have a floor."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.points = torch.rand(9, SIDE * SIDE, generator=generator)
        self.response = Ramp(0.2)

    def forward(self, images: Tensor) -> Tensor:
        apart = self.response(images).flatten(1)[:, None] - self.points
        return -apart.square().sum(2).unflatten(1, (3, 3)).amin(2)

    def prototypes(self) -> Prototypes:
        return Prototypes(self.points, torch.zeros(9), torch.arange(9) // 3, 1e-4, self.response)


@pytest.mark.parametrize("norm", NORMS.values(), ids=str)
def test_no_attack_distance_is_below_a_certified_radius(norm: Norm) -> None:
    model = Nearest()
    images = model.points[::2] + 0.1 * torch.randn(5, SIDE * SIDE, generator=torch.Generator().manual_seed(6))
    images = images.clamp(0, 1).view(5, 1, SIDE, SIDE)
    labels = model(images).argmax(1)
    radii = certified_radii(model, images, labels, (str(norm),))[str(norm)]
    result = RampProjection(norm, restarts=1)(model, images, Goal.untargeted(labels), torch.arange(5))
    assert result.found.all()
    distances = norm.distance(result.images, images)
    assert bool((radii > 0).all()) and bool((radii <= distances).all())
    assert bool((distances <= 3 * radii).all())


def test_gradient_on_the_ramp_is_the_straight_line() -> None:
    model = Linear(1)
    images, _ = model.problem()
    images = images.clone().requires_grad_(True)
    (plain,) = torch.autograd.grad(model(images)[:, 0].sum(), images)
    (straight,) = torch.autograd.grad(OnTheRamp(model, model.response)(images)[:, 0].sum(), images)
    expected = (model.weights * model.response.slope).expand(len(images), -1)
    torch.testing.assert_close(straight.flatten(1), expected)
    assert bool((plain == 0).any())
    torch.testing.assert_close(OnTheRamp(model, model.response)(images.detach()), model(images.detach()))


class Nudge(Attack):
    """Proposes the image it was made for."""

    norm = L2
    family = "nudge"
    kind = "minimum"
    knowledge = "decision"
    source = "this test"
    deterministic = True
    queries = "none"

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def search(self, problem: Problem) -> Proposals:
        return Proposals(self.images, torch.ones(len(self.images), dtype=torch.bool))


def test_tightening_takes_back_what_flat_parts_cost() -> None:
    model = Linear(0)
    images, labels = model.problem(2)
    far = RampProjection(L2)(model, images, Goal.untargeted(labels), torch.arange(2)).images
    wasted = torch.where(far < 0.25, 0.2, torch.where(far > 0.75, 0.8, far))  # another image of the same response
    assert torch.equal(model.response(far) > 0, model.response(wasted) > 0)
    goal = Goal.untargeted(labels, slack=0.0)
    pushed = torch.where(wasted == far, (far + 0.02 * (far - images)).clamp(0, 1), wasted)
    plain = Nudge(pushed)(model, images, goal, torch.arange(2))
    tight = Tightened(Nudge(pushed))(model, images, goal, torch.arange(2))
    assert plain.found.all() and tight.found.all()
    assert bool((L2.distance(tight.images, images) < 0.9 * L2.distance(plain.images, images)).all())


def test_suites_add_and_refine_attacks_for_models_with_a_ramp_only() -> None:
    def plain(images: Tensor) -> Tensor:
        return images.flatten(1)[:, :2]

    names = [attack.name for attack in choose_attacks("quick", ("l0", "l2", "linf"), plain)]
    assert not any("ramp" in name or "refined" in name for name in names)
    aware = [attack.name for attack in choose_attacks("quick", ("l0", "l2", "linf"), Linear(0))]
    assert {"ramp-projection-l0", "ramp-projection-l2", "boundary-projection-refined-linf"} <= set(aware)
    assert [attack.name for attack in lookup("ramp-projection-l2")] == ["ramp-projection-l2"]


@pytest.mark.parametrize("a", [0.0, 0.2, 0.25, 0.3, 0.45])
def test_the_ramp_and_its_inverse(a: float) -> None:
    ramp = Ramp(a)
    pixels = torch.linspace(0, 1, 1001)
    seen = ramp(pixels)
    assert float(seen[0]) == 0 and float(seen[-1]) == 1 and bool((seen.diff() >= 0).all())
    torch.testing.assert_close(ramp(ramp.inverse(seen)), seen, rtol=0, atol=1e-5)
    assert torch.equal(ramp.nearest(pixels, seen), pixels)
    for target in (0.0, 0.3, 1.0):
        moved = ramp.nearest(pixels, torch.full_like(pixels, target))
        torch.testing.assert_close(ramp(moved), torch.full_like(pixels, target), rtol=0, atol=1e-5)
        steps = pixels[(seen - target).abs() <= 1e-3]  # no pixel of that response is nearer
        nearest = (pixels[:, None] - steps).abs().amin(1)
        assert bool(((moved - pixels).abs() <= nearest + 2e-3).all())
    ends = torch.tensor([0.0, 1.0])
    assert torch.equal(ramp(ramp.nearest(ends, ends.flip(0))), ends.flip(0))  # saturated, not nearly
    exact = pixels.double()
    for up in (True, False):
        entry, length = ramp.moves(exact, up=up)
        sign = 1 if up else -1
        for share in (0.0, 0.5, 1.0):
            way = torch.where(length > 0, entry + share * length, 0.0)
            change = sign * (ramp(exact + sign * way) - ramp(exact))
            torch.testing.assert_close(change, share * length * ramp.slope)
    assert float((ramp(pixels).double() - ramp(exact)).abs().max()) <= ramp.rounding


def test_only_a_ramp_is_a_ramp() -> None:
    assert ramp_of(Linear(0)) is not None
    model = Linear(0)
    model.response = Threshold()  # type: ignore[assignment]
    assert ramp_of(model) is None and ramp_of(lambda images: images) is None


def test_more_steps_and_restarts_do_no_better_where_the_answer_is_exact() -> None:
    model = Linear(2)
    images, labels = model.problem()
    seeds = torch.arange(len(images))
    distances: Callable[[Attack], Tensor] = lambda attack: attack.norm.distance(  # noqa: E731
        attack(model, images, Goal.untargeted(labels), seeds).images, images
    )
    plain = RampProjection(LINF)
    more = distances(replace(plain, steps=80, restarts=3))
    torch.testing.assert_close(distances(plain), more, rtol=0.01, atol=0)
    assert ATTACKS["ramp-projection-linf"] == plain
