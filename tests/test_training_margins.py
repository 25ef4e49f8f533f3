"""What an attacker can close of a gap, against perturbations drawn and searched for; stacked decoders against single
ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from absynth.decoding import to_blocks
from absynth.errors import InputError
from absynth.responses import Ramp
from absynth.training.margins import closable, room
from absynth.training.prototypes import with_more_latents
from absynth.training.stacked import StackedDecoders, decode_mixed, rows_by_class
from absynth.vae import Decoder, VAEConfig

RADII = {"l2": 1.5, "linf": 0.3, "l0": 3.0}
COUNT, SIZE = 12, 20


def pairs(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Differences of prototypes (B,N), and pixels (B,N), many of them black or white."""
    generator = torch.Generator().manual_seed(seed)
    apart = torch.rand(COUNT, SIZE, generator=generator) * 2 - 1
    pixels = (torch.rand(COUNT, SIZE, generator=generator) * 2 - 0.5).clamp(0, 1)
    return apart, pixels


def gained(apart: Tensor, pixels: Tensor, moved: Tensor, response: Ramp) -> Tensor:
    return (apart * (response(moved) - response(pixels))).sum(-1)


@pytest.mark.parametrize("a", [0.0, 0.3])
@pytest.mark.parametrize("norm", ["l2", "linf", "l0"])
def test_no_perturbation_closes_more(norm: str, a: float) -> None:
    response, (apart, pixels) = Ramp(a), pairs()
    most = closable(apart, pixels, response, norm, RADII[norm])
    generator = torch.Generator().manual_seed(1)
    for _ in range(300):
        step = torch.randn(COUNT, SIZE, generator=generator) + 2 * apart * torch.rand(1, generator=generator)
        if norm == "l2":
            step = step / step.norm(dim=1, keepdim=True) * RADII[norm]
        elif norm == "linf":
            step = step.sign() * RADII[norm]
        else:
            step = step * (step.abs() >= step.abs().topk(3, dim=1).values[:, -1:]) * 10
        assert (gained(apart, pixels, (pixels + step).clamp(0, 1), response) <= most + 1e-5).all()


@pytest.mark.parametrize("a", [0.0, 0.3])
def test_the_best_perturbations_close_that_much(a: float) -> None:
    response, (apart, pixels) = Ramp(a), pairs(2)
    moved = (pixels + 0.3 * apart.sign()).clamp(0, 1)
    assert torch.allclose(closable(apart, pixels, response, "linf", 0.3), gained(apart, pixels, moved, response))
    ends = apart.sign().clamp(min=0)
    best = (apart * (response(ends) - response(pixels))).topk(3, dim=1).values.sum(1)
    assert torch.allclose(closable(apart, pixels, response, "l0", 3.0), best)
    # L2: a grid of multipliers, and for each the moves that it makes worth while
    most, reached = closable(apart, pixels, response, "l2", 1.0), torch.zeros(COUNT)
    moves = torch.linspace(-1, 1, 401)
    trials = (pixels[:, :, None] + moves).clamp(0, 1)  # (B,N,T)
    gains = apart[:, :, None] * (response(trials) - response(pixels)[:, :, None])
    costs = (trials - pixels[:, :, None]).square()
    for multiplier in torch.logspace(-1.5, 1.2, 150):
        choice = (gains - multiplier * costs).argmax(2, keepdim=True)
        inside = costs.gather(2, choice).sum((1, 2)) <= 1
        reached = torch.where(inside, torch.maximum(reached, gains.gather(2, choice).sum((1, 2))), reached)
    assert (reached <= most + 1e-4).all()
    assert (reached >= most * (0.95 if a == 0 else 0.6)).all()  # behind a ramp hardly two of these pixels fit in


def test_room_has_a_gradient_and_names_its_norms() -> None:
    apart, pixels = pairs(3)
    apart.requires_grad_()
    for norm, radius in RADII.items():
        held = room(torch.ones(COUNT), apart, pixels, Ramp(0.3), norm, radius)
        (gradient,) = torch.autograd.grad(held.sum(), apart)
        assert gradient.isfinite().all() and gradient.abs().sum() > 0
    with pytest.raises(InputError, match="l1"):
        room(torch.ones(COUNT), apart, pixels, Ramp(0.3), "l1", 1.0)


def decoders(count: int = 3) -> list[Decoder]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = [Decoder(VAEConfig()) for _ in range(count)]
        for one in made:
            for norm in (one.bn_0, one.bn_1, one.bn_2):
                norm.running_mean.normal_()  # type: ignore[union-attr, operator]
                norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr, operator]
    return [one.eval() for one in made]


def test_stacked_decoders_decode_as_single_ones_do() -> None:
    single = decoders()
    stacked = StackedDecoders(single, VAEConfig())
    latents = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([to_blocks(one(part)) for one, part in zip(single, latents, strict=True)])
    torch.testing.assert_close(stacked(latents), expected, atol=1e-5, rtol=0)
    classes = torch.tensor([2, 0, 2, 2, 1])
    mixed = decode_mixed(stacked, latents[0], rows_by_class(classes, 3))
    alone = torch.cat([to_blocks(single[c](z[None])) for c, z in zip(classes.tolist(), latents[0], strict=True)])
    torch.testing.assert_close(mixed, alone, atol=1e-5, rtol=0)
    expected.square().sum().backward()
    stacked(latents).square().sum().backward()
    for name in ("conv_1.weight", "bn_2.weight", "conv_3.bias"):
        own = torch.stack([one.get_parameter(name).grad for one in single])  # type: ignore[arg-type]
        together = stacked.get_parameter(name.replace(".", "_")).grad
        torch.testing.assert_close(together, own, atol=1e-3, rtol=1e-4)
    for one, again in zip(single, stacked.decoders(), strict=True):
        assert all(torch.equal(value, again.state_dict()[name]) for name, value in one.state_dict().items())


def test_more_latents_decode_to_the_same_images() -> None:
    single = decoders()
    latents = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    wider, longer, sizes = with_more_latents(single, latents, VAEConfig(), 12, seed=0)
    assert sizes.latent_size == 12 and longer.shape == (3, 5, 12)
    for before, after, z, w in zip(single, wider, latents, longer, strict=True):
        torch.testing.assert_close(after(w), before(z))
        assert not torch.equal(after(w + 1), after(torch.cat([w[:, :8] + 1, w[:, 8:]], dim=1)))  # they have a say
    assert with_more_latents(single, latents, VAEConfig(), 8, seed=0)[1] is latents
