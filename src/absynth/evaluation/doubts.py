"""An evaluation that doubts itself: reasons to mistrust its numbers, looked for in the model, the attacks and the rows.

``probe_model`` and ``probe_attacks`` ask the model and write what they find into the ledger; ``ledger_doubts`` reads
rows. After the checks of AutoAttack (Croce & Hein 2020, arXiv 2003.01690) and Carlini et al. 2019 (arXiv 1902.06705).
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor

from absynth.attacks.base import Attack, Classifier, Goal
from absynth.evaluation.jobs import run_job
from absynth.evaluation.judge import device_of, judge
from absynth.evaluation.ledger import Ledger
from absynth.evaluation.plan import Job, Plan, row_seed
from absynth.evaluation.probed import FEWEST, innermost_steps
from absynth.evaluation.rows import AttackRecord, CleanRow, Doubt, Row
from absynth.evaluation.statistics import median, short
from absynth.norms import Norm

PROBED = 8  # images the model is probed with
PLANTED = 2  # images an adversarial is planted beside
HALVED = 3  # images an attack is run on again with half of its steps
MISSED = 1.5  # an attack misses a planted adversarial when what it finds is this many times as far
GAIN = 0.97  # success still rises when the full steps bring the median distance below this share of half the steps'


def probe_model(plan: Plan, classifier: Classifier, images: Tensor, labels: Tensor, ledger: Ledger) -> None:
    """Look for a random model, one that depends on the batch, probabilities for logits, useless gradients. Once a
    model."""
    if ("model", "") in ledger.probes(plan.model_digest):
        return
    index = [row.image for row in ledger.clean(plan.model_digest) if row.image in plan.images][:PROBED]
    device = device_of(classifier)
    found = model_doubts(plan.model_digest, classifier, images[index].to(device), labels[index].to(device))
    ledger.add_probe(plan.model_digest, "model", "", found)


def probe_attacks(
    plan: Plan,
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    ledger: Ledger,
    progress: Callable[[Attack], None] | None = None,
) -> None:
    """Plant adversarials for the white-box attacks to find, and run attacks with half of their steps. Once an
    attack. ``progress`` is called with each attack that is done."""
    model = plan.model_digest
    clean = {row.image: row for row in ledger.clean(model)}
    sound = [i for i in plan.images if clean[i].logits is not None and not clean[i].broken]
    if not sound:
        return
    done = ledger.probes(model)
    distances = {
        (row.attack, row.image): row.distance for row in ledger.rows(model, images=False) if row.status != "error"
    }
    for attack in plan.attacks:
        name = repr(attack)
        if attack.kind == "minimum" and attack.knowledge == "gradient" and ("planted", name) not in done:
            doubts = planted_doubts(model, attack, classifier, sound[:PLANTED], images, labels, plan.seed)
            ledger.add_probe(model, "planted", name, doubts)
        half = with_half_steps(attack)
        index = [image for image in sound if (name, image) in distances][:HALVED]
        if half is not None and index and ("steps", name) not in done:
            rows = run_job(Job(half, tuple(index)), classifier, images[index], labels[index], clean, model, plan.seed)
            pairs = [(row.distance, distances[name, row.image]) for row in rows if row.status != "error"]
            if pairs:  # an error is no distance
                ledger.add_probe(model, "steps", name, steps_doubts(model, attack.name, *zip(*pairs, strict=True)))
        if progress is not None:
            progress(attack)


def model_doubts(model: str, classifier: Classifier, images: Tensor, labels: Tensor) -> list[Doubt]:
    """What is suspicious about the model's answers and gradients at the images (n,C,H,W)."""
    try:
        with torch.no_grad():
            answered = torch.isfinite(classifier(images)).all(1)
        if not answered.any():
            return []  # the rows of those images say so
        images, labels = images[answered], labels[answered]
        found = [*answer_doubts(classifier, images), *_gradients(classifier, images, labels)]
        return [Doubt(model, code, "model", message) for code, message in found]
    except Exception as error:
        return [Doubt(model, "probe-failed", "model", _failed(error))]


def _failed(error: Exception) -> str:
    return " ".join(f"probing the model failed: {type(error).__name__}: {error}".split())[:300]


