"""Estimates of an ABS model's robustness: the paper's lower bounds and sharper ones. **None of them is a guarantee.**

They would be lower bounds on the distance to the nearest adversarial if the searches behind them found global minima,
and if the deployed classifier did. A search that stops short overstates them. For what holds, see
``absynth.certificates``.

With un-normalized energies E_c = min_z ||x - G_c(z)||^2 + beta/2 ||z||^2, y the true class, z* its minimum,
r = ||x - G_y(z*)|| and d_c = min_z ||x - G_c(z)|| without the prior's cost:

* ``paper-l2`` (paper, section 5): min over c != y of (d_c^2 - E_y) / (2 (d_c + r)).
* ``paper-linf`` (paper, section 5): the smallest e at which E_y + 2 e ||x - G_y(z*)||_1 + N e^2 reaches, for some
  c != y, sum_i max(0, b_i - e)^2, where b_i = min_z abs(x_i - G_c(z)_i) is taken pixel by
  pixel.
* ``lipschitz``: (sqrt E_2 - sqrt E_y) / 2, E_2 the lowest energy of another class: the root of an energy is a distance
  to a set, in the space of images and scaled latents, and so changes by at most the distance moved.
* ``bisector``: min over c != y and over z of (||x - G_c(z)||^2 + beta/2 ||z||^2 - E_y) / (2 ||G_c(z) - G_y(z*)||): the
  distance to the plane where the explanation of the true class stops being the better one.

With factors g_c on the energies, as Binary ABS has them, the same arguments hold for g_c E_c: ``paper-l2`` is the root
e of g_y (E_y + 2 r e + e^2) = g_c (d_c - e)^2, ``lipschitz`` the least over c of (sqrt(g_c E_c) - sqrt(g_y E_y)) /
(sqrt(g_c) + sqrt(g_y)).

For a thresholded image the two are distances in the space of thresholded images, as in the paper, where every flipped
pixel counts 1: an estimate e stands for at least e^2 flips. ``paper-l2-input`` and ``lipschitz-input`` say what that
many flips cost in the image itself, where the pixels nearest to the threshold flip first.

A misclassified image has all of them 0.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from absynth.analysis import analyze
from absynth.classifiers import ABS, IMAGE_CHUNK
from absynth.decoding import FoldedDecoder, to_blocks
from absynth.errors import InputError
from absynth.responses import Identity, Threshold

PLAIN = {"paper-l2": "l2", "paper-linf": "linf", "lipschitz": "l2", "bisector": "l2"}
THRESHOLDED = {"paper-l2": "l2", "paper-l2-input": "l2", "lipschitz": "l2", "lipschitz-input": "l2"}


def methods_of(model: object) -> dict[str, str]:
    """The estimates there are for a model, each with its norm. Raises InputError for a model they are not for."""
    if isinstance(model, ABS) and isinstance(model.response, Threshold):
        return THRESHOLDED
    if isinstance(model, ABS) and isinstance(model.response, Identity) and bool((model.scales == 1).all()):
        return PLAIN
    raise InputError(f"{type(model).__name__} has no estimated bounds: they are for abs and binary-abs")


@torch.no_grad()
def estimated_radii(
    model: ABS, images: Tensor, labels: Tensor, *, searches: int = 2, steps: int = 10
) -> dict[str, Tensor]:
    """The estimates (B,), float64, by name, of images (B,C,S,S) in [0,1] with labels (B,).

    ``searches``: from how many starting points a class each minimum is sought; ``steps``: of the descent behind
    ``bisector``. Raises InputError for a model without them, see ``methods_of``.
    """
    methods = methods_of(model)
    if searches < 1 or steps < 0:
        raise InputError(f"searches is {searches} and steps {steps}; expected at least 1 and at least 0")
    model.check(images)
    parts = [
        _estimates(model, to_blocks(chunk), label, searches, steps)
        for chunk, label in zip(model.response(images).split(IMAGE_CHUNK), labels.split(IMAGE_CHUNK), strict=True)
    ]
    found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    if isinstance(model.response, Threshold):
        costs = (images.flatten(1).double() - model.response.level).square().sort(dim=1).values.cumsum(1)  # (B,N)
        for name in ("paper-l2", "lipschitz"):
            flips = (found[name].square() * (1 - 1e-9)).ceil().long()  # at least so many; 0 where nothing is estimated
            cheapest = costs.gather(1, (flips - 1).clamp(min=0)[:, None])[:, 0].sqrt()
            found[f"{name}-input"] = torch.where(flips > 0, cheapest, 0.0)
    return {name: found[name] for name in methods}


def _estimates(model: ABS, blocks: Tensor, labels: Tensor, searches: int, steps: int) -> dict[str, Tensor]:
    count, classes = len(blocks), len(model.folded)
    # every class followed to the end, from several starts: explanations with and without the prior's cost
    schedule = replace(model.schedule, slack=(), steps=max(model.schedule.steps, 8))
    starts = torch.stack([_starts(model, number, blocks, searches) for number in range(classes)], dim=2)  # (B,S,K,D)
    best = near = None
    for start in starts.unbind(1):
        found = analyze(model.folded, [], blocks, schedule, beta=model.beta, starts=start)
        free = analyze(model.folded, [], blocks, schedule, beta=0.0, starts=found.latents)
        if best is None or near is None:
            best, near = found, free.energies
            continue
        lower = found.energies < best.energies
        best = replace(
            best,
            energies=torch.where(lower, found.energies, best.energies),
            latents=torch.where(lower[:, :, None], found.latents, best.latents),
            blocks=torch.where(lower[:, :, None], found.blocks, best.blocks),
        )
        near = torch.minimum(near, free.energies)
    assert best is not None and near is not None
    rows = torch.arange(count, device=blocks.device)
    energies, distances = best.energies.double(), near.double().sqrt()  # (B,K)
    own = torch.nn.functional.one_hot(labels, classes).bool()
    factors = model.scales.double().expand(count, -1)  # (B,K)
    true_factor = factors[rows, labels]
    true_energy, explanation = energies[rows, labels], best.blocks[rows, labels].double()  # (B,), (B,N)
    residual = blocks.double() - explanation
    paper = _paper_l2(true_factor, true_energy, residual.norm(dim=1), factors, distances)
    roots, true_root = (factors * energies).sqrt(), (true_factor * true_energy).sqrt()
    lipschitz = (roots - true_root[:, None]) / (factors.sqrt() + true_factor.sqrt()[:, None])
    radii = {
        "paper-l2": paper.masked_fill(own, torch.inf).amin(1),
        "lipschitz": lipschitz.masked_fill(own, torch.inf).amin(1),
    }
    if isinstance(model.response, Identity):
        radii["paper-linf"] = _paper_linf(
            model, blocks.double(), best.blocks.double(), own, true_energy, residual.abs().sum(1)
        )
        radii["bisector"] = _bisector(
            model, blocks, starts, best.latents, own, true_energy.float(), explanation.float(), steps
        )
    right = (roots.masked_fill(own, torch.inf).amin(1)) > true_root
    return {name: torch.where(right, radius.double().clamp(min=0), 0.0) for name, radius in radii.items()}


def _paper_l2(factor: Tensor, energy: Tensor, r: Tensor, factors: Tensor, distances: Tensor) -> Tensor:
    """The root e (B,K) of factor (energy + 2 r e + e^2) = factors (distances - e)^2, at most ``distances``."""
    # a e^2 + 2 b e + c = 0; with equal factors a = 0 and e = -c / 2b
    a = factor[:, None] - factors
    b = (factor * r)[:, None] + factors * distances
    c = (factor * energy)[:, None] - factors * distances.square()
    root = (b.square() - a * c).clamp(min=0).sqrt()
    return torch.minimum(-c / (b + root), distances)


def _starts(model: ABS, number: int, blocks: Tensor, searches: int) -> Tensor:
    """The best candidates of class ``number`` for each image: latents (B,S,D)."""
    candidates = model.starts[number]
    scores = torch.addmm(candidates.offsets, blocks, candidates.points.T, alpha=-1)  # (B,M)
    chosen = scores.topk(searches, largest=False).indices
    latents: Tensor = candidates.latents[chosen]
    return latents


def _paper_linf(
    model: ABS, blocks: Tensor, explanations: Tensor, own: Tensor, true_energy: Tensor, residual_l1: Tensor
) -> Tensor:
    """By bisection on e in [0,1]; the range of a class's pixels is taken over its candidates and the explanations."""
    pixels = blocks.shape[1]
    gaps = []
    for number, candidates in enumerate(model.starts):
        low = torch.minimum(candidates.points.amin(0).double(), explanations[:, number])  # (B,N)
        high = torch.maximum(candidates.points.amax(0).double(), explanations[:, number])
        gaps.append(torch.maximum(low - blocks, blocks - high).clamp(min=0))
    b = torch.stack(gaps, dim=1)  # (B,K,N)
    low = torch.zeros_like(true_energy)
    high = torch.ones_like(true_energy)
    for _ in range(40):
        e = (low + high) / 2
        mine = true_energy + 2 * e * residual_l1 + pixels * e.square()
        others = (b - e[:, None, None]).clamp(min=0).square().sum(2).masked_fill(own, torch.inf).amin(1)
        safe = others > mine
        low, high = torch.where(safe, e, low), torch.where(safe, high, e)
    return low


