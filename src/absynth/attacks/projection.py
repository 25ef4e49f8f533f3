"""The exact projection onto a half-space within the box [0,1], in each norm: the step of every boundary attack."""

from __future__ import annotations

import torch
from torch import Tensor

from absynth.norms import L0, L1, L2, Norm


def onto_halfspace(norm: Norm, images: Tensor, gradient: Tensor, margin: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest δ with margin + gradient·δ ≤ 0 and images + δ in [0,1].

    ``images`` and ``gradient`` are (B,C,H,W), ``margin`` (B,). Returns δ (B,C,H,W) and whether the box lets it be
    reached (B,); where it does not, δ goes as far as the box allows. A margin of at most 0 gives δ = 0.

    Every pixel moves the way that lowers the margin, by s ≥ 0 of at most the room the box leaves, and gains w·s with w
    = |gradient|. One multiplier t then decides all pixels: L∞: s = min(room, t). L2: s = min(room, t·w). L1: pixels of
    largest w first. L0: pixels of largest w·room first, in full. The gain as a function of t is piecewise linear, so t
    follows from sorting its kinks.
    """
    shape = images.shape
    w = gradient.flatten(1).double()  # (B,C,H,W) -> (B,N)
    x = images.flatten(1).double()
    room = torch.where(w < 0, 1 - x, x) * (w != 0)
    direction, w = -w.sign(), w.abs()
    # Scaled so that the largest weight is 1: the equation is the same, and sums neither overflow nor vanish.
    scale = w.amax(1).clamp(min=torch.finfo(torch.float64).tiny)
    w = w / scale.unsqueeze(1)
    need = (margin.double() / scale).clamp(min=0)
    reached = (w * room).sum(1) >= need
    if norm == L1:
        amount = _fill(w, w, room, need)
    elif norm == L0:
        # The last pixel also goes all the way: its size is free in L0, and more of it does no harm to the count.
        amount = _fill(w * room, w, room, need)
        amount = torch.where(amount > 0, room, amount)
    elif norm == L2:
        t = _multiplier(kinks=room / w.clamp(min=1e-300), rise=w * w, final=w * room, need=need)
        amount = torch.minimum(room, t.unsqueeze(1) * w)
    else:
        t = _multiplier(kinks=room, rise=w, final=w * room, need=need)
        amount = torch.minimum(room, t.unsqueeze(1) * (w > 0))
    amount = torch.where(reached.unsqueeze(1), amount, room)
    return (direction * amount).view(shape).to(images.dtype), reached


def _fill(priority: Tensor, w: Tensor, room: Tensor, need: Tensor) -> Tensor:
    """Use pixels up in order of ``priority`` until the gains w·room add up to ``need``; the last only as far as
    needed."""
    order = priority.argsort(dim=1, descending=True, stable=True)
    w_sorted, room_sorted = w.gather(1, order), room.gather(1, order)
    gains = w_sorted * room_sorted
    missing = need.unsqueeze(1) - (gains.cumsum(1) - gains)  # what is still to be gained when a pixel's turn comes
    amount = torch.minimum(room_sorted, (missing / w_sorted.clamp(min=1e-300)).clamp(min=0))
    return torch.zeros_like(amount).scatter(1, order, torch.where(gains > 0, amount, 0.0))


def _multiplier(kinks: Tensor, rise: Tensor, final: Tensor, need: Tensor) -> Tensor:
    """The smallest t (B,) at which Σ_i min(rise_i·t, final_i) reaches ``need``; pixel i stops rising at ``kinks``_i."""
    kinks = torch.where(rise > 0, kinks, 0.0)
    order = kinks.argsort(dim=1)
    kinks, rise, final = kinks.gather(1, order), rise.gather(1, order), final.gather(1, order)
    stopped = final.cumsum(1)  # the gain of pixels up to and with i, all at their ends
    rising = rise.flip(1).cumsum(1).flip(1) - rise  # the slope of the pixels after i
    gain = stopped + rising * kinks  # the gain at t = kinks_i
    index = (gain < need.unsqueeze(1)).sum(1, keepdim=True).clamp(max=kinks.shape[1] - 1)  # first kink that suffices
    before = torch.where(index > 0, stopped.gather(1, (index - 1).clamp(min=0)), 0.0)
    slope = rising.gather(1, index) + rise.gather(1, index)
    t = (need.unsqueeze(1) - before) / slope.clamp(min=1e-300)
    return torch.minimum(t, kinks.gather(1, index)).squeeze(1).clamp(min=0)