@torch.no_grad()
def answer_doubts(classifier: Classifier, images: Tensor) -> list[tuple[str, str]]:
    """What is suspicious about the answers to images (n,C,H,W): codes and messages. A model that answers batches may
    fail on one image, which is a doubt, too."""
    try:
        first, second = classifier(images), classifier(images)
        alone = torch.cat([classifier(image[None]) for image in images])
        return list(_answers(first, second, alone))
    except Exception as error:
        return [("probe-failed", _failed(error))]


def _answers(first: Tensor, second: Tensor, alone: Tensor) -> Iterator[tuple[str, str]]:
    if ((first >= 0) & (first <= 1)).all() and torch.allclose(first.sum(1), torch.ones_like(first[:, 0]), atol=1e-4):
        yield (
            "probabilities",
            (
                "the model returns probabilities, not logits: their gradients vanish where it is certain, so "
                "gradient attacks "
                "look weaker than they are; return log-probabilities"
            ),
        )
    if (change := _change(first, second)) > 1e-5:
        yield (
            "random",
            (
                f"the answer to one batch changed between two calls, by {change:.2g} of the spread of the logits: "
                "distances to the boundary of a random model mean little"
            ),
        )
    elif (change := _change(first, alone)) > 1e-3:
        yield (
            "batch",
            (
                f"the answer to an image depends on its batch, by {change:.2g} of the spread of the logits: put "
                "the model in "
                "eval mode, and rows into independent computations"
            ),
        )


def _change(first: Tensor, second: Tensor) -> float:
    """The largest change of an image's two highest logits, as a share of their spread."""
    top = first.topk(2, dim=1).indices
    change = (first - second).gather(1, top).abs().amax(1) / (first.amax(1) - first.amin(1)).clamp(min=1e-12)
    return float(change.max())


def _gradients(classifier: Classifier, images: Tensor, labels: Tensor) -> Iterator[tuple[str, str]]:
    variable = images.clone().requires_grad_()
    margin = Goal.untargeted(labels).margin(classifier(variable))
    gradient = torch.autograd.grad(margin.sum(), variable, allow_unused=True)[0] if margin.requires_grad else None
    if gradient is None:
        yield (
            "no-gradient",
            "the model has no gradient: white-box attacks cannot see it, only decision and score attacks count",
        )
        return
    flat = gradient.flatten(1)
    zero = int((flat == 0).all(1).sum())
    broken = int((~torch.isfinite(flat)).any(1).sum())
    if zero:
        yield (
            "zero-gradient",
            (
                f"the gradient of the margin is zero at {zero} of {len(images)} images: gradient attacks start "
                "blind there"
            ),
        )
    if broken:
        yield "non-finite-gradient", f"the gradient has NaN or infinite entries at {broken} of {len(images)} images"


@dataclass(frozen=True)
class Planted:
    """``classifier`` with an adversarial planted beside one image: ``clean + delta`` is of class ``rival`` for sure.

    Toward it the logit of ``rival`` rises linearly by up to ``gain``. Every image it is asked about belongs to that
    one.
    """

    classifier: Classifier
    clean: Tensor  # (1,C,H,W)
    delta: Tensor  # (1,C,H,W)
    rival: int
    gain: float

    def __call__(self, images: Tensor) -> Tensor:
        logits = self.classifier(images)
        share = ((images - self.clean) * self.delta).flatten(1).sum(1) / self.delta.square().sum()  # (n,)
        lift = torch.zeros_like(logits[0])
        lift[self.rival] = self.gain
        return logits + share.clamp(0, 1).unsqueeze(1) * lift


def plant(classifier: Classifier, clean: Tensor, label: int, norm: Norm, seed: int) -> tuple[Planted, float]:
    """An adversarial planted beside ``clean`` (1,C,H,W), and its distance: half a threshold away."""
    generator = torch.Generator().manual_seed(seed)
    room = torch.where(clean < 0.5, 1 - clean, -clean)  # at least 0.5 everywhere
    if norm.name in ("l0", "l1"):
        count = min(6 if norm.name == "l0" else 10, clean.numel())
        pixels = torch.randperm(clean.numel(), generator=generator)[:count].to(clean.device)
        mask = torch.zeros_like(clean).flatten().scatter(0, pixels, 1.0).view_as(clean)
        delta = room.sign() * mask * (room.abs() if norm.name == "l0" else 0.5)
    elif norm.name == "l2":
        weight = torch.rand(clean.shape, generator=generator).to(clean.device) * room
        delta = 0.75 * weight / weight.norm()
    else:
        delta = 0.15 * room.sign()
    with torch.no_grad():
        logits = classifier(clean + delta)[0]
    own = float(logits[label])
    rivals = logits.clone()
    rivals[label] = -torch.inf
    rival = int(rivals.argmax())
    spread = float(logits.max() - logits.min())
    gain = max(0.0, own - float(logits[rival]) + 0.01 * spread)
    return Planted(classifier, clean, delta, rival, gain), float(norm.distance(clean + delta, clean))


