"""Writes docs/attacks.md from the catalog: python docs/attacks_page.py."""

from __future__ import annotations

from pathlib import Path

from absynth.attacks.catalog import SUITES, information

INTRO = """# All attacks

What `absynth attacks` prints, norm by norm: every name can be given to `--attacks`, alone, with others after commas, or
as a family without its norm. *Finds* says whether an attack looks for the smallest perturbation or for any within a
budget; *needs*, what it must know of the model; *r*, that it draws random numbers, from the evaluation's seed. Which
one to take: [choosing an attack](choosing-an-attack.md).

This page is made by `python docs/attacks_page.py`.
"""
TITLES = {
    "l0": "L0: pixels changed",
    "l1": "L1: sum of the changes",
    "l2": "L2: Euclidean",
    "linf": "L∞: largest change",
}


def page() -> str:
    """The whole page, Markdown."""
    rows = information()
    parts = [INTRO]
    for norm, title in TITLES.items():
        lines = ["| attack | finds | needs | | cost an image | suites | source |", "|---|---|---|---|---|---|---|"]
        for row in rows:
            if row.norm == norm:
                chance = "" if row.deterministic else "r"
                cells = (
                    f"`{row.name}`",
                    row.kind,
                    row.knowledge,
                    chance,
                    row.queries,
                    ", ".join(row.suites),
                    row.source,
                )
                lines.append(f"| {' | '.join(cells)} |")
        parts.append(f"## {title}\n\n" + "\n".join(lines) + "\n")
    suites = "\n".join(f"* `{name}`: {', '.join(f'`{one}`' for one in members)}" for name, members in SUITES.items())
    return "\n".join([*parts, f"## Suites\n\n{suites}\n"])


if __name__ == "__main__":
    (Path(__file__).parent / "attacks.md").write_text(page(), encoding="utf-8")
