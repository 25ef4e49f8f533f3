"""The analysis: for an image and each class, the latents whose decoded image explains it best.

    E_c(x) = min over z of  ||t(x) - G_c(z)||^2 + beta/2 ||z||^2,     ||z|| <= max_norm            (paper, section 3)

t is the pixel response (identity for ABS), G_c the decoder of class c. The minimum is searched in two stages: the best
of a fixed set of *candidates*, decoded once and compared by one matrix product; then refinement from there. E_c is a
non-linear least-squares problem in a handful of unknowns, so second-order steps need few decodes. The default is
quasi-Newton (BFGS), which starts from the Gauss-Newton curvature of the nearest of a few latents where it is known: a
step costs one decode and one gradient, a fifth of a Levenberg-Marquardt step with the exact Jacobian, which is there
too. The paper's 50 steps of Adam are kept as a named schedule.

Everything is a pure function of the decoders and of each image alone: no global random state, no memory between calls.
What other images are in the batch can change an energy only by the rounding of the matrix products.

Energies here are un-normalized sums over pixels. Shapes: B images, K classes, M candidates a class, D latents,
N = C*S*S values of an image in block order (see ``absynth.decoding``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from absynth.candidates import (
    DECODE_CHUNK,
    REFINE_CHUNK,
    Candidates,
    chunk_size,
    curvature,
    inverse_curvature,
    matrix_vector,
)
from absynth.decoding import Activations, FoldedDecoder

METHODS = ("quasi-newton", "levenberg-marquardt", "adam")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How much searching an analysis does. The same for every image: it is part of a classifier's definition.

    ``candidates``: how many of the stored candidates are used (None: all). ``steps``: refinement steps.
    ``method``: "quasi-newton", "levenberg-marquardt" or "adam". ``max_norm``: latents stay in the ball of this radius.

    ``slack``: a class is out of the running as soon as its energy exceeds ``slack[i]`` times the lowest energy any
    class has reached after i steps (i = 0: among the candidates); the last entry holds from then on. Empty: every class
    stays. When only the label is asked for, the search of such a class ends there, and its energy is the one it had;
    when all energies are asked for, it goes on to ``losing_steps`` in all.

    ``rivals``: of the classes in the running only the best and so many more stay. None: all.

    ``tolerance``: a search ends early when a step lowers its energy by less than this share.
    """

    candidates: int | None = None
    steps: int = 8
    losing_steps: int = 4
    method: str = "levenberg-marquardt"
    max_norm: float = 5.0
    slack: tuple[float, ...] = ()
    rivals: int | None = None
    tolerance: float = 1e-5
    damping: float = 0.03  # Levenberg-Marquardt: at the first step, relative to the diagonal
    learning_rate: float = 0.05  # Adam

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}; expected one of {', '.join(METHODS)}")
        if self.steps < 0 or self.max_norm <= 0 or any(slack < 1 for slack in self.slack):
            raise ValueError(f"{self}: steps must not be negative, max_norm positive, every slack at least 1")


DEFAULT = Schedule(
    method="quasi-newton",
    steps=16,
    losing_steps=12,
    tolerance=1e-4,
    slack=(2.0, 1.85, 1.7, 1.6, 1.5, 1.45, 1.4, 1.35, 1.3),
)
# From what was found for an image close by: nearly there, and few classes matter.
FOLLOWING = replace(DEFAULT, steps=3, losing_steps=0, slack=(1.3, 1.2, 1.15), rivals=2)
PAPER = Schedule(candidates=8000, steps=50, method="adam")  # with prior candidates: see ``absynth.candidates``


@dataclass(frozen=True)
class Found:
    """Minima found for B images and K classes: energies (B,K), latents (B,K,D), images (B,K,N) in block order.

    ``settled`` (B,K) is False where a class was out of the running before the last step.
    """

    energies: Tensor
    latents: Tensor
    blocks: Tensor
    settled: Tensor

    def rows(self, index: Tensor | slice) -> Found:
        """What was found for the images ``index``."""
        return Found(**{field.name: getattr(self, field.name)[index] for field in fields(Found)})

    def room(self, count: int) -> Found:
        """Room for what is found for ``count`` images, to be ``put`` there."""
        known = [getattr(self, field.name) for field in fields(Found)]
        return Found(*(tensor.new_zeros(count, *tensor.shape[1:]) for tensor in known))

    def put(self, index: Tensor, found: Found) -> None:
        """Replace, in place, what was found for the images ``index``."""
        for field in fields(Found):
            getattr(self, field.name)[index] = getattr(found, field.name)


