"""Attacks made of another attack: what they say of themselves is what that one says, unless they know better."""

from __future__ import annotations

from dataclasses import dataclass, field

from absynth.attacks.base import Attack, Kind, Knowledge
from absynth.norms import Norm


@dataclass(frozen=True)
class Wrapping(Attack):
    """Another attack, changed in a way that ``mark`` names; what ``search`` does with it is for subclasses to say."""

    attack: Attack
    norm: Norm = field(init=False, repr=False)

    mark = "wrapped"

    def __post_init__(self) -> None:
        object.__setattr__(self, "norm", self.attack.norm)

    @property
    def family(self) -> str:
        """The inner family, marked: ``pgd-refined``."""
        return f"{self.attack.family}-{self.mark}"

    @property
    def kind(self) -> Kind:
        """As the inner attack."""
        return self.attack.kind

    @property
    def knowledge(self) -> Knowledge:
        """As the inner attack."""
        return self.attack.knowledge

    @property
    def source(self) -> str:
        """As the inner attack."""
        return self.attack.source

    @property
    def deterministic(self) -> bool:
        """As the inner attack."""
        return self.attack.deterministic

    @property
    def queries(self) -> str:
        """As the inner attack, and one more."""
        return f"{self.attack.queries}, and 1 prediction"

    def check_installed(self) -> None:
        """As the inner attack."""
        self.attack.check_installed()

    @property
    def in_small_steps(self) -> bool:
        """As the inner attack."""
        return self.attack.in_small_steps
