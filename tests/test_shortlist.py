"""Answers around one image by a short list of stored points: those of the whole comparison, for less."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from absynth.attacks.queries import CountingClassifier, Following
from absynth.baselines import NearestNeighbor
from absynth.nearest import nearest_of_each_class, offsets_of
from absynth.prototypes import PrototypeABS, SaturatingPrototypeABS
from absynth.responses import Ramp
from absynth.shortlist import LISTED, nearest_around, shortlist
from absynth.vae import Decoder, VAEConfig


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def close_to(images: Tensor, count: int, size: float, seed: int) -> tuple[Tensor, Tensor]:
    """``count`` images within L2 ``size`` of each of (U,N), and whose they are."""
    owner = torch.arange(len(images)).repeat_interleave(count)
    steps = torch.randn(len(owner), images.shape[1], generator=seeded(seed))
    sizes = size * torch.rand(len(owner), 1, generator=seeded(seed + 1))
    return images[owner] + steps / steps.norm(dim=1, keepdim=True) * sizes, owner


@pytest.mark.parametrize("costs", [False, True])
@pytest.mark.parametrize("counts", [(200, 300, 3), (5, 1, 70), (64, 65, 4000)])
def test_within_reach_nothing_else_is_nearest(counts: tuple[int, ...], costs: bool) -> None:
    points = torch.rand(sum(counts), 6, generator=seeded(1))
    offsets = offsets_of(points, torch.rand(len(points), generator=seeded(2)) if costs else None)
    known = torch.rand(9, 6, generator=seeded(3))
    listed = shortlist(known, points, offsets, counts)
    assert listed.indices.shape == (9, len(counts), LISTED)
    assert (listed.reach > 0).all()
    assert listed.reach.isinf().all() == (max(counts) <= LISTED)
    for known_number in range(len(known)):  # right up to the reach
        reach = min(float(listed.reach[known_number]), 1.0)
        images, owner = close_to(known[known_number : known_number + 1], 200, reach, seed=4)
        found = nearest_around(images, listed, owner + known_number, points, offsets)
        assert torch.equal(found, nearest_of_each_class(images, points, offsets, counts))


def test_of_equal_points_the_first_is_nearest() -> None:
    points = torch.rand(10, 6, generator=seeded(1)).repeat(3, 1)
    offsets, known = offsets_of(points), torch.rand(4, 6, generator=seeded(2))
    expected = nearest_of_each_class(known, points, offsets, (30,))
    assert (expected < 10).all()
    found = nearest_around(known, shortlist(known, points, offsets, (30,)), torch.arange(4), points, offsets)
    assert torch.equal(found, expected)


def models() -> list[NearestNeighbor | PrototypeABS]:
    images = torch.rand(900, 1, 16, 16, generator=seeded(5))
    labels = torch.arange(900) % 3
    torch.manual_seed(6)
    decoders = [Decoder(VAEConfig(16, 1, 2)).eval() for _ in range(3)]
    latents = [2 * torch.randn(150 + number, 2, generator=seeded(number)) for number in range(3)]
    return [
        NearestNeighbor(images, labels),
        PrototypeABS(decoders, latents),
        SaturatingPrototypeABS(decoders, latents, response=Ramp(0.3)),
    ]


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("size", [0.02, 0.2, 3.0])
def test_around_answers_as_forward_does(number: int, size: float) -> None:
    model = models()[number]
    clean = torch.rand(5, 1, 16, 16, generator=seeded(7))
    logits, known = model.follow(clean)
    assert torch.equal(logits, model(clean))
    flat, owner = close_to(clean.flatten(1), 40, size, seed=8)
    images = flat.clamp(0, 1).view(-1, 1, 16, 16)
    torch.testing.assert_close(model.around(images, known, owner), model(images), rtol=0, atol=1e-6)


def test_around_compares_with_the_listed_points_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole comparison is asked for by the images beyond reach alone."""
    model = models()[0]
    clean = torch.rand(2, 1, 16, 16, generator=seeded(7))
    _, known = model.follow(clean)
    images = clean[[0, 0, 1]].clone()
    images[0, 0, 3, 3] += 0.01
    images[2] = 1 - images[2]  # far away
    whole: list[int] = []
    forward = NearestNeighbor.forward
    monkeypatch.setattr(NearestNeighbor, "forward", lambda self, x: whole.append(len(x)) or forward(self, x))
    model.around(images, known, torch.tensor([0, 0, 1]))
    assert whole == [1]


def test_questions_around_an_image_are_counted_and_answered_by_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models()[1]
    clean = torch.rand(3, 1, 16, 16, generator=seeded(9))
    counted = CountingClassifier(model, 3)
    following = Following(counted, 3)
    following(clean)
    rows = torch.tensor([0, 2]).repeat_interleave(50)
    near = (clean[rows] + 0.005 * torch.randn(100, 1, 16, 16, generator=seeded(10))).clamp(0, 1)
    expected = model(near)
    monkeypatch.setattr(PrototypeABS, "forward", None)  # not asked
    torch.testing.assert_close(following.select(rows)(near), expected, rtol=0, atol=1e-6)
    assert counted.forward.tolist() == [51, 1, 51]


def test_images_of_the_wrong_shape_are_refused() -> None:
    for model in models():
        with pytest.raises(ValueError, match="images"):
            model.follow(torch.rand(2, 1, 28, 28))