def join(parts: Sequence[Found]) -> Found:
    """What was found for consecutive parts of the images, as one."""
    if len(parts) == 1:
        return parts[0]
    names = [field.name for field in fields(Found)]
    return Found(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


def analyze(
    decoders: Sequence[FoldedDecoder],
    candidates: Sequence[Candidates],
    blocks: Tensor,
    schedule: Schedule,
    *,
    beta: float = 1.0,
    scales: Tensor | None = None,
    label_only: bool = False,
    starts: Tensor | Found | None = None,
) -> Found:
    """Images (B,N) in block order -> the minima found for every class.

    ``label_only`` lets the search of a class end where it is out of the running; ``scales`` (K,) are the factors with
    which energies are compared. ``starts`` replaces the search among candidates: latents (B,K,D), or what was found for
    images close to these.
    """
    count, classes = len(blocks), len(decoders)
    # problem b*K + c: image b, class c
    if starts is None:
        chosen = [one.best(blocks, schedule.candidates) for one in candidates]
        latents = torch.stack([one.latents[index] for one, index in zip(candidates, chosen, strict=True)], dim=1)
        points = torch.stack([one.points[index] for one, index in zip(candidates, chosen, strict=True)], dim=1)
        work = _Problems(decoders, blocks, latents.flatten(0, 1), beta, schedule, candidates)
        work.begin(points.flatten(0, 1))
    elif isinstance(starts, Found):
        work = _Problems(decoders, blocks, starts.latents.flatten(0, 1), beta, schedule, candidates)
        work.begin(starts.blocks.flatten(0, 1).clone())
    else:
        work = _Problems(decoders, blocks, starts.flatten(0, 1), beta, schedule)
        work.evaluate(work.everything())
    weights = torch.ones(classes, device=blocks.device) if scales is None else scales
    settled = torch.ones(count, classes, dtype=torch.bool, device=blocks.device)
    if schedule.method == "adam":
        work.adam(work.everything())
    else:
        for step in range(schedule.steps):
            energies = work.energies.view(count, classes) * weights  # (B*K,) -> (B,K)
            settled &= in_the_running(energies, schedule, step)
            followed = settled if label_only or step >= schedule.losing_steps else torch.ones_like(settled)
            problems = (followed.flatten() & work.moving).nonzero()[:, 0]
            if schedule.method == "quasi-newton":
                work.quasi_newton(problems)
            else:
                work.step(problems)
    return Found(
        energies=work.energies.view(count, classes),
        latents=work.latents.view(count, classes, -1),
        blocks=work.images.view(count, classes, -1),
        settled=settled,
    )


def in_the_running(energies: Tensor, schedule: Schedule, step: int) -> Tensor:
    """Which classes (B,K) may still win after ``step`` steps that reached these energies (B,K)."""
    running = torch.ones_like(energies, dtype=torch.bool)
    if schedule.slack:
        limit = schedule.slack[min(step, len(schedule.slack) - 1)] * energies.amin(1, keepdim=True)
        running &= energies <= limit
    if schedule.rivals is not None:
        last = min(schedule.rivals + 1, energies.shape[1])
        running &= energies <= energies.kthvalue(last, 1, keepdim=True).values
    return running


class _Problems:
    """The state of P = B*K independent minimizations, one for each image and class."""

    def __init__(
        self,
        decoders: Sequence[FoldedDecoder],
        blocks: Tensor,
        starts: Tensor,
        beta: float,
        schedule: Schedule,
        candidates: Sequence[Candidates] = (),
    ) -> None:
        self.decoders, self.blocks, self.beta, self.schedule = decoders, blocks, beta, schedule
        self.candidates = candidates  # none: where a search starts, its curvature is computed
        count, size = starts.shape
        self.latents = into_ball(starts, schedule.max_norm)  # (P,D)
        self.energies = blocks.new_full((count,), torch.inf)
        self.images = blocks.new_zeros(count, blocks.shape[1])  # (P,N)
        # Levenberg-Marquardt: the Gauss-Newton matrix and minus half the gradient at the latents, and the damping.
        # Quasi-Newton: the *inverse* of the matrix, and in place of the damping the share of a step that is tried.
        self.curvature = blocks.new_zeros(count, size, size)
        self.descent = blocks.new_zeros(count, size)
        self.damping = blocks.new_full((count,), schedule.damping if schedule.method == "levenberg-marquardt" else 1.0)
        self.linearized = torch.zeros(count, dtype=torch.bool, device=blocks.device)
        self.moving = torch.ones(count, dtype=torch.bool, device=blocks.device)  # not yet converged

    def everything(self) -> Tensor:
        return torch.arange(len(self.latents), device=self.latents.device)

    def chunks(self, problems: Tensor, size: int) -> Iterator[tuple[FoldedDecoder, Tensor]]:
        """The problems (P',), class by class, at most ``size`` at a time on a CPU, each with its class's decoder."""
        size = chunk_size(size, self.blocks)
        classes = problems % len(self.decoders)
        for number, decoder in enumerate(self.decoders):
            for chunk in problems[classes == number].split(size):
                if len(chunk):
                    yield decoder, chunk

    def targets(self, problems: Tensor) -> Tensor:
        """The images (P',N) to be explained."""
        return self.blocks[problems // len(self.decoders)]

    def energy(self, images: Tensor, latents: Tensor, targets: Tensor) -> Tensor:
        """(P,N), (P,D), (P,N) -> (P,)."""
        return (targets - images).square().sum(1) + self.beta / 2 * latents.square().sum(1)

    def begin(self, points: Tensor) -> None:
        """Start where the images (P,N) of the latents are known, unless those latents lie outside the ball."""
        self.images = points
        self.energies = self.energy(points, self.latents, self.targets(self.everything()))
        self.evaluate((self.latents.norm(dim=1) >= self.schedule.max_norm * (1 - 1e-6)).nonzero()[:, 0])

    @torch.no_grad()
    def evaluate(self, problems: Tensor) -> None:
        """Energies and images at the present latents."""
        for decoder, chunk in self.chunks(problems, DECODE_CHUNK):
            images = decoder(self.latents[chunk])
            self.images[chunk] = images
            self.energies[chunk] = self.energy(images, self.latents[chunk], self.targets(chunk))

    @torch.no_grad()
    def step(self, problems: Tensor) -> None:
        """One Levenberg-Marquardt step: solve the damped linearized problem, keep the result where it is better."""
        for decoder, chunk in self.chunks(problems, REFINE_CHUNK):
            targets = self.targets(chunk)
            self._linearize(decoder, chunk[~self.linearized[chunk]])
            matrix = self.curvature[chunk]
            diagonal = matrix.diagonal(dim1=1, dim2=2)
            damped = matrix + torch.diag_embed(self.damping[chunk, None] * diagonal)
            moved = self.latents[chunk] + torch.linalg.solve(damped, self.descent[chunk])
            latents = into_ball(moved, self.schedule.max_norm)
            images = decoder(latents)
            energies = self.energy(images, latents, targets)
            better = energies < self.energies[chunk]
            self.damping[chunk] *= torch.where(better, 0.3, 4.0)
            gain = self.energies[chunk] - energies
            self.moving[chunk] = ~better | (gain > self.schedule.tolerance * energies)
            taken = chunk[better]
            self.latents[taken], self.energies[taken], self.images[taken] = (
                latents[better],
                energies[better],
                images[better],
            )
            self.linearized[taken] = False

    def _linearize(self, decoder: FoldedDecoder, problems: Tensor) -> None:
        """Curvature J'J + beta/2 I and descent J'(x - G) - beta/2 z at the present latents of these problems."""
        if not len(problems):
            return
        latents = self.latents[problems]
        activations = decoder.activations(latents)
        jacobian = decoder.tangents(activations)  # (P,D,N)
        residual = self.targets(problems) - activations.images
        self.curvature[problems] = curvature(jacobian, self.beta)
        self.descent[problems] = (jacobian @ residual[:, :, None])[:, :, 0] - self.beta / 2 * latents
        self.linearized[problems] = True

    @torch.no_grad()
    def quasi_newton(self, problems: Tensor) -> None:
        """One BFGS step (Nocedal and Wright 2006, section 6.1): kept where it is better, else a shorter one is next."""
        for decoder, chunk in self.chunks(problems, REFINE_CHUNK):
            targets = self.targets(chunk)
            self._begin_descent(decoder, chunk[~self.linearized[chunk]])
            before, energies, descent = self.latents[chunk], self.energies[chunk], self.descent[chunk]
            inverse, share = self.curvature[chunk], self.damping[chunk]
            direction = matrix_vector(inverse, descent)
            latents = into_ball(before + share[:, None] * direction, self.schedule.max_norm)
            activations = decoder.activations(latents)
            found = self.energy(activations.images, latents, targets)
            downhill = self._descent(decoder, activations, latents, targets)
            moved, turned = latents - before, descent - downhill  # the step, and by how much half the gradient changed
            self.curvature[chunk] = _bfgs(inverse, moved, turned)
            better = found < energies
            # rejected: the minimum of the parabola through both energies with the slope at the start
            slope = -2 * share * (descent * direction).sum(1)
            shorter = share * (-slope / (2 * (found - energies - slope)).clamp(min=1e-12)).clamp(0.1, 0.5)
            self.damping[chunk] = torch.where(better, 1.0, shorter)
            gain = torch.where(
                better, energies - found, -slope / 2
            )  # or, where rejected, what a step could have gained
            self.moving[chunk] = gain > self.schedule.tolerance * energies
            taken = chunk[better]
            self.latents[taken], self.energies[taken] = latents[better], found[better]
            self.images[taken], self.descent[taken] = activations.images[better], downhill[better]

    def _begin_descent(self, decoder: FoldedDecoder, problems: Tensor) -> None:
        """Descent at the present latents, and the inverse curvature of the nearest anchor."""
        if not len(problems):
            return
        latents = self.latents[problems]
        activations = decoder.activations(latents)
        self.descent[problems] = self._descent(decoder, activations, latents, self.targets(problems))
        if self.candidates:
            known = self.candidates[int(problems[0]) % len(self.decoders)]
            nearest = (latents[:, None] - known.anchors).square().sum(2).argmin(1)  # (P,A,D) -> (P,)
            self.curvature[problems] = known.inverses[nearest]
        else:
            self.curvature[problems] = inverse_curvature(decoder, latents, self.beta)
        self.linearized[problems] = True

    def _descent(self, decoder: FoldedDecoder, activations: Activations, latents: Tensor, targets: Tensor) -> Tensor:
        """Minus half the gradient of the energy, (P,D)."""
        return decoder.pullback(activations, targets - activations.images) - self.beta / 2 * latents

    def adam(self, problems: Tensor) -> None:
        """The paper's refinement: Adam on the energy, averaged over pixels as in the released code."""
        pixels = self.blocks.shape[1]
        for decoder, chunk in self.chunks(problems, DECODE_CHUNK):
            targets = self.targets(chunk)
            latents = self.latents[chunk].requires_grad_(True)
            optimizer = torch.optim.Adam([latents], lr=self.schedule.learning_rate)
            for _ in range(self.schedule.steps):
                with torch.enable_grad():
                    energy = self.energy(decoder(latents), latents, targets).sum() / pixels
                    (latents.grad,) = torch.autograd.grad(energy, latents)
                optimizer.step()
                with torch.no_grad():
                    latents.copy_(into_ball(latents, self.schedule.max_norm))
            self.latents[chunk] = latents.detach()
        self.evaluate(problems)


def _bfgs(inverse: Tensor, moved: Tensor, turned: Tensor) -> Tensor:
    """The inverse (P,D,D) that maps ``turned`` (P,D) to ``moved`` (P,D); as it was where that has no positive one."""
    product = (moved * turned).sum(1)
    image = matrix_vector(inverse, turned)
    rate = 1 / product.clamp(min=1e-8)
    outer = moved[:, :, None] * image[:, None]  # (P,D,D)
    own = (1 + rate * (turned * image).sum(1)) * rate
    change = own[:, None, None] * moved[:, :, None] * moved[:, None] - rate[:, None, None] * (outer + outer.mT)
    return torch.where((product > 1e-8)[:, None, None], inverse + change, inverse)


def into_ball(latents: Tensor, radius: float) -> Tensor:
    """Latents (P,D), those outside the ball brought back to its surface."""
    norms = latents.norm(dim=1, keepdim=True)
    return torch.where(norms > radius, latents * (radius / norms), latents)


def without_giving_up(schedule: Schedule) -> Schedule:
    """The same search with every class followed to the end."""
    return replace(schedule, slack=())
