"""What the rows of a ledger say: medians, accuracies, wins, costs; of every attack, of all together, of the union of
balls."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from absynth.errors import InputError, unknown_name
from absynth.evaluation.cells import THRESHOLDS, UNION, Cell, plain, uneven, within
from absynth.evaluation.doubts import clean_doubts, ledger_doubts
from absynth.evaluation.files import nothing_in
from absynth.evaluation.folders import ledger_folders
from absynth.evaluation.ledger import Ledger
from absynth.evaluation.names import named_apart
from absynth.evaluation.paper import is_papers_data
from absynth.evaluation.probed import unprobed
from absynth.evaluation.rows import AttackRecord, Certificate, CleanRow, Doubt, Row
from absynth.evaluation.statistics import wilson_interval
from absynth.norms import NORMS

__all__ = [
    "THRESHOLDS",
    "UNION",
    "Cell",
    "ModelSummary",
    "NormSummary",
    "Summary",
    "attack_labels",
    "summarize",
    "summarize_model",
    "survivors",
    "uneven",
    "within",
]


@dataclass(frozen=True)
class NormSummary:
    """All attacks of one norm on one model: ``all`` takes the nearest adversarial of each image."""

    all: Cell
    attacks: Mapping[str, Cell]

    @property
    def uneven(self) -> bool:
        """Whether some of its images lack a usable row of some of the attacks, and are the less surely broken."""
        return uneven(self.all.distances, self.attacks.values())

    def to_json(self) -> dict[str, Any]:
        """The cell of all attacks, with those of each below ``attacks``."""
        attacks = {name: {**cell.to_json(), "wins": cell.wins} for name, cell in self.attacks.items()}
        return {**self.all.to_json(), "uneven": self.uneven, "attacks": attacks}


@dataclass(frozen=True)
class ModelSummary:
    """Everything the ledger says about one model.

    ``clean`` says of the images that it answered whether rightly; the others, ``unanswered`` many, are left out of all
    numbers. ``union`` holds the images that no adversarial of any attack breaks within the balls of L0, L2 and L∞ at
    their thresholds; each adversarial counts in every ball it lies in, not only in its own norm's. None without rows in
    all three; ``union_errors`` are left out of it as nothing but errors came of one of the norms. ``nearest`` is the
    row of each image's nearest adversarial, by norm. ``probes`` are the kinds of questions of
    ``absynth.evaluation.doubts`` that were put to the model, ``unprobed`` those that were not, each with the attacks it
    was not put to; without them no doubt means little. ``stored_name`` is what the ledger in ``folder`` calls the
    model; ``name`` says in which folder where several are called so. ``paper_name`` is what the paper's figures for its
    data go by, empty on other data.
    """

    name: str
    digest: str
    clean: Mapping[int, bool]
    norms: Mapping[str, NormSummary]
    union: Mapping[int, bool] | None
    nearest: Mapping[str, Mapping[int, Row]]
    certificates: tuple[Certificate, ...] = ()
    doubts: tuple[Doubt, ...] = ()
    probes: frozenset[str] = frozenset()
    unprobed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    labels: Mapping[int, int] = field(default_factory=dict)
    unanswered: int = 0
    union_errors: int = 0
    stored_name: str = ""
    paper_name: str = ""
    folder: Path = Path()

    @property
    def clean_accuracy(self) -> float:
        """Share of the answered images classified correctly, in [0,1]; NaN where there is none."""
        return sum(self.clean.values()) / len(self.clean) if self.clean else math.nan

    @property
    def union_uneven(self) -> bool:
        """Whether some images of the union lack a usable row of some attack."""
        cells = [cell for norm in UNION if norm in self.norms for cell in self.norms[norm].attacks.values()]
        return uneven(self.union or (), cells)

    def to_json(self) -> dict[str, Any]:
        """Plain values only."""
        union = None
        if self.union is not None:
            survivors = sum(self.union.values())
            union = {
                "accuracy": plain(survivors / len(self.union)) if self.union else None,
                "accuracy_interval": list(wilson_interval(survivors, len(self.union))),
                "images": len(self.union),
                "errors": self.union_errors,
                "uneven": self.union_uneven,
                "thresholds": {norm: THRESHOLDS[norm] for norm in UNION},
            }
        return {
            "digest": self.digest,
            "clean_accuracy": plain(self.clean_accuracy),
            "clean_accuracy_interval": list(wilson_interval(sum(self.clean.values()), len(self.clean))),
            "images": len(self.clean),
            "unanswered": self.unanswered,
            **{norm: summary.to_json() for norm, summary in self.norms.items()},
            "union": union,
            "warnings": [{"code": d.code, "subject": d.subject, "message": d.message} for d in self.doubts],
        }


@dataclass(frozen=True)
class Summary:
    """The models of one or several run folders."""

    models: tuple[ModelSummary, ...]
    facts: Mapping[str, str]

    def __getitem__(self, name: str) -> ModelSummary:
        for model in self.models:
            if model.name == name:
                return model
        raise unknown_name("model", name, [model.name for model in self.models])

    def to_json(self) -> dict[str, Any]:
        """``{"models": {name: {"clean_accuracy", "l2": {"median", "accuracy", "threshold", "images",
        "attacks"}}}}``."""
        return {**self.facts, "models": {model.name: model.to_json() for model in self.models}}


def summarize(*folders: str | Path) -> Summary:
    """Sum up the ledgers in or below the run folders. Of models that are called the same each stands under ``name
    (folder)``, with as much of the path as tells them apart.

    A ledger without an answer of any model, as a run leaves that was refused, counts as none. Raises InputError when
    there is no other, one cannot be read, or they are about different data.
    """
    read: dict[Path, Summary] = {}
    for given in map(Path, folders):
        places = ledger_folders([given])
        for place in places:
            if place.resolve() not in read:
                read[place.resolve()] = _read(place)
        if not any(read[place.resolve()].models for place in places):
            raise nothing_in(given)
    runs = [run for run in read.values() if run.models]
    for run in runs:
        if run.facts.get("data_digest") != runs[0].facts.get("data_digest"):
            raise InputError(
                f"{_about(runs[0])}, {_about(run)}, which is different data: give runs on one data set at a time"
            )
    return Summary(named_apart([model for run in runs for model in run.models]), runs[0].facts if runs else {})


def _about(run: Summary) -> str:
    facts = {"data": "unknown data", "split": "unknown", "data_digest": "unknown", **run.facts}
    return (
        f"{run.models[0].folder} is about {facts['data']} ({facts['split']} split, digest {facts['data_digest'][:8]})"
    )


def _read(folder: Path) -> Summary:
    """What one ledger says."""
    with Ledger(folder) as ledger:
        attacks, compared = ledger.attacks(), is_papers_data(ledger.facts())
        images = {index: image for index, (image, _) in ledger.images().items()}
        models = []
        for record in ledger.models():
            rows, clean = ledger.rows(record.digest), ledger.clean(record.digest)
            if not rows and not clean:
                continue
            if unknown := next((row.attack for row in rows if row.attack not in attacks), None):
                raise InputError(
                    f"{ledger.path} is damaged (it has rows of {unknown}, which its table attacks lacks): restore it "
                    "from a copy, or move it away and run again"
                )
            seen = (*clean_doubts(record.digest, clean), *ledger_doubts(record.digest, rows, attacks))
            model = summarize_model(
                record.name,
                record.digest,
                clean,
                rows,
                attacks,
                images,
                ledger.certificates(record.digest),
                (*ledger.doubts(record.digest), *seen),
                ledger.probes(record.digest),
            )
            models.append(replace(model, folder=folder, paper_name=record.name if compared else ""))
        return Summary(tuple(models), ledger.facts())


def summarize_model(
    name: str,
    digest: str,
    clean: Iterable[CleanRow],
    rows: Iterable[Row],
    attacks: Mapping[str, AttackRecord],
    images: Mapping[int, torch.Tensor],
    certificates: Iterable[Certificate] = (),
    doubts: Iterable[Doubt] = (),
    probes: Collection[tuple[str, str]] = (),
) -> ModelSummary:
    """Sum up one model's rows. ``images`` are the clean images (C,H,W) by index."""
    answers, rows = list(clean), list(rows)
    by_norm: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_norm[row.norm].append(row)
    spent = [row for row in rows if row.status in ("found", "failed")]  # attacks on nothing cannot be put to the test
    labels = {row.image: row.label for row in rows} | {row.image: row.label for row in answers}
    norms = {norm: _norm_summary(norm, by_norm[norm], attacks) for norm in NORMS if by_norm[norm]}
    union, attacked = None, set[int]()
    if set(UNION) <= set(norms):
        union = survivors(rows, images, {norm: THRESHOLDS[norm] for norm in UNION})
        attacked = set.intersection(*({row.image for row in by_norm[norm]} for norm in UNION))
    return ModelSummary(
        name=name,
        digest=digest,
        clean={row.image: not row.broken for row in answers if row.logits is not None},
        unanswered=sum(row.logits is None for row in answers),
        norms=norms,
        union=union,
        union_errors=len(attacked - (union or {}).keys()),
        nearest={norm: _nearest(by_norm[norm]) for norm in norms},
        certificates=tuple(certificates),
        doubts=tuple(doubts),
        probes=frozenset(probe for probe, _ in probes),
        unprobed=unprobed(probes, [attacks[key] for key in dict.fromkeys(row.attack for row in spent)]),
        labels=labels,
        stored_name=name,
    )


