"""Foolbox's attacks as attacks of this package: same call, same seeds, same failure value.

What Foolbox proposes is believed no more than anything else: each image is classified again before it counts.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import eagerpy
import foolbox
import foolbox.attacks
import numpy as np
import torch
from torch import Tensor

from absynth.attacks.base import Attack, Classifier, Knowledge, Problem, Proposals
from absynth.attacks.search import Best, starting_points, toward_clean
from absynth.errors import InputError, unknown_name
from absynth.norms import L0, L1, L2, LINF, Norm

# Neither package exports its names in a way a type checker sees.
fb: Any = foolbox.attacks
ep: Any = eagerpy


@dataclass(frozen=True)
class Method:
    """One attack of Foolbox: how to make it for a number of steps, and what to know about it."""

    make: Callable[[int], Any]
    steps: int
    knowledge: Knowledge
    source: str
    queries: str
    random: bool = False
    starts: bool = False  # begins at an adversarial
    alone: bool = False  # its rows depend on the batch, so images go one by one


def _brendel_bethge(attack: Any) -> Method:
    return Method(
        make=lambda steps: attack(steps=steps, lr_num_decay=min(20, steps)),
        steps=200,
        knowledge="gradient",
        source="Brendel et al. 2019, arXiv 1907.01003",
        queries="up to 200 gradients, 100 predictions",
        starts=True,
        alone=True,
    )


def _minimum_norm(attack: Any, step: float) -> Method:
    return Method(
        make=lambda steps: attack(steps=steps, max_stepsize=step),
        steps=200,
        knowledge="gradient",
        source="Pintor et al. 2021, arXiv 2102.12827",
        queries="200 gradients",
    )


class _L0FMN(fb.L0FMNAttack):  # type: ignore[misc]  # Foolbox is untyped here
    """Foolbox's, which indexes past the end once its budget has grown to the whole image."""

    def project(self, x: Any, x0: Any, epsilon: Any) -> Any:
        return super().project(x, x0, epsilon.minimum(x[0].raw.numel() - 1))


def _hop_skip_jump(constraint: str) -> Method:
    return Method(
        make=lambda steps: fb.HopSkipJumpAttack(steps=steps, max_gradient_eval_steps=1000, constraint=constraint),
        steps=20,
        knowledge="decision",
        source="Chen et al. 2020, arXiv 1904.02144",
        queries="about 7,000 predictions",
        random=True,
        starts=True,
        alone=True,
    )


_CARLINI_WAGNER = Method(
    # abort_early looks at the whole batch, which would make rows depend on each other.
    make=lambda steps: fb.L2CarliniWagnerAttack(
        binary_search_steps=6, steps=steps, stepsize=0.05, initial_const=1.0, abort_early=False
    ),
    steps=100,
    knowledge="gradient",
    source="Carlini & Wagner 2017, arXiv 1608.04644",
    queries="600 gradients",
)
_EAD = Method(
    make=lambda steps: fb.EADAttack(
        binary_search_steps=6, steps=steps, initial_const=1.0, decision_rule="L1", abort_early=False
    ),
    steps=100,
    knowledge="gradient",
    source="Chen et al. 2018, arXiv 1709.04114",
    queries="1,200 predictions, 600 of them with gradients",
)
_DDN = Method(
    make=lambda steps: fb.DDNAttack(steps=steps),
    steps=200,
    knowledge="gradient",
    source="Rony et al. 2019, arXiv 1811.09600",
    queries="200 gradients",
)
_BOUNDARY = Method(
    make=lambda steps: fb.BoundaryAttack(steps=steps),
    steps=5000,
    knowledge="decision",
    source="Brendel et al. 2018, arXiv 1712.04248",
    queries="about 5,500 predictions",
    random=True,
    starts=True,
    alone=True,
)

