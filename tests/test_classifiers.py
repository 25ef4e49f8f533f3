"""ABS as a pure function of the image with the exact gradient; the analysis behind it."""

from copy import deepcopy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from absynth.analysis import PAPER, Schedule, _bfgs, analyze, without_giving_up
from absynth.candidates import Candidates, prior_candidates
from absynth.classifiers import ABS
from absynth.decoding import FoldedDecoder, to_blocks
from absynth.errors import InputError
from absynth.responses import Ramp, Threshold
from test_decoding import random_decoder

CLASSES = 4


def toy_abs(**options: object) -> ABS:
    decoders = [random_decoder(seed=seed) for seed in range(CLASSES)]
    candidates = torch.stack([prior_candidates(60, seed=seed) for seed in range(CLASSES)])
    return ABS(decoders, candidates, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def model() -> ABS:
    return toy_abs()


@pytest.fixture(scope="module")
def images(model: ABS) -> Tensor:
    """Images the classes can nearly make: decoded latents with some noise."""
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(12, 8, generator=generator)
    with torch.no_grad():
        decoded = torch.cat([model.decoders[row % CLASSES](latents[row : row + 1]) for row in range(12)])
    return (decoded + 0.05 * torch.randn(decoded.shape, generator=generator)).clamp(0, 1)


def test_each_image_goes_to_the_class_that_made_it(model: ABS, images: Tensor) -> None:
    assert torch.equal(model(images).argmax(1), torch.arange(12) % CLASSES)


def test_energies_are_those_of_the_returned_explanation(model: ABS, images: Tensor) -> None:
    analysis = model.analyze(images)
    residual = (images[:, None] - analysis.reconstructions).square().flatten(2).sum(2)
    energies = (residual + analysis.latents.square().sum(2) / 2) / 784
    torch.testing.assert_close(analysis.energies, energies, atol=1e-6, rtol=1e-5)
    for number in range(CLASSES):
        # in float64, since the decoder's own rounding in float32 is as large, and differs from processor to processor
        decoded = deepcopy(model.decoders[number]).double()(analysis.latents[:, number].double())
        torch.testing.assert_close(analysis.reconstructions[:, number].double(), decoded, atol=5e-6, rtol=0)
    torch.testing.assert_close(analysis.probabilities.sum(1), torch.ones(12))
    assert torch.equal(analysis.labels, model(images).argmax(1))


def test_forward_and_analysis_agree_on_what_was_not_given_up(images: Tensor) -> None:
    model = toy_abs()
    found = model._find(to_blocks(images), label_only=True)
    energies = model.analyze(images).energies
    assert 0 < found.settled.float().mean() < 1  # the rule has something to do here
    torch.testing.assert_close(-model(images)[found.settled], energies[found.settled], atol=1e-6, rtol=1e-5)
    assert (-model(images) >= energies - 1e-6).all()  # what was given up is an upper bound


@pytest.mark.parametrize("response", [None, Threshold(), Ramp(0.2)])
def test_pure_function_of_the_image(images: Tensor, response: torch.nn.Module | None) -> None:
    model = toy_abs(response=response)
    together = model(images)
    torch.manual_seed(123)
    torch.rand(7)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(images[order]), together[order], atol=1e-5, rtol=0)
    alone = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=0)
    state = torch.get_rng_state()
    model(images[:2])
    assert torch.equal(torch.get_rng_state(), state)


def test_the_number_of_threads_does_not_matter(model: ABS, images: Tensor) -> None:
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append((model(images), model.analyze(images).energies))
    finally:
        torch.set_num_threads(before)
    for logits, energies in found[1:]:
        torch.testing.assert_close(logits, found[0][0], atol=1e-5, rtol=0)
        torch.testing.assert_close(energies, found[0][1], atol=1e-5, rtol=0)


def test_following_an_image_finds_what_a_fresh_search_finds(model: ABS, images: Tensor) -> None:
    logits, found = model.follow(images)
    assert torch.equal(logits, model(images))
    for step in range(1, 4):
        moved = (images + 0.02 * step * torch.roll(images, 1, 0)).clamp(0, 1).requires_grad_()
        logits, found = model.follow(moved, found)
        (gradient,) = torch.autograd.grad(logits.amax(1).sum(), moved)
        cold = model(moved)
        (expected,) = torch.autograd.grad(cold.amax(1).sum(), moved)
        assert torch.equal(logits.argmax(1), cold.argmax(1))
        torch.testing.assert_close(logits.amax(1), cold.amax(1), atol=2e-4, rtol=0)
        assert torch.nn.functional.cosine_similarity(gradient.flatten(1), expected.flatten(1)).min() > 0.99


