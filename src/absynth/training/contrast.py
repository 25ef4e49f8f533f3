"""The third phase of training: each decoder learns not to explain the images of other classes.

The first two phases make a decoder explain its own class. What decides a classification, and how far an adversarial has
to go, is the gap to the energy that the *best rival* reaches; nothing in those phases asks for one. Here, for image x
of class y and rival c, the loss

    E_y(x) + weight * temperature * softplus((E_y(x) + margin - E_c(x)) / temperature)

is descended in the decoders' weights. By the envelope theorem its gradient needs no derivative of the minimizing
latents.

Every round moves every training image afresh, at random: latents kept for an image, or for a few copies of it, let a
decoder learn its training images by heart (LOG.md). So a round begins with a search for the latents: the best of the
candidates, then a few Newton steps with the curvature of that candidate, for the true class and for the rivals that
come close. The first step needs no decode, for the decoder's Jacobian at each candidate is known. No adversarial image
is used. What is here serves both ways to run the rounds: ``absynth.training.sharpening`` on the cores of a CPU,
``absynth.training.together`` on a GPU. Batch norm stays in eval mode: the decoder is the one the analysis will use.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from absynth.candidates import Candidates, chunk_size, matrix_vector
from absynth.decoding import Activations, FoldedDecoder, to_blocks
from absynth.training.augment import Augmentation, augment


@dataclass(frozen=True, kw_only=True)
class ContrastConfig:
    """``rounds`` passes over the images, those of the first half over ``early_share`` of them; ``margin`` and
    ``temperature`` in units of un-normalized energy."""

    rounds: int = 8
    early_share: float = 0.5
    augmentation: Augmentation = field(
        default_factory=lambda: Augmentation(rotation=8, zoom=0.08, shear=6, shift=0.5, elastic=0.3, bicubic=True)
    )
    rivals: int = 2  # classes an image is contrasted with: those with the best candidates
    margin: float = 8.0
    temperature: float = 3.0
    weight: float = 3.0
    batch_size: int = 32
    learning_rate: float = 1e-3
    settling: int = 2  # Newton steps of the search, the one from the candidate included
    seed: int = 0

    @property
    def hard(self) -> float:
        """The gap below which a pair is hard."""
        return self.margin + 2 * self.temperature


STAGES = 3  # of a round: compare with the candidates, settle the latents, train
# What a Newton step promises is not the minimum: rivals are searched for up to this much beyond a hard gap. Of those
# that promise more, one in 400 turns out to be hard, and then hardly (LOG.md, 2026-11-27).
UNSETTLED = 4.0
GIVEN_UP = 3.0  # the same, after the step


@dataclass
class Pairs:
    """The images that one class is asked to explain: its own, and those it is a rival for."""

    images: Tensor  # (P,) indices into the training set
    own: Tensor  # (P,) bool
    latents: Tensor  # (P,D)
    energies: Tensor  # (P,) of this class
    others: Tensor  # (P,) of the class to be compared with: the true class for a rival, the best rival for its own

    @classmethod
    def begun(cls, wanted: Tensor, own: Tensor, size: int, true: Tensor | None = None) -> Pairs:
        """Those that a class looks at, ``wanted`` (N,) of all images; ``own`` (N,) are its own. Latents, of ``size``
        numbers, and energies are yet to be found; what the true classes promise, ``true`` (N,), may be known."""
        rows = wanted.nonzero()[:, 0]
        nothing = torch.full((len(rows),), torch.nan, device=rows.device)
        others = nothing if true is None else true[rows]
        return cls(rows, own[rows], nothing[:, None].repeat(1, size), nothing.clone(), others)

    def gaps(self) -> Tensor:
        """The rival's energy minus the true class's (P,)."""
        return gaps_between(self.own, self.energies, self.others)


def gaps_between(own: Tensor, energies: Tensor, others: Tensor) -> Tensor:
    """The rival's energy minus the true class's, for pairs of any shape."""
    return torch.where(own, others - energies, energies - others)


def derivatives(own: Tensor, energies: Tensor, others: Tensor, config: ContrastConfig) -> Tensor:
    """The derivative of the loss by the energies of pairs, for pairs of any shape."""
    gaps = gaps_between(own, energies.detach(), others)
    push = config.weight * torch.sigmoid((config.margin - gaps) / config.temperature)
    return torch.where(own, 1.0 + push, -push)


def rate_at(done: float, config: ContrastConfig) -> float:
    """The learning rate when this share of the training is done: up in a line, down as a cosine."""
    return config.learning_rate * min(1.0, done / 0.03 + 1e-3) * 0.5 * (1 + math.cos(math.pi * done))


def of_round(labels: Tensor, config: ContrastConfig, round_number: int) -> Tensor:
    """Which images, of ``labels`` (N,), a round looks at (n,): in the early rounds a part of each class, drawn anew."""
    if round_number >= config.rounds // 2:
        return torch.arange(len(labels))
    generator = torch.Generator().manual_seed(config.seed * 1000 + round_number)
    drawn = torch.randperm(len(labels), generator=generator)
    sorted_labels, order = labels.cpu()[drawn].sort(stable=True)
    counts = sorted_labels.bincount()
    parts = drawn[order].split(counts.tolist())
    return torch.cat([part[: math.ceil(config.early_share * len(part))] for part in parts]).sort().values


def moved(
    images: Tensor, config: ContrastConfig, round_number: int, response: nn.Module | None, chunk: int = 1000
) -> Tensor:
    """The images (N,C,S,S) of one round: each moved at random, then seen through the response."""
    generator = torch.Generator().manual_seed(config.seed * 1000 + round_number)
    parts = [augment(part, config.augmentation, generator) for part in images.split(chunk)]
    return torch.cat([part if response is None else response(part) for part in parts])


@dataclass(frozen=True)
class Starts:
    """The candidates of one class, with all that a Newton step from each of them takes."""

    candidates: Candidates
    jacobians: Tensor  # (M,D,N)
    inverses: Tensor  # (M,D,D): (J'J + beta/2 I)^-1
    beta: float

    @classmethod
    @torch.no_grad()
    def of(cls, folded: FoldedDecoder, latents: Tensor, beta: float) -> Starts:
        chunks = latents.split(2000 if latents.is_cuda else 32)
        jacobians = torch.cat([folded.tangents(folded.activations(chunk)) for chunk in chunks])
        damping = beta / 2 * torch.eye(latents.shape[1], device=latents.device)
        inverses = torch.linalg.inv(jacobians @ jacobians.mT + damping)
        return cls(Candidates(folded, latents, beta), jacobians, inverses, beta)

    def step(self, blocks: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From the ``chosen`` candidates (B,) of images (B,N), or from the one (1,) of all: their energies (B,), the
        Newton step (B,D), and the energy (B,) that it promises."""
        residual, latents = blocks - self.candidates.points[chosen], self.candidates.latents[chosen]
        energies = residual.square().sum(1) + self.beta / 2 * latents.square().sum(1)
        jacobians, inverses = self.jacobians[chosen], self.inverses[chosen]
        if len(chosen) == 1:
            descent = residual @ jacobians[0].T - self.beta / 2 * latents  # minus half the gradient
            newton = descent @ inverses[0].T
        else:
            descent = matrix_vector(jacobians, residual) - self.beta / 2 * latents
            newton = matrix_vector(inverses, descent)
        return energies, newton, energies - (newton * descent).sum(1)


