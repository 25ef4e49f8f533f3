"""Recomputing a ledger: every row from its stored adversarial, every certificate against every adversarial."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from absynth.attacks.base import Classifier
from absynth.errors import InputError
from absynth.evaluation.folders import ledger_folders
from absynth.evaluation.judge import ask, device_of, is_broken
from absynth.evaluation.ledger import Ledger
from absynth.evaluation.plan import load_model, model_digest
from absynth.evaluation.provenance import DataSets, left_out, missing
from absynth.evaluation.rows import AttackRecord, Certificate, CleanRow, ModelRecord, Row, Status
from absynth.norms import NORMS

BATCH = 128
#: Classes whose logits differ by less than this share of their spread are level: rounding says which is ahead.
LEVEL = 1e-6


@dataclass(frozen=True)
class Failure:
    """A row, a clean answer, a certificate or a stored image that does not hold. ``attack`` is empty for all but rows,
    ``model`` for stored images, ``image`` None where all of these, or of the attack's rows, are meant."""

    model: str
    attack: str
    norm: str
    image: int | None
    reason: str


@dataclass(frozen=True)
class Verification:
    """How many rows, clean answers and certificates were checked, which do not hold, and what could not be checked.

    ``errors`` of the rows say that the model or the attack failed there, ``found_nothing`` of them that an attack found
    no adversarial: nothing can be recomputed of either. ``notices`` say what else the figures rest on that was not
    recomputed: rows that are not there, images that were not compared with the data set.
    """

    rows: int
    clean: int
    certificates: int
    failures: tuple[Failure, ...]
    unchecked: tuple[str, ...] = ()
    errors: int = 0
    found_nothing: int = 0
    notices: tuple[str, ...] = ()

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
            "found_nothing": self.found_nothing,
            "clean": self.clean,
            "certificates": self.certificates,
            "failures": [vars(failure) for failure in self.failures],
            "unchecked": list(self.unchecked),
            "notices": list(self.notices),
        }


def verify(
    *folders: str | Path,
    models: Mapping[str, Classifier] | None = None,
    progress: Callable[[int, int], None] | None = None,
    root: str | Path | None = None,
) -> Verification:
    """Recompute every row in or below the run folders and say which do not hold.

    Models are loaded by the names in the ledgers and must have the digests written there; ``models`` gives those that
    have no such name, by name or digest. Checked are shape, range and finiteness of each adversarial, its distance from
    the stored clean image, that the model, asked anew, is fooled by it (a true class ahead by less than ``LEVEL`` is a
    tie), that clean answers are what is written down, that statuses fit the numbers, that the ledger knows each attack
    and its norm, and that no adversarial of any attack, in whichever of the folders, lies below a certified radius of
    kind exact or probabilistic for the same model, image and norm. Stored images and labels are compared with those of
    the data set where it is at hand (``root`` as for ``absynth.data.load``, but nothing is downloaded). ``progress`` is
    called with rows done and rows in all.

    Raises InputError when there is no ledger or one cannot be read. A model that cannot be loaded is reported as
    unchecked; what cannot be told from a run that was stopped early is a notice.
    """
    failures: list[Failure] = []
    unchecked: list[str] = []
    notices: list[str] = []
    statuses: Counter[str] = Counter()
    clean_count = certificate_count = 0
    data_sets = DataSets(root)
    held: dict[tuple[str, str], _Held] = {}  # by data and model: certificates and attacks may lie in different folders
    places = ledger_folders(folders)
    for folder in places:
        with Ledger(folder) as ledger:
            images, attacks, used, facts = ledger.images(), ledger.attacks(), set[str](), ledger.facts()
            compared = data_sets.compare(facts, images)
            failures += [Failure("", "", "", image, reason) for image, reason in compared.problems]
            if compared.reason:
                notices.append(f"images not compared with the data set: {compared.reason}")
            told = []
            for record in ledger.models():
                rows, clean = ledger.rows(record.digest), ledger.clean(record.digest)
                certificates = ledger.certificates(record.digest)
                statuses.update(row.status for row in rows)
                used |= {row.attack for row in rows}
                told += missing(record.name, images, clean, rows, attacks)
                clean_count += len(clean)
                certificate_count += len(certificates)
                failures += _entries(record.name, rows, attacks)
                failures += _distances(record.name, rows, images)
                failures += _clean_statuses(record.name, rows, clean)
                one = held.setdefault((facts.get("data_digest", str(folder)), record.digest), _Held(record.name))
                one.add(certificates, rows, images, clean)
                try:
                    classifier = _model(record, models or {})
                except InputError as error:
                    unchecked.append(f"{record.name} in {folder}: {error}")
                    continue
                failures += _clean_answers(record.name, classifier, clean, images)
                failures += _adversarials(record.name, classifier, rows, progress)
            told += left_out(images, attacks, used)
            notices += [f"{folder}: {line}" for line in told] if len(places) > 1 else told
    for one in held.values():
        failures += invariant(one.model, one.certificates, one.rows, one.images, one.clean)
    return Verification(
        rows=statuses.total(),
        clean=clean_count,
        certificates=certificate_count,
        failures=tuple(dict.fromkeys(failures)),
        unchecked=tuple(unchecked),
        errors=statuses["error"],
        found_nothing=statuses["failed"],
        notices=tuple(dict.fromkeys(notices)),
    )


