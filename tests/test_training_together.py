"""The contrast of all classes at once, as a GPU runs it: it sets classes apart, resumes exactly, and starts afresh."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from absynth import data
from absynth.errors import InputError
from absynth.training import together
from absynth.training.candidates import choose_candidates
from absynth.training.contrast import ContrastConfig, Pairs
from absynth.training.generative import GenerativeConfig, train_class
from absynth.training.sharpening import sharpen
from absynth.training.stacked import StackedDecoders
from absynth.training.together import explained, sharpen_together
from absynth.vae import Decoder, VAEConfig
from small_models import candidate_energies

SIZES = VAEConfig()
CONFIG = ContrastConfig(rounds=2, batch_size=8, margin=60.0, temperature=10.0)


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    """40 images of zeros and 30 of ones."""
    images, labels = data.load("digits", "train")
    rows = torch.cat([(labels == number).nonzero()[:count, 0] for number, count in ((0, 40), (1, 30))])
    return images[rows], labels[rows]


@pytest.fixture(scope="module")
def trained(digits: tuple[Tensor, Tensor]) -> tuple[list[Decoder], Tensor]:
    """A decoder and 20 candidates of each of the two classes."""
    images, labels = digits
    config = GenerativeConfig(vae_steps=50, decoder_steps=80, vae_batch_size=8, decoder_batch_size=8)
    classes = [train_class(images[labels == number], number, config) for number in (0, 1)]
    starts = torch.stack([choose_candidates(one.latents, 20, 0) for one in classes])
    return [one.vae.decoder for one in classes], starts


def test_it_widens_the_gap_and_resumes(
    digits: tuple[Tensor, Tensor], trained: tuple[list[Decoder], Tensor], tmp_path: Path
) -> None:
    (images, labels), (decoders, starts) = digits, trained

    def gap(of: list[Decoder]) -> float:
        energies = torch.stack([candidate_energies(d, one, images) for d, one in zip(of, starts, strict=True)], dim=1)
        own = energies.gather(1, labels[:, None])
        return (energies.gather(1, 1 - labels[:, None]) - own).mean().item()

    whole, own, rival = sharpen_together(decoders, starts, images, labels, SIZES, CONFIG)
    assert gap(whole) > gap(decoders) + 1
    assert [len(one) for one in own] == [40, 30] and all(0 < len(one) <= 40 for one in rival)
    assert not any(parameter.requires_grad for one in whole for parameter in one.parameters())

    file = tmp_path / "contrast.safetensors"

    def stop(done: int, total: int, text: str) -> None:
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sharpen_together(decoders, starts, images, labels, SIZES, CONFIG, checkpoint=file, progress=stop)
    resumed, _, _ = sharpen_together(decoders, starts, images, labels, SIZES, CONFIG, checkpoint=file)
    for a, b in zip(whole, resumed, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    with pytest.raises(InputError, match="config"):
        other = replace(CONFIG, margin=1.0)
        sharpen_together(decoders, starts, images, labels, SIZES, other, checkpoint=file)


def test_one_round_does_what_the_classes_do_one_by_one(
    digits: tuple[Tensor, Tensor], trained: tuple[list[Decoder], Tensor]
) -> None:
    """Same images, same search, as many steps: the same gain, though the order of the images is another."""
    (images, labels), (decoders, starts) = digits, trained
    config = replace(CONFIG, rounds=1)
    apart, own_apart, _ = sharpen(decoders, starts, images, labels, SIZES, config, workers=1)
    at_once, own, _ = sharpen_together(decoders, starts, images, labels, SIZES, config)
    for a, b in zip(own_apart, own, strict=True):
        assert torch.allclose(a, b, atol=1e-3)  # the latents that the round searched for, before it trained
    for a, b, before in zip(apart, at_once, decoders, strict=True):
        moved_apart, moved = (one.conv_3.weight - before.conv_3.weight for one in (a, b))
        assert torch.cosine_similarity(moved_apart.flatten(), moved.flatten(), dim=0) > 0.5


def test_pairs_hold_the_energies_of_their_latents(
    digits: tuple[Tensor, Tensor], trained: tuple[list[Decoder], Tensor]
) -> None:
    (images, labels), (decoders, starts) = digits, trained
    pairs = explained(StackedDecoders(decoders, SIZES), starts, images, labels, CONFIG, 1.0)
    for number, one in enumerate(pairs):
        assert one.own.tolist() == (labels[one.images] == number).tolist()
        assert int(one.own.sum()) == int((labels == number).sum())
        decoded = decoders[number](one.latents)
        again = (images[one.images] - decoded).square().flatten(1).sum(1) + one.latents.square().sum(1) / 2
        assert torch.allclose(again, one.energies, atol=1e-3)
        first = candidate_energies(decoders[number], starts[number], images[one.images])
        assert (one.energies <= first + 1e-3).all()


def test_a_smaller_class_visits_its_pairs_again() -> None:
    def pairs(own: int, rivals: int, far: int) -> Pairs:
        """``own`` images, ``rivals`` of which the class comes close to, ``far`` others."""
        is_own = torch.arange(own + rivals + far) < own
        energies = torch.where(is_own, 1.0, 5.0)
        others = torch.where(is_own, 5.0, 4.0)
        energies[own + rivals :] = 500.0
        nothing = torch.zeros(len(is_own))
        return Pairs(torch.arange(len(is_own)), is_own, nothing, energies, others)

    order = together._order([pairs(6, 3, 5), pairs(2, 1, 0)], replace(CONFIG, batch_size=4), 0)
    assert [len(rows) for rows in order] == [12, 12]
    assert set(order[0].tolist()) == set(range(9))
    assert torch.bincount(order[1]).tolist() == [4, 4, 4]
    other = together._order([pairs(6, 3, 5), pairs(2, 1, 0)], replace(CONFIG, batch_size=4), 1)
    assert order[0].tolist() != other[0].tolist()


def test_later_rounds_start_where_images_were_found() -> None:
    own, rival = torch.zeros(5, 3), torch.ones(4, 3)
    drawn = together._drawn([(own, rival), (own + 2, rival[:0])], 10, 0)
    assert drawn.shape == (2, 10, 3)
    assert drawn[0, :, 0].tolist() == [0.0] * 6 + [1.0] * 4
    assert (drawn[1] == 2).all()  # a class that is no rival to any image