def attack_labels(attacks: Iterable[AttackRecord]) -> dict[str, str]:
    """What each attack (by repr) is called in tables: its name, or its repr where two of one ledger share the name."""
    attacks = list(attacks)
    names = [record.name for record in attacks]
    return {r.attack: r.name if names.count(r.name) == 1 else f"{r.name}: {r.attack}" for r in attacks}


def _norm_summary(norm: str, rows: list[Row], attacks: Mapping[str, AttackRecord]) -> NormSummary:
    present = {row.attack for row in rows}
    labels = attack_labels(record for key, record in attacks.items() if key in present)
    by_attack: dict[str, list[Row]] = {label: [] for label in labels.values()}
    for row in rows:
        by_attack[labels[row.attack]].append(row)
    best = _smallest(rows)
    winners: dict[int, set[str]] = defaultdict(set)
    for row in rows:
        if row.status == "found" and 0 < row.distance == best[row.image] < math.inf:
            winners[row.image].add(labels[row.attack])
    wins: dict[str, float] = defaultdict(float)
    for nearest in winners.values():
        for label in nearest:
            wins[label] += 1 / len(nearest)
    knowledge = {labels[key]: record.knowledge for key, record in attacks.items() if key in labels}
    cells = {
        label: _cell(norm, group, wins=wins[label], knowledge=knowledge[label]) for label, group in by_attack.items()
    }
    return NormSummary(_cell(norm, rows), cells)


