"""Every attack of the catalog on a classifier whose distances are known in closed form: near enough, never below."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from absynth.attacks.base import Attack, Goal
from absynth.attacks.catalog import ATTACKS
from absynth.attacks.estimated import Estimated
from absynth.attacks.foolbox_adapter import AutoAttack
from absynth.attacks.ramp import Straight
from absynth.attacks.search import SmallestRadius
from absynth.attacks.transfer import Transfer
from attack_models import images_near, prototypes, unbreakable

MODEL = prototypes()
#: Attacks that claim no minimum, only that the noise or the procedure works: how far they may be off.
LOOSE = {
    "gaussian-noise-l2": 8.0,
    "salt-and-pepper-l0": 12.0,
    "pointwise-l2": 8.0,  # few large changes, where many small ones are shortest
    "square-l2": 3.0,
}
#: Fewer steps where an attack is slow and so small a model needs less.
STEPS = {
    "boundary": {"steps": 2000},
    "foolbox-boundary": {"steps": 1500},
    "hop-skip-jump": {"steps": 8},
    "foolbox-hop-skip-jump": {"steps": 6},
    "brendel-bethge": {"steps": 60},
    "brendel-bethge-wide": {"steps": 60},
    "carlini-wagner": {"steps": 60},
    "ead": {"steps": 60},
    "sigma-zero": {"steps": 150},
    "latent-descent": {"steps": 120},
    "pgd": {"steps": 7},
}


#: Fewer still where the distance does not matter.
FEW = {
    "boundary": {"steps": 100},
    "foolbox-boundary": {"steps": 50},
    "hop-skip-jump": {"steps": 2},
    "foolbox-hop-skip-jump": {"steps": 2},
    "brendel-bethge": {"steps": 5},
    "brendel-bethge-wide": {"steps": 5},
    "carlini-wagner": {"steps": 30},
    "ead": {"steps": 30},
    "sigma-zero": {"steps": 60},
    "pgd": {"steps": 3},
    "gaussian-noise": {"draws": 2},
    "salt-and-pepper": {"draws": 2},
    "pointwise": {"draws": 2},
}


def small(attack: Attack, few: bool = False) -> Attack:
    """The catalog's attack, with a substitute and fewer steps."""
    if isinstance(attack, Transfer):
        return replace(attack, substitute=MODEL)
    if isinstance(attack, SmallestRadius) and attack.family == "square":
        return replace(attack, attack=replace(attack.attack, steps=30 if few else 150))
    if isinstance(attack, Straight):
        return replace(attack, attack=small(attack.attack, few))
    fewer = STEPS.get(attack.family, {}) | (FEW.get(attack.family, {}) if few else {})
    return replace(attack, **fewer)


NAMES = [name for name, attack in ATTACKS.items() if not isinstance(attack, AutoAttack)]
EVERY = pytest.mark.parametrize("name", NAMES)


def allowed(attack: Attack) -> float:
    guessing = attack.knowledge == "decision" or attack.family == "square"
    return LOOSE.get(attack.name.replace("-straight", ""), 2.0 if guessing else 1.25)


@EVERY
def test_found_distances_lie_between_the_exact_one_and_a_little_more(name: str) -> None:
    attack = small(ATTACKS[name])
    count = 2 if attack.knowledge in ("decision", "score") else 4
    images, labels = images_near(MODEL, count)
    result = attack(MODEL, images, Goal.untargeted(labels), torch.arange(count))
    assert result.found.all()
    assert result.images.min() >= 0 and result.images.max() <= 1
    assert Goal.untargeted(labels).met(MODEL(result.images)).all()
    found = attack.norm.distance(result.images, images)
    for image, label, distance in zip(images, labels.tolist(), found.tolist(), strict=True):
        exact = MODEL.exact(attack.norm, image, label, [0, 1, 2, 3])
        assert exact * (1 - 1e-5) <= distance <= exact * allowed(attack), f"{distance:.4f} against {exact:.4f}"


@EVERY
def test_targeted_attacks_reach_the_target_or_say_they_did_not(name: str) -> None:
    attack = small(ATTACKS[name], few=True)
    images, labels = images_near(MODEL, 2)
    targets = (labels + 1) % 4
    result = attack(MODEL, images, Goal.targeted(targets), torch.arange(2))
    reached = Goal.targeted(targets).met(MODEL(result.images))
    assert (reached == result.found).all()
    assert torch.equal(result.images[~result.found], images[~result.found])
    if attack.knowledge in ("gradient", "latent", "transfer") and not attack.family.startswith("fgm"):
        assert result.found.all()


# Latent attacks need a model that explains images, and such a model can be broken.
@pytest.mark.parametrize("name", [name for name in NAMES if ATTACKS[name].knowledge != "latent"])
def test_a_classifier_nothing_can_break_is_a_failure_and_no_crash(name: str) -> None:
    attack = small(ATTACKS[name], few=True)
    attack = replace(attack, step_sizes=(0.5,)) if isinstance(attack, Estimated) else attack
    images, _ = images_near(MODEL, 2)
    result = attack(unbreakable, images, Goal.untargeted(torch.zeros(2, dtype=torch.int64)), torch.arange(2))
    assert not result.found.any()
    assert torch.equal(result.images, images)


@EVERY
def test_a_row_does_not_depend_on_its_batch(name: str) -> None:
    attack = small(ATTACKS[name], few=True)
    count = 2 if attack.knowledge in ("decision", "score") else 3
    images, labels = images_near(MODEL, count)
    seeds = torch.arange(count) + 7
    together = attack(MODEL, images, Goal.untargeted(labels), seeds)
    torch.manual_seed(99)  # the global generator has no say
    last = slice(count - 1, count)
    alone = attack(MODEL, images[last], Goal.untargeted(labels[last]), seeds[last])
    torch.testing.assert_close(together.images[last], alone.images, rtol=0, atol=1e-5)
