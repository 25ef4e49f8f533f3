"""Training of the generative models: it learns, it resumes exactly, and it sets classes apart."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from absynth import data
from absynth.analysis import DEFAULT, Schedule, analyze
from absynth.candidates import Candidates
from absynth.decoding import FoldedDecoder, to_blocks
from absynth.errors import InputError
from absynth.responses import Threshold
from absynth.training import contrast, generative, recipes
from absynth.training.calibration import calibrate, class_scales, refusal_threshold
from absynth.training.candidates import choose_candidates, widen
from absynth.training.contrast import (
    ContrastConfig,
    Pairs,
    Starts,
    choose_rivals,
    exchange,
    moved,
    of_round,
    scan,
    settle,
)
from absynth.training.generative import GenerativeConfig, TrainedClass, shared_start, train_class
from absynth.training.sharpening import sharpen
from absynth.training.side_by_side import train_classes
from absynth.vae import VAE, VAEConfig
from small_models import candidate_energies

TINY = GenerativeConfig(shared_steps=5, vae_steps=6, decoder_steps=7, vae_batch_size=8, decoder_batch_size=8)
SMALL = replace(TINY, vae_steps=50, decoder_steps=80)


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    """80 images of zeros and 80 of ones."""
    images, labels = data.load("digits", "train")
    rows = torch.cat([(labels == number).nonzero()[:80, 0] for number in (0, 1)])
    return images[rows], labels[rows]


def same(first: TrainedClass, second: TrainedClass) -> bool:
    pairs = zip(first.vae.state_dict().values(), second.vae.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs) and torch.equal(first.latents, second.latents)


def test_both_phases_lower_the_energy(digits: tuple[Tensor, Tensor]) -> None:
    losses: list[float] = []

    def listen(step: int, total: int, text: str) -> None:
        losses.append(float(text.rsplit(" ", 1)[1]))

    zeros = digits[0][:80]
    trained = train_class(zeros, 0, SMALL, progress=listen)
    assert len(losses) == SMALL.steps
    first_phase, second_phase = losses[: SMALL.vae_steps], losses[SMALL.vae_steps :]
    assert sum(first_phase[-10:]) < 0.5 * sum(first_phase[:10])
    assert sum(second_phase[-10:]) < 0.8 * sum(second_phase[:10])
    assert trained.latents.shape == (80, 8)
    with torch.no_grad():
        error = (zeros - trained.vae.decoder(trained.latents)).square().flatten(1).sum(1).mean()
        blank = (zeros - zeros.mean(0)).square().flatten(1).sum(1).mean()
    assert error < 0.7 * blank  # better than the mean image: the latents say something


NOISY = replace(TINY, vae_steps=13, decoder_steps=0, kl_first=2.0, kl_last=0.5)  # without a second phase


@pytest.mark.parametrize(("config", "stop_at"), [(TINY, 3), (TINY, 6), (TINY, 9), (NOISY, 9), (NOISY, 13)])
def test_a_stopped_training_ends_in_the_same_weights(
    digits: tuple[Tensor, Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    config: GenerativeConfig,
    stop_at: int,
) -> None:
    monkeypatch.setattr(generative, "CHECKPOINT_EVERY", 2)
    whole = train_class(digits[0][:80], 3, config)

    def stop(step: int, total: int, text: str) -> None:
        if step == stop_at:
            raise KeyboardInterrupt

    file = tmp_path / "class.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train_class(digits[0][:80], 3, config, checkpoint=file, progress=stop)
    steps: list[int] = []
    resumed = train_class(digits[0][:80], 3, config, checkpoint=file, progress=lambda s, _t, _x: steps.append(s))
    assert same(whole, resumed)
    assert not steps or steps[0] > stop_at - 2  # it did go on from the checkpoint
    assert not same(whole, train_class(digits[0][:80], 4, config))


def test_the_divergence_weighs_less_and_less() -> None:
    config = GenerativeConfig(beta=2.0, kl_first=4.0, kl_last=0.5, kl_until=0.4)
    assert [round(config.kl_weight(done), 6) for done in (0.0, 0.2, 0.4, 0.9)] == [8.0, 4.5, 1.0, 1.0]
    assert [GenerativeConfig().kl_weight(done) for done in (0.0, 0.3, 1.0)] == [1.0, 1.0, 1.0]


def test_without_a_second_phase_latents_are_what_the_encoder_says(digits: tuple[Tensor, Tensor]) -> None:
    zeros = digits[0][:80]
    trained = train_class(zeros, 0, replace(NOISY, vae_steps=300))
    with torch.no_grad():
        assert torch.equal(trained.latents, torch.cat([trained.vae.encoder(chunk)[0] for chunk in zeros.split(256)]))
        error = (zeros - trained.vae.decoder(trained.latents)).square().flatten(1).sum(1).mean()
    assert error < 0.7 * (zeros - zeros.mean(0)).square().flatten(1).sum(1).mean()
    light, heavy = (train_class(zeros, 0, replace(NOISY, kl_first=weight, kl_last=weight)) for weight in (0.1, 50.0))
    assert heavy.latents.norm() < light.latents.norm()  # the weight reaches the loss


def test_more_effort_trains_abs_by_the_longer_plan() -> None:
    short, eight = recipes.plan_of_abs(1.0, seed=7)
    long, cycles = recipes.plan_of_abs(3.0, seed=7)
    assert (short.vae_steps, short.decoder_steps, short.seed) == (300, 5000, 7) and [c.rounds for c in eight] == [8]
    assert (long.vae_steps, long.decoder_steps, long.seed) == (6000, 0, 7)
    assert [c.rounds for c in cycles] == [6, 16, 24] and [c.seed for c in cycles] == [700, 701, 702]
    assert recipes.plan_of_abs(2.0)[0].vae_steps == 4000 and recipes.plan_of_abs(1.9)[0].decoder_steps == 9500
    assert [c.rounds for c in recipes.plan_of_abs(6.0)[1]] == [6, 16, 24]


def test_another_trainings_checkpoint_is_refused(digits: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    file = tmp_path / "class.safetensors"
    train_class(digits[0][:80], 0, TINY, checkpoint=file)
    with pytest.raises(InputError, match="data_digest"):
        train_class(digits[0][80:], 0, TINY, checkpoint=file)
    with pytest.raises(InputError, match="config"):
        train_class(digits[0][:80], 0, replace(TINY, seed=1), checkpoint=file)
    with pytest.raises(InputError, match="at least 2"):
        train_class(digits[0][:1], 0, TINY)


def test_latents_stay_in_the_ball_after_next_to_no_training(digits: tuple[Tensor, Tensor]) -> None:
    """The encoder's variances mean nothing yet, and steps of that size would lead out and out."""
    trained = train_class(digits[0][:80], 0, replace(TINY, vae_steps=1, decoder_steps=50))
    assert trained.latents.norm(dim=1).max() <= DEFAULT.max_norm * (1 + 1e-6)


