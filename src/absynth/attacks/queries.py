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
    return classifier.select(rows) if isinstance(classifier, Selectable) else classifier


class CountingClassifier:
    """A classifier that counts, for each of ``count`` images, how often it is asked.

    ``forward`` and ``backward`` are (count,) int64: predictions, and gradients of a prediction. ``select`` makes a view
    of some images that counts into the same tensors, so attacks that drop finished images are counted image by image.
    """

    def __init__(self, classifier: Callable[[Tensor], Tensor], count: int) -> None:
        self.classifier = classifier
        self.rows = torch.arange(count)
        self.forward = torch.zeros(count, dtype=torch.int64)
        self.backward = torch.zeros(count, dtype=torch.int64)

    def select(self, rows: Tensor) -> CountingClassifier:
        """The view of the images ``rows`` (n,) of this view."""
        view = CountingClassifier(rows_of(self.classifier, rows), 0)
        view.rows, view.forward, view.backward = self.rows[rows.cpu()], self.forward, self.backward
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

    def _watched(self, logits: Tensor) -> Tensor:
        """The logits, whose gradient is counted when it is asked for."""
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
    return bool(getattr(classifier, "follows", hasattr(classifier, "follow")))


class Following:
    """A classifier that starts, for each of ``count`` images, from what it found when it was last asked about it.

    For attacks that move every image in small steps. Its answers depend on what was asked before: a hit counts when the
    classifier itself says so.
    """

    def __init__(self, classifier: Callable[[Tensor], Tensor], count: int) -> None:
        self.classifier, self.rows = classifier, torch.arange(count)
        self.memory: dict[str, Any] = {"count": count}  # shared by all views; later also "found", of all images

    def select(self, rows: Tensor) -> Following:
        """The view of the images ``rows`` (n,) of this view; none may come twice."""
        view = Following(rows_of(self.classifier, rows), 0)
        view.rows, view.memory = self.rows.to(rows.device)[rows], self.memory
        return view

    def __call__(self, images: Tensor) -> Tensor:
        """(n,C,H,W) -> logits (n,K). The first question is about all images."""
        known = self.memory.get("found")
        before = None if known is None else known.rows(self.rows)
        logits, found = self.classifier.follow(images, before)  # type: ignore[attr-defined]
        if known is None:
            assert torch.equal(self.rows.cpu(), torch.arange(self.memory["count"])), "the first question is about all"
            self.memory["found"] = found
        else:
            known.put(self.rows, found)
        return logits  # type: ignore[no-any-return]
