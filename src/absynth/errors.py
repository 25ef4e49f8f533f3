"""Errors a user can cause, each one clear line: the value, what was expected, the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

SHOWN = 200  # characters of a value that an error names


class InputError(ValueError):
    """Bad input. The message is one line that names the value, what was expected and how to fix it."""


def unknown_name(kind: str, name: object, known: Iterable[str], listed: str = "") -> InputError:
    """An InputError for a name that is not in ``known``, with the nearest names and all of them; or, where those would
    be too many for a line, what is ``listed`` instead."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) if isinstance(name, str) else []
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    shown = " ".join(repr(name).split())
    shown = shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}…"  # of a tensor, for one
    return InputError(f"unknown {kind} {shown}: {hint}known: {listed or ', '.join(known)}")
