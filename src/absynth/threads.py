"""Independent parts of one job, side by side in threads.

The analysis is made of many small tensor operations. Sharing each of them among the cores costs more than it saves;
giving every core whole operations on a part of the images does not: PyTorch releases the interpreter's lock inside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Part = TypeVar("Part")
Result = TypeVar("Result")


def side_by_side(work: Callable[[Part], Result], parts: Iterable[Part]) -> list[Result]:
    """``work`` of each part, in their order, at most ``torch.get_num_threads()`` at a time, each on one core.

    The results do not depend on the number of threads. Gradients are not recorded.
    """
    waiting, threads = list(parts), torch.get_num_threads()

    def alone(part: Part) -> Result:
        if threads > 1:
            torch.set_num_threads(1)  # of the calling thread only
        with torch.no_grad():
            return work(part)

    try:
        if threads == 1 or len(waiting) < 2:
            # One part, too: shared among the threads it is hardly faster, and where another program has a core, fifty
            # times slower, since they wait for one another in every operation.
            return [alone(part) for part in waiting]
        with ThreadPoolExecutor(min(threads, len(waiting))) as pool:
            return list(pool.map(alone, waiting))
    finally:
        if threads > 1:
            torch.set_num_threads(threads)  # what threads that start later begin with