METHODS: dict[str, dict[Norm, Method]] = {
    "foolbox-brendel-bethge": {
        L0: _brendel_bethge(fb.L0BrendelBethgeAttack),
        L1: _brendel_bethge(fb.L1BrendelBethgeAttack),
        L2: _brendel_bethge(fb.L2BrendelBethgeAttack),
        LINF: _brendel_bethge(fb.LinfinityBrendelBethgeAttack),
    },
    "fmn": {
        L0: _minimum_norm(_L0FMN, 1.0),
        L1: _minimum_norm(fb.L1FMNAttack, 1.0),
        L2: _minimum_norm(fb.L2FMNAttack, 1.0),
        LINF: _minimum_norm(fb.LInfFMNAttack, 1.0),
    },
    "ddn": {L2: _DDN},
    "carlini-wagner": {L2: _CARLINI_WAGNER},
    "ead": {L1: _EAD},
    "foolbox-hop-skip-jump": {L2: _hop_skip_jump("l2"), LINF: _hop_skip_jump("linf")},
    "foolbox-boundary": {L2: _BOUNDARY},
}


@dataclass(frozen=True)
class Foolbox(Attack):
    """The attack ``method`` of Foolbox 3.3 in ``norm``; ``steps`` None stands for the default in ``METHODS``.

    Random attacks, and those whose rows depend on the batch, get one image at a time, with the global generators of
    torch and NumPy set from the image's seed and put back afterwards. Attacks that begin at an adversarial get one from
    blends into noise; where none is found the image counts as not found. Brendel-Bethge needs numba and compiles for
    about a minute on first use in a process. Logits are scaled, image by image, so that the two best differ by ``gap``
    on the clean image: losses made of logits, cross-entropy above all, then push toward the nearest class whatever the
    scale of a model (that of ABS is so small that all other classes weigh the same). In the end every proposal but an
    L0 one is bisected toward the clean image.
    """

    norm: Norm
    method: str
    steps: int | None = None
    gap: float = 10.0
    bisections: int = 8

    kind = "minimum"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise unknown_name("Foolbox attack", self.method, METHODS)
        if self.norm not in METHODS[self.method]:
            known = ", ".join(str(norm) for norm in METHODS[self.method])
            raise InputError(f"{self.method} knows no {self.norm}: use {known}")

    @property
    def family(self) -> str:
        """The method's name."""
        return self.method

    @property
    def default_steps(self) -> int:
        """What None stands for."""
        return self._entry.steps

    @property
    def knowledge(self) -> Knowledge:
        """As published."""
        return self._entry.knowledge

    @property
    def source(self) -> str:
        """As published, run by Foolbox."""
        return f"{self._entry.source} (Foolbox)"

    @property
    def deterministic(self) -> bool:
        """Starting points from noise make even a deterministic method depend on the seed."""
        return not (self._entry.random or self._entry.starts)

    @property
    def queries(self) -> str:
        """At the default number of steps."""
        return self._entry.queries

    @property
    def _entry(self) -> Method:
        return METHODS[self.method][self.norm]

    def search(self, problem: Problem) -> Proposals:
        count = len(problem)
        starts = (
            starting_points(problem)
            if self._entry.starts
            else Proposals(problem.images, problem.images.new_ones(count, dtype=torch.bool))
        )
        todo = starts.found.nonzero().squeeze(1)
        best = Best(problem)
        if self._entry.starts:
            best.update(todo, starts.images[todo], starts.found[todo])
        for rows in todo.split(1 if self._entry.alone or self._entry.random else max(1, count)):
            if len(rows):
                images = self._run(problem.rows(rows), starts.images[rows] if self._entry.starts else None)
                best.update(rows, images, problem.rows(rows).met(images))
        return best.proposals() if self.norm == L0 else toward_clean(problem, best.proposals(), self.bisections)

    def _run(self, problem: Problem, starts: Tensor | None) -> Tensor:
        with _seeded(int(problem.seeds[0])), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Foolbox warns of compilation, and of empty means before the first success
            attack = _make(self._entry, self.steps or self._entry.steps)
            criterion: Any = foolbox.criteria.Misclassification(problem.goal.classes)
            if problem.goal.toward:
                criterion = foolbox.criteria.TargetedMisclassification(problem.goal.classes)
            more = {} if starts is None else {"starting_points": starts}
            scale = self.gap / problem.margin(problem.images).clamp(min=1e-12)
            images: Tensor = attack.run(_Model(problem.classifier, scale), problem.images, criterion, **more)
        images = torch.where(images.isfinite(), images, problem.images).clamp(0, 1).detach()
        if self.norm == L0:  # rounding in x + δ − x is no change of a pixel
            images = torch.where((images - problem.images).abs() < 1e-4, problem.images, images)
        return images