@dataclass(frozen=True)
class Scan:
    """What a class's candidates tell about images: the best one of each, and the Newton step from there."""

    chosen: Tensor  # (N,) candidates
    energies: Tensor  # (N,) there
    newton: Tensor  # (N,D)
    promised: Tensor  # (N,): the energies that the step promises

    def rows(self, index: Tensor) -> Scan:
        """Those of the images ``index``."""
        return Scan(self.chosen[index], self.energies[index], self.newton[index], self.promised[index])


@torch.no_grad()
def best_candidates(candidates: Candidates, images: Tensor) -> Tensor:
    """Of images (N,C,S,S), the candidate (N,) that explains each best."""
    parts = images.split(chunk_size(256, images))
    points, offsets = candidates.points, candidates.offsets
    return torch.cat([torch.addmm(offsets, to_blocks(part), points.T, alpha=-1).argmin(1) for part in parts])


@torch.no_grad()
def scan(starts: Starts, images: Tensor) -> Scan:
    """Compare images (N,C,S,S) with the candidates of a class."""
    chosen = best_candidates(starts.candidates, images)
    energies, promised = images.new_empty(len(images)), images.new_empty(len(images))
    newton = images.new_empty(len(images), starts.candidates.latents.shape[1])
    for rows, candidates in _alike(chosen):
        blocks = to_blocks(images[rows])
        energies[rows], newton[rows], promised[rows] = starts.step(blocks, candidates)
    return Scan(chosen, energies, newton, promised)