def planted_doubts(
    model: str, attack: Attack, classifier: Classifier, index: Sequence[int], images: Tensor, labels: Tensor, seed: int
) -> list[Doubt]:
    """Whether ``attack`` misses adversarials planted beside the images ``index``, or finds nothing as near."""
    missed = []
    device = device_of(classifier)
    for image in index:
        clean, truth = images[image : image + 1].to(device), labels[image : image + 1].to(device)
        try:
            planted, distance = plant(classifier, clean, int(truth), attack.norm, row_seed(seed, image, "planted"))
            seeds = torch.tensor([row_seed(seed, image, repr(attack))])
            proposals = attack(planted, clean, Goal.untargeted(truth), seeds)
            verdict = judge(planted, clean, proposals.images, proposals.found, truth, attack.norm)[0]
        except Exception:  # an attack that fails on this model has rows that say so
            return []
        if verdict.distance > MISSED * distance:
            missed.append(f"{_number(verdict.distance)} instead of {_number(distance)} on image {image}")
    if 2 * len(missed) < max(1, len(index)):
        return []
    message = f"missed a planted adversarial: found {'; '.join(missed)}. Its distances may be too large"
    return [Doubt(model, "planted-missed", attack.name, message)]


def with_half_steps(attack: Attack) -> Attack | None:
    """The attack with half of its steps, of the innermost attack's where one wraps another; None without steps to
    halve."""
    inner = getattr(attack, "attack", None)
    if isinstance(inner, Attack):
        half = with_half_steps(inner)
        return None if half is None else _replaced(attack, attack=half)
    steps = getattr(attack, "steps", None) or getattr(attack, "default_steps", None)
    if not isinstance(steps, int) or steps < FEWEST:
        return None
    return _replaced(attack, steps=steps // 2)


def _replaced(original: Attack, /, **changes: Any) -> Attack:
    changed: Attack = dataclasses.replace(cast(Any, original), **changes)  # attacks are dataclasses, their base is not
    return changed


def steps_doubts(model: str, attack: str, half: Sequence[float], full: Sequence[float]) -> list[Doubt]:
    """Whether an attack's distances still fall between half and all of its steps, on the same images."""
    before, after = median(half), median(full)
    found_before, found_after = (sum(math.isfinite(d) for d in values) for values in (half, full))
    if not (found_after > found_before or after < GAIN * before):
        return []
    message = (
        f"success still rises with its steps: median distance {_number(before)} with half of them, "
        f"{_number(after)} with "
        f"all, found {found_before} and {found_after} of {len(full)}. More steps would find nearer adversarials"
    )
    return [Doubt(model, "steps-rising", attack, message)]


def ledger_doubts(model: str, rows: Sequence[Row], attacks: Mapping[str, AttackRecord]) -> list[Doubt]:
    """What is suspicious about the rows of a model, all norms."""
    doubts: list[Doubt] = []
    by_attack: dict[str, dict[int, Row]] = defaultdict(dict)
    for row in rows:
        if row.status == "error":
            continue
        known = by_attack[row.attack].get(row.image)
        if known is None or row.distance < known.distance:
            by_attack[row.attack][row.image] = row
    doubts += [*_error_doubts(model, rows, attacks), *_undefined(model, rows, attacks)]
    for norm in dict.fromkeys(row.norm for row in rows):
        here = {attacks[key]: found for key, found in by_attack.items() if key in attacks and attacks[key].norm == norm}
        doubts += _beaten(model, norm, here)
        doubts += _noise(model, here)
        spent = [row for found in here.values() for row in found.values() if row.status != "misclassified"]
        if spent and not any(row.found for row in spent):
            message = (
                f"no attack found any adversarial in {norm}: rather a sign of attacks that fail than of a robust model"
            )
            doubts.append(Doubt(model, "nothing-found", norm, message))
    return [*doubts, *_steps_pairs(model, by_attack, attacks)]


def _error_doubts(model: str, rows: Sequence[Row], attacks: Mapping[str, AttackRecord]) -> Iterator[Doubt]:
    failed: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row.status == "error":
            failed[row.attack].append(row)
    for key, errors in failed.items():
        name = attacks[key].name if key in attacks else key
        yield Doubt(model, "errors", name, f"{len(errors)} images left out of its numbers: {errors[0].message}")


def clean_doubts(model: str, clean: Sequence[CleanRow]) -> list[Doubt]:
    """Images that the model gave no usable answer for."""
    silent = [row for row in clean if row.logits is None]
    of = f"{len(silent)} of {len(clean)} images got no usable answer and are left out of all numbers"
    return [Doubt(model, "unanswered", "model", f"{of}: {silent[0].message}")] if silent else []


def _undefined(model: str, rows: Sequence[Row], attacks: Mapping[str, AttackRecord]) -> Iterator[Doubt]:
    """Attacks that found something, and were answered with NaN on the way."""
    answered: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row.status == "found" and row.message:
            answered[row.attack].append(row)
    for key, those in answered.items():
        name = attacks[key].name if key in attacks else key
        message = f"on {len(those)} images {those[0].message}: nearer adversarials may lie where it has no answer"
        yield Doubt(model, "undefined", name, message)


def _beaten(model: str, norm: str, found: Mapping[AttackRecord, Mapping[int, Row]]) -> Iterator[Doubt]:
    """All white-box attacks together against all attacks without gradients, as far as they search the nearest."""
    searching = {record: rows for record, rows in found.items() if record.kind == "minimum"}
    white, black = (
        _nearest(rows for record, rows in searching.items() if (record.knowledge == "gradient") is is_white)
        for is_white in (True, False)
    )
    shared = [image for image in white if image in black]
    beaten = [image for image in shared if black[image] < 0.99 * white[image]]
    if shared and len(beaten) > max(1, 0.1 * len(shared)):
        yield Doubt(
            model,
            "white-box-beaten",
            norm,
            f"attacks without gradients found nearer adversarials than all white-box attacks on {len(beaten)} of "
            f"{len(shared)} images: the gradients mislead, or the white-box attacks are too weak",
        )


def _noise(model: str, found: Mapping[AttackRecord, Mapping[int, Row]]) -> Iterator[Doubt]:
    """Each white-box attack that searches the nearest against plain noise."""
    noise = _nearest(
        rows for record, rows in found.items() if record.name.startswith(("gaussian-noise", "salt-and-pepper"))
    )
    for record, rows in found.items():
        shared = [image for image in rows if image in noise and rows[image].status != "misclassified"]
        if record.knowledge != "gradient" or record.kind != "minimum" or not shared:
            continue
        own, floor = median([rows[image].distance for image in shared]), median([noise[image] for image in shared])
        if math.isfinite(floor) and own >= floor:
            message = f"no better than noise: median distance {_number(own)}, noise {_number(floor)} on the same images"
            yield Doubt(model, "beaten-by-noise", record.name, message)


def _steps_pairs(
    model: str, found: Mapping[str, Mapping[int, Row]], attacks: Mapping[str, AttackRecord]
) -> Iterator[Doubt]:
    """Attacks of the ledger that differ in nothing but their steps."""
    groups: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for key in found:
        if innermost := innermost_steps(key):
            group = key[: innermost.start(1)] + "…" + key[innermost.end(1) :]
            groups[group].append((int(innermost.group(1)), key))
    for members in groups.values():
        members.sort()
        for (_, fewer), (_, more) in pairwise(members):
            shared = [i for i in found[fewer] if i in found[more] and found[more][i].status != "misclassified"]
            if shared:
                pair = ([found[key][image].distance for image in shared] for key in (fewer, more))
                name = attacks[more].name if more in attacks else more
                for doubt in steps_doubts(model, name, *pair):
                    message = doubt.message.replace("with half of them", "with fewer").replace("with all", "with more")
                    yield dataclasses.replace(doubt, message=message)


def _nearest(groups: Iterator[Mapping[int, Row]]) -> dict[int, float]:
    """The nearest distance of each image that was attacked."""
    best: dict[int, float] = {}
    for rows in groups:
        for image, row in rows.items():
            if row.status != "misclassified":
                best[image] = min(row.distance, best.get(image, math.inf))
    return best


def _number(value: float) -> str:
    return short(value) if math.isfinite(value) else "none"
