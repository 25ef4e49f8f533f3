"""Image classifiers that explain what they see: analysis by synthesis (ABS), its attacks and its certificates.

    import absynth

    images, labels = absynth.data.load("mnist", "test")
    model = absynth.load("abs")
    analysis = model.analyze(images[:1])

The public names are imported when they are first used, so that `import absynth` itself takes no time.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from absynth import data
    from absynth.classifiers import ABS, Analysis
    from absynth.clean import Clean, measure
    from absynth.errors import InputError
    from absynth.zoo import load
    from absynth.zoo import names as models

__version__ = "0.1.0"

__all__ = ["ABS", "Analysis", "Clean", "InputError", "__version__", "data", "load", "measure", "models"]

_HOMES = {
    "ABS": ("classifiers", "ABS"),
    "Analysis": ("classifiers", "Analysis"),
    "Clean": ("clean", "Clean"),
    "InputError": ("errors", "InputError"),
    "load": ("zoo", "load"),
    "measure": ("clean", "measure"),
    "models": ("zoo", "names"),
}


def __getattr__(name: str) -> Any:
    if name == "data":
        return import_module("absynth.data")
    if name not in _HOMES:
        raise AttributeError(f"module 'absynth' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(import_module(f"absynth.{module}"), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