def _alike(chosen: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Which images (n,) to treat at once, and their candidates: on a CPU those with the same one (1,), whose Jacobian
    is then read once; on a GPU as many as fit (n,)."""
    if chosen.is_cuda:
        for rows in torch.arange(len(chosen), device=chosen.device).split(chunk_size(1, chosen)):
            yield rows, chosen[rows]
        return
    order = chosen.argsort(stable=True)
    candidates, counts = torch.unique_consecutive(chosen[order], return_counts=True)
    for rows, candidate in zip(order.split(counts.tolist()), candidates, strict=True):
        yield rows, candidate[None]


def choose_rivals(energies: Tensor, labels: Tensor, config: ContrastConfig) -> Tensor:
    """Which classes look at which images: (N,K) bool, from the promised energies (N,K). The true class always, and the
    ``rivals`` best others where they come close."""
    classes = energies.shape[1]
    own = torch.nn.functional.one_hot(labels, classes).bool()
    true = energies[own][:, None]  # (N,1)
    others = energies.masked_fill(own, torch.inf)
    near = others.topk(min(config.rivals, classes - 1), largest=False)
    close = near.values - true < config.hard + UNSETTLED
    return own.scatter(1, near.indices, close)


@torch.no_grad()
def settle(
    folded: FoldedDecoder,
    latents: Tensor,
    inverses: Tensor,
    found: Scan,
    pairs: Pairs,
    images: Tensor,
    config: ContrastConfig,
    beta: float,
) -> None:
    """Newton steps of the latents of ``pairs``, in place, from candidates ``latents`` (M,D) with their ``inverses``
    (M,D,D); ``found`` is the scan of their images. A step that raises the energy is taken back, and the next one is
    shorter. Rivals that a step leaves far from what the true class promises, where that is known, are given up."""
    device = images.device
    for rows in torch.arange(len(pairs.images), device=device).split(chunk_size(64, images)):
        targets, chosen = to_blocks(images[pairs.images[rows]]), found.chosen[rows]
        best, rate = latents[chosen], torch.ones(len(rows), device=device)
        lowest, newton = found.energies[rows], found.newton[rows]
        for step in range(config.settling):
            trial = best + rate[:, None] * newton
            activations = folded.activations(trial)
            residual = targets - activations.images
            energies = residual.square().sum(1) + beta / 2 * trial.square().sum(1)
            better = energies < lowest
            best = torch.where(better[:, None], trial, best)
            lowest = torch.where(better, energies, lowest)
            pairs.latents[rows], pairs.energies[rows] = best, lowest
            if step + 1 == config.settling:
                break
            hopeless = ~pairs.own[rows] & (lowest - pairs.others[rows] > config.hard + GIVEN_UP)
            if hopeless.any():
                near = ~hopeless
                rows, targets, chosen, best, rate = rows[near], targets[near], chosen[near], best[near], rate[near]
                lowest, newton, trial, better = lowest[near], newton[near], trial[near], better[near]
                activations, residual = Activations(*(one[near] for one in activations)), residual[near]
                if not len(rows):
                    break
            descent = folded.pullback(activations, residual) - beta / 2 * trial
            newton = torch.where(better[:, None], matrix_vector(inverses[chosen], descent), newton)
            rate = torch.where(better, rate, rate * 0.3)


def exchange(pairs: Sequence[Pairs], count: int) -> None:
    """Tell every pair what it is compared with: a rival the true class, a true class the best rival."""
    device = pairs[0].energies.device
    true = torch.full((count,), torch.nan, device=device)
    rival = torch.full((count,), torch.inf, device=device)
    for one in pairs:
        true[one.images[one.own]] = one.energies[one.own]
        rows = one.images[~one.own]
        rival[rows] = torch.minimum(rival[rows], one.energies[~one.own])
    for one in pairs:
        one.others = torch.where(one.own, rival[one.images], true[one.images])