@pytest.mark.parametrize("response", [None, Ramp(0.2)])
def test_images_around_one_are_answered_nearly_as_by_a_search(images: Tensor, response: torch.nn.Module | None) -> None:
    model = toy_abs(response=response)
    exact = replace(without_giving_up(model.schedule), tolerance=1e-9, steps=40)
    _, found = model.follow(images[:4])
    owner = torch.arange(4).repeat_interleave(5)
    noise = torch.randn(20, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    moved = (images[owner] + 0.01 * noise).clamp(0, 1)  # by about 0.2 in L2
    logits = model.around(moved, found, owner)
    energies = model.analyze(moved, schedule=exact).energies
    assert (-logits - energies).min() > -1e-5 * energies.max()  # never below the minimum
    torch.testing.assert_close(-logits.amax(1), energies.amin(1), rtol=0.01, atol=0)
    still = -model.around(images[:4], found, torch.arange(4)) - model.analyze(images[:4], schedule=exact).energies
    assert still.min() > -1e-5 * energies.max()
    alone = torch.cat([model.around(moved[row : row + 1], found, owner[row : row + 1]) for row in range(20)])
    torch.testing.assert_close(logits, alone, rtol=1e-5, atol=1e-7)


def test_images_around_one_that_are_equal_behind_a_threshold_are_answered_once(
    images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = toy_abs(response=Threshold(0.5))
    pair = torch.stack([images[0], images[1]])
    _, found = model.follow(pair)
    owner = torch.tensor([1, 0, 0, 1, 0, 0])
    moved = pair[owner].clone()
    moved[4, 0, 14, 10:12] = 1 - (moved[4, 0, 14, 10:12] >= 0.5).float()  # the only one that crosses the threshold
    moved[1:3] = torch.where(moved[1:3] >= 0.5, moved[1:3], 0.4 * moved[1:3])
    moved[5] = pair[1]  # what the other image looks like: not the same question
    sizes: list[int] = []
    answered = ABS._around

    def counted(self: ABS, seen: Tensor, before: object, owner: Tensor) -> Tensor:
        sizes.append(len(seen))
        return answered(self, seen, before, owner)  # type: ignore[arg-type]

    monkeypatch.setattr(ABS, "_around", counted)
    logits = model.around(moved, found, owner)
    assert sizes == [4]
    alone = torch.cat([model.around(moved[row : row + 1], found, owner[row : row + 1]) for row in range(6)])
    torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-6)
    assert torch.equal(logits[1], logits[2]) and not torch.equal(logits[1], logits[4])


@pytest.mark.parametrize("response", [None, Ramp(0.2)])
def test_a_step_too_small_to_matter_is_not_decoded(
    images: Tensor, response: torch.nn.Module | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = toy_abs(response=response)
    # not followed to the end: all images of a neighborhood have something to gain in common
    found = model._find(to_blocks(model.response(images[:4])), False, replace(model.schedule, steps=1))
    owner, pixel = torch.arange(4).repeat_interleave(100), torch.arange(300, 400).repeat(4)
    moved = images[owner].flatten(1)
    moved[torch.arange(400), pixel] = (moved[torch.arange(400), pixel] + 0.02).clamp(max=1)
    moved = moved.view(-1, 1, 28, 28)
    decoded: list[int] = []
    decode = FoldedDecoder.__call__

    def counted(self: FoldedDecoder, latents: Tensor) -> Tensor:
        decoded.append(len(latents))
        return decode(self, latents)

    monkeypatch.setattr(FoldedDecoder, "__call__", counted)
    promised = model.around(moved, found, owner)
    assert max(decoded) == 1  # the first image of each neighborhood, for each class in the running
    monkeypatch.setattr("absynth.neighbors.TRUSTED", -1.0)
    exact = model.around(moved, found, owner)
    assert sum(decoded) >= 400
    here = model.around(images[:4], found, torch.arange(4))[owner]
    winner = here.argmax(1, keepdim=True)
    changes, expected = ((one - here).gather(1, winner) for one in (promised, exact))
    assert (changes - expected).norm() < 0.01 * expected.norm()


def test_a_batch_larger_than_a_chunk(model: ABS, images: Tensor) -> None:
    many = images.repeat(14, 1, 1, 1)  # 168 images: more than one chunk
    torch.testing.assert_close(model(many)[-12:], model(images), atol=1e-5, rtol=0)


def test_gradient_is_that_of_the_minimum(images: Tensor) -> None:
    """Envelope theorem against central differences, with the search run to convergence."""
    model = toy_abs(schedule=Schedule(steps=60))
    image = images[:1].clone().requires_grad_(True)
    model(image).sum().backward()
    assert image.grad is not None
    generator = torch.Generator().manual_seed(9)
    for _ in range(2):
        direction = torch.randn(image.shape, generator=generator)
        step = 2e-2 * direction / direction.norm()
        inside = image.detach().clamp(0.1, 0.9)
        probe = inside.clone().requires_grad_(True)
        model(probe).sum().backward()
        assert probe.grad is not None
        predicted = (probe.grad * step).sum()
        measured = (model(inside + step).sum() - model(inside - step).sum()) / 2
        # the sum of K normalized energies changes by about 1e-5 here; its rounding is about 1e-7
        torch.testing.assert_close(predicted, measured, rtol=0.03, atol=1e-7)


def test_gradient_formula(model: ABS, images: Tensor) -> None:
    probe = images.clone().requires_grad_(True)
    weights = torch.randn(12, CLASSES, generator=torch.Generator().manual_seed(3))
    (model(probe) * weights).sum().backward()
    found = model._find(to_blocks(images), label_only=True)
    differences = to_blocks(images)[:, None] - found.blocks  # (B,K,N)
    expected = (-2 / 784 * weights[:, :, None] * differences).sum(1)
    assert probe.grad is not None
    torch.testing.assert_close(to_blocks(probe.grad), expected, atol=1e-7, rtol=1e-4)


def test_scales_and_calibration_enter(images: Tensor) -> None:
    scales = torch.tensor([1.0, 0.9, 1.1, 1.0])
    plain, scaled = toy_abs(), toy_abs(scales=scales)
    torch.testing.assert_close(scaled.analyze(images).energies, plain.analyze(images).energies * scales)
    logits = torch.tensor([[-0.01, -0.02, -0.5, -0.5]])
    evidence = torch.exp(440.0 * logits) + 0.000039
    torch.testing.assert_close(plain.posterior(logits), evidence / evidence.sum())
    nothing = plain.posterior(torch.full((1, 4), -1.0))  # no class explains the image
    torch.testing.assert_close(nothing, torch.full((1, 4), 0.25))
    assert not plain.refuses(plain.posterior(logits))[0]


def test_binary_abs_sees_only_the_threshold(images: Tensor) -> None:
    model = toy_abs(response=Threshold())
    dimmed = torch.where(images >= 0.5, 0.6, 0.3)
    assert torch.equal(model(images), model(dimmed))
    probe = dimmed.clone().requires_grad_(True)
    model(probe).sum().backward()
    assert probe.grad is not None and probe.grad.abs().max() > 0  # straight through


def test_weights_loaded_later_are_used(images: Tensor) -> None:
    model, other = toy_abs(), ABS([random_decoder(seed=s + 50) for s in range(CLASSES)], torch.zeros(CLASSES, 60, 8))
    assert not torch.allclose(model(images), other(images))
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(images), other(images))


def test_other_sizes_and_class_counts() -> None:
    decoders = [random_decoder(image_size=16, channels=3, latent_size=3, seed=seed) for seed in range(2)]
    model = ABS(decoders, torch.stack([prior_candidates(9, 3, seed=s) for s in range(2)]))
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert model(images).shape == (2, 2)
    assert model.analyze(images).reconstructions.shape == (2, 2, 3, 16, 16)


def test_levenberg_marquardt_goes_below_the_papers_schedule(model: ABS, images: Tensor) -> None:
    candidates = prior_candidates(200)
    decoders = [FoldedDecoder(decoder) for decoder in model.decoders]
    starts = [Candidates(decoder, candidates, 1.0) for decoder in decoders]
    blocks = to_blocks(images)
    paper = analyze(decoders, starts, blocks, replace(PAPER, candidates=200))
    ours = analyze(decoders, starts, blocks, Schedule(steps=8))
    start = analyze(decoders, starts, blocks, Schedule(steps=0))
    assert (
        paper.energies < start.energies + 1e-4
    ).float().mean() > 0.95 and paper.energies.mean() < start.energies.mean()
    # lower for the class that explains the image, and as good for the others, where random decoders explain nothing
    assert (ours.energies.amin(1) < paper.energies.amin(1)).all()
    assert ours.energies.mean() < 1.001 * paper.energies.mean()
    assert (ours.energies <= start.energies).all()  # a step is only kept where it is better
    assert ours.latents.norm(dim=2).max() <= 5.0001 and paper.latents.norm(dim=2).max() <= 5.0001


def test_quasi_newton_reaches_the_same_minima(model: ABS, images: Tensor) -> None:
    """For the class that explains the image, from the anchors' curvature and from that of known latents."""
    exact = model.analyze(images, schedule=Schedule(steps=30, losing_steps=30)).energies.amin(1)
    schedule = Schedule(method="quasi-newton", steps=30, losing_steps=30)
    found = model._find(to_blocks(images), False, schedule)
    torch.testing.assert_close(found.energies.amin(1) / 784, exact, rtol=1e-3, atol=0)
    nearby = found.latents + 0.1
    again = analyze(model.folded, [], to_blocks(images), schedule, starts=nearby)
    torch.testing.assert_close(again.energies.amin(1) / 784, exact, rtol=1e-3, atol=0)
    assert found.latents.norm(dim=2).max() <= 5.0001


def test_a_quasi_newton_step_never_goes_up(model: ABS, images: Tensor) -> None:
    energies = [
        model.analyze(images, schedule=Schedule(method="quasi-newton", steps=steps, losing_steps=steps)).energies
        for steps in range(4)
    ]
    for before, after in pairwise(energies):
        assert (after <= before).all() and after.mean() < before.mean()


def test_bfgs_maps_the_change_of_the_gradient_to_the_step() -> None:
    generator = torch.Generator().manual_seed(6)
    root = torch.randn(5, 4, 4, generator=generator)
    matrix = root @ root.mT + torch.eye(4)
    moved = torch.randn(5, 4, generator=generator)
    turned = (matrix @ moved[:, :, None])[:, :, 0]
    turned[4] *= -1  # no positive inverse does that
    inverse = torch.eye(4).expand(5, 4, 4)
    updated = _bfgs(inverse, moved, turned)
    torch.testing.assert_close((updated @ turned[:, :, None])[:4, :, 0], moved[:4], atol=1e-4, rtol=1e-4)
    assert (torch.linalg.eigvalsh(updated) > 0).all() and torch.equal(updated[4], inverse[4])


def test_latents_leave_the_ball_without_losing_their_signs(model: ABS, images: Tensor) -> None:
    found = model.analyze(images, schedule=Schedule(steps=8, max_norm=0.5))
    norms = found.latents.norm(dim=2)
    assert norms.max() <= 0.5001 and (norms > 0.499).any()
    assert (found.latents < 0).any()


def test_candidate_search_takes_the_lowest_energy(model: ABS, images: Tensor) -> None:
    decoder = FoldedDecoder(model.decoders[0])  # type: ignore[arg-type]
    latents = prior_candidates(300, seed=2)
    blocks = to_blocks(images)
    with torch.no_grad():
        distances = (blocks[:, None].double() - decoder(latents)[None].double()).square().sum(2)
    best = (distances + latents.double().square().sum(1) / 2).argmin(1)
    candidates = Candidates(decoder, latents, 1.0)
    assert torch.equal(candidates.best(blocks, None), best)
    assert torch.equal(candidates.best(blocks, 1), torch.zeros(12, dtype=torch.int64))


def test_prior_candidates_are_the_densest() -> None:
    drawn = prior_candidates(100, seed=4)
    everything = prior_candidates(111, seed=4, surplus=1.0)
    assert drawn.shape == (100, 8) and torch.equal(prior_candidates(100, seed=4), drawn)
    assert drawn.norm(dim=1).max() <= everything.norm(dim=1).sort().values[100]
    assert (drawn < 0).any()


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (torch.zeros(28, 28), "shape"),
        (torch.zeros(0, 1, 28, 28), "empty"),
        (torch.zeros(1, 1, 20, 20), "28"),
        (torch.zeros(1, 1, 28, 28, dtype=torch.float64), "float32"),
        (torch.full((1, 1, 28, 28), 255.0), "255"),
        (torch.full((1, 1, 28, 28), torch.nan), "NaN"),
    ],
)
def test_bad_images(model: ABS, bad: Tensor, says: str) -> None:
    for call in (model, model.analyze):
        with pytest.raises(InputError, match=says) as caught:
            call(bad)
        assert "\n" not in str(caught.value)


def test_bad_construction() -> None:
    with pytest.raises(InputError, match="candidates of shape"):
        ABS([random_decoder()], torch.zeros(1, 5, 8))
    with pytest.raises(ValueError, match="method"):
        Schedule(method="guess")
    with pytest.raises(ValueError, match="slack"):
        Schedule(slack=(0.5,))
    assert without_giving_up(Schedule(slack=(2.0,))).slack == ()
