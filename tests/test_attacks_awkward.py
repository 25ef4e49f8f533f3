"""Attacks on models and images that are unlike the project's own: answers of NaN, of other types, on the very boundary,
images that lie otherwise in memory, targets that noise never meets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import absynth
from absynth import data
from absynth.attacks.base import Attack, Goal, Problem, Proposals
from absynth.attacks.boundary_projection import BoundaryProjection
from absynth.attacks.brendel_bethge import BrendelBethge, BrendelBethgeFromFlips
from absynth.attacks.catalog import ATTACKS, lookup
from absynth.attacks.decision import Boundary
from absynth.attacks.gradient import FastGradient, ProjectedGradient
from absynth.attacks.hop_skip_jump import HopSkipJump
from absynth.attacks.noise import GaussianNoise, SaltAndPepper
from absynth.attacks.pointwise import Pointwise
from absynth.attacks.queries import can_follow, rows_of
from absynth.attacks.ramp_projection import RampProjection
from absynth.attacks.resetting import take_back
from absynth.attacks.square import Square
from absynth.errors import InputError
from absynth.evaluation import evaluate
from absynth.evaluation.doubts import model_doubts
from absynth.norms import L0, L1, L2, LINF, Norm
from attack_models import images_near, prototypes, trained_digits
from evaluation_models import Linear, labeled, run

MODEL = prototypes()


@pytest.fixture(scope="module")
def curved() -> tuple[nn.Module, Tensor, Tensor]:
    """The shipped CNN, and test images on which steps from the clean image alone go round in circles."""
    model = absynth.load("cnn")
    images, labels = data.load("mnist", "test")
    return model, images[:6], labels[:6]


@pytest.mark.parametrize("norm", [L0, L1, L2, LINF], ids=str)
@pytest.mark.parametrize("make", [BoundaryProjection, RampProjection])
def test_projections_that_go_round_in_circles_are_led_on(
    curved: tuple[nn.Module, Tensor, Tensor], make: type[BoundaryProjection] | type[RampProjection], norm: Norm
) -> None:
    model, images, labels = curved
    goals = Goal.untargeted(labels), Goal.targeted((labels + 1) % 10)
    for goal in goals:
        assert make(norm)(model, images, goal, torch.arange(6)).found.all()


def test_brendel_bethge_in_l0_gives_pixels_back(curved: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, images, labels = curved
    goal, seeds = Goal.untargeted(labels), torch.arange(6)
    usual = L0.distance(BoundaryProjection(L0)(model, images, goal, seeds).images, images).mean()
    for attack, most in ((ATTACKS["brendel-bethge-l0"], 1.25), (ATTACKS["brendel-bethge-wide-l0"], 1.1)):
        found = attack(model, images, goal, seeds)
        assert found.found.all() and L0.distance(found.images, images).mean() < most * usual


def test_brendel_bethge_in_l0_begins_elsewhere_where_salt_and_pepper_finds_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images, labels = images_near(MODEL, 4)
    goal, seeds = Goal.untargeted(labels), torch.arange(4)
    usual = L0.distance(BrendelBethge(L0, steps=40)(MODEL, images, goal, seeds).images, images)

    def nothing(problem: Problem) -> Proposals:
        return Proposals(problem.images, torch.zeros(len(problem), dtype=torch.bool))

    monkeypatch.setattr(SaltAndPepper, "search", lambda _, problem: nothing(problem))
    monkeypatch.setattr("absynth.attacks.brendel_bethge.greedy_flips", nothing)
    for attack in (BrendelBethge(L0, steps=40), BrendelBethgeFromFlips(L0, steps=40)):
        found = attack(MODEL, images, goal, seeds)
        assert found.found.all() and (L0.distance(found.images, images) <= 1.5 * usual).all()


class OnTheBoundary(Attack):
    """Proposes the point of the boundary between two prototypes, a hair on the wrong side."""

    family, kind, knowledge, source, deterministic, queries = "edge", "minimum", "gradient", "test", True, "1"
    norm = L2

    def search(self, problem: Problem) -> Proposals:
        return Proposals(problem.images + 0.25 - 1e-6, torch.ones(len(problem), dtype=torch.bool))


def halves(images: Tensor) -> Tensor:
    """Class 1 from a mean of a half on."""
    mean = images.flatten(1).mean(1)
    return torch.stack([0.5 - mean, mean - 0.5], dim=1)


def test_a_hit_that_misses_the_boundary_by_rounding_is_moved_a_hair_farther() -> None:
    images = torch.full((3, 1, 4, 4), 0.25)
    found = OnTheBoundary()(halves, images, Goal.untargeted(torch.zeros(3, dtype=torch.int64)), torch.arange(3))
    assert found.found.all() and (halves(found.images).argmax(1) == 1).all()
    assert float((found.images - images).max()) < 0.25 * 1.001


class Undefined:
    """Adversarial where the first two of 16 pixels are bright; no answer where these are dark and others are not."""

    def __call__(self, images: Tensor) -> Tensor:
        flat = images.flatten(1)
        margin = flat[:, 0] + flat[:, 1] - 0.5
        margin = torch.where((flat[:, :2].sum(1) < 0.1) & (flat[:, 4:].sum(1) > 0), torch.nan, margin)
        return torch.stack([-margin, margin], dim=1)


def test_no_answer_is_no_adversarial_when_pixels_are_reset() -> None:
    clean = torch.zeros(6, 1, 4, 4)
    clean[:, 0, 3, 3] = 0.2
    problem = Problem(Undefined(), clean, Goal.untargeted(torch.zeros(6, dtype=torch.int64)), torch.arange(6), L0)
    reset = take_back(problem, Proposals(torch.ones_like(clean), torch.ones(6, dtype=torch.bool)))
    assert problem.met(reset.images).all() and (problem.distance(reset.images) == 1).all()


def test_square_goes_on_where_its_first_image_has_no_answer() -> None:
    network, images, labels = trained_digits()

    calls = []

    def partly(asked: Tensor) -> Tensor:
        calls.append(len(asked))  # the first question is about the clean images, the second about stripes
        return network(asked) * (torch.nan if len(calls) == 2 else 1)

    attack = Square(LINF, 0.4, steps=200)
    assert attack(partly, images[:8], Goal.untargeted(labels[:8]), torch.arange(8)).found.all()


L0_ATTACKS = "boundary-projection-l0,sigma-zero-l0,ramp-projection-l0,ramp-greedy-l0,pointwise-l0"


def test_images_with_channels_last_are_attacked_like_others() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(162, 3))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network[1].reset_parameters()
    images = torch.rand(3, 6, 9, 3, generator=torch.Generator().manual_seed(0)).permute(0, 3, 1, 2)
    assert not images.is_contiguous()
    labels = network(images).argmax(1)
    for attack in lookup(L0_ATTACKS):
        found = attack(network, images, Goal.untargeted(labels), torch.arange(3))
        same = attack(network, images.contiguous(), Goal.untargeted(labels), torch.arange(3))
        assert found.found.all() and torch.equal(found.images, same.images), attack.name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_models_that_answer_in_another_type_are_attacked(dtype: torch.dtype, tmp_path: Path) -> None:
    suite = "fgm-ge-l2,fmn-linf,boundary-projection-l0,pointwise-l0"
    images, labels = images_near(MODEL, 4)

    def model(asked: Tensor) -> Tensor:
        return MODEL(asked).to(dtype)

    summary = evaluate(model, (images, labels), suite=suite, norms=("l0", "l2", "linf"), images=4, out=tmp_path)
    for norm in summary.models[0].norms.values():
        for name, cell in norm.attacks.items():
            assert cell.errors == 0 and cell.images == 4, name


class Counted:
    """Follows, and answers roughly around an image: by ``error`` too early for an adversarial."""

    def __init__(self, error: float) -> None:
        self.error, self.warm = error, 0

    def __call__(self, images: Tensor) -> Tensor:
        return MODEL(images)

    def follow(self, images: Tensor, before: object) -> tuple[Tensor, object]:
        self.warm += before is not None
        return MODEL(images), _Nothing()

    def around(self, images: Tensor, before: object, owner: Tensor) -> Tensor:
        logits = MODEL(images)
        return logits - self.error * nn.functional.one_hot(logits.argmax(1), logits.shape[1])


class _Nothing:
    def room(self, count: int) -> _Nothing:
        return self

    def put(self, rows: Tensor, found: object) -> None:
        pass

    def rows(self, rows: Tensor) -> _Nothing:
        return self


@pytest.mark.parametrize("chunk", [3, 4, 512])
def test_hop_skip_jump_asks_around_however_few_probes_fit_into_a_batch(chunk: int) -> None:
    images, labels = images_near(MODEL, 3)
    attack = HopSkipJump(L2, steps=3, first_probes=10)
    goal, seeds = Goal.untargeted(labels), torch.arange(3)
    model = Counted(0.01)
    found = replace(attack, chunk=chunk)(model, images, goal, seeds)
    assert model.warm == 0
    torch.testing.assert_close(found.images, attack(Counted(0.01), images, goal, seeds).images, rtol=0, atol=1e-5)


def test_a_layer_that_is_called_select_or_follow_is_none_of_ours() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.select, self.follow = nn.Linear(64, 4), nn.Linear(4, 4)

        def forward(self, images: Tensor) -> Tensor:
            answer: Tensor = self.follow(self.select(images.flatten(1)))
            return answer

    net = Net()
    assert rows_of(net, torch.tensor([0])) is net and not can_follow(net)
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    FastGradient(L2)(net, images, Goal.untargeted(net(images).argmax(1)), torch.arange(2))


def test_a_restart_does_not_depend_on_the_place_in_the_batch() -> None:
    network, images, labels = trained_digits()
    attack = RampProjection(L2, restarts=2, steps=10)
    together = attack(network, images[:4], Goal.untargeted(labels[:4]), torch.arange(4))
    alone = attack(network, images[3:4], Goal.untargeted(labels[3:4]), torch.tensor([3]))
    torch.testing.assert_close(together.images[3:], alone.images, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["boundary-projection-l0", "ramp-projection-l0", "sigma-zero-l0", "ramp-greedy-l0"])
def test_attacks_that_call_themselves_deterministic_are(name: str) -> None:
    network, images, labels = trained_digits()
    (attack,) = lookup(name)
    goal = Goal.targeted((labels[:8] + 3) % 10)
    one, other = (attack(network, images[:8], goal, torch.arange(8) + add) for add in (0, 100))
    assert attack.deterministic and torch.equal(one.images, other.images)


@pytest.mark.parametrize(
    "attack", [Boundary(steps=50), HopSkipJump(L2, steps=3), Pointwise(L0, draws=1)], ids=lambda a: a.name
)
def test_attacks_on_decisions_reach_a_target_from_an_image_of_it(attack: Attack) -> None:
    network, images, labels = trained_digits()
    targets = (labels[:6] + 1) % 10
    starts = torch.stack([images[labels == target][0] for target in targets])
    found = attack(network, images[:6], Goal.targeted(targets, starts=starts), torch.arange(6))
    assert found.found.all() and (network(found.images).argmax(1) == targets).all()
    assert bool((attack.norm.distance(found.images, images[:6]) <= attack.norm.distance(starts, images[:6])).all())
    with pytest.raises(InputError, match="starts are"):
        attack(network, images[:6], Goal.targeted(targets, starts=starts[:2]), torch.arange(6))


def test_one_image_without_an_answer_hides_no_doubt_about_the_model() -> None:
    images, labels = labeled(Linear())

    def model(asked: Tensor) -> Tensor:
        answers = Linear()(asked).softmax(1)
        return torch.where((asked == images[2]).flatten(1).all(1, keepdim=True), torch.nan, answers)

    found = {doubt.code for doubt in model_doubts("digest", model, images[:8], labels[:8])}
    assert "probabilities" in found
    assert not model_doubts("digest", lambda asked: Linear()(asked) * torch.nan, images[:8], labels[:8])


def test_attacks_within_a_radius_are_not_held_against_those_that_search_the_nearest(tmp_path: Path) -> None:
    near = ProjectedGradient(L2, radius=0.01)  # finds next to nothing so near
    summary = run(tmp_path, Linear(), suite=[near, GaussianNoise()])
    assert summary.models[0].norms["l2"].attacks[near.name].accuracy > 0.5
    codes = {doubt.code for doubt in summary.models[0].doubts}
    assert not codes & {"white-box-beaten", "beaten-by-noise"}
