"""Which of the questions of ``absynth.evaluation.doubts`` were put to a model and its attacks, and which were not."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from absynth.evaluation.rows import AttackRecord

#: What each kind of question is about, as a report says it; in the order of ``absynth.evaluation.doubts``.
KINDS = {"model": ("gradients", "answers"), "planted": ("planted adversarials",), "steps": ("steps",)}
FEWEST = 4  # steps that are halved


def unprobed(probes: Collection[tuple[str, str]], attacks: Sequence[AttackRecord]) -> dict[str, tuple[str, ...]]:
    """The kinds of questions that were not put to a model (an entry without names) or to some of the ``attacks`` it has
    rows of, by name; ``probes`` are those that were, with the attack's repr. Nothing is missing where nothing attacks.
    """
    found: dict[str, tuple[str, ...]] = {}
    if attacks and ("model", "") not in probes:
        found["model"] = ()
    for kind in ("planted", "steps"):
        left = [one.name for one in attacks if kind in _questions(one) and (kind, one.attack) not in probes]
        if left:
            found[kind] = tuple(dict.fromkeys(left))
    return found


def innermost_steps(attack: str) -> re.Match[str] | None:
    """Where the repr of an attack says how many steps it takes, the innermost attack where one wraps another."""
    found = list(re.finditer(r"(?<![a-z_])steps=(\d+)", attack))
    depths = [attack[: one.start()].count("(") - attack[: one.start()].count(")") for one in found]
    return found[depths.index(max(depths))] if found else None


def _questions(attack: AttackRecord) -> set[str]:
    """What ``absynth.evaluation.doubts`` asks of an attack."""
    steps = innermost_steps(attack.attack)
    is_white = attack.kind == "minimum" and attack.knowledge == "gradient"
    by_default = "steps=None" in attack.attack  # more than FEWEST
    can_halve = by_default or (steps is not None and int(steps.group(1)) >= FEWEST)
    return {kind for kind, is_asked in (("planted", is_white), ("steps", can_halve)) if is_asked}
