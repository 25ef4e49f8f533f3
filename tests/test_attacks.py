"""What attacks promise beside their distances: counting, goals, failure, sequential procedures, wrappers, bad input."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from absynth.attacks.base import Goal, Problem, Proposals, draw_normal, generators
from absynth.attacks.binary import Thresholded, across_threshold
from absynth.attacks.boundary_projection import BoundaryProjection
from absynth.attacks.catalog import ATTACKS, SUITES, information, iterated, lookup
from absynth.attacks.decision import Boundary
from absynth.attacks.estimated import EstimatedGradient
from absynth.attacks.foolbox_adapter import AutoAttack, Foolbox
from absynth.attacks.gradient import ProjectedGradient
from absynth.attacks.greedy import greedy_flips
from absynth.attacks.hop_skip_jump import HopSkipJump
from absynth.attacks.latent import LatentDescent
from absynth.attacks.noise import GaussianNoise, SaltAndPepper
from absynth.attacks.pointwise import Pointwise
from absynth.attacks.queries import CountingClassifier
from absynth.attacks.search import first_on_path, starting_points
from absynth.attacks.transfer import Transfer
from absynth.errors import InputError
from absynth.norms import L0, L2, LINF, NORMS
from attack_models import SIDE, images_near, prototypes, trained_digits

MODEL = prototypes()


def problem(count: int = 3, norm=L2) -> Problem:
    images, labels = images_near(MODEL, count)
    return Problem(MODEL, images, Goal.untargeted(labels), torch.arange(count), norm)


# Goals


def test_margins_and_ties() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0], [1.0, 1.0, 0.0], [torch.nan, 1.0, 0.0]])
    untargeted = Goal.untargeted(torch.tensor([0, 0, 0]))
    assert untargeted.margin(logits)[:2].tolist() == [1.0, 0.0]
    assert untargeted.met(logits).tolist() == [False, True, False]  # a tie is broken, NaN is not
    targeted = Goal.targeted(torch.tensor([1, 1, 1]))
    assert targeted.margin(logits)[:2].tolist() == [1.0, 0.0]
    assert targeted.met(logits).tolist() == [False, True, False]
    assert Goal.untargeted(torch.tensor([0, 0, 0]), slack=0.1).met(logits).tolist() == [False, False, False]


def test_an_image_that_meets_the_goal_already_comes_back_unchanged_at_one_query() -> None:
    images, labels = images_near(MODEL, 2)
    counted = CountingClassifier(MODEL, 2)
    result = BoundaryProjection(L2)(counted, images, Goal.targeted(labels), torch.arange(2))
    assert result.found.all() and torch.equal(result.images, images)
    assert counted.forward.tolist() == [1, 1]


def test_an_empty_batch_is_an_empty_answer() -> None:
    empty = torch.zeros(0, dtype=torch.int64)
    result = BoundaryProjection(L2)(MODEL, torch.zeros(0, 1, SIDE, SIDE), Goal.untargeted(empty), empty)
    assert result.images.shape == (0, 1, SIDE, SIDE) and result.found.shape == (0,)


# Queries


def test_queries_are_counted_image_by_image() -> None:
    counted = CountingClassifier(MODEL, 4)
    images, _ = images_near(MODEL, 4)
    counted(images)
    counted.select(torch.tensor([1, 1, 3])).select(torch.tensor([0, 2]))(images[[1, 3]])
    assert counted.forward.tolist() == [1, 2, 1, 2]
    leaf = images[2:3].clone().requires_grad_()
    counted.select(torch.tensor([2]))(leaf).sum().backward()
    assert counted.forward.tolist() == [1, 2, 2, 2]
    assert counted.backward.tolist() == [0, 0, 1, 0]
    with pytest.raises(InputError, match="use select"):
        counted(images[:2])


def test_images_that_are_done_cost_no_more() -> None:
    """An image on the boundary's edge beside one far from it: the first is asked about a few times only."""
    images, labels = images_near(MODEL, 2)
    images[0] = MODEL.prototypes[0] * 0.51 + MODEL.prototypes[1] * 0.49
    counted = CountingClassifier(MODEL, 2)
    problem = Problem(counted, images, Goal.untargeted(labels), torch.arange(2), L2)
    far = MODEL.prototypes[(labels + 1) % 4]
    first_on_path(
        problem,
        lambda rows, t: images[rows] + t.view(-1, 1, 1, 1).float() * (far[rows] - images[rows]),
        [(step + 1) / 100 for step in range(100)],
        bisections=0,
    )
    assert counted.forward[0] < 10 < counted.forward[1]