@dataclass
class _Held:
    """What the folders together say of one model on one data set, as far as certificates are about it."""

    model: str
    certificates: list[Certificate] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    images: dict[int, tuple[Tensor, int]] = field(default_factory=dict)
    clean: list[CleanRow] = field(default_factory=list)

    def add(
        self,
        certificates: Iterable[Certificate],
        rows: Iterable[Row],
        images: Mapping[int, tuple[Tensor, int]],
        clean: Iterable[CleanRow],
    ) -> None:
        """What one folder says."""
        self.certificates += certificates
        self.rows += [row for row in rows if row.found]
        self.images |= {index: image for index, image in images.items() if index not in self.images}
        self.clean += [answer for answer in clean if answer.broken]


def invariant(
    model: str,
    certificates: Iterable[Certificate],
    rows: Iterable[Row],
    images: Mapping[int, tuple[Tensor, int]],
    clean: Iterable[CleanRow] = (),
) -> list[Failure]:
    """The certificates with an adversarial below their radius, by whatever attack, or of an image that is misclassified
    as it is; estimates promise nothing."""
    wrong = {row.image for row in clean if row.broken}
    by_image: dict[int, list[Row]] = {}
    for row in rows:
        if row.found:
            by_image.setdefault(row.image, []).append(row)
    failures = []
    for certificate in certificates:
        if certificate.kind == "estimate" or certificate.norm not in NORMS:
            continue
        if certificate.image in wrong and certificate.radius > 0:
            reason = (
                f"{certificate.method} certifies {certificate.radius:.6g}, the model misclassifies the image as it is"
            )
            failures.append(Failure(model, "", certificate.norm, certificate.image, reason))
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
    given = models.get(record.digest, models.get(record.name))
    classifier = given if given is not None else load_model(record.name)
    digest = model_digest(classifier)
    if digest != record.digest:
        raise InputError(
            f"the model {record.name!r} has digest {digest[:12]}, the ledger was made with {record.digest[:12]}: "
            "give the model that was evaluated"
        )
    return classifier


def _entries(model: str, rows: Iterable[Row], attacks: Mapping[str, AttackRecord]) -> list[Failure]:
    """Attacks with rows that the ledger's list of attacks lacks, or has in another norm."""
    failures = []
    for attack, norm in dict.fromkeys((row.attack, row.norm) for row in rows):
        if attack not in attacks:
            reason = "the ledger has no entry of this attack, which says its name and norm"
        elif attacks[attack].norm != norm:
            reason = f"its rows are in {norm}, its entry says {attacks[attack].norm}"
        else:
            continue
        failures.append(Failure(model, attack, norm, None, reason))
    return failures


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
    if row.status not in get_args(Status):
        return f"its status {row.status!r} is unknown"
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
    problems = {row.image: reason for row in clean if (reason := _prediction_problem(row))}
    failures += [Failure(model, "", "", image, reason) for image, reason in problems.items()]
    usable = [row for row in clean if row.logits is not None and row.image in images]
    for start in range(0, len(usable), BATCH):
        batch = usable[start : start + BATCH]
        for row, answer in zip(batch, _answers(classifier, [images[row.image][0] for row in batch]), strict=True):
            if not (_is_wrong(answer, row.label, LEVEL) if row.broken else _is_wrong(answer, row.label) is False):
                reason = f"the clean image was {'misclassified' if row.broken else 'classified rightly'}, not so now"
                failures.append(Failure(model, "", "", row.image, reason))
            elif row.image in problems or row.prediction is None:
                continue
            elif _is_wrong(answer, row.prediction) is not False:
                reason = f"the clean answer's prediction is {row.prediction}, not so now"
                failures.append(Failure(model, "", "", row.image, reason))
    return failures


def _prediction_problem(row: CleanRow) -> str:
    """Why the prediction of a clean answer is not what its logits say, up to a tie, or nothing."""
    if (row.logits is None) != (row.prediction is None):
        return "the clean answer has a prediction without logits, or logits without one"
    if row.logits is None or row.prediction is None:
        return ""
    if _is_wrong((row.logits, row.logits), row.prediction) is False:
        return ""
    return f"the clean answer's prediction is {row.prediction}, its logits say {int(row.logits.argmax())}"


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
            answers = _answers(classifier, [image for _, image in batch])
            for (row, _), answer in zip(batch, answers, strict=True):
                if not (perhaps := _is_wrong(answer, row.label, LEVEL)):
                    answered = perhaps is not None
                    reason = "the model is not fooled by its image" if answered else "the model gives no usable answer"
                    failures.append(Failure(model, row.attack, row.norm, row.image, reason))
            done += len(batch)
            if progress is not None:
                progress(done, total)
    return failures


def _answers(classifier: Classifier, images: list[Tensor]) -> list[tuple[Tensor, Tensor] | None]:
    """The logits (K,) of each image, asked twice; None where the model gives no usable answer."""
    try:
        answer = ask(classifier, torch.stack(images).to(device_of(classifier)))
    except Exception:
        if len(images) == 1:
            return [None]
        return [_answers(classifier, [image])[0] for image in images]
    return [
        None if problem else (first, second)
        for problem, first, second in zip(answer.errors, answer.logits.cpu(), answer.again.cpu(), strict=True)
    ]


def _is_wrong(answer: tuple[Tensor, Tensor] | None, label: int, rounding: float = -LEVEL) -> bool | None:
    """Whether another class is ahead of ``label`` both times: surely, or with ``rounding`` LEVEL perhaps, up to a tie.
    None without an answer, and for a label that it has no class of."""
    if answer is None or not 0 <= label < len(answer[0]):
        return None
    return all(bool(is_broken(logits[None], torch.tensor([label]), rounding)) for logits in answer)
