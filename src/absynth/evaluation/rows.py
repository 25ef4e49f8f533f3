"""The records an evaluation writes down: clean answers, attack rows, certificates, doubts. Plain values, no
behavior."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

#: ``found``: an adversarial holds. ``failed``: the attack found none. ``misclassified``: wrong already, distance 0.
#: ``error``: the model or the attack did not give a usable answer; ``message`` says what happened. A row that is
#: ``found`` has one, too, where the model answered NaN on the way.
Status = Literal["found", "failed", "misclassified", "error"]
CertificateKind = Literal["exact", "estimate", "probabilistic"]


@dataclass(frozen=True)
class ModelRecord:
    """A model of the ledger: ``digest`` names it, ``name`` is what it was loaded by."""

    digest: str
    name: str
    classes: int = 0  # 0: not known, the model gave no usable answer


@dataclass(frozen=True)
class AttackRecord:
    """An attack of the ledger. ``attack`` is its repr with all parameters, which names it."""

    attack: str
    name: str
    norm: str
    knowledge: str
    kind: str


@dataclass(frozen=True)
class CleanRow:
    """What a model says of an unperturbed image. ``logits`` (K,) float32, None where it gave no usable answer."""

    model: str
    image: int
    label: int
    prediction: int | None
    logits: Tensor | None
    message: str = ""

    @property
    def broken(self) -> bool:
        """Whether another class is at least as likely as the true one: a tie is broken."""
        if self.logits is None:
            return False
        rival = self.logits.clone()
        rival[self.label] = -torch.inf
        return bool(rival.max() >= self.logits[self.label])


@dataclass(frozen=True)
class Row:
    """What one attack did to one image.

    ``distance`` is float64, in the norm's units, from the stored clean image: 0 for an image that is misclassified as
    it is, infinite where nothing was found or the status is ``error``. ``adversarial`` (C,H,W) float32 in [0,1] where
    the status is ``found``. Queries are the attack's own, the checks afterwards not counted. ``seconds`` is the time
    of the batch divided by its images.
    """

    model: str
    attack: str
    norm: str
    image: int
    seed: int
    label: int
    distance: float
    status: Status
    forward: int = 0
    backward: int = 0
    seconds: float = 0.0
    adversarial: Tensor | None = None
    message: str = ""

    @property
    def found(self) -> bool:
        """Whether the image is broken: by an adversarial, or misclassified as it is."""
        return self.status in ("found", "misclassified")

    @property
    def key(self) -> tuple[str, str, str, int, int]:
        """What the ledger holds at most one row of."""
        return (self.model, self.attack, self.norm, self.image, self.seed)


@dataclass(frozen=True)
class Certificate:
    """No image within ``radius`` of image ``image`` gets another label than ``label`` from ``model``.

    ``kind`` says how far to trust it: ``exact`` is proven, ``probabilistic`` holds with the probability its method
    states, ``estimate`` is no guarantee. A misclassified image has radius 0.
    """

    model: str
    image: int
    norm: str
    radius: float
    method: str
    kind: CertificateKind
    label: int


@dataclass(frozen=True)
class Doubt:
    """A reason to mistrust numbers of ``model``. ``subject`` is the attack or the part of the model it is about."""

    model: str
    code: str
    subject: str
    message: str
