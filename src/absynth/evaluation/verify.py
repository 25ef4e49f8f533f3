"""Recomputing a ledger: every row from its stored adversarial, every certificate against every adversarial."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from absynth.attacks.base import Classifier
from absynth.errors import InputError
from absynth.evaluation.folders import ledger_folders
from absynth.evaluation.judge import ask, device_of, is_broken
from absynth.evaluation.ledger import Ledger
from absynth.evaluation.plan import load_model, model_digest
from absynth.evaluation.rows import Certificate, CleanRow, ModelRecord, Row
from absynth.norms import NORMS

BATCH = 128
#: Classes whose logits differ by less than this share of their spread are level: rounding says which is ahead.
LEVEL = 1e-6


@dataclass(frozen=True)
class Failure:
    """A row, a clean answer or a certificate that does not hold. ``attack`` is empty for the latter two."""

    model: str
    attack: str
    norm: str
    image: int
    reason: str


@dataclass(frozen=True)
class Verification:
    """How many rows, clean answers and certificates were checked, which do not hold, and what could not be checked.

    ``errors`` of the rows say that the model or the attack failed there, which nothing can be recomputed of.
    """

    rows: int
    clean: int
    certificates: int
    failures: tuple[Failure, ...]
    unchecked: tuple[str, ...] = ()
    errors: int = 0

    @property
    def holds(self) -> bool:
        """Whether everything was checked and holds."""
        return not self.failures and not self.unchecked

    def to_json(self) -> dict[str, Any]:
        """Plain values only."""
        return {
            "holds": self.holds,
            "rows": self.rows,
            "errors": self.errors,
            "clean": self.clean,
            "certificates": self.certificates,
            "failures": [vars(failure) for failure in self.failures],
            "unchecked": list(self.unchecked),
        }


def verify(
    *folders: str | Path,
    models: Mapping[str, Classifier] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Verification:
    """Recompute every row in or below the run folders and say which do not hold.

    Models are loaded by the names in the ledgers and must have the digests written there; ``models`` gives those that
    have no such name. Checked are shape, range and finiteness of each adversarial, its distance from the stored clean
    image, that the model, asked anew, is fooled by it (a true class ahead by less than ``LEVEL`` is a tie), that clean
    answers are what is written down, that statuses fit the numbers, and that no adversarial of any attack lies below a
    certified radius of kind exact or probabilistic for the same model, image and norm. ``progress`` is called with rows
    done and rows in all.

    Raises InputError when there is no ledger or one cannot be read. A model that cannot be loaded is reported as
    unchecked.
    """
    failures: list[Failure] = []
    unchecked: list[str] = []
    row_count = error_count = clean_count = certificate_count = 0
    for folder in ledger_folders(folders):
        with Ledger(folder) as ledger:
            images = ledger.images()
            for record in ledger.models():
                rows, clean = ledger.rows(record.digest), ledger.clean(record.digest)
                certificates = ledger.certificates(record.digest)
                row_count += len(rows)
                error_count += sum(row.status == "error" for row in rows)
                clean_count += len(clean)
                certificate_count += len(certificates)
                failures += _distances(record.name, rows, images)
                failures += _clean_statuses(record.name, rows, clean)
                failures += invariant(record.name, certificates, rows, images)
                try:
                    classifier = _model(record, models or {})
                except InputError as error:
                    unchecked.append(f"{record.name} in {folder}: {error}")
                    continue
                failures += _clean_answers(record.name, classifier, clean, images)
                failures += _adversarials(record.name, classifier, rows, progress)
    failed = tuple(dict.fromkeys(failures))
    return Verification(row_count, clean_count, certificate_count, failed, tuple(unchecked), error_count)


def invariant(
    model: str, certificates: Iterable[Certificate], rows: Iterable[Row], images: Mapping[int, tuple[Tensor, int]]
) -> list[Failure]:
    """The certificates with an adversarial below their radius, by whatever attack; estimates promise nothing."""
    by_image: dict[int, list[Row]] = {}
    for row in rows:
        if row.found:
            by_image.setdefault(row.image, []).append(row)
    failures = []
    for certificate in certificates:
        if certificate.kind == "estimate" or certificate.norm not in NORMS:
            continue
        for row in by_image.get(certificate.image, []):
            distance = row.distance if row.norm == certificate.norm else math.inf
            if row.adversarial is not None and row.image in images:
                clean = images[row.image][0]
                if row.adversarial.shape == clean.shape:
                    distance = float(NORMS[certificate.norm].distance(row.adversarial[None], clean[None]))
            if row.status == "misclassified":
                distance = 0.0
            if distance < certificate.radius:
                reason = f"{certificate.method} certifies {certificate.radius:.6g}, {row.attack} found {distance:.6g}"
                failures.append(Failure(model, "", certificate.norm, certificate.image, reason))
                break
    return failures


def _model(record: ModelRecord, models: Mapping[str, Classifier]) -> Classifier:
    given = models.get(record.name) or models.get(record.digest)
    classifier = given if given is not None else load_model(record.name)
    digest = model_digest(classifier)
    if digest != record.digest:
        raise InputError(
            f"the model {record.name!r} has digest {digest[:12]}, the ledger was made with {record.digest[:12]}: "
            "give the model that was evaluated"
        )
    return classifier


def _distances(model: str, rows: Iterable[Row], images: Mapping[int, tuple[Tensor, int]]) -> list[Failure]:
    """What can be checked without the model."""
    failures = []
    for row in rows:
        if reason := _row_problem(row, images):
            failures.append(Failure(model, row.attack, row.norm, row.image, reason))
    return failures


def _row_problem(row: Row, images: Mapping[int, tuple[Tensor, int]]) -> str:
    """What is wrong with a row, or nothing."""
    if row.image not in images:
        return "its clean image is missing"
    clean, label = images[row.image]
    if row.label != label:
        return f"its label is {row.label}, the image's is {label}"
    if row.norm not in NORMS:
        return f"its norm {row.norm!r} is unknown"
    if row.status != "found":
        expected = 0.0 if row.status == "misclassified" else math.inf
        if row.distance != expected or row.adversarial is not None:
            return (
                f"its status {row.status} does not fit its distance {row.distance:.6g}, or an image it should not have"
            )
        return ""
    if row.adversarial is None or row.adversarial.shape != clean.shape:
        return "its adversarial image is missing or damaged"
    if not _in_range(row.adversarial):
        return "its adversarial image leaves [0,1]"
    distance = float(NORMS[row.norm].distance(row.adversarial[None], clean[None]))
    if not math.isclose(distance, row.distance, rel_tol=1e-9):
        return f"its distance is {row.distance:.9g}, the stored image's is {distance:.9g}"
    return ""


def _in_range(image: Tensor) -> bool:
    return bool(((image >= 0) & (image <= 1)).all())  # False for NaN


def _clean_statuses(model: str, rows: Iterable[Row], clean: Iterable[CleanRow]) -> list[Failure]:
    """Rows that say misclassified of an image that is not, and the other way round."""
    answers = {answer.image: answer for answer in clean}
    failures = []
    for row in rows:
        answer = answers.get(row.image)
        if answer is None:
            reason = "the model's clean answer is missing"
        elif row.status != "error" and (row.status == "misclassified") != answer.broken:
            truth = "misclassified" if answer.broken else "classified rightly"
            reason = f"its status is {row.status}, but the clean image is {truth}"
        else:
            continue
        failures.append(Failure(model, row.attack, row.norm, row.image, reason))
    return failures


def _clean_answers(
    model: str, classifier: Classifier, clean: list[CleanRow], images: Mapping[int, tuple[Tensor, int]]
) -> list[Failure]:
    failures = [
        Failure(model, "", "", row.image, f"the clean answer's label is {row.label}, not the image's")
        for row in clean
        if row.image not in images or row.label != images[row.image][1]
    ]
    usable = [row for row in clean if row.logits is not None and row.image in images]
    for start in range(0, len(usable), BATCH):
        batch = usable[start : start + BATCH]
        broken = _broken(classifier, [images[row.image][0] for row in batch], [row.label for row in batch])
        for row, (surely, perhaps) in zip(batch, broken, strict=True):
            if not (perhaps if row.broken else surely is False):
                reason = f"the clean image was {'misclassified' if row.broken else 'classified rightly'}, not so now"
                failures.append(Failure(model, "", "", row.image, reason))
    return failures


def _adversarials(
    model: str, classifier: Classifier, rows: list[Row], progress: Callable[[int, int], None] | None
) -> list[Failure]:
    failures = []
    by_shape: dict[tuple[int, ...], list[tuple[Row, Tensor]]] = {}
    for row in rows:
        if row.status == "found" and row.adversarial is not None and _in_range(row.adversarial):
            by_shape.setdefault(tuple(row.adversarial.shape), []).append((row, row.adversarial))
    done, total = 0, sum(map(len, by_shape.values()))
    for group in by_shape.values():
        for start in range(0, len(group), BATCH):
            batch = group[start : start + BATCH]
            broken = _broken(classifier, [image for _, image in batch], [row.label for row, _ in batch])
            for (row, _), (_, perhaps) in zip(batch, broken, strict=True):
                if not perhaps:
                    answered = perhaps is not None
                    reason = "the model is not fooled by its image" if answered else "the model gives no usable answer"
                    failures.append(Failure(model, row.attack, row.norm, row.image, reason))
            done += len(batch)
            if progress is not None:
                progress(done, total)
    return failures


def _broken(
    classifier: Classifier, images: list[Tensor], labels: list[int]
) -> list[tuple[bool, bool] | tuple[None, None]]:
    """Whether the model, asked twice, is surely wrong about each image, and whether it is perhaps, up to a tie; None
    where it gives no usable answer."""
    device = device_of(classifier)
    try:
        answer = ask(classifier, torch.stack(images).to(device))
    except Exception:
        if len(images) == 1:
            return [(None, None)]
        return [_broken(classifier, [image], [label])[0] for image, label in zip(images, labels, strict=True)]
    truth = torch.tensor(labels, device=device)
    surely, perhaps = (
        (is_broken(answer.logits, truth, rounding) & is_broken(answer.again, truth, rounding)).tolist()
        for rounding in (-LEVEL, LEVEL)
    )
    return [
        (None, None) if problem else (bool(yes), bool(maybe))
        for problem, yes, maybe in zip(answer.errors, surely, perhaps, strict=True)
    ]