def test_what_has_diverged_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    diverged = TrainedClass(VAE(VAEConfig()), torch.full((3, 8), torch.inf))
    monkeypatch.setattr(recipes, "train_classes", lambda *_, **__: [diverged])
    with pytest.raises(InputError, match=r"abs diverged at effort 0\.01.*delete .*abs\.training") as caught:
        recipes.train("abs", "digits", out=tmp_path, effort=0.01)
    assert "\n" not in str(caught.value)


def test_processes_do_not_change_the_result(digits: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the processes do: a sum over threads rounds differently
    try:
        one = train_classes(*digits, TINY, workers=1)
        two = train_classes(*digits, TINY, workers=2, checkpoints=tmp_path)
    finally:
        torch.set_num_threads(threads)
    assert all(same(a, b) for a, b in zip(one, two, strict=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "class-0.safetensors",
        "class-1.safetensors",
        "shared.safetensors",
    ]


def test_classes_begin_from_what_they_share(digits: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(step: int, _total: int, _text: str) -> None:
        if step == 3:
            raise Stop

    start = shared_start(digits[0], TINY)
    with pytest.raises(Stop):
        shared_start(digits[0], TINY, checkpoint=tmp_path / "shared", progress=stop)
    assert torch.equal(
        start.decoder.conv_0.weight, shared_start(digits[0], TINY, checkpoint=tmp_path / "shared").decoder.conv_0.weight
    )
    zeros = digits[0][:80]
    begun = train_class(zeros, 0, replace(TINY, vae_steps=1, decoder_steps=1), start=start)
    moved = (begun.vae.decoder.conv_1.weight - start.decoder.conv_1.weight).norm()
    assert moved < 0.1 * start.decoder.conv_1.weight.norm()
    file = tmp_path / "class-0"
    train_class(zeros, 0, TINY, start=start, checkpoint=file)
    with pytest.raises(InputError, match="start"):  # the same class, begun by itself
        train_class(zeros, 0, TINY, checkpoint=file)


def test_early_rounds_look_at_a_part_of_every_class() -> None:
    labels = torch.tensor([0] * 10 + [1] * 5 + [2])
    config = ContrastConfig(rounds=4, early_share=0.5)
    first, second = (of_round(labels, config, number) for number in (0, 1))
    assert labels[first].bincount().tolist() == [5, 3, 1] and (first.diff() > 0).all()
    assert not torch.equal(first, second) and torch.equal(first, of_round(labels, config, 0))
    for number in (2, 3):
        assert torch.equal(of_round(labels, config, number), torch.arange(16))


def test_rivals_that_a_step_leaves_far_behind_are_given_up(digits: tuple[Tensor, Tensor]) -> None:
    images = digits[0][:80]
    trained = train_class(images, 0, SMALL)
    folded, starts = FoldedDecoder(trained.vae.decoder), trained.latents[:20]
    known = Starts.of(folded, starts, 1.0)
    found, config = scan(known, images), ContrastConfig(settling=3)
    own = torch.arange(80) < 40

    def settled(true: float) -> Pairs:
        pairs = Pairs.begun(torch.ones(80, dtype=torch.bool), own, starts.shape[1], torch.full((80,), true))
        settle(folded, starts, known.inverses, found, pairs, images, config, 1.0)
        return pairs

    close, far = settled(1000.0), settled(-1000.0)
    assert torch.equal(close.energies[own], far.energies[own])
    assert (far.energies[~own] >= close.energies[~own]).all() and (far.energies > close.energies).any()
    assert (far.energies <= found.energies).all()  # their first step counts


def test_contrast_widens_the_gap_and_resumes(
    digits: tuple[Tensor, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = (torch.cat([one[:40], one[80:120]]) for one in digits)
    trained = [train_class(images[labels == number], number, SMALL) for number in (0, 1)]
    decoders = [one.vae.decoder for one in trained]
    starts = torch.stack([choose_candidates(one.latents, 40, 0) for one in trained])
    config = ContrastConfig(rounds=2, batch_size=8, margin=60.0, temperature=10.0)
    sizes = VAEConfig()

    def gap(of: list[torch.nn.Module]) -> float:
        energies = torch.stack(
            [candidate_energies(d, one, images) for d, one in zip(of, starts, strict=True)],  # type: ignore[arg-type]
            dim=1,
        )
        own = energies.gather(1, labels[:, None])
        return (energies.gather(1, 1 - labels[:, None]) - own).mean().item()

    before = gap(list(decoders))
    whole, own, rival = sharpen(decoders, starts, images, labels, sizes, config, workers=1)
    assert gap(list(whole)) > before + 1
    assert [len(one) for one in own] == [40, 40]
    assert all(0 < len(one) <= 40 for one in rival)
    assert all(
        torch.equal(d.conv_0.weight, t.vae.decoder.conv_0.weight) for d, t in zip(decoders, trained, strict=True)
    )

    file = tmp_path / "contrast.safetensors"

    def stop(done: int, total: int, text: str) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sharpen(decoders, starts, images, labels, sizes, config, workers=1, checkpoint=file, progress=stop)
    resumed, _, _ = sharpen(decoders, starts, images, labels, sizes, config, workers=1, checkpoint=file)
    for a, b in zip(whole, resumed, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    with pytest.raises(InputError, match="config"):
        sharpen(decoders, starts, images, labels, sizes, replace(config, margin=1.0), workers=1, checkpoint=file)


def test_the_search_of_a_round_comes_close_to_the_analysis(digits: tuple[Tensor, Tensor]) -> None:
    images = digits[0][:40]
    trained = train_class(images, 0, SMALL)
    decoder, starts = trained.vae.decoder, choose_candidates(trained.latents, 20, 0)
    folded = FoldedDecoder(decoder)
    known = Starts.of(folded, starts, 1.0)
    energies = candidate_energies(decoder, starts, images)
    scanned = scan(known, images)
    promise = scanned.promised
    everything = torch.ones(40, dtype=torch.bool)
    pairs = Pairs.begun(everything, everything, starts.shape[1])
    settle(folded, starts, known.inverses, scanned, pairs, images, ContrastConfig(settling=3), 1.0)
    found = analyze([folded], [Candidates(folded, starts, 1.0)], to_blocks(images), Schedule(steps=12)).energies[:, 0]
    assert (pairs.energies <= energies + 1e-3).all()  # a step that raises an energy is not taken
    assert (energies - pairs.energies).mean() > 0.7 * (energies - found).mean() > 0
    assert (promise < energies).all() and (promise - found).mean().abs() < 0.5 * (energies - found).mean()
    again = (images - decoder(pairs.latents)).square().flatten(1).sum(1) + pairs.latents.square().sum(1) / 2
    assert torch.allclose(again, pairs.energies, atol=1e-3)


def test_a_scan_goes_candidate_by_candidate_and_says_the_same(digits: tuple[Tensor, Tensor]) -> None:
    images = digits[0][:30]
    trained = train_class(images, 0, SMALL)
    latents = choose_candidates(trained.latents, 7, 0)
    known = Starts.of(FoldedDecoder(trained.vae.decoder), latents, 1.0)
    found = scan(known, images)
    assert len(found.chosen.unique()) > 1  # or there would be one group only
    blocks = to_blocks(images)
    assert torch.equal(
        found.chosen,
        (torch.cdist(blocks, known.candidates.points).square() / 2 + latents.square().sum(1) / 4).argmin(1),
    )
    energies, newton, promised = known.step(blocks, found.chosen)
    assert torch.allclose(found.energies, energies, rtol=1e-5)
    assert torch.allclose(found.newton, newton, atol=1e-4) and torch.allclose(found.promised, promised, rtol=1e-4)
    some = found.rows(torch.tensor([3, 5]))
    assert torch.equal(some.newton, found.newton[[3, 5]]) and torch.equal(some.promised, found.promised[[3, 5]])


def test_rivals_are_those_that_come_close() -> None:
    energies = torch.tensor([[1.0, 2.0, 3.0, 4.0], [9.0, 500.0, 8.0, 1.0]])
    chosen = choose_rivals(energies, torch.tensor([1, 3]), ContrastConfig(rivals=2))
    assert chosen.tolist() == [[True, True, True, False], [True, False, True, True]]
    far = choose_rivals(energies, torch.tensor([1, 1]), ContrastConfig(rivals=1))
    assert far.tolist() == [[True, True, False, False], [False, True, False, True]]
    alone = choose_rivals(energies + torch.tensor([0.0, 0, 0, 900]), torch.tensor([0, 2]), ContrastConfig(rivals=3))
    assert alone.tolist() == [[True, True, True, False], [True, False, True, False]]


def test_every_round_moves_the_images_afresh(digits: tuple[Tensor, Tensor]) -> None:
    images, config = digits[0][:6], ContrastConfig()
    first = moved(images, config, 0, None)
    assert torch.equal(first, moved(images, config, 0, None))
    assert not torch.equal(first, moved(images, config, 1, None))
    assert 0.01 < (first - images).abs().mean() < 0.15
    assert torch.equal(moved(images, config, 0, Threshold()), Threshold()(first))


def test_a_rival_is_compared_with_the_true_class() -> None:
    def pairs(rows: list[int], own: list[bool], energies: list[float]) -> contrast.Pairs:
        nothing = torch.zeros(len(rows), 0)
        return contrast.Pairs(torch.tensor(rows), torch.tensor(own), nothing, torch.tensor(energies), nothing)

    both = [pairs([0, 1], [True, False], [3.0, 9.0]), pairs([0, 1], [False, True], [7.0, 4.0])]
    exchange(both, 2)
    assert both[0].others.tolist() == [7.0, 4.0] and both[1].others.tolist() == [3.0, 9.0]


def test_candidates_cover_the_latents() -> None:
    latents = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    chosen = choose_candidates(latents, 100, seed=1)
    assert chosen.shape == (100, 8) and torch.equal(chosen, choose_candidates(latents, 100, seed=1))
    nearest = torch.cdist(latents, chosen).amin(1).mean()
    random = torch.cdist(latents, torch.randn(100, 8, generator=torch.Generator().manual_seed(5))).amin(1).mean()
    assert nearest < 0.8 * random
    filled = choose_candidates(latents[:30], 100, seed=1)
    assert filled.shape == (100, 8) and torch.equal(filled[:30], latents[:30])


def test_widened_candidates_are_nearer_to_the_images_of_other_classes(digits: tuple[Tensor, Tensor]) -> None:
    images, labels = (torch.cat([one[:40], one[80:120]]) for one in digits)
    trained = [train_class(images[labels == number], number, SMALL) for number in (0, 1)]
    decoders = [one.vae.decoder for one in trained]
    starts = torch.stack([choose_candidates(one.latents, 40, 0) for one in trained])
    wider = widen(decoders, starts, images, VAEConfig(), beta=1.0, seed=3, count=60)
    assert wider.shape == starts.shape

    def losing(candidates: Tensor) -> float:
        """Mean energy of the best candidate of the class that an image does not belong to."""
        found = [
            candidate_energies(decoder, one, images[labels != number])
            for number, (decoder, one) in enumerate(zip(decoders, candidates, strict=True))
        ]
        return torch.cat(found).mean().item()

    assert losing(wider) < 0.98 * losing(starts)


def test_calibration_reaches_the_confidence_it_is_asked_for() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(5, (800,), generator=generator)
    energies = 0.04 + 0.01 * torch.rand(800, 5, generator=generator)
    energies[torch.arange(800), labels] = 0.02 + 0.015 * torch.rand(800, generator=generator)
    found = calibrate(energies, labels)
    evidence = torch.exp(-found.alpha * energies.double()) + found.eta
    probabilities = evidence / evidence.sum(1, keepdim=True)
    assert abs(probabilities.amax(1).median().item() - 0.9) < 1e-3
    true = probabilities.gather(1, labels[:, None]).log().mean().item()
    assert abs(-true - found.cross_entropy) < 1e-6
    threshold = refusal_threshold(probabilities, share=0.05)
    assert 0.3 <= threshold <= 0.5


def test_class_scales_undo_a_bias() -> None:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(3, (3000,), generator=generator)
    energies = 1 + 0.05 * torch.rand(3000, 3, generator=generator)
    energies[torch.arange(3000), labels] -= 0.06
    biased = energies * torch.tensor([1.0, 1.05, 1.0])  # class 1 looks worse than it is
    scales = class_scales(biased, labels)
    before = (biased.argmin(1) == labels).float().mean()
    after = ((biased * scales).argmin(1) == labels).float().mean()
    assert scales[0] == 1 and 0.93 < scales[1] < 0.97 and abs(scales[2] - 1) < 0.02
    assert after > before + 0.05