def _cell(norm: str, rows: list[Row], wins: float = 0.0, knowledge: str = "") -> Cell:
    spent = [row for row in rows if row.status in ("found", "failed")]
    count = max(1, len({row.image for row in spent}))
    distances = _smallest(rows)
    return Cell(
        distances=distances,
        threshold=THRESHOLDS[norm],
        errors=len({row.image for row in rows} - distances.keys()),
        forward=sum(row.forward for row in spent) / count,
        backward=sum(row.backward for row in spent) / count,
        seconds=sum(row.seconds for row in spent) / count,
        wins=wins,
        knowledge=knowledge,
    )


def _smallest(rows: Iterable[Row]) -> dict[int, float]:
    """The smallest distance of each image over its usable rows."""
    best: dict[int, float] = {}
    for row in rows:
        if row.status != "error":
            best[row.image] = min(row.distance, best.get(row.image, math.inf))
    return dict(sorted(best.items()))


def _nearest(rows: Iterable[Row]) -> dict[int, Row]:
    best: dict[int, Row] = {}
    for row in rows:
        if row.adversarial is not None and (row.image not in best or row.distance < best[row.image].distance):
            best[row.image] = row
    return best


def survivors(rows: Sequence[Row], images: Mapping[int, torch.Tensor], balls: Mapping[str, float]) -> dict[int, bool]:
    """Whether images survive the union of ``balls``, radii by norm; for those with usable rows in each of the norms.

    ``rows`` are one model's. Each adversarial counts in every ball that it lies in, not only in its own norm's.
    """
    attacked = [{row.image for row in rows if row.norm == norm and row.status != "error"} for norm in balls]
    alive = {image: True for image in sorted(set.intersection(*attacked))}
    for row in rows:
        if row.image not in alive or not row.found:
            continue
        if row.status == "misclassified" or row.adversarial is None or row.image not in images:
            broken = row.norm in balls and within(row.distance, balls[row.norm])
        else:
            pair = row.adversarial[None], images[row.image][None]
            broken = any(within(float(NORMS[norm].distance(*pair)), radius) for norm, radius in balls.items())
        if broken:
            alive[row.image] = False
    return alive
