"""Counting what an attack asks: forward and backward queries of each image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from absynth.errors import InputError


@runtime_checkable
class Selectable(Protocol):
    """A classifier that wants to know which images of the batch its rows belong to."""

    def select(self, rows: Tensor) -> Callable[[Tensor], Tensor]:
        """The same classifier for the images ``rows`` (n,) of the batch only; an index may come twice."""


def rows_of(classifier: Callable[[Tensor], Tensor], rows: Tensor) -> Callable[[Tensor], Tensor]:
    """``classifier`` for the images ``rows`` (n,) of the batch; a plain classifier does not care and comes back as
    it is."""
    return (
        classifier.select(rows) if isinstance(classifier, Selectable) and _method(classifier, "select") else classifier
    )


def _method(classifier: object, name: str) -> bool:
    """Whether its class defines a method of this name; a layer that a network calls so is none."""
    return callable(getattr(type(classifier), name, None))


class CountingClassifier:
    """A classifier that counts, for each of ``count`` images, how often it is asked.

    ``forward`` and ``backward`` are (count,) int64: predictions, and gradients of a prediction; ``undefined`` of these
    predictions were NaN. ``select`` makes a view of some images that counts into the same tensors, so attacks that drop
    finished images are counted image by image.
    """

    def __init__(self, classifier: Callable[[Tensor], Tensor], count: int) -> None:
        self.classifier = classifier
        self.rows = torch.arange(count)
        self.forward = torch.zeros(count, dtype=torch.int64)
        self.backward = torch.zeros(count, dtype=torch.int64)
        self.undefined = torch.zeros(count, dtype=torch.int64)

    def select(self, rows: Tensor) -> CountingClassifier:
        """The view of the images ``rows`` (n,) of this view."""
        view = CountingClassifier(rows_of(self.classifier, rows), 0)
        view.rows, view.undefined = self.rows[rows.cpu()], self.undefined
        view.forward, view.backward = self.forward, self.backward
        return view

    @property
    def response(self) -> Any:
        """What the inner classifier says it does to the pixels first; None where it says nothing."""
        return getattr(self.classifier, "response", None)

    def __call__(self, images: Tensor) -> Tensor:
        """(n,C,H,W) -> logits (n,K), n the number of images of this view."""
        self._count(self.forward, images)
        return self._watched(self.classifier(images))

    def analyze(self, images: Tensor) -> Any:
        """The inner classifier's analysis, counted as one forward query an image."""
        analyze = getattr(self.classifier, "analyze", None)
        if analyze is None:
            raise InputError(
                f"{type(self.classifier).__name__} has no analyze(images): this needs a generative classifier"
            )
        self._count(self.forward, images)
        return analyze(images)

    @property
    def follows(self) -> bool:
        """Whether the inner classifier can start from what it found for images close by."""
        return can_follow(self.classifier)

    def follow(self, images: Tensor, before: Any = None) -> tuple[Tensor, Any]:
        """The inner classifier's ``follow``, counted like any other question."""
        self._count(self.forward, images)
        logits, found = self.classifier.follow(images, before)  # type: ignore[attr-defined]
        return self._watched(logits), found

    def around(self, images: Tensor, before: Any, owner: Tensor) -> Tensor:
        """The inner classifier's ``around``, counted like any other question."""
        self._count(self.forward, images)
        logits: Tensor = self.classifier.around(images, before, owner)  # type: ignore[attr-defined]
        return self._watched(logits)

    def _watched(self, logits: Tensor) -> Tensor:
        """The logits, whose gradient is counted when it is asked for. Answers of NaN are counted. Whatever a network
        computes in, attacks compute in float32."""
        if isinstance(logits, Tensor) and logits.is_floating_point():
            logits = logits.float()
        if isinstance(logits, Tensor) and logits.ndim == 2 and len(logits) == len(self.rows):  # checked elsewhere
            self.undefined.index_add_(0, self.rows, logits.detach().isnan().any(1).to(torch.int64).cpu())
        if logits.requires_grad:
            logits.register_hook(lambda gradient: self._count(self.backward, gradient))
        return logits

    def _count(self, counter: Tensor, batch: Tensor) -> None:
        if len(batch) != len(self.rows):
            raise InputError(
                f"{len(batch)} images were asked about in a batch of {len(self.rows)}: use select(rows) first"
            )
        counter.index_add_(0, self.rows, torch.ones_like(self.rows))


def can_follow(classifier: Callable[[Tensor], Tensor]) -> bool:
    """Whether ``classifier`` can start its own search from what it found for images close by, as ABS can."""
    return classifier.follows if isinstance(classifier, CountingClassifier) else _method(classifier, "follow")


#: A search starts anew where an image has moved farther than this since it was last asked (L2, after the response).
FAR = 8.0
#: Images within this distance of the last one asked about are answered from what was found there, if many are asked.
NEAR = 1.0


def can_answer_around(classifier: Callable[[Tensor], Tensor]) -> bool:
    """Whether ``classifier`` can answer about many images around one at once, as ABS can."""
    while isinstance(classifier, CountingClassifier):
        classifier = classifier.classifier
    return _method(classifier, "around")


