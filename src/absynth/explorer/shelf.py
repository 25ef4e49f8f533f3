"""The models and the test images, loaded when they are first asked for, once."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from absynth import data, weight_files, zoo
from absynth.certificates import Certifier, HasPrototypes
from absynth.classifiers import Calibrated
from absynth.clean import answers
from absynth.errors import InputError, unknown_name
from absynth.explorer.wire import Answer, Explanation, Look, encode, encode_bytes
from absynth.inventory import describe_model, label_names

NORMS = ("l0", "l1", "l2", "linf")


@dataclass(frozen=True)
class Shown:
    """A loaded model; ``trained_on`` names its data set."""

    name: str
    model: nn.Module
    trained_on: str

    def answer(self, image: Tensor) -> Answer:
        """What the model says about an image (1,28,28)."""
        labels, probabilities = answers(self.model, image[None])
        return self._answer(int(labels), probabilities)

    def look(self, image: Tensor) -> Look:
        """The answer about an image (1,28,28) and everything behind it."""
        begun = time.perf_counter()
        explanation = None
        if isinstance(self.model, Calibrated):
            analysis = self.model.analyze(image[None])
            answer = self._answer(int(analysis.labels), analysis.probabilities)
            explanation = Explanation(
                energies=analysis.energies[0].tolist(),
                reconstructions=[encode_bytes(one) for one in analysis.reconstructions[0]],
            )
        else:
            answer = self.answer(image)
        certified = None
        if self.certifier is not None:
            radii = self.certifier.radii(image[None], torch.tensor([answer.label]), NORMS)
            certified = {norm: float(radius) for norm, radius in radii.items()}
        return Look(
            image=encode(image), answer=answer, explanation=explanation, certified=certified,
            seconds=time.perf_counter() - begun,
        )  # fmt: skip

    @cached_property
    def certifier(self) -> Certifier | None:
        """What proves radii for this model; None where there are none."""
        return Certifier(self.model.prototypes()) if isinstance(self.model, HasPrototypes) else None

    def _answer(self, label: int, probabilities: Tensor) -> Answer:
        """``probabilities`` (1,K)."""
        can_refuse = isinstance(self.model, Calibrated)
        return Answer(
            model=self.name,
            label=label,
            refused=isinstance(self.model, Calibrated) and bool(self.model.refuses(probabilities)),
            can_refuse=can_refuse,
            probabilities=probabilities[0].tolist(),
            names=list(label_names(self.trained_on, probabilities.shape[1])),
        )


class Shelf:
    """The zoo, with weights from the folder ``weights`` (default: shipped) and data looked for in ``root`` first."""

    def __init__(self, weights: str | Path | None = None, root: str | Path | None = None) -> None:
        self.weights, self.root = weights, root
        self._models: dict[str, Shown] = {}
        there = [name for name in zoo.names() if name == "nearest-neighbor" or zoo.path_of(name, weights).exists()]
        self._locks = {name: threading.Lock() for name in there}
        self._images = threading.Lock()

    def names(self) -> tuple[str, ...]:
        """The models with weights at hand, whether loaded or not."""
        return tuple(self._locks)

    def state(self, name: str) -> Literal["idle", "loading", "ready"]:
        """Whether a model is loaded."""
        if name in self._models:
            return "ready"
        return "loading" if self._locks[name].locked() else "idle"

    def get(self, name: str) -> Shown:
        """The model, loaded now if need be. Raises InputError for one that is unknown or not at hand."""
        if name not in self._locks:
            if name in zoo.names():  # without weights
                raise InputError(f"{name}: {describe_model(name, folder=self.weights, root=self.root).problem}")
            raise unknown_name("model", name, self._locks)
        with self._locks[name]:
            if name not in self._models:
                described = describe_model(name, folder=self.weights, root=self.root)
                if described.problem is not None:
                    raise InputError(described.problem)
                model = zoo.load(name, folder=self.weights, root=self.root)
                self._models[name] = Shown(name, model, described.data or "mnist")
            return self._models[name]

    def test_images(self) -> tuple[str, Tensor, Tensor]:
        """A data set's name, test images (N,1,28,28) and labels (N,): the models' own, or the digits if not at hand."""
        with self._images:
            return self._test_images

    @cached_property
    def _test_images(self) -> tuple[str, Tensor, Tensor]:
        found = (zoo.path_of(name, self.weights) for name in self._locks)
        file = next((path for path in found if path.exists()), None)
        name = str(weight_files.read(file).header["data"]) if file is not None else "mnist"
        # Never a download: the explorer works offline.
        if not data.at_hand(name, "test", self.root):
            name = "digits"
        images, labels = data.load(name, "test", self.root)
        return name, images, labels
