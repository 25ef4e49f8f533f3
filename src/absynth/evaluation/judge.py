"""The one place that decides what an attack has achieved. Attacks propose, this disposes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from absynth.attacks.base import NUDGES, Classifier
from absynth.checks import check_logits
from absynth.norms import Norm

#: Two answers about the same image may differ by this share of the spread of its logits.
TOLERANCE = 1e-2


@dataclass(frozen=True)
class Verdict:
    """The truth about one proposal. ``adversarial`` (C,H,W) is set where it holds; ``error`` where nothing can be
    said."""

    distance: float = float("inf")
    adversarial: Tensor | None = None
    error: str = ""


@dataclass(frozen=True)
class Answer:
    """What a model says of n images, asked twice: logits (n,K) each time, and per image an error, empty where there is
    none."""

    logits: Tensor
    again: Tensor
    errors: list[str]


def ask(classifier: Classifier, images: Tensor, classes: int | None = None) -> Answer:
    """Classify images (n,C,H,W) cold: fresh calls, no gradient, and twice, the second time in another order and batch.

    An image has an error when an answer is not finite or the two differ, in the two likeliest classes, by more than
    ``TOLERANCE`` of the spread of the logits (classes far behind may be answered roughly). Raises InputError when the
    model returns something else than logits (n,K), K at least 2 (exactly ``classes`` if given).
    """
    with torch.no_grad():
        first = _logits(classifier, images, classes)
        backward = [_logits(classifier, part, first.shape[1]) for part in images.flip(0).tensor_split(2) if len(part)]
    second = torch.cat(backward).flip(0)
    errors = []
    for one, two in zip(first, second, strict=True):
        spread = float(one.max() - one.min())
        if not (torch.isfinite(one).all() and torch.isfinite(two).all()):
            errors.append("the model answered NaN or infinity")
        elif float((one - two)[one.topk(2).indices].abs().max()) > TOLERANCE * max(spread, 1e-12):
            errors.append("the model's answer changed between two calls: it is random or depends on the batch")
        else:
            errors.append("")
    return Answer(first, second, errors)


def is_broken(logits: Tensor, labels: Tensor, rounding: float = 0.0) -> Tensor:
    """Logits (n,K) and true labels (n,) -> (n,) bool: another class is at least as likely as the true one.

    ``rounding``: the share of the spread of an image's logits by which the other class may be behind.
    """
    own = logits.gather(1, labels.unsqueeze(1)).squeeze(1)
    rival = logits.scatter(1, labels.unsqueeze(1), -torch.inf).amax(1)
    return rival >= own - rounding * (logits.amax(1) - logits.amin(1))


def judge(
    classifier: Classifier, clean: Tensor, proposed: Tensor, claimed: Tensor, labels: Tensor, norm: Norm
) -> list[Verdict]:
    """Verdicts on the proposals ``proposed`` for the images ``clean``, both (n,C,H,W); ``claimed`` (n,) says found or
    not.

    A proposal holds when it has the clean image's shape, is float32, finite and within [0,1], and the model, asked
    anew, gives another class at least the logit of the true one, both times. One that fails by rounding is tried again
    a little farther from the clean image. The distance is that of the image that holds, in float64 from the stored
    clean image.
    """
    if proposed.shape != clean.shape or claimed.shape != clean.shape[:1]:
        message = f"the attack returned shape {tuple(proposed.shape)} for images {tuple(clean.shape)}"
        return [Verdict(error=message)] * len(clean)
    verdicts = [Verdict()] * len(clean)
    proposed = proposed.detach()
    open_rows: list[int] = []
    for row in claimed.nonzero().squeeze(1).tolist():
        if problem := _invalid(proposed[row]):
            verdicts[row] = Verdict(error=f"the attack returned {problem}")
        else:
            open_rows.append(row)
    for nudge in (0.0, *NUDGES):
        if not open_rows:
            break
        rows = torch.tensor(open_rows, device=clean.device)
        candidates = (proposed[rows] + nudge * (proposed[rows] - clean[rows])).clamp(0, 1)
        answer = ask(classifier, candidates)
        broken = is_broken(answer.logits, labels[rows]) & is_broken(answer.again, labels[rows])
        distances = norm.distance(candidates, clean[rows])
        still_open = []
        for place, row in enumerate(open_rows):
            if answer.errors[place]:
                verdicts[row] = Verdict(error=answer.errors[place])
            elif broken[place]:
                verdicts[row] = Verdict(float(distances[place]), candidates[place].cpu())
            else:
                still_open.append(row)
        open_rows = still_open
    return verdicts


def _logits(classifier: Classifier, images: Tensor, classes: int | None) -> Tensor:
    return check_logits(classifier(images), len(images), classes).detach().float()


def _invalid(image: Tensor) -> str:
    """What is wrong with a proposed image (C,H,W), or nothing."""
    if image.dtype != torch.float32:
        return f"{image.dtype} instead of float32"
    if not torch.isfinite(image).all():
        return "pixels that are NaN or infinite"
    low, high = float(image.min()), float(image.max())
    return f"pixels from {low:.4g} to {high:.4g}, outside [0,1]" if low < 0 or high > 1 else ""


def device_of(classifier: Classifier) -> torch.device:
    """Where the classifier's parameters or buffers are; the CPU when it has none."""
    if isinstance(classifier, nn.Module):
        for tensor in (*classifier.parameters(), *classifier.buffers()):
            return tensor.device
    return torch.device("cpu")