class _Model(foolbox.models.base.Model):
    """A classifier as Foolbox wants it: bounds, tensors of any framework in and out, logits times ``scale`` (B,).

    The momentum of EAD asks beyond the bounds, and models refuse such images. They are cut to the bounds for the
    answer, and its gradient is passed on as it is.
    """

    data_format = "channels_first"

    def __init__(self, classifier: Classifier, scale: Tensor) -> None:
        self._classifier, self._scale = classifier, scale[:, None]

    @property
    def bounds(self) -> Any:
        return foolbox.types.Bounds(0, 1)

    def __call__(self, inputs: Any) -> Any:
        images, restore = ep.astensor_(inputs)
        inside = images.raw.clamp(0, 1).detach() + (images.raw - images.raw.detach())
        return restore(ep.astensor(self._classifier(inside).float() * self._scale))


def _make(method: Method, steps: int) -> Any:
    try:
        return method.make(steps)
    except ImportError as missing:
        raise InputError(
            f"Foolbox's Brendel-Bethge needs numba ({missing}): pip install numba, or use brendel-bethge"
        ) from missing


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Global generators of torch and NumPy set from ``seed`` inside, untouched afterwards."""
    numpy_state = np.random.get_state()
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(seed)
        torch.cuda.manual_seed_all(seed)  # nothing where there is no GPU
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)


@dataclass(frozen=True)
class AutoAttack(Attack):
    """The standard ensemble of AutoAttack within ``radius``, if the package ``autoattack`` is installed.

    Runs one image at a time, seeded, so that rows stay independent. Untargeted only.
    """

    norm: Norm
    radius: float

    family = "autoattack"
    kind = "budget"
    knowledge = "gradient"
    source = "Croce & Hein 2020, arXiv 2003.01690"
    deterministic = False
    queries = "about 1,000 gradients, 5,000 predictions"

    def check_installed(self) -> None:
        """Raise InputError without the package ``autoattack``."""
        _ensemble()

    def search(self, problem: Problem) -> Proposals:
        if problem.goal.toward or self.norm == L0:
            raise InputError("AutoAttack here is untargeted, in l1, l2 or linf: use boundary-projection instead")
        name = {L1: "L1", L2: "L2", LINF: "Linf"}[self.norm]
        device = str(problem.images.device)
        best = Best(problem)
        for row in torch.arange(len(problem), device=problem.images.device).split(1):
            part = problem.rows(row)
            with _seeded(int(part.seeds[0])):
                ensemble = _ensemble()(part.classifier, norm=name, eps=self.radius, device=device, verbose=False)
                images = ensemble.run_standard_evaluation(part.images, part.goal.classes, bs=1)
            best.update(row, images, part.met(images))
        return best.proposals()


def _ensemble() -> Any:
    """The class of the package, which is not among the libraries that absynth declares."""
    try:
        from autoattack import AutoAttack as Ensemble  # type: ignore[import-not-found]
    except ImportError as missing:
        raise InputError(
            "AutoAttack is not installed: pip install git+https://github.com/fra31/auto-attack, or leave it out"
        ) from missing
    return Ensemble
