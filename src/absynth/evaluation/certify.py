"""Certificates of a model on a split, written into the same ledger as the attacks."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

from torch import Tensor, nn

from absynth import certificates
from absynth import data as datasets
from absynth import estimates as estimated
from absynth.errors import InputError
from absynth.evaluation.ledger import Ledger
from absynth.evaluation.plan import Plan, image_indices, load_model, model_digest
from absynth.evaluation.rows import Certificate, CertificateKind
from absynth.evaluation.run import check_run, load_split, prepare
from absynth.evaluation.statistics import wilson_interval
from absynth.evaluation.summary import THRESHOLDS, UNION
from absynth.norms import listed

BATCH = 32  # images of a transaction
Told = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Certified:
    """What is certified of a model in one norm, or, with ``kind`` "estimate", what a method estimates: no guarantee.

    ``certified_accuracy``: the share of images that no perturbation of size ``radius`` or smaller breaks, with its 95 %
    ``interval``. Radii of misclassified images are 0 and count in ``mean_radius`` and ``median_radius``.
    """

    norm: str
    method: str
    kind: CertificateKind
    radius: float
    images: int
    clean_accuracy: float
    certified_accuracy: float
    interval: tuple[float, float]
    mean_radius: float
    median_radius: float
    seconds_per_image: float | None = None
    radii: tuple[float, ...] = field(default=(), repr=False)
    indices: tuple[int, ...] = field(default=(), repr=False)  # of the images, in the order of ``radii``

    def to_json(self) -> dict[str, Any]:
        """Plain values, without the single radii."""
        return {key: value for key, value in vars(self).items() if key not in ("radii", "indices")}


@dataclass(frozen=True)
class CertifiedUnion:
    """The share of images certified in the union of the paper's balls: each radius larger than its threshold, so that
    no perturbation inside any of ``balls`` breaks them; with its 95 % ``interval``."""

    balls: dict[str, float]
    images: int
    certified_accuracy: float
    interval: tuple[float, float]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return dict(vars(self))


def certified_union(found: Mapping[str, Certified]) -> CertifiedUnion | None:
    """Of what ``certify`` returned; None unless it has certificates, no estimates, in L0, L2 and L-infinity."""
    if any(norm not in found or found[norm].kind == "estimate" for norm in UNION):
        return None
    radii = {norm: dict(zip(found[norm].indices, found[norm].radii, strict=True)) for norm in UNION}
    images = set.intersection(*(set(one) for one in radii.values()))
    if not images:
        return None
    balls = {norm: THRESHOLDS[norm] for norm in UNION}
    certified = sum(all(radii[norm][image] > balls[norm] for norm in UNION) for image in images)
    return CertifiedUnion(balls, len(images), certified / len(images), wilson_interval(certified, len(images)))


def check_request(norms: Sequence[str], radius: float | None) -> None:
    """Raises InputError for a radius that is negative, NaN or infinite, and for unknown norms."""
    if radius is not None and not (math.isfinite(radius) and radius >= 0):
        raise InputError(f"radius is {radius}; expected a number that is at least 0, such as 1.5 for l2")
    certificates.check_norms(norms)


def certify(
    model: str | nn.Module,
    data: str | Path | tuple[Tensor, Tensor] = "mnist",
    split: str = "test",
    norms: Sequence[str] = ("l0", "l1", "l2", "linf"),
    images: int | Sequence[int] = 1000,
    out: str | Path = "runs/certificates",
    radius: float | None = None,
    *,
    estimates: bool = False,
    name: str | None = None,
    root: str | Path | None = None,
    progress: Told | None = None,
) -> dict[str, Certified]:
    """Certify a model's answers on a split's images, by norm; every radius goes into the ledger of ``out``.

    With ``estimates``, what ``absynth.estimates`` says of an ABS model instead, by method, marked as estimates.

    ``radius``: where ``certified_accuracy`` is taken (default: the paper's threshold of each norm). A perturbation *of*
    the certified radius may break the image, so an image counts when its radius is larger; in L0, where the radius is
    the least number of pixels an attack needs, the same.

    Interrupted, it loses at most 32 images; called again, it goes on. Raises InputError for a radius that is negative,
    NaN or infinite, for unknown norms, and for a model without certificates.
    """
    norms = listed(*norms)
    check_request(norms, radius)
    kind: CertificateKind = "estimate" if estimates else "exact"
    label = name or (model if isinstance(model, str) else type(model).__name__)
    classifier = load_model(model) if isinstance(model, str) else model
    find, methods = _estimator(classifier, norms) if estimates else _certifier(classifier, norms)
    pictures, labels, data_name, split = load_split(data, split, root)
    plan = Plan(
        model=label,
        model_digest=model_digest(classifier),
        attacks=(),
        images=image_indices(images, len(pictures)),
        data=data_name,
        split=split,
        data_digest=datasets.digest(pictures, labels),
    )
    seconds = 0.0
    fresh = 0
    with Ledger(out, write=True) as ledger:
        check_run(plan, ledger)
        prepare(plan, classifier, pictures, labels, ledger)
        known = {(one.image, one.method, one.norm) for one in ledger.certificates(plan.model_digest)}
        broken = {row.image: row.broken or row.logits is None for row in ledger.clean(plan.model_digest)}
        left = [i for i in plan.images if any((i, method, norm) not in known for method, norm in methods.values())]
        done = len(plan.images) - len(left)
        for start in range(0, len(left), BATCH):
            index = left[start : start + BATCH]
            started = time.monotonic()
            radii = find(pictures[index], labels[index])
            seconds += time.monotonic() - started
            fresh += len(index)
            if not estimates:
                _check_agreement(index, radii, broken)
            ledger.add_certificates(
                Certificate(plan.model_digest, i, norm, float(radii[key][row]), method, kind, int(labels[i]))
                for row, i in enumerate(index)
                for key, (method, norm) in methods.items()
            )
            if progress is not None:
                progress(done + fresh, len(plan.images), f"{seconds / fresh:.3f} s an image")
        stored = ledger.certificates(plan.model_digest)
    clean = sum(not broken[image] for image in plan.images) / len(plan.images)
    wanted = set(plan.images)
    found = {}
    for key, (method, norm) in methods.items():
        own = [one for one in stored if (one.method, one.norm) == (method, norm) and one.image in wanted]
        values = tuple(one.radius for one in own)
        at = THRESHOLDS[norm] if radius is None else radius
        certified = sum(value > at for value in values)
        found[key] = Certified(
            norm=norm,
            method=method,
            kind=kind,
            radius=at,
            images=len(values),
            clean_accuracy=clean,
            certified_accuracy=certified / len(values),
            interval=wilson_interval(certified, len(values)),
            mean_radius=mean(values),
            median_radius=median(values),
            seconds_per_image=seconds / fresh if fresh else None,
            radii=values,
            indices=tuple(one.image for one in own),
        )
    return found


def _check_agreement(index: Sequence[int], radii: Mapping[str, Tensor], broken: Mapping[int, bool]) -> None:
    """Raises InputError where an image that the model answers wrongly has a radius: what is proven is proven of the
    prototypes, and the model does something else."""
    wrong = [image for row, image in enumerate(index) if broken[image] and any(one[row] > 0 for one in radii.values())]
    if wrong:
        raise InputError(
            f"the model misclassifies image {wrong[0]} and {len(wrong) - 1} more of {len(index)}, which its "
            "prototypes() classify rightly: certificates would be of another model; let forward return -min over p of "
            "||x - p||^2 + cost for the very prototypes, class by class"
        )


Methods = dict[str, tuple[str, str]]  # by what the result is called: method and norm
Find = Callable[[Tensor, Tensor], dict[str, Tensor]]  # images (B,C,S,S), labels (B,) -> radii (B,) by the same names


def _certifier(model: Any, norms: Sequence[str]) -> tuple[Find, Methods]:
    certificates.check_model(model)
    certifier = certificates.Certifier(model.prototypes())
    methods = {norm: (certificates.METHOD, norm) for norm in norms}
    return lambda images, labels: certifier.radii(images, labels, norms), methods


def _estimator(model: Any, norms: Sequence[str]) -> tuple[Find, Methods]:
    methods = {method: (method, norm) for method, norm in estimated.methods_of(model).items() if norm in norms}
    if not methods:
        raise InputError(f"norms are {', '.join(norms)}; estimates are for l2 and linf: choose among these")
    return lambda images, labels: estimated.estimated_radii(model, images, labels), methods
