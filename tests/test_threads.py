"""Parts of a job side by side in threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from absynth.threads import side_by_side


@pytest.fixture(params=(1, 3))
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_come_in_the_order_of_the_parts(threads: int) -> None:
    assert side_by_side(lambda part: part * part, range(10)) == [part * part for part in range(10)]


@pytest.mark.parametrize("count", [1, 6])
def test_each_part_has_one_core_and_the_caller_keeps_its_own(threads: int, count: int) -> None:
    seen = side_by_side(lambda _: torch.get_num_threads(), range(count))
    assert seen == [1] * count
    assert torch.get_num_threads() == threads
    later: list[int] = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [threads]


def test_no_gradient_is_recorded(threads: int) -> None:
    weight = torch.ones(2, requires_grad=True)
    assert not any(part.requires_grad for part in side_by_side(lambda factor: factor * weight, [1.0, 2.0, 3.0]))


def test_an_error_reaches_the_caller(threads: int) -> None:
    def work(part: int) -> int:
        if part == 2:
            raise ValueError("part 2")
        return part

    with pytest.raises(ValueError, match="part 2"):
        side_by_side(work, range(4))
    assert torch.get_num_threads() == threads
