"""Distal images: what a model calls a class with certainty although it started as noise (paper, section 4)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from absynth.attacks.base import Classifier, draw_uniform, generators
from absynth.attacks.queries import Following, can_follow, rows_of
from absynth.checks import check_seed
from absynth.errors import InputError
from absynth.evaluation.judge import device_of
from absynth.evaluation.plan import row_seed
from absynth.responses import ramp_of

FILE_NAME = "distal.safetensors"
EDGE = 1e-6  # how near a response comes to the ramp's ends, at which float32 may see none of its gradient


@dataclass(frozen=True)
class Distal:
    """Distal images of one model, all on the CPU.

    ``starts`` and ``images`` (n,C,H,W) in [0,1]: the noise, and what became of it; ``targets`` (n,) the class whose
    probability was raised; ``start_confidences`` and ``confidences`` (n,) its probability before and after; ``steps``
    (n,) the steps it took.
    """

    starts: Tensor
    images: Tensor
    targets: Tensor
    start_confidences: Tensor
    confidences: Tensor
    steps: Tensor


def probabilities(classifier: Classifier, images: Tensor) -> Tensor:
    """(n,C,H,W) -> (n,K): the model's own ``probabilities(images)`` where it has such a method, the softmax
    otherwise."""
    own = getattr(classifier, "probabilities", None)
    result: Tensor = own(images) if callable(own) else torch.softmax(classifier(images), dim=1)
    return result


def distal(
    classifier: Classifier,
    target: int = 1,
    *,
    count: int = 5,
    shape: tuple[int, int, int] = (1, 28, 28),
    confidence: float = 0.9,
    steps: int = 10_000,
    learning_rate: float = 1.0,
    momentum: float = 0.95,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Distal:
    """From uniform noise, ascend the log-probability of class ``target`` until it exceeds ``confidence``.

    The paper's procedure: gradient ascent with momentum on the image, kept in [0,1]. Where the probability is flat to
    float32, as that of a generative model is far from everything it knows, the logit is ascended instead until it is
    not. Behind a ramp, whose flat parts hide the gradient, the response ascends, and the image is one that has it.
    Each image's noise depends on ``seed`` and its number alone, and an image that is done costs nothing more.
    ``progress`` is called with steps done and ``steps``.

    Raises InputError for a ``seed`` out of range, a class the model does not have, and a model that returns no
    probabilities (n,K), or NaN, or has no gradient.
    """
    check_seed(seed)
    device = device_of(classifier)
    sources = generators(torch.tensor([row_seed(seed, number, "distal") for number in range(count)]))
    starts = draw_uniform(sources, torch.zeros(count, *shape, device=device))
    with torch.no_grad():
        first = probabilities(classifier, starts)
    if first.ndim != 2 or len(first) != count:
        raise InputError(f"the model returned {tuple(first.shape)} for {count} images: expected ({count}, K)")
    if not 0 <= target < first.shape[1]:
        raise InputError(f"class {target} is out of range: the model has {first.shape[1]}, numbered from 0")
    ramp, low, high = ramp_of(classifier), 0.0, 1.0
    seen = starts.clone()  # what ascends: images, or the ramp's responses to them
    if ramp is not None:
        low, high = EDGE, 1 - EDGE
        seen = ramp(starts).clamp(low, high)

    def shown(seen: Tensor) -> Tensor:
        return seen if ramp is None else ramp.inverse(seen)

    velocity = torch.zeros_like(starts)
    confidences, taken = first[:, target].clone(), torch.zeros(count, dtype=torch.int64)
    # A classifier that searches starts from what it found for the image one step before.
    asked = Following(classifier, count) if can_follow(classifier) else classifier
    todo = torch.arange(count, device=device)
    for step in range(steps + 1):
        confidences[todo], gradient = _ascent(rows_of(asked, todo), classifier, shown, seen[todo], target)
        sure = todo[confidences[todo] > confidence]
        if asked is not classifier and len(sure):  # it counts when a fresh search says so
            with torch.no_grad():
                confidences[sure] = probabilities(classifier, shown(seen[sure]))[:, target]
        going = confidences[todo] <= confidence
        todo, gradient = todo[going], gradient[going]
        if step == steps or not len(todo):
            break
        velocity[todo] = momentum * velocity[todo] + gradient
        seen[todo] = (seen[todo] + learning_rate * velocity[todo]).clamp(low, high)
        taken[todo.cpu()] = step + 1
        if progress is not None:
            progress(step + 1, steps)
    if asked is not classifier and len(todo):
        with torch.no_grad():
            confidences[todo] = probabilities(classifier, shown(seen[todo]))[:, target]
    moved = (taken > 0).to(device).view(-1, 1, 1, 1)  # (n,1,1,1)
    images = torch.where(moved, shown(seen), starts)
    targets = torch.full((count,), target)
    return Distal(starts.cpu(), images.cpu(), targets, first[:, target].cpu(), confidences.cpu(), taken)


def save_distal(folder: str | Path, found: Mapping[str, Distal], made: Mapping[str, str] | None = None) -> Path:
    """Write the distal images of several models, by name, into a run folder, where the report finds them. ``made``
    says for each model what its images were made of and how, for ``made_distal``."""
    path = Path(folder) / FILE_NAME
    tensors = {
        f"{i}.{key}": value.contiguous().clone()
        for i, item in enumerate(found.values())
        for key, value in vars(item).items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    header = {"models": json.dumps(list(found)), "made": json.dumps(dict(made or {}))}
    safetensors.torch.save_file(tensors, temporary, header)
    temporary.replace(path)
    return path


def load_distal(folder: str | Path) -> dict[str, Distal]:
    """What ``save_distal`` wrote; empty where there is nothing. Raises InputError for a damaged file."""
    return _read(folder)[0]


def made_distal(folder: str | Path) -> dict[str, tuple[Distal, str]]:
    """By name, the images whose making ``save_distal`` was told, and what it was told. Raises InputError for a damaged
    file."""
    found, made = _read(folder)
    return {name: (found[name], how) for name, how in made.items() if name in found}


def _read(folder: str | Path) -> tuple[dict[str, Distal], dict[str, str]]:
    path = Path(folder) / FILE_NAME
    if not path.is_file():
        return {}, {}
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = file.metadata()
            names, made = json.loads(header["models"]), dict(json.loads(header.get("made", "{}")))
            return {
                name: Distal(**{key: file.get_tensor(f"{i}.{key}") for key in Distal.__dataclass_fields__})
                for i, name in enumerate(names)
            }, made
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged ({error}): delete it and run `absynth distal` again") from error


def _ascent(
    asked: Classifier, classifier: Classifier, shown: Callable[[Tensor], Tensor], seen: Tensor, target: int
) -> tuple[Tensor, Tensor]:
    """The probability (n,) of ``target`` for the images ``shown(seen)`` and the gradient (n,C,H,W) of its logarithm by
    ``seen``; of its logit where that vanishes. ``asked`` gives the logits of ``classifier``. Raises InputError for
    probabilities that are NaN or have no gradient."""
    variable = seen.detach().requires_grad_()
    images = shown(variable)
    logits = asked(images)
    shares = _shares(classifier, images, logits)[:, target]
    if bad := int(shares.isnan().sum()):
        raise InputError(f"the model returned NaN for {bad} of {len(seen)} images: expected finite numbers")
    if not (logits.requires_grad and shares.requires_grad):
        raise InputError(
            "the model has no gradient: something in it, such as no_grad, detach, argmax or NumPy, keeps its answers "
            "from the image; distal images need one"
        )
    # The smallest normal float32 keeps the logarithm finite and its gradient zero where the probability underflows.
    log = shares.clamp(min=torch.finfo(torch.float32).tiny).log()
    (gradient,) = torch.autograd.grad(log.sum(), variable, retain_graph=True)
    flat = ~(gradient.abs().flatten(1).amax(1) > 1e-6)
    if flat.any():
        (steepest,) = torch.autograd.grad(logits[flat, target].sum(), variable)
        gradient[flat] = steepest[flat]
    return shares.detach(), torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)


def _shares(classifier: Classifier, images: Tensor, logits: Tensor) -> Tensor:
    """The probabilities (n,K) that belong to these images and their logits (n,K), without asking again if possible."""
    posterior = getattr(classifier, "posterior", None)
    if callable(posterior):
        found: Tensor = posterior(logits)
        return found
    own = getattr(classifier, "probabilities", None)
    return probabilities(classifier, images) if callable(own) else torch.softmax(logits, dim=1)
