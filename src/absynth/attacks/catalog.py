"""Every attack by name, and the suites: what ``absynth attacks`` lists and ``absynth evaluate`` runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from absynth.attacks.base import Attack, Classifier
from absynth.attacks.binary import Thresholded
from absynth.attacks.boundary_projection import BoundaryProjection
from absynth.attacks.brendel_bethge import BrendelBethge, BrendelBethgeFromFlips
from absynth.attacks.decision import Boundary
from absynth.attacks.estimated import Estimated
from absynth.attacks.foolbox_adapter import METHODS, AutoAttack, Foolbox
from absynth.attacks.gradient import DeepFool, FastGradient, ProjectedGradient
from absynth.attacks.hop_skip_jump import HopSkipJump
from absynth.attacks.latent import LatentDescent
from absynth.attacks.local_search import LocalSearch
from absynth.attacks.noise import GaussianNoise, SaltAndPepper
from absynth.attacks.pointwise import Pointwise
from absynth.attacks.ramp import Straight, Tightened
from absynth.attacks.ramp_projection import RampGreedy, RampProjection
from absynth.attacks.search import SmallestRadius
from absynth.attacks.sparse import SigmaZero
from absynth.attacks.square import Square
from absynth.attacks.transfer import Transfer
from absynth.errors import InputError, unknown_name
from absynth.norms import L0, L1, L2, LINF, Norm

#: Where the search for the smallest radius begins, in the units of the norm.
FIRST_RADIUS = {L1: 8.0, L2: 1.0, LINF: 0.1}
#: The paper's thresholds, the radii of budget attacks.
THRESHOLDS = {L0: 12.0, L2: 1.5, LINF: 0.3}


def iterated(
    norm: Norm, called: str, steps: int = 10, momentum: float = 0.0, restarts: int = 0, tolerance: float = 0.01
) -> SmallestRadius:
    """BIM, MIM or PGD as an attack that minimizes."""
    step = 2.5 / steps  # enough to cross the ball and come back
    inner = ProjectedGradient(
        norm, steps=steps, relative_step=step, momentum=momentum, restarts=restarts, called=called
    )
    return SmallestRadius(inner, first=FIRST_RADIUS[norm], tolerance=tolerance)


def _all() -> dict[str, Attack]:
    attacks: list[Attack] = []
    for norm in (L2, LINF):
        once = [FastGradient(norm), DeepFool(norm)]
        # With gradients that cost a thousand predictions each the radius is told to a twentieth, not to a hundredth.
        attacks += [*once, iterated(norm, "bim"), *map(Estimated, [*once, iterated(norm, "bim", tolerance=0.05)])]
    attacks += [iterated(LINF, "mim", momentum=1.0), Estimated(iterated(LINF, "mim", momentum=1.0, tolerance=0.05))]
    attacks += [
        Transfer(L2),
        Transfer(LINF),
        GaussianNoise(),
        SaltAndPepper(),
        Pointwise(L0),
        Pointwise(L2),
        Boundary(),
        HopSkipJump(L2),
        HopSkipJump(LINF),
    ]
    attacks += [LatentDescent(), LatentDescent(rounds=30)]
    attacks += [BoundaryProjection(norm) for norm in (L0, L1, L2, LINF)]
    attacks += [LocalSearch(L2), LocalSearch(LINF)]
    attacks += [iterated(norm, "pgd", steps=40, restarts=2) for norm in (L1, L2, LINF)]
    attacks += [
        SigmaZero(),
        SmallestRadius(Square(L2), first=1.0, steps=6),
        SmallestRadius(Square(LINF), first=0.1, steps=6),
    ]
    attacks += [BrendelBethge(norm) for norm in (L0, L1, L2, LINF)]
    wide = "brendel-bethge-wide"
    attacks.append(BrendelBethgeFromFlips(L0, trust=1.0, momentum=0.9, called=wide))
    attacks += [BrendelBethge(norm, trust=0.3, momentum=0.9, called=wide) for norm in (L1, L2, LINF)]
    attacks += [RampProjection(norm) for norm in (L0, L1, L2, LINF)]
    attacks += [RampGreedy(), Straight(SigmaZero())]
    attacks += [Straight(iterated(norm, "pgd", steps=40, restarts=2)) for norm in (L2, LINF)]
    attacks += [Straight(BrendelBethge(norm)) for norm in (L0, L2, LINF)]
    # Foolbox's Brendel-Bethge wants a compiler and a minute; ours takes its place.
    attacks += [Foolbox(n, m) for m, norms in METHODS.items() for n in norms if m != "foolbox-brendel-bethge"]
    attacks += [AutoAttack(L2, THRESHOLDS[L2]), AutoAttack(LINF, THRESHOLDS[LINF])]
    return {attack.name: attack for attack in attacks}


ATTACKS: dict[str, Attack] = _all()

SUITES: dict[str, tuple[str, ...]] = {
    # A first answer in minutes: the strongest attack of each norm. All of them trust the model's gradient.
    "quick": (
        "boundary-projection-l0",
        "boundary-projection-l1",
        "boundary-projection-l2",
        "boundary-projection-linf",
        # For models with a ramp; left out for others.
        "ramp-projection-l0",
        "ramp-projection-l1",
        "ramp-projection-l2",
        "ramp-projection-linf",
    ),
    # Schott et al. 2019, section 4.
    "paper": (
        "transfer-l2",
        "gaussian-noise-l2",
        "boundary-l2",
        "pointwise-l2",
        "fgm-l2",
        "fgm-ge-l2",
        "deepfool-l2",
        "deepfool-ge-l2",
        "bim-l2",
        "bim-ge-l2",
        "latent-descent-l2",
        "transfer-linf",
        "fgsm-linf",
        "fgsm-ge-linf",
        "deepfool-linf",
        "deepfool-ge-linf",
        "bim-linf",
        "bim-ge-linf",
        "mim-linf",
        "mim-ge-linf",
        "salt-and-pepper-l0",
        "pointwise-l0",
    ),
    # One representative of every idea that wins images somewhere; no estimated gradients, whose attacks it contains.
    "strong": (
        "boundary-projection-l0",
        "sigma-zero-l0",
        "brendel-bethge-l0",
        "brendel-bethge-wide-l0",
        "fmn-l0",
        "pointwise-l0",
        "boundary-projection-l1",
        "brendel-bethge-l1",
        "brendel-bethge-wide-l1",
        "fmn-l1",
        "ead-l1",
        "pgd-l1",
        "boundary-projection-l2",
        "brendel-bethge-l2",
        "brendel-bethge-wide-l2",
        "local-search-l2",
        "ddn-l2",
        "fmn-l2",
        "carlini-wagner-l2",
        "deepfool-l2",
        "pgd-l2",
        "latent-descent-converged-l2",
        "boundary-l2",
        "hop-skip-jump-l2",
        "transfer-l2",
        "pointwise-l2",
        "boundary-projection-linf",
        "brendel-bethge-linf",
        "brendel-bethge-wide-linf",
        "local-search-linf",
        "fmn-linf",
        "mim-linf",
        "pgd-linf",
        "square-linf",
        "hop-skip-jump-linf",
        "transfer-linf",
        # For models with a ramp; left out for others.
        "ramp-projection-l0",
        "ramp-greedy-l0",
        "sigma-zero-straight-l0",
        "brendel-bethge-straight-l0",
        "ramp-projection-l1",
        "ramp-projection-l2",
        "pgd-straight-l2",
        "brendel-bethge-straight-l2",
        "ramp-projection-linf",
        "pgd-straight-linf",
        "brendel-bethge-straight-linf",
    ),
}


@dataclass(frozen=True)
class Information:
    """One line of the table of attacks."""

    name: str
    norm: str
    kind: str
    knowledge: str
    source: str
    deterministic: bool
    queries: str
    suites: tuple[str, ...]


def information() -> list[Information]:
    """All attacks, sorted by norm and name."""
    rows = [
        Information(
            name=name,
            norm=str(attack.norm),
            kind=attack.kind,
            knowledge=attack.knowledge,
            source=attack.source,
            deterministic=attack.deterministic,
            queries=attack.queries,
            suites=tuple(suite for suite, members in SUITES.items() if name in members),
        )
        for name, attack in ATTACKS.items()
    ]
    return sorted(rows, key=lambda row: (row.norm, row.name))


def lookup(
    names: str | Iterable[str],
    norm: Norm | None = None,
    *,
    substitute: Classifier | None = None,
    threshold: float | None = None,
    ramp: bool = False,
) -> list[Attack]:
    """The attacks of a suite, or by name ("quick", "bim-l2", "bim-l2,pgd-linf" or a list), of one norm or of all.

    A family stands for its attacks in every norm: "deepfool". ``substitute`` is the model transfer attacks run on.
    ``threshold`` makes every attack refine its adversarials for a model that thresholds its input there, ``ramp`` for
    one that puts it through a ramp; attacks made for such models are left out of suites for others (some are in
    "strong" for thresholds at one half, too). Raises InputError for a name that is neither, or when nothing in ``norm``
    is left.
    """
    wanted = names.split(",") if isinstance(names, str) else list(names)
    chosen: dict[str, Attack] = {}
    families = {attack.family for attack in ATTACKS.values()}
    for name in (item.strip() for item in wanted):
        if name in SUITES:
            members = [ATTACKS[member] for member in SUITES[name]]
            steep = threshold == 0.5 and name != "quick"  # which is to take minutes
            chosen |= {one.name: one for one in members if ramp or not is_for_ramps(one) or (steep and _for_steps(one))}
        elif name in ATTACKS:
            chosen[name] = ATTACKS[name]
        elif name in families:
            chosen |= {attack.name: attack for attack in ATTACKS.values() if attack.family == name}
        else:
            listed = f"the suites {', '.join(SUITES)}, and the attacks that 'absynth attacks' lists"
            raise unknown_name("attack or suite", name, {*SUITES, *ATTACKS, *families}, listed)
    found = [attack for attack in chosen.values() if norm is None or attack.norm == norm]
    if not found:
        raise InputError(f"none of {', '.join(wanted)} works in {norm}: `absynth attacks` lists name and norm of all")
    if substitute is not None:
        found = [replace(attack, substitute=substitute) if isinstance(attack, Transfer) else attack for attack in found]
    if threshold is not None:
        found = [Thresholded(attack, threshold) for attack in found]
    if ramp:
        found = [attack if is_for_ramps(attack) else Tightened(attack) for attack in found]
    return found


def _for_steps(attack: Attack) -> bool:
    """Whether an attack made for ramps takes a threshold for a steep one."""
    return bool(getattr(attack, "for_thresholds", False))


def is_for_ramps(attack: Attack) -> bool:
    """Whether an attack was made for models with a ramp, and knows others to do as well for the rest."""
    return bool(getattr(attack, "for_ramps", False))
