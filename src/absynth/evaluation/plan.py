"""What an evaluation will do, decided before anything runs: which model, which attacks, which images, in which
batches."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import re
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
from torch import Tensor, nn

from absynth.attacks.base import Attack, Classifier
from absynth.checks import check_seed
from absynth.errors import InputError
from absynth.evaluation.judge import device_of
from absynth.responses import ramp_of, threshold_of


@dataclass(frozen=True)
class Job:
    """One attack on one batch of images: what is computed and written down in one piece."""

    attack: Attack
    images: tuple[int, ...]  # indices into the data split


@dataclass(frozen=True)
class Plan:
    """An evaluation, described completely: two equal plans give the same rows.

    ``attacks`` carry their norms and all parameters; ``images`` are indices into the split. ``model_digest`` and
    ``data_digest`` are SHA-256. Each image's randomness derives from ``seed``, its index and the attack, so rows do not
    depend on ``batch_size`` beyond the rounding of the model itself.
    """

    model: str
    model_digest: str
    attacks: tuple[Attack, ...]
    images: tuple[int, ...]
    data: str
    split: str
    data_digest: str
    seed: int = 0
    batch_size: int = 32

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise InputError(f"batch_size is {self.batch_size}; expected at least 1")
        check_seed(self.seed)
        if not self.images:
            raise InputError("the plan has no images; give at least one")
        if len(set(self.images)) != len(self.images):
            raise InputError("an image index comes twice; give each once")
        named: dict[str, Attack] = {}
        for attack in self.attacks:
            other = named.setdefault(repr(attack), attack)
            if (other.name, other.norm) != (attack.name, attack.norm):
                raise InputError(
                    f"{other.name} in {other.norm} and {attack.name} in {attack.norm} are both {repr(attack)[:80]}: "
                    "let the repr show what tells them apart, no field of it with repr=False"
                )

    @property
    def norms(self) -> tuple[str, ...]:
        """The norms of the attacks, in the order they first come."""
        return tuple(dict.fromkeys(str(attack.norm) for attack in self.attacks))

    def batches(self) -> list[tuple[int, ...]]:
        """The images in batches."""
        return [self.images[i : i + self.batch_size] for i in range(0, len(self.images), self.batch_size)]

    def jobs(self, done: AbstractSet[tuple[str, str, int, int]] = frozenset()) -> list[Job]:
        """What is left to do, in order, when the (attack repr, norm, image, seed) in ``done`` have a row.

        All attacks on the first batch, then all on the second: an interrupted run has complete results for its images.
        """
        return list(self._jobs(done))

    def _jobs(self, done: AbstractSet[tuple[str, str, int, int]]) -> Iterator[Job]:
        names = [(repr(attack), str(attack.norm)) for attack in self.attacks]
        for batch in self.batches():
            for attack, name in zip(self.attacks, names, strict=True):
                left = tuple(image for image in batch if (*name, image, self.seed) not in done)
                if left:
                    yield Job(attack, left)


def row_seed(seed: int, image: int, attack: str) -> int:
    """The seed of the attack with repr ``attack`` on image ``image``: 63 bits, from the three alone."""
    name = int.from_bytes(hashlib.sha256(attack.encode()).digest()[:8], "little")
    return int(np.random.SeedSequence([seed, image, name]).generate_state(1, np.uint64)[0]) >> 1


def load_model(name: str) -> nn.Module:
    """The model of the zoo called ``name``, or ``factory()`` for a name ``package.module:factory``, in eval mode.

    Raises InputError for an unknown name, a module or factory that is not there or fails, and a factory that returns
    something else than a torch.nn.Module.
    """
    if ":" not in name:
        from absynth import zoo  # here: the weights and models of the zoo are not needed for a user's own model

        model: nn.Module = zoo.load(name)
        return model.eval()
    module_name, _, factory_name = name.partition(":")
    if not module_name or not factory_name:
        missing = "function" if module_name else "module"
        raise InputError(f"model {name!r} names no {missing}: give package.module:factory")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise InputError(
            f"cannot import {module_name!r} of model {name!r}: {_one_line(error)}; install it or set PYTHONPATH"
        ) from error
    factory = getattr(module, factory_name, None)
    if not callable(factory):
        raise InputError(f"{module_name!r} has no function {factory_name!r}: give package.module:factory")
    try:
        made = factory()
    except Exception as error:
        raise InputError(f"{name}() failed: {_one_line(error)}; it must return a torch.nn.Module") from error
    if not isinstance(made, nn.Module):
        raise InputError(f"{name}() returned a {type(made).__name__}; it must return a torch.nn.Module")
    return made.eval()


def model_digest(model: Classifier) -> str:
    """SHA-256, in hexadecimal, of a model's class names, plain settings and state dict.

    Plain settings are the numbers, strings and tuples among the attributes of the module and its submodules, and frozen
    dataclasses of them. A function that is no module is named by its module and qualified name. The same on every
    machine and under every version of PyTorch: what a module lists as ``derived_buffers``, whose last digits depend on
    the processor, is left out, and so is how PyTorch's own modules describe themselves.
    """
    total = hashlib.sha256()
    if not isinstance(model, nn.Module):
        total.update(
            f"{getattr(model, '__module__', '')}.{getattr(model, '__qualname__', type(model).__qualname__)}".encode()
        )
        return total.hexdigest()
    for path, module in model.named_modules():
        settings = {key: value for key, value in vars(module).items() if _is_setting(key, value)}
        said = "" if type(module).__module__.startswith("torch.") else module.extra_repr()
        text = f"{path} {type(module).__qualname__} {said} {sorted(settings.items())}"
        total.update(re.sub(r" at 0x[0-9a-f]+", "", text).encode())
    derived = {
        f"{path}.{name}".lstrip(".")
        for path, module in model.named_modules()
        for name in getattr(module, "derived_buffers", ())
    }
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor) and name not in derived:
            total.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            total.update(value.detach().cpu().contiguous().flatten().numpy().tobytes())
    return total.hexdigest()


def image_indices(images: int | Sequence[int], available: int) -> tuple[int, ...]:
    """The first ``images`` indices, or the given ones. Raises InputError for any that is not there."""
    if isinstance(images, int | Integral):  # the latter: NumPy's
        images = int(images)
        if not 1 <= images <= available:
            raise InputError(f"images is {images}; this split has {available}: give a number from 1 to {available}")
        return tuple(range(images))
    for index in images:
        if not 0 <= index < available:
            raise InputError(f"image index {index} is out of range; this split has {available}, numbered from 0")
    return tuple(int(index) for index in images)


def choose_attacks(suite: str | Iterable[Attack], norms: Sequence[str], model: Classifier) -> tuple[Attack, ...]:
    """The attacks of a suite in ``norms`` that apply to ``model``; ``"none"`` gives none.

    Latent attacks are left out for a model without ``analyze``. For a model with a ``threshold`` every attack refines
    its adversarials across it; for one with a ramp attacks that know it are added, and all others tighten what they
    find. Transfer attacks take the zoo's ``transfer-cnn`` as their substitute and are left out
    where the zoo has none for such images. Raises InputError where a package that an attack needs is missing.
    """
    from absynth.norms import parse

    wanted = [parse(norm) for norm in norms]
    if not isinstance(suite, str):
        return _installed([attack for attack in suite if attack.norm in wanted])
    if suite == "none":
        return ()
    from absynth.attacks.catalog import lookup

    threshold = threshold_of(model)
    ramp = ramp_of(model) is not None
    found = lookup(suite, threshold=threshold, ramp=ramp)
    chosen = [attack for attack in found if attack.norm in wanted]
    if not hasattr(model, "analyze"):
        chosen = [attack for attack in chosen if attack.knowledge != "latent"]
    if any(attack.knowledge == "transfer" for attack in chosen):
        from absynth import zoo

        substitute = zoo.load("transfer-cnn").eval().to(device_of(model))
        names = {attack.name for attack in chosen}
        found = lookup(suite, substitute=substitute, threshold=threshold, ramp=ramp)
        chosen = [attack for attack in found if attack.name in names]
    if not chosen:
        raise InputError(
            f"suite {suite!r} has no attack in {', '.join(norms)} for this model: `absynth attacks` lists all"
        )
    return _installed(chosen)


def _installed(attacks: Sequence[Attack]) -> tuple[Attack, ...]:
    """The attacks, if all can run: said before anything does, not by each of their rows."""
    for attack in attacks:
        attack.check_installed()
    return tuple(attacks)


def _is_setting(key: str, value: Any) -> bool:
    if key.startswith("_") or key == "training":
        return False
    if isinstance(value, (list, tuple)):
        return all(_is_setting("item", item) for item in value)
    is_record = dataclasses.is_dataclass(value) and not isinstance(value, type)
    return is_record or isinstance(value, (bool, int, float, str, type(None)))


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