def test_estimated_gradients_are_the_gradients_and_cost_two_queries_a_coordinate() -> None:
    images, _ = images_near(MODEL, 2)
    images[0, 0, 0, :3] = torch.tensor([0.0, 1.0, 0.995])  # one-sided, and cut short
    counted = CountingClassifier(MODEL, 2)
    estimated = EstimatedGradient(counted, step_sizes=(0.02,), chunk=50)
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(estimated(leaf)[:, 1].sum(), leaf)
    exact = -2 * (images - MODEL.prototypes[1])
    inner = torch.ones_like(images, dtype=torch.bool)
    inner[0, 0, 0, :3] = False
    torch.testing.assert_close(gradient[inner], exact[inner], atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(gradient, exact, atol=0.03, rtol=1e-3)  # a one-sided difference is off by half a step
    # Two of the first image's pixels move one way only: for these it is asked about itself, once.
    assert counted.forward.tolist() == [1 + 2 * SIDE * SIDE - 2 + 1, 1 + 2 * SIDE * SIDE]
    assert counted.backward.tolist() == [0, 0]


@pytest.mark.parametrize("chunk", [1, 3, 20, 1000])
def test_estimated_gradients_ask_nothing_beyond_the_edges(chunk: int) -> None:
    images = torch.stack([torch.zeros(1, SIDE, SIDE), torch.ones(1, SIDE, SIDE), torch.full((1, SIDE, SIDE), 0.5)])
    counted = CountingClassifier(MODEL, 3)
    found = EstimatedGradient(counted, step_sizes=(0.02,), chunk=chunk).jacobian(images)  # (3,K,N)
    center = images + torch.tensor([0.01, -0.01, 0.0]).view(3, 1, 1, 1)  # where a one-sided difference is exact
    exact = -2 * (center.unsqueeze(1) - MODEL.prototypes).flatten(2)
    torch.testing.assert_close(found, exact, atol=2e-3, rtol=1e-3)
    chunks = -(-SIDE * SIDE // chunk)  # an image at the edge is asked about itself in each of its chunks
    size = SIDE * SIDE
    assert size < counted.forward[0] <= size + chunks + 1 and size < counted.forward[1] <= size + chunks + 2
    assert counted.forward[2] == 2 * size


def test_estimated_gradients_see_through_a_threshold() -> None:
    def thresholded(images: Tensor) -> Tensor:
        return MODEL((images > 0.5).float())

    images, labels = images_near(MODEL, 2)
    leaf = images.clone().requires_grad_()
    blind = EstimatedGradient(thresholded, step_sizes=(1e-4,))
    seeing = EstimatedGradient(thresholded, step_sizes=(1e-4, 0.5))
    assert not torch.autograd.grad(blind(leaf)[:, 0].sum(), leaf)[0].any()
    gradient = torch.autograd.grad(seeing(leaf)[:, 0].sum(), leaf)[0]
    assert (gradient.sign() == (MODEL.prototypes[0] - 0.5).sign()).all()
    del labels


# Seeds


def test_noise_depends_on_the_seed_of_the_image_alone() -> None:
    like = torch.zeros(3, 1, 2, 2)
    seeds = torch.tensor([5, 6, 7])
    together = draw_normal(generators(seeds), like)
    assert torch.equal(together[1:2], draw_normal(generators(seeds[1:2]), like[:1]))
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(together, draw_normal(generators(seeds, stream=1), like))


# Pointwise


@pytest.mark.parametrize("attack", [GaussianNoise(draws=5), SaltAndPepper(draws=5)], ids=["gaussian", "salt"])
def test_noise_that_cannot_be_nearer_is_not_asked_about(
    attack: GaussianNoise | SaltAndPepper, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = prototypes()
    images, labels = images_near(model, 6)
    goal, seeds = Goal.untargeted(labels), torch.arange(6)
    short, long = CountingClassifier(model, 6), CountingClassifier(model, 6)
    found = attack(short, images, goal, seeds)
    monkeypatch.setattr("absynth.attacks.noise._limit", lambda *_: torch.full((6,), torch.inf))
    assert torch.equal(found.images, attack(long, images, goal, seeds).images) and found.found.any()
    assert (short.forward <= long.forward).all() and short.forward.sum() < 0.9 * long.forward.sum()


def test_pointwise_ends_where_no_pixel_can_be_reset() -> None:
    task = problem(3, L0)
    result = Pointwise(L0, draws=2)(MODEL, task.images, task.goal, task.seeds)
    assert result.found.all()
    for row in range(3):
        for pixel in (result.images[row] != task.images[row]).flatten().nonzero().squeeze(1).tolist():
            reset = result.images[row].clone()
            reset.view(-1)[pixel] = task.images[row].reshape(-1)[pixel]
            assert not task.rows(torch.tensor([row])).met(reset.unsqueeze(0)).any()


def test_a_walk_from_an_island_is_begun_anew_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    task = problem(3)
    island = (task.images + 0.3).clamp(max=1)  # adversarial, and nothing around it is

    def classifier(images: Tensor) -> Tensor:
        logits, there = MODEL(images), (images[:, None] - island).flatten(2).norm(dim=2).amin(1) < 1e-3
        return torch.where(there[:, None], logits.flip(1), logits)

    def starts(asked: Problem, *, stream: int) -> Proposals:
        first = Proposals(island, torch.ones(3, dtype=torch.bool))
        return first if stream == 1000 else starting_points(asked, stream=stream)

    assert not task.met(island).any() and replace(task, classifier=classifier).met(island).all()
    plain = Boundary(steps=1600, converged=1e-4)(MODEL, task.images, task.goal, task.seeds)
    monkeypatch.setattr("absynth.attacks.decision.starting_points", starts)
    stuck, anew = (
        Boundary(steps=1600, converged=1e-4, starts=count)(classifier, task.images, task.goal, task.seeds)
        for count in (1, 2)
    )
    assert (L2.distance(stuck.images, island) < 2e-3).all()
    assert (L2.distance(anew.images, task.images) < 1.1 * L2.distance(plain.images, task.images)).all()


# Wrappers


def test_pixels_move_just_across_the_threshold_and_no_farther() -> None:
    clean = torch.tensor([0.2, 0.2, 0.8, 0.8, 0.5, 0.5, 0.49]).view(1, 1, 1, 7)
    adversarial = torch.tensor([0.9, 0.3, 0.1, 0.6, 0.7, 0.2, 0.5]).view(1, 1, 1, 7)
    refined = across_threshold(clean, adversarial)
    assert ((refined > 0.5) == (adversarial > 0.5)).flatten()[:6].all()
    assert refined.flatten()[[1, 3]].tolist() == clean.flatten()[[1, 3]].tolist()
    assert (abs(refined.flatten()[[0, 2, 4, 5, 6]] - 0.5) < 1e-7).all()
    assert ((refined >= 0.5) == (adversarial >= 0.5)).all()


def test_refinement_helps_a_thresholding_model_and_is_dropped_where_it_fails() -> None:
    images, labels = images_near(MODEL, 3)

    def thresholded(x: Tensor) -> Tensor:
        return MODEL((x > 0.5).float())

    plain = Boundary(steps=50)
    rough = plain(thresholded, images, Goal.untargeted(labels), torch.arange(3))
    fine = Thresholded(plain)(thresholded, images, Goal.untargeted(labels), torch.arange(3))
    assert fine.found.all()
    assert (L2.distance(fine.images, images) < L2.distance(rough.images, images)).all()
    harmless = Thresholded(BoundaryProjection(L2))(MODEL, images, Goal.untargeted(labels), torch.arange(3))
    assert harmless.found.all()  # not a thresholding model


def test_latent_descent_needs_a_model_that_explains() -> None:
    images, labels = images_near(MODEL, 1)
    with pytest.raises(InputError, match="needs a classifier with analyze"):
        LatentDescent()(lambda x: MODEL(x), images, Goal.untargeted(labels), torch.arange(1))
    with pytest.raises(InputError, match="no analyze"):
        LatentDescent()(CountingClassifier(lambda x: MODEL(x), 1), images, Goal.untargeted(labels), torch.arange(1))


def test_converged_latent_descent_is_at_least_as_near() -> None:
    images, labels = images_near(MODEL, 4)
    first, last = (LatentDescent(rounds=r)(MODEL, images, Goal.untargeted(labels), torch.arange(4)) for r in (0, 20))
    assert first.found.all()
    assert (L2.distance(last.images, images) <= L2.distance(first.images, images)).all()


# Strength, on a trained network


def test_greedy_flips_find_what_they_claim() -> None:
    network, images, labels = trained_digits()
    goal = Goal.untargeted(labels[:8])
    problem = Problem(network, images[:8], goal, torch.arange(8), L0)
    found = greedy_flips(problem)
    assert found.found.all() and goal.met(network(found.images)).all()
    changed = found.images != images[:8]
    assert ((found.images[changed] == 0) | (found.images[changed] == 1)).all()
    assert (L0.distance(found.images, images[:8]) <= 100).all()
    assert not greedy_flips(problem, most=1).found.all()


def test_restarts_never_hurt_and_momentum_is_another_attack() -> None:
    network, images, labels = trained_digits()
    images, goal, seeds = images[:20], Goal.untargeted(labels[:20]), torch.arange(20)
    found = [
        int(ProjectedGradient(LINF, radius=0.05, steps=5, restarts=r)(network, images, goal, seeds).found.sum())
        for r in (0, 3)
    ]
    assert found[0] <= found[1]
    bim, mim = (iterated(LINF, "x", momentum=m)(network, images, goal, seeds) for m in (0.0, 1.0))
    assert bim.found.all() and mim.found.all()
    assert not torch.equal(bim.images, mim.images)


# The catalog


def test_every_suite_names_attacks_that_exist_and_every_attack_is_described() -> None:
    for members in SUITES.values():
        assert set(members) <= set(ATTACKS)
    rows = information()
    assert len(rows) == len(ATTACKS)
    assert all(row.source and row.queries and row.norm in NORMS for row in rows)
    assert {attack.norm for attack in lookup("quick")} == set(NORMS.values())


def test_lookup_by_suite_family_list_and_norm() -> None:
    assert [attack.name for attack in lookup("deepfool")] == ["deepfool-l2", "deepfool-linf"]
    assert [attack.name for attack in lookup("bim-l2, pgd-linf", LINF)] == ["pgd-linf"]
    assert all(attack.norm == L0 for attack in lookup("strong", L0))
    (transfer,) = lookup(["transfer-l2"], substitute=MODEL)
    assert isinstance(transfer, Transfer) and transfer.substitute is MODEL
    (refined,) = lookup("bim-l2", threshold=0.5)
    assert refined.name == "bim-refined-l2"
    with pytest.raises(InputError, match=r"did you mean.*deepfool"):
        lookup("depfool")
    with pytest.raises(InputError, match="works in l0"):
        lookup("deepfool", L0)


# Bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(2, SIDE, SIDE)}, r"expected float32 \(B,C,H,W\)"),
        ({"images": torch.full((2, 1, SIDE, SIDE), 255.0)}, "divide by 255"),
        ({"images": torch.full((2, 1, SIDE, SIDE), torch.nan)}, r"expected \[0,1\]"),
        ({"labels": torch.tensor([0])}, "one per image"),
        ({"labels": torch.tensor([0, 9])}, "classes 0 to 3"),
        ({"seeds": torch.tensor([0])}, "expected 2 integers"),
        ({"seeds": torch.tensor([0, -1])}, "from 0 up"),
        ({"model": lambda x: x.flatten(1).sum(1)}, "returned shape"),
    ],
)
def test_inputs_that_do_not_fit_are_named(change: dict, message: str) -> None:
    images, labels = images_near(MODEL, 2)
    given = {"images": images, "labels": labels, "seeds": torch.arange(2), "model": MODEL} | change
    with pytest.raises(InputError, match=message):
        BoundaryProjection(L2)(given["model"], given["images"], Goal.untargeted(given["labels"]), given["seeds"])


def test_attacks_say_what_they_miss() -> None:
    task = problem(2)
    with pytest.raises(InputError, match="needs a substitute"):
        Transfer(L2)(MODEL, task.images, task.goal, task.seeds)
    with pytest.raises(InputError, match="needs a radius"):
        ProjectedGradient(L2)(MODEL, task.images, task.goal, task.seeds)
    with pytest.raises(InputError, match="knows no l0: use l2"):
        Foolbox(L0, "ddn")
    with pytest.raises(InputError, match="did you mean foolbox-hop-skip-jump"):
        Foolbox(L2, "hopskipjump")
    with pytest.raises(InputError, match="hop-skip-jump knows no l0: use l2 or linf"):
        HopSkipJump(L0)
    if importlib.util.find_spec("autoattack") is None:
        with pytest.raises(InputError, match="not installed"):
            AutoAttack(L2, 1.5)(MODEL, task.images, task.goal, task.seeds)
    if importlib.util.find_spec("numba") is None:
        with pytest.raises(InputError, match="needs numba"):
            Foolbox(L2, "foolbox-brendel-bethge")(MODEL, task.images, task.goal, task.seeds)