class Following:
    """A classifier that starts, for each of ``count`` images, from what it found when it was last asked about it.

    For attacks that move every image in small steps: an image that moved by more than ``FAR`` is asked cold. Answers
    about an image that comes several times in one batch are not remembered, so that they do not depend on the order.
    Its answers depend on what was asked before: a hit counts when the classifier itself says so. With ``anew`` an image
    that comes once is always asked cold, and only questions around it start from there.
    """

    def __init__(self, classifier: Callable[[Tensor], Tensor], count: int, *, anew: bool = False) -> None:
        self.classifier, self.rows, self.remembers, self.anew = classifier, torch.arange(count), True, anew
        self.memory: dict[str, Any] = {"count": count}  # shared by all views; later also "found" and "seen", of all

    @property
    def response(self) -> Any:
        """What the inner classifier says it does to the pixels first; None where it says nothing."""
        return getattr(self.classifier, "response", None)

    def select(self, rows: Tensor) -> Following:
        """The view of the images ``rows`` (n,) of this view; one that holds an image twice remembers nothing."""
        view = Following(rows_of(self.classifier, rows), 0, anew=self.anew)
        view.rows, view.memory = self.rows.to(rows.device)[rows], self.memory
        view.remembers = self.remembers and len(view.rows.unique()) == len(view.rows)
        return view

    def settled(self) -> Following:
        """The same for questions around what was found so far, however few at once: it remembers nothing more."""
        view = self.select(torch.arange(len(self.rows)))
        view.remembers = False
        return view

    def several(self, owner: Tensor) -> Following:
        """One for the images ``owner`` (R,) of this view, which may name an image several times: each of them goes on
        alone from what was found for the image so far."""
        runs = Following(rows_of(self.classifier, owner), len(owner), anew=self.anew)
        if "found" in self.memory:
            rows = self.rows.to(owner.device)[owner]
            runs.memory |= {"found": self.memory["found"].rows(rows), "seen": self.memory["seen"][rows]}
        return runs

    def __call__(self, images: Tensor) -> Tensor:
        """(n,C,H,W) -> logits (n,K)."""
        seen = self._seen(images)
        moved = self._moved(seen)
        together = (moved <= NEAR) & self._answers_together(images)
        warm = ~together & (moved <= FAR) & (not self.anew)
        kinds = ((together, self._ask_together), (warm, self._ask_warm), (~together & ~warm, self._ask_cold))
        logits, places = [], []
        for chosen, ask in kinds:
            if len(index := chosen.nonzero()[:, 0]):
                logits.append(ask(images, seen, index))
                places.append(index)
        return torch.cat(logits)[torch.cat(places).argsort()]

    def afresh(self, images: Tensor) -> Tensor:
        """(n,C,H,W) -> logits (n,K), asked cold; what was found for the images before is forgotten."""
        return self._ask_cold(images, self._seen(images), torch.arange(len(images), device=images.device))

    def _answers_together(self, images: Tensor) -> bool:
        """Whether images close to one are answered by a step from there: many of them, and no gradient is wanted."""
        wanted = images.requires_grad and torch.is_grad_enabled()
        return not self.remembers and not wanted and can_answer_around(self.classifier)

    def _seen(self, images: Tensor) -> Tensor:
        """What the classifier looks at, (n,N)."""
        flat = images.detach()
        return (flat if self.response is None else self.response(flat)).flatten(1)

    def _moved(self, seen: Tensor) -> Tensor:
        """How far each image (n,N) is from where it was last asked about, (n,); infinite where it never was."""
        if "found" not in self.memory:
            return seen.new_full((len(seen),), torch.inf)
        distance: Tensor = (seen - self.memory["seen"][self.rows]).norm(dim=1)
        return distance

    def _ask_together(self, images: Tensor, _seen: Tensor, index: Tensor) -> Tensor:
        rows, owner = self.rows.to(index.device)[index].unique(return_inverse=True)
        part: Any = rows_of(self.classifier, index)
        logits: Tensor = part.around(images[index], self.memory["found"].rows(rows), owner)
        return logits

    def _ask_warm(self, images: Tensor, seen: Tensor, index: Tensor) -> Tensor:
        return self._ask(images, seen, index, self.memory["found"].rows(self.rows.to(index.device)[index]))

    def _ask_cold(self, images: Tensor, seen: Tensor, index: Tensor) -> Tensor:
        return self._ask(images, seen, index, None)

    def _ask(self, images: Tensor, seen: Tensor, index: Tensor, before: Any) -> Tensor:
        part: Any = rows_of(self.classifier, index)
        logits: Tensor
        logits, found = part.follow(images[index], before)
        if self.remembers:
            count, rows = self.memory["count"], self.rows.to(index.device)[index]
            if "found" not in self.memory:
                self.memory["found"] = found.room(count)
                self.memory["seen"] = seen.new_full((count, seen.shape[1]), torch.inf)
            self.memory["found"].put(rows, found)
            self.memory["seen"][rows] = seen[index]
        return logits
