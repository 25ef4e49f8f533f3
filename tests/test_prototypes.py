"""ABS by prototypes: the exact minimum, and answers that depend on the image alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from absynth.certificates import certified_radii
from absynth.errors import InputError
from absynth.evaluation import model_digest
from absynth.prototypes import PrototypeABS
from absynth.vae import Decoder, VAEConfig


def model(classes: int = 3, beta: float = 0.7) -> PrototypeABS:
    torch.manual_seed(0)
    decoders = [Decoder(VAEConfig()).eval() for _ in range(classes)]
    for decoder in decoders:  # untrained decoders are nearly gray: make them differ
        decoder.conv_3.weight.data.mul_(8)
    latents = [2 * torch.randn(4 + number, 8) for number in range(classes)]
    return PrototypeABS(decoders, latents, beta=beta)


def images(count: int = 7) -> Tensor:
    return torch.rand(count, 1, 28, 28, generator=torch.Generator().manual_seed(1))


def test_logits_are_minus_the_smallest_energy_of_all_prototypes() -> None:
    prototypes, x = model(), images()
    logits = prototypes(x)
    start = 0
    for number, count in enumerate(prototypes.class_counts):
        points = prototypes.points[start : start + count].double()
        costs = 0.7 / 2 * prototypes.latents[start : start + count].double().square().sum(1)
        energies = (x.flatten(1)[:, None].double() - points).square().sum(2) + costs
        torch.testing.assert_close(logits[:, number].double(), -energies.amin(1) / 784, rtol=1e-6, atol=1e-7)
        start += count


def test_prototypes_are_decoded_latents() -> None:
    torch.manual_seed(0)
    decoder = Decoder(VAEConfig()).eval()
    latents = torch.randn(3, 8)
    prototypes = PrototypeABS([decoder, decoder], [latents, latents + 1])
    with torch.no_grad():
        torch.testing.assert_close(prototypes.points[:3].view(3, 1, 28, 28), decoder(latents), rtol=1e-4, atol=1e-5)


def test_an_answer_depends_on_the_image_alone() -> None:
    prototypes, x = model(), images(9)
    together = prototypes(x)
    assert torch.equal(together, torch.cat([prototypes(one[None]) for one in x]))
    assert torch.equal(together.flip(0), prototypes(x.flip(0)))


def test_the_gradient_is_exact() -> None:
    prototypes, x = model(), images(2).requires_grad_(True)
    logits = prototypes(x)
    (gradient,) = torch.autograd.grad(logits[:, 1].sum(), x)
    step = torch.zeros_like(x)
    step[:, 0, 13, 9] = 1e-2
    with torch.no_grad():
        slope = (prototypes(x + step).double() - prototypes(x - step).double())[:, 1] / 2e-2
    torch.testing.assert_close(gradient[:, 0, 13, 9].double(), slope, rtol=2e-3, atol=1e-6)


def test_analyze_shows_the_prototypes_behind_the_logits() -> None:
    prototypes, x = model(), images(4)
    analysis = prototypes.analyze(x)
    assert torch.equal(analysis.energies, -prototypes(x))
    assert analysis.reconstructions.shape == (4, 3, 1, 28, 28) and analysis.latents.shape == (4, 3, 8)
    energies = (x[:, None] - analysis.reconstructions).square().flatten(2).sum(2)
    energies = energies + 0.35 * analysis.latents.square().sum(2)
    torch.testing.assert_close(analysis.energies, energies / 784, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(analysis.probabilities.sum(1), torch.ones(4))


def test_random_attacks_do_not_break_the_certificates() -> None:
    prototypes, x = model(), images(5)
    labels = prototypes(x).argmax(1)
    radii = certified_radii(prototypes, x, labels)
    generator = torch.Generator().manual_seed(2)
    # straight toward every rival's prototype, as far as certified: the shortest way there is
    for norm, order in (("l2", 2), ("linf", math.inf)):
        for point in prototypes.points:
            direction = point - x.flatten(1)
            length = torch.linalg.vector_norm(direction, ord=order, dim=1, keepdim=True)
            moved = x.flatten(1) + direction / length * torch.minimum(0.999 * radii[norm][:, None].float(), length)
            assert torch.equal(prototypes(moved.view_as(x).clamp(0, 1)).argmax(1), labels)
    for row in range(5):
        changed = x[row].flatten().clone()
        chosen = torch.randperm(784, generator=generator)[: int(radii["l0"][row]) - 1]
        changed[chosen] = torch.rand(len(chosen), generator=generator).round()
        assert int(prototypes(changed.view(1, 1, 28, 28)).argmax(1)) == int(labels[row])


def test_weights_that_are_loaded_are_certified_and_told_apart() -> None:
    """A state that is loaded replaces all that follows from it, too."""
    first, second = model(), model()
    torch.manual_seed(5)
    other = PrototypeABS(
        [Decoder(VAEConfig()).eval() for _ in range(3)],
        [2 * torch.randn(4 + number, 8) for number in range(3)],
        beta=0.7,
    )
    assert model_digest(first) == model_digest(second) != model_digest(other)
    before = model_digest(other)
    other.load_state_dict(first.state_dict())
    batch = images(32)
    assert torch.equal(other(batch), first(batch))
    labels = first(batch).argmax(1)
    radii = certified_radii(other, batch, labels)["l2"]
    assert torch.equal(radii, certified_radii(first, batch, labels)["l2"]) and bool((radii > 0).all())
    assert model_digest(other) != before
    second.load_state_dict(first.state_dict())  # the same: no other model
    assert model_digest(second) == model_digest(first)


def test_bad_input_is_named() -> None:
    decoder = Decoder(VAEConfig()).eval()
    with pytest.raises(InputError, match="at least 2 decoders"):
        PrototypeABS([decoder], [torch.zeros(1, 8)])
    with pytest.raises(InputError, match="at least one"):
        PrototypeABS([decoder, decoder], [torch.zeros(1, 8), torch.zeros(0, 8)])
    with pytest.raises(InputError, match="values from"):
        model()(images() * 255)
