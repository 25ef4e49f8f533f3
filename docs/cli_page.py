"""Writes docs/cli.md from the commands' own help: python docs/cli_page.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from absynth.cli import app

WIDTH = 100
INTRO = """# Command line

Every command is a thin translation of a library call. Results go to stdout, everything else (progress, warnings) to
stderr; with `--json`, stdout is one JSON document. Bad input is one line on stderr that names the fix, with exit code
2; Ctrl-C ends with 130 and says how to go on; `absynth verify` ends with 1 when a row does not hold.

This page is made by `python docs/cli_page.py`.
"""


def page() -> str:
    """The whole page, Markdown."""
    group: Any = typer.main.get_command(app)
    parts = [INTRO]
    for name in ["", *group.commands]:
        command = group.commands[name] if name else group
        called = f"absynth {name}".strip()
        context = command.make_context(
            called, [], resilient_parsing=True, terminal_width=WIDTH, max_content_width=WIDTH
        )
        parts.append(f"## {called}\n\n```text\n{command.get_help(context).rstrip()}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    (Path(__file__).parent / "cli.md").write_text(page(), encoding="utf-8")
