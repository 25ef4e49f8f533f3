"""The few statistics of an evaluation, with their 95 % intervals. Distances may be infinite."""

from __future__ import annotations

import math
from collections.abc import Sequence

Interval = tuple[float, float]
_Z = 1.959963984540054  # the normal quantile of 97.5 %


def median(values: Sequence[float]) -> float:
    """The middle value, or the mean of the two middle ones; infinite when one of them is. NaN for no values."""
    ordered = sorted(values)
    if not ordered:
        return math.nan
    low, high = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
    return low if low == high else (low + high) / 2


def median_interval(values: Sequence[float]) -> Interval:
    """Order statistics between which the median lies with at least 95 % probability, whatever the distribution.

    The k-th smallest and k-th largest value, k the largest with P(Binomial(n, 1/2) < k) ≤ 2.5 %. Below six values no
    such k exists and the interval is (0, inf).
    """
    ordered = sorted(values)
    count = len(ordered)
    below, k = 0, 0  # below: the number of the 2^n outcomes with fewer than k + 1 successes
    while k < count and 40 * (below := below + math.comb(count, k)) <= 2**count:
        k += 1
    return (0.0, math.inf) if k == 0 else (ordered[k - 1], ordered[count - k])


def wilson_interval(successes: int, count: int) -> Interval:
    """Wilson's score interval for a proportion; (0, 1) for no observations. Source: Wilson 1927, JASA 22."""
    if count == 0:
        return (0.0, 1.0)
    share, z2 = successes / count, _Z**2
    center = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = _Z / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    # exactly 0 and 1 at the ends, where rounding would leave 1e-19
    return (max(0.0, center - half) if successes else 0.0, min(1.0, center + half) if successes < count else 1.0)


def short(value: float) -> str:
    """A finite number as text: three significant digits, from 1,000 on all that are before the point."""
    return f"{value:.3g}" if abs(value) < 999.5 else f"{value:,.0f}"
