"""Statistics and summaries against numbers worked out by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from absynth.evaluation.doubts import ledger_doubts
from absynth.evaluation.rows import AttackRecord, CleanRow, Row
from absynth.evaluation.statistics import median, median_interval, wilson_interval
from absynth.evaluation.summary import Summary, summarize_model, within

INF = math.inf


def test_median() -> None:
    assert median([3.0, 1.0, 2.0]) == 2.0
    assert median([1.0, 2.0]) == 1.5
    assert median([1.0, INF, INF, INF]) == INF
    assert median([1.0, INF]) == INF
    assert math.isnan(median([]))


def test_median_interval_is_the_binomial_one() -> None:
    assert median_interval([1.0, 2.0, 3.0, 4.0, 5.0]) == (0.0, INF)  # 2 · 2^-5 > 5 %
    assert median_interval([6.0, 5.0, 4.0, 3.0, 2.0, 1.0]) == (1.0, 6.0)  # 2 · 2^-6 = 3.1 %
    # For 20 values the tables have the 6th and the 15th; for 100 the 40th and the 61st.
    assert median_interval([float(i) for i in range(1, 21)]) == (6.0, 15.0)
    assert median_interval([float(i) for i in range(1, 101)]) == (40.0, 61.0)


def test_wilson_interval() -> None:
    low, high = wilson_interval(80, 100)
    assert low == pytest.approx(0.7112, abs=1e-4) and high == pytest.approx(0.8666, abs=1e-4)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_a_distance_equal_to_the_threshold_is_within() -> None:
    assert within(1.5, 1.5) and within(float(torch.tensor(0.3)), 0.3) and within(12.0, 12.0)
    assert not within(1.50001, 1.5) and not within(INF, 1.5)


ATTACKS = {
    "A2": AttackRecord("A2", "a-l2", "l2", "gradient", "minimum"),
    "B2": AttackRecord("B2", "b-l2", "l2", "decision", "minimum"),
    "A0": AttackRecord("A0", "a-l0", "l0", "gradient", "minimum"),
    "AI": AttackRecord("AI", "a-linf", "linf", "gradient", "minimum"),
}
CLEAN = {index: torch.zeros(1, 4, 4) for index in range(4)}


def row(attack: str, image: int, distance: float, adversarial: torch.Tensor | None = None, **more: float) -> Row:
    status = "misclassified" if distance == 0 else "failed" if distance == INF else "found"
    if status == "found" and adversarial is None:
        adversarial = torch.full((1, 4, 4), 1.0)
    return Row("m", attack, ATTACKS[attack].norm, image, 0, 0, distance, status, adversarial=adversarial, **more)  # type: ignore[arg-type]


def sparse(count: int, value: float) -> torch.Tensor:
    image = torch.zeros(16)
    image[:count] = value
    return image.view(1, 4, 4)


ROWS = [
    # image 0 misclassified; image 1: B nearer; image 2: A at the threshold; image 3: only B, an error of A
    *(row("A2", 0, 0.0), row("A2", 1, 2.0, forward=10, seconds=1.0), row("A2", 2, 1.5, forward=20, seconds=3.0)),
    replace(row("A2", 3, INF), status="error", message="it raised"),
    *(row("B2", 0, 0.0), row("B2", 1, 1.6), row("B2", 2, INF), row("B2", 3, 3.0)),
]


def answers(*wrong: int) -> list[CleanRow]:
    return [CleanRow("m", i, 0, int(i in wrong), torch.tensor([0.0, 1.0 if i in wrong else -1.0])) for i in range(4)]


def test_cells_by_hand() -> None:
    model = summarize_model("net", "m", answers(0), ROWS, ATTACKS, CLEAN)
    norm = model.norms["l2"]
    assert model.clean_accuracy == 0.75
    assert norm.all.distances == {0: 0.0, 1: 1.6, 2: 1.5, 3: 3.0}
    assert norm.all.median == pytest.approx(1.55) and norm.all.accuracy == 0.5 and norm.all.images == 4
    first, second = norm.attacks["a-l2"], norm.attacks["b-l2"]
    assert (first.images, first.errors, first.median) == (3, 1, 1.5)
    assert first.accuracy == pytest.approx(1 / 3)
    assert (first.forward, first.seconds) == (15.0, 2.0)
    assert (first.wins, second.wins) == (1.0, 2.0)
    assert (second.median, second.accuracy) == (2.3, 0.75)
    assert model.nearest["l2"][1].attack == "B2" and 0 not in model.nearest["l2"]
    assert model.union is None


def test_a_tied_win_is_shared_and_the_nearest_of_several_seeds_counts() -> None:
    rows = [row("A2", 1, 2.0), row("B2", 1, 2.0), replace(row("A2", 2, 4.0)), replace(row("A2", 2, 3.0), seed=1)]
    norm = summarize_model("net", "m", answers(), rows, ATTACKS, CLEAN).norms["l2"]
    assert (norm.attacks["a-l2"].wins, norm.attacks["b-l2"].wins) == (1.5, 0.5)
    assert norm.attacks["a-l2"].distances == {1: 2.0, 2: 3.0}


def test_the_union_counts_an_adversarial_in_every_ball() -> None:
    far = torch.full((1, 4, 4), 1.0)
    rows = [
        *(row("A2", 0, 0.0), row("A0", 0, 0.0), row("AI", 0, 0.0)),  # misclassified
        *(row("A2", 1, 4.0, far), row("A0", 1, 16.0, far), row("AI", 1, 1.0, far)),  # survives
        # An L2 adversarial at 1.8, beyond its own threshold, but of 13 pixels of 0.5; one at 2.0 of 4 pixels.
        *(row("A2", 2, 1.8, sparse(13, 0.5)), row("A0", 2, INF), row("AI", 2, INF)),
        *(row("A2", 3, 2.0, sparse(4, 1.0)), row("A0", 3, INF), row("AI", 3, INF)),
    ]
    model = summarize_model("net", "m", answers(0), rows, ATTACKS, CLEAN)
    assert model.union == {0: False, 1: True, 2: True, 3: False}


def test_json_is_strict_and_complete() -> None:
    model = summarize_model("net", "m", answers(0), [*ROWS, row("A0", 1, INF)], ATTACKS, CLEAN)
    text = json.dumps(Summary((model,), {"data": "x"}).to_json(), allow_nan=False)
    cell = json.loads(text)["models"]["net"]
    assert cell["clean_accuracy"] == 0.75
    assert {key: cell["l2"][key] for key in ("accuracy", "threshold", "images")} == {
        "accuracy": 0.5,
        "threshold": 1.5,
        "images": 4,
    }
    assert cell["l2"]["median"] == pytest.approx(1.55)
    assert {"median", "accuracy", "threshold", "images"} <= set(cell["l2"]["attacks"]["a-l2"])
    assert cell["l0"]["median"] is None and cell["l0"]["threshold"] == 12.0


def test_doubts_from_rows() -> None:
    noise = AttackRecord("N", "gaussian-noise-l2", "l2", "decision", "minimum")
    half = AttackRecord("W(attack=V(steps=10), steps=12)", "v-l2", "l2", "gradient", "minimum")
    full = AttackRecord("W(attack=V(steps=20), steps=12)", "v-l2", "l2", "gradient", "minimum")
    attacks = ATTACKS | {r.attack: r for r in (noise, half, full)}

    def found(attack: str, distances: list[float]) -> list[Row]:
        return [replace(row("A2", i, d), attack=attack) for i, d in enumerate(distances)]

    def codes(rows: list[Row]) -> set[tuple[str, str]]:
        return {(doubt.code, doubt.subject) for doubt in ledger_doubts("m", rows, attacks)}

    assert codes(found("A2", [1.0] * 4) + found("B2", [2.0] * 4) + found("N", [3.0] * 4)) == set()
    assert codes(found("A2", [1.0] * 4) + found("B2", [0.9] * 4)) == {("white-box-beaten", "l2")}
    assert ("beaten-by-noise", "a-l2") in codes(found("A2", [3.0] * 4) + found("N", [2.0] * 4))
    assert codes(found("A2", [INF] * 4)) == {("nothing-found", "l2")}
    assert codes(found("A2", [0.0] * 4)) == set()
    assert codes(found(half.attack, [2.0] * 4) + found(full.attack, [1.5] * 4)) == {("steps-rising", "v-l2")}
    assert codes(found(half.attack, [2.0] * 4) + found(full.attack, [1.99] * 4)) == set()
    assert ("errors", "a-l2") in codes(ROWS)
