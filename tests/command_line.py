"""Running commands in this process, and what is asserted of their output."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple


class Result(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Result]


def document(result: Result) -> Any:
    """The one JSON document on stdout."""
    assert result.code == 0, result.err
    return json.loads(result.out)


def assert_error(result: Result, *expected: str) -> None:
    """One line, exit code 2, nothing on stdout."""
    assert result.code == 2
    assert result.out == ""
    lines = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert lines[0] == result.err.splitlines()[-1]
    for text in expected:
        assert text in lines[0]
