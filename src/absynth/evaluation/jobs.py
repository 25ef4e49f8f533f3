"""One job: an attack on a batch of images, and the rows that come of it. Knows no files."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from absynth.attacks.base import Attack, Classifier, Goal
from absynth.attacks.queries import CountingClassifier
from absynth.evaluation.judge import ask, device_of, judge
from absynth.evaluation.plan import Job, row_seed
from absynth.evaluation.rows import CleanRow, Row, Status


def clean_rows(
    classifier: Classifier, indices: Sequence[int], images: Tensor, labels: Tensor, model: str
) -> list[CleanRow]:
    """What the model says of unperturbed images (n,C,H,W); images it fails on are marked, the others unaffected."""
    try:
        answer = ask(classifier, images.to(device_of(classifier)))
    except Exception as error:
        if len(indices) == 1:
            return [CleanRow(model, indices[0], int(labels[0]), None, None, _describe(error))]
        parts = [slice(i, i + 1) for i in range(len(indices))]
        return [r for p in parts for r in clean_rows(classifier, indices[p], images[p], labels[p], model)]
    rows = []
    for place, (index, label) in enumerate(zip(indices, labels.tolist(), strict=True)):
        logits, problem = answer.logits[place].cpu(), answer.errors[place]
        usable = None if problem else logits
        rows.append(CleanRow(model, index, label, None if problem else int(logits.argmax()), usable, problem))
    return rows


def run_job(
    job: Job,
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    clean: Mapping[int, CleanRow],
    model: str,
    seed: int,
) -> list[Row]:
    """The rows of one job, in the order of its images (n,C,H,W): a pure function of the arguments but for the seconds.

    No attack is spent on an image that is misclassified as it is, or that the model gave no usable answer for. When
    model or attack raise, the images are tried one by one and the ones at fault are marked.
    """
    attack, norm = repr(job.attack), str(job.attack.norm)
    rows: dict[int, Row] = {}
    attacked = []
    for place, (image, label) in enumerate(zip(job.images, labels.tolist(), strict=True)):
        answer = clean[image]
        if answer.logits is None:
            rows[image] = Row(model, attack, norm, image, seed, label, float("inf"), "error", message=answer.message)
        elif answer.broken:
            rows[image] = Row(model, attack, norm, image, seed, label, 0.0, "misclassified")
        else:
            attacked.append(place)
    if attacked:
        indices = [job.images[place] for place in attacked]
        for row in _attack(job.attack, classifier, indices, images[attacked], labels[attacked], model, seed):
            rows[row.image] = row
    return [rows[image] for image in job.images]


def _attack(
    attack: Attack, classifier: Classifier, indices: list[int], images: Tensor, labels: Tensor, model: str, seed: int
) -> list[Row]:
    """Rows of images that are classified correctly."""
    device = device_of(classifier)
    name, norm = repr(attack), attack.norm
    seeds = torch.tensor([row_seed(seed, index, name) for index in indices])
    counter = CountingClassifier(classifier, len(indices))
    started = time.monotonic()
    try:
        clean, truth = images.to(device), labels.to(device)
        proposals = attack(counter, clean, Goal.untargeted(truth), seeds)
        seconds = (time.monotonic() - started) / len(indices)
        verdicts = judge(classifier, clean, proposals.images, proposals.found, truth, norm)
    except Exception as error:
        if len(indices) > 1:
            parts = [slice(i, i + 1) for i in range(len(indices))]
            return [
                r for p in parts for r in _attack(attack, classifier, indices[p], images[p], labels[p], model, seed)
            ]
        message = _describe(error)
        return [Row(model, name, str(norm), indices[0], seed, int(labels[0]), float("inf"), "error", message=message)]
    rows = []
    for place, (index, verdict) in enumerate(zip(indices, verdicts, strict=True)):
        undefined, asked = int(counter.undefined[place]), int(counter.forward[place])
        message = verdict.error
        if undefined and not message:
            message = f"the model answered NaN to {undefined} of the attack's {asked} questions"
        # Where an attack found nothing among images without an answer, nothing is known: that is not robust.
        status: Status = "found" if verdict.adversarial is not None else "error" if message else "failed"
        rows.append(
            Row(
                *(model, name, str(norm), index, seed, int(labels[place]), verdict.distance, status),
                forward=asked,
                backward=int(counter.backward[place]),
                seconds=seconds,
                adversarial=verdict.adversarial,
                message=message,
            )
        )
    return rows


def _describe(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
