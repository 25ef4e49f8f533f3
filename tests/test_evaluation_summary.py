"""Statistics and summaries against numbers worked out by hand."""

from __future__ import annotations

import json
import math
import re
import sqlite3
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from absynth.cli import runs
from absynth.errors import InputError
from absynth.evaluation import compare, distal, merge, report, save_distal, summarize
from absynth.evaluation.doubts import ledger_doubts
from absynth.evaluation.ledger import FILE_NAME
from absynth.evaluation.names import named_apart
from absynth.evaluation.rows import AttackRecord, CleanRow, Row
from absynth.evaluation.statistics import median, median_interval, wilson_interval
from absynth.evaluation.summary import Summary, summarize_model, within
from evaluation_models import Linear, labeled, run

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


def test_runs_on_different_data_are_not_summed_up(tmp_path: Path) -> None:
    run(tmp_path / "one", suite="none")
    run(tmp_path / "two", suite="none", data=labeled(Linear(), wrong=1))
    with pytest.raises(InputError, match=r"one is about tensors \(all split, digest \w{8}\), .*two is.*different data"):
        summarize(tmp_path)


def test_a_ledger_without_an_answer_counts_as_none(tmp_path: Path) -> None:
    pictures, _ = labeled(Linear())
    with pytest.raises(InputError, match="label 3"):
        run(tmp_path / "refused", data=(pictures, torch.full((12,), 3)))
    for read in (summarize, report):
        with pytest.raises(InputError, match=r"no evaluation in .*refused"):
            read(tmp_path / "refused")
    run(tmp_path / "run", suite="none")
    assert [model.name for model in summarize(tmp_path).models] == ["net"]
    assert "1 model, 8 images" in report(tmp_path).html.read_text(encoding="utf-8")
    save_distal(tmp_path / "refused", {"net": distal(Linear(), 1, count=1, shape=(1, 8, 8), steps=1)})
    assert "Distal images alone" in report(tmp_path / "refused").markdown.read_text(encoding="utf-8")


def test_models_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    for place in ("a/abs", "b/abs"):
        run(tmp_path / place, suite="deepfool-l2", name="abs")
    run(tmp_path / "a/other", Linear(seed=3), suite="deepfool-l2", name="other")
    both = summarize(tmp_path / "a", tmp_path / "b", tmp_path / "b" / "abs")
    assert list(both.to_json()["models"]) == ["abs (a/abs)", "other", "abs (b/abs)"]
    assert both["abs (b/abs)"].stored_name == "abs"
    text = report(tmp_path / "a", tmp_path / "b").markdown.read_text(encoding="utf-8")
    assert "| attack | ABS (a/abs) | ABS (b/abs) | other |" in text
    twins = [replace(both["other"], folder=tmp_path, digest=digest) for digest in ("1" * 64, "2" * 64)]
    assert [model.name for model in named_apart(twins)] == ["other (11111111)", "other (22222222)"]
    with pytest.raises(InputError, match=r"unknown model 'abs'.*abs \(a/abs\)"):
        both["abs"]


def test_a_model_is_compared_with_each_of_itself(tmp_path: Path) -> None:
    for place in ("one/net", "two/net", "two/again"):
        run(tmp_path / place, suite="deepfool-l2")
    run(tmp_path / "one/other", Linear(seed=3), suite="deepfool-l2", name="other")
    run(tmp_path / "two/other", Linear(seed=4), suite="deepfool-l2", name="other")
    found = compare(tmp_path / "one", tmp_path / "two")
    assert {one.model for one in found} == {"net | net (again)", "net | net (net)", "other"}
    assert all(one.nearer == one.farther == 0 for one in found if one.model != "other")


def test_a_row_of_an_attack_that_is_not_listed_is_damage(tmp_path: Path) -> None:
    run(tmp_path, suite="deepfool-l2")
    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as connection, connection:
        connection.execute("DELETE FROM attacks")
    for read in (summarize, report):
        with pytest.raises(InputError, match=r"is damaged \(it has rows of DeepFool\(.*which its table attacks lacks"):
            read(tmp_path)


def test_an_attack_of_many_images_is_summed_up_in_one_pass() -> None:
    """Each image looked up in all rows takes minutes."""
    rows = [row(attack, image, 1.0 + image) for image in range(20_000) for attack in ("A2", "B2")]
    started = time.monotonic()
    norm = summarize_model("net", "m", [], rows, ATTACKS, CLEAN).norms["l2"]
    assert norm.attacks["a-l2"].wins == 10_000 and time.monotonic() - started < 10


def test_where_attacks_cover_different_images_all_of_them_together_say_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "one", suite="gaussian-noise-l2")
    run(tmp_path / "two", suite="gaussian-noise-l2,deepfool-l2", images=3)
    merge(tmp_path / "one", tmp_path / "two", tmp_path / "both")
    found = {one.attack: one for one in compare(tmp_path / "one", tmp_path / "both")}
    assert (found["all"].images, found["all"].uneven, found["gaussian-noise-l2"].uneven) == (8, True, False)
    found = {one.attack: one for one in compare(tmp_path / "two", tmp_path / "both")}
    assert (found["all"].images, found["all"].uneven) == (3, False)  # on the images they share every attack ran
    text = report(tmp_path / "both").markdown.read_text(encoding="utf-8")
    assert re.search(r"\| net \| 8 \|.* \(some without every attack; ", text)
    assert re.search(r"\| deepfool \| .* \(3 images; ", text) and re.search(
        r"\| gaussian-noise \| \S+ · \d+ % \(\d", text
    )
    runs.compare(tmp_path / "one", tmp_path / "both")
    out, said = capsys.readouterr()
    assert "all *" in out and "gaussian-noise-l2 *" not in out and "lack a row of some attack" in said