def _bisector(
    model: ABS, blocks: Tensor, starts: Tensor, latents: Tensor, own: Tensor, true_energy: Tensor, explanation: Tensor,
    steps: int,
) -> Tensor:  # fmt: skip
    """Descend the distance to the bisecting plane in the latents of every other class."""
    smallest = torch.full_like(true_energy, torch.inf)
    for number, decoder in enumerate(model.folded):
        rows = (~own[:, number]).nonzero()[:, 0]
        if not len(rows):
            continue
        every = torch.cat([latents[rows, number][:, None], starts[rows, :, number]], dim=1)  # (b,1+S,D)
        for begin in every.unbind(1):
            for part, z in zip(rows.split(64), begin.split(64), strict=True):
                radius = _descend(
                    decoder, z, blocks[part], true_energy[part], explanation[part], model.beta, steps,
                    model.schedule.max_norm,
                )  # fmt: skip
                smallest[part] = torch.minimum(smallest[part], radius)
    return smallest


def _descend(
    decoder: FoldedDecoder, latents: Tensor, blocks: Tensor, energy: Tensor, explanation: Tensor, beta: float,
    steps: int, max_norm: float,
) -> Tensor:  # fmt: skip
    latents = latents.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([latents], lr=0.05)
    best = torch.full_like(energy, torch.inf)
    for step in range(steps + 1):
        with torch.enable_grad():
            images = decoder(latents)
            theirs = (blocks - images).square().sum(1) + beta / 2 * latents.square().sum(1)
            radius = (theirs - energy) / (2 * (images - explanation).norm(dim=1).clamp(min=1e-6))
            if step < steps:
                (latents.grad,) = torch.autograd.grad(radius.sum(), latents)
        best = torch.minimum(best, radius.detach())
        if step < steps:
            optimizer.step()
            norms = latents.data.norm(dim=1, keepdim=True)
            latents.data.mul_((max_norm / norms.clamp(min=1e-12)).clamp(max=1))
    return best
