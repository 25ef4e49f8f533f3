"""A whole attack on a classifier that starts from its last answers, and what is done with hits that do not hold."""

from __future__ import annotations

from collections.abc import Callable

from absynth.attacks.base import Problem, Proposals
from absynth.attacks.following import confirmed, followed, or_else
from absynth.attacks.greedy import greedy_flips
from absynth.attacks.resetting import take_back
from absynth.norms import L0


def by_following(problem: Problem, search: Callable[[Problem], Proposals]) -> Proposals:
    """What ``search`` finds on a classifier that starts from its last answers, as far as it holds, asked again, cold.

    In L0, where one cannot go a little farther, what just fails to hold gets more pixels. Images of which nothing is
    left are searched cold.
    """
    return or_else(problem, what_holds(problem, search(followed(problem))), search)


def what_holds(problem: Problem, said: Proposals) -> Proposals:
    """What the problem, asked cold, says of images that are ``said`` to be adversarial: those that are not, a little
    farther away or, in L0, with more pixels."""
    held = confirmed(problem, said)
    if problem.norm == L0:
        held = or_else(problem, held, lambda _: _with_more_pixels(problem, said, held))
    return held


def _with_more_pixels(problem: Problem, said: Proposals, held: Proposals) -> Proposals:
    """For the images that have no adversarial among ``held``: those that were ``said`` to be, with pixels flipped until
    they are, then with every pixel reset that can be."""
    missing = (~held.found).nonzero()[:, 0]
    part = problem.rows(missing)
    flipped = greedy_flips(part, most=20, start=said.images[missing])
    return take_back(part, Proposals(flipped.images, flipped.found & said.found[missing]))
