"""Evaluations one can trust: plan, run, ledger, verification, report. Models and attacks are seen as protocols only.

from absynth.evaluation import evaluate, report, verify

summary = evaluate("abs", suite="quick", norms=("l0", "l2", "linf"), images=100, out="runs/abs")
print(summary["abs"].norms["l2"].all.median)
report("runs/abs")
assert verify("runs/abs").holds
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from absynth.evaluation.certify import Certified, CertifiedUnion, certified_union, certify
from absynth.evaluation.compare import Difference, compare
from absynth.evaluation.distal import Distal, distal, load_distal, save_distal
from absynth.evaluation.folders import merge_ledgers
from absynth.evaluation.ledger import Ledger
from absynth.evaluation.plan import Job, Plan, load_model, model_digest
from absynth.evaluation.rows import Certificate, CleanRow, Doubt, Row
from absynth.evaluation.run import Progress, evaluate, run
from absynth.evaluation.summary import THRESHOLDS, Cell, ModelSummary, NormSummary, Summary, summarize
from absynth.evaluation.verify import Failure, Verification, verify

if TYPE_CHECKING:
    from absynth.evaluation.reporting import Report

__all__ = [
    "THRESHOLDS",
    "Cell",
    "Certificate",
    "Certified",
    "CertifiedUnion",
    "CleanRow",
    "Difference",
    "Distal",
    "Doubt",
    "Failure",
    "Job",
    "Ledger",
    "ModelSummary",
    "NormSummary",
    "Plan",
    "Progress",
    "Row",
    "Summary",
    "Verification",
    "certified_union",
    "certify",
    "compare",
    "distal",
    "evaluate",
    "load_distal",
    "load_model",
    "merge",
    "model_digest",
    "report",
    "run",
    "save_distal",
    "summarize",
    "verify",
]


def report(*folders: str | Path, out: str | Path | None = None) -> Report:
    """Write ``report.html``, ``report.csv`` and ``report.md``; see ``absynth.evaluation.reporting.report``."""
    from absynth.evaluation import reporting  # here: matplotlib takes a while to import, and nothing else needs it

    return reporting.report(*folders, out=out)


def merge(first: str | Path, second: str | Path, out: str | Path) -> Summary:
    """Put the rows of two runs on the same data into one ledger, of equal keys the first's, and sum it up.

    ``out`` may be new, or one of the two. Raises InputError, and writes nothing, when a run cannot be read or the two
    are about different data.
    """
    merge_ledgers([first, second], out)
    return summarize(out)
