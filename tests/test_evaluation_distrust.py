"""Evaluations that trust nobody: models that misbehave, attacks that lie, doubts about attacks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import evaluation_models as models
from absynth.attacks.base import Attack, Problem, Proposals
from absynth.attacks.boundary_projection import BoundaryProjection
from absynth.attacks.foolbox_adapter import Foolbox
from absynth.attacks.gradient import DeepFool, FastGradient
from absynth.errors import InputError
from absynth.evaluation import Ledger, evaluate, model_digest, report, summarize, verify
from absynth.evaluation.doubts import plant, planted_doubts, with_half_steps
from absynth.evaluation.judge import judge
from absynth.norms import L0, L2, LINF, Norm
from evaluation_models import SUITE, Bad, Linear, labeled, run

# Models that misbehave


class Undecided(Linear):
    """The linear model; where its two best logits are nearly level, the second is ``ahead`` by this share of all."""

    ahead: float | None = None

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images).double()
        if self.ahead is None:
            return logits
        best, spread = logits.topk(2), logits.amax(1) - logits.amin(1)
        level = (best.values[:, 0] - best.values[:, 1] < 0.03 * spread).nonzero()[:, 0]
        logits[level, best.indices[level, 1]] = best.values[level, 0] + self.ahead * spread[level]
        return logits


@pytest.mark.parametrize(("ahead", "holds"), [(1e-7, True), (1e-5, False)])
def test_a_tie_is_verified_whoever_is_ahead_by_rounding(tmp_path: Path, ahead: float, holds: bool) -> None:
    model = Undecided()
    run(tmp_path, model)
    assert verify(tmp_path, models={"net": model}).holds
    Undecided.ahead = ahead
    try:
        again = verify(tmp_path, models={"net": model})
    finally:
        Undecided.ahead = None
    assert again.holds == holds
    assert holds or "the model is not fooled by its image" in {failure.reason for failure in again.failures}


@pytest.mark.parametrize("what", ["raises at one image", "nan at one image"])
def test_one_bad_image_is_marked_and_the_rest_goes_on(tmp_path: Path, what: str) -> None:
    summary = run(tmp_path, Bad(what))
    with Ledger(tmp_path) as ledger:
        found = ledger.rows(model_digest(Bad(what)))
    assert len(found) == 32
    errors = [row for row in found if row.status == "error"]
    assert {row.image for row in errors} == {4} and len(errors) == 4
    expected = "RuntimeError: cannot do this one" if what.startswith("raises") else "NaN"
    assert expected in errors[0].message
    cell = summary["net"].norms["l2"].attacks["boundary-projection-l2"]
    assert (cell.images, cell.errors) == (7, 1)
    assert any(doubt.code == "errors" for doubt in summary["net"].doubts)
    again = verify(tmp_path, models={"net": Bad(what)})
    assert again.holds and (again.rows, again.errors) == (32, 4)


@dataclass(frozen=True)
class Probing(Attack):
    """An attack that asks about a gray image first, and then finds the inverted image, or nothing."""

    norm: Norm
    finds: bool

    family = "probing"
    kind = "minimum"
    knowledge = "decisions"
    source = "test"
    deterministic = True
    queries = "1"

    def search(self, problem: Problem) -> Proposals:
        problem.met(torch.full_like(problem.images, 0.5))
        found = torch.full((len(problem),), self.finds)
        return Proposals(1 - problem.images if self.finds else problem.images, found)


class Undefined(Linear):
    """Linear, but for gray images, of which it says NaN."""

    def forward(self, images: Tensor) -> Tensor:
        gray = (images == 0.5).flatten(1).all(1)
        return torch.where(gray[:, None], torch.nan, super().forward(images))


def test_nothing_found_among_answers_of_nan_is_not_robust(tmp_path: Path) -> None:
    model = Undefined()
    data = labeled(model, 8, wrong=0)
    attacks = [Probing(L2, True), Probing(L2, False)]
    summary = evaluate(model, data, suite=attacks, norms=("l2",), images=8, out=tmp_path, name="net", probe=False)
    with Ledger(tmp_path) as ledger:
        rows = ledger.rows(model_digest(model))
    hits, rest = ([row for row in rows if f"finds={what}" in row.attack] for what in (True, False))
    assert {row.status for row in hits} == {"found"} and {row.status for row in rest} == {"error"}
    assert all("answered NaN to 1 of the attack's" in row.message for row in rows)
    doubts = {doubt.code: doubt.message for doubt in summary["net"].doubts}
    assert "on 8 images" in doubts["undefined"] and "8 images left out" in doubts["errors"]


def test_a_report_on_errors_alone_draws_no_curve(tmp_path: Path) -> None:
    summary = run(tmp_path / "run", Bad("wrong shape"))
    files = report(tmp_path / "run", out=tmp_path / "page")  # warnings are errors here
    assert "(errors only)" in files.html.read_text()
    assert "| net | 0 | error (0 of 8 images answered) | error | error | error | error |" in files.markdown.read_text()
    assert math.isnan(summary["net"].clean_accuracy) and summary.to_json()["models"]["net"]["clean_accuracy"] is None


@pytest.mark.parametrize("suite", ["none", (DeepFool(L2),)])
def test_images_without_an_answer_are_left_out_of_the_clean_accuracy_too(tmp_path: Path, suite: Any) -> None:
    model = Bad("nan at one image")
    summary = run(tmp_path, model, data=labeled(Linear(), wrong=0), suite=suite)
    one = summary["net"]
    assert (one.clean_accuracy, len(one.clean), one.unanswered) == (1.0, 7, 1)
    assert ("unanswered", "model") in {(doubt.code, doubt.subject) for doubt in one.doubts}
    text = report(tmp_path).markdown.read_text()
    assert "| net | 7 | 100.0 % (7 of 8 images answered; 65–100 %) |" in text
    assert "net, model: 1 of 8 images got no usable answer and are left out of all numbers: the model answered" in text


@dataclass(frozen=True)
class Partial(DeepFool):
    """Fails where the first pixel is bright."""

    limit: float = 0.5

    def search(self, problem: Problem) -> Proposals:
        if (problem.images.flatten(1)[:, 0] > self.limit).any():
            raise ValueError("too bright")
        return super().search(problem)


def test_an_image_counts_by_the_other_attacks_and_without_any_as_an_error(tmp_path: Path) -> None:
    pictures, labels = labeled(Linear(), wrong=0)
    first = pictures[:8].flatten(1)[:, 0].sort().values
    low, high = (
        float(first[k : k + 2].mean()) for k in (3, 6)
    )  # four images are darker than one, seven than the other
    attacks = (Partial(L2, limit=low), Partial(L2, limit=high), BoundaryProjection(LINF), BoundaryProjection(L0))
    one = run(tmp_path, data=(pictures, labels), suite=attacks)["net"]
    together = one.norms["l2"].all
    assert (together.images, together.errors, one.norms["l2"].uneven) == (7, 1, True)
    assert sorted((cell.images, cell.errors) for cell in one.norms["l2"].attacks.values()) == [(4, 4), (7, 1)]
    assert one.union is not None and (len(one.union), one.union_errors, one.union_uneven) == (7, 1, True)
    assert [doubt.message for doubt in one.doubts if doubt.code == "errors"] == [
        f"{count} images left out of its numbers: ValueError: too bright" for count in (4, 1)
    ]
    text = report(tmp_path).markdown.read_text()
    assert "(7 images, some without every attack; " in text.split("all attacks |")[1].splitlines()[0]
    assert "(4 images; " in text and one.norms["linf"].uneven is False


def test_errors_are_tried_again_on_request(tmp_path: Path) -> None:
    model = Bad("raises at one image")
    run(tmp_path, model)
    digest, model.what = model_digest(model), "raises at one image"
    model.forward = models.Linear.forward.__get__(model)  # type: ignore[method-assign]
    assert model_digest(model) == digest
    assert run(tmp_path, model)["net"].norms["l2"].all.images == 7
    assert run(tmp_path, model, retry_errors=True)["net"].norms["l2"].all.images == 8


def test_errors_that_are_not_tried_again_stay(tmp_path: Path) -> None:
    model = Bad("nan at one image")

    def stop(_progress: object) -> None:
        raise KeyboardInterrupt

    def counted() -> tuple[float, int, int]:
        found = summarize(tmp_path)["net"]
        return found.clean_accuracy, len(found.clean), found.norms["l2"].all.errors

    run(tmp_path, model, suite=SUITE[:2])
    before = counted()
    assert before == (5 / 7, 7, 1)  # images 0 and 1 are misclassified, image 4 has no answer
    run(tmp_path, model, suite=SUITE[:2], images=2, retry_errors=True)
    assert counted() == before
    with pytest.raises(InputError, match="seed"):
        run(tmp_path, model, suite=SUITE[:2], seed=5, retry_errors=True)
    assert counted() == before
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, model, suite=SUITE[:2], retry_errors=True, progress=stop)
    assert counted() == before
    model.forward = models.Linear.forward.__get__(model)  # type: ignore[method-assign]
    run(tmp_path, model, suite=SUITE[:1], retry_errors=True)
    with Ledger(tmp_path) as ledger:
        rows = ledger.rows(model_digest(model))
    assert counted() == (6 / 8, 8, 0) and sum(row.status == "error" for row in rows) == 1  # of the attack not asked for


def test_questions_that_failed_are_put_again(tmp_path: Path) -> None:
    model = Bad("raises at one image")
    run(tmp_path, model, suite="none", probe=True)
    model.forward = models.Linear.forward.__get__(model)  # type: ignore[method-assign]
    for retry, codes in ((False, {"probe-failed", "unanswered"}), (True, set())):
        summary = run(tmp_path, model, suite="none", probe=True, retry_errors=retry)
        assert {doubt.code for doubt in summary["net"].doubts} == codes


@pytest.mark.parametrize("what", ["random", "wrong shape", "wrong shape later"])
def test_a_model_that_is_no_classifier_gives_marked_rows(tmp_path: Path, what: str) -> None:
    summary = run(tmp_path, Bad(what), probe=True)
    with Ledger(tmp_path) as ledger:
        found = ledger.rows(model_digest(Bad(what)))
    assert len(found) == 32
    messages = {row.message for row in found if row.status == "error"}
    if what == "random":
        assert any("changed between two calls" in message for message in messages)
        assert any(doubt.code == "random" for doubt in summary["net"].doubts)
    else:
        assert any("expected logits" in message for message in messages)
    assert not any(row.status == "found" for row in found if what == "wrong shape")


def test_probabilities_are_warned_about(tmp_path: Path) -> None:
    codes = {doubt.code for doubt in run(tmp_path, Bad("probabilities"), probe=True, suite=SUITE[:1])["net"].doubts}
    assert "probabilities" in codes


def test_a_model_that_sees_the_batch_is_warned_about(tmp_path: Path) -> None:
    summary = run(tmp_path, Bad("sees the batch"), probe=True, suite=SUITE[:1])
    assert "batch" in {doubt.code for doubt in summary["net"].doubts}


def test_a_model_without_gradient_is_warned_about(tmp_path: Path) -> None:
    summary = run(tmp_path, Bad("no gradient"), probe=True, suite=(FastGradient(L2), SUITE[1]))
    codes = {doubt.code for doubt in summary["net"].doubts}
    assert {"zero-gradient", "white-box-beaten"} <= codes


def test_a_model_no_attack_can_start_on(tmp_path: Path) -> None:
    pictures = models.images(4), torch.zeros(4, dtype=torch.int64)
    summary = run(tmp_path, Bad("constant"), data=pictures, images=4)
    assert summary["net"].norms["l0"].all.median == math.inf and summary["net"].union == dict.fromkeys(range(4), True)
    assert "nothing-found" in {doubt.code for doubt in summary["net"].doubts}


@dataclass(frozen=True)
class Liar(Attack):
    """Claims what it has not done."""

    what: str
    norm: Any = field(default=L2, repr=False)
    family = "liar"
    kind = "minimum"
    knowledge = "decision"
    source = "tests"
    deterministic = True
    queries = "none"

    def __call__(self, classifier: Any, images: Tensor, goal: Any, seeds: Tensor) -> Proposals:
        found = torch.ones(len(images), dtype=torch.bool)
        if self.what == "raises":
            raise ValueError("out of ideas")
        proposed = {
            "clean": images,
            "range": images + 1,
            "nan": images * torch.nan,
            "shape": images[:, :, 1:],
            "double": images.double(),
        }[self.what]
        return Proposals(proposed, found)

    def search(self, problem: Problem) -> Proposals:
        raise AssertionError


@pytest.mark.parametrize(
    ("what", "status", "message"),
    [
        ("clean", "failed", ""),
        ("range", "error", "outside [0,1]"),
        ("nan", "error", "NaN or infinite"),
        ("shape", "error", "returned shape"),
        ("double", "error", "float64 instead of float32"),
        ("raises", "error", "ValueError: out of ideas"),
    ],
)
def test_no_claim_of_an_attack_is_believed(tmp_path: Path, what: str, status: str, message: str) -> None:
    run(tmp_path, suite=(Liar(what),))
    with Ledger(tmp_path) as ledger:
        found = [row for row in ledger.rows(model_digest(models.Linear())) if row.image >= 2]
    assert {row.status for row in found} == {status} and {row.distance for row in found} == {math.inf}
    assert all(message in row.message for row in found)


def test_the_judge_counts_ties_and_nudges_what_misses_by_rounding() -> None:
    def classifier(images: Tensor) -> Tensor:
        return torch.stack([torch.full((len(images),), 0.5), images.flatten(1)[:, 0]], dim=1)

    clean = torch.full((3, 1, 2, 2), 0.25)
    proposed = clean.clone()
    proposed[:, 0, 0, 0] = torch.tensor([0.5, 0.49999, 0.4])
    labels = torch.zeros(3, dtype=torch.int64)
    verdicts = judge(classifier, clean, proposed, torch.ones(3, dtype=torch.bool), labels, LINF)
    assert verdicts[0].distance == 0.25
    assert 0.25 <= verdicts[1].distance <= 0.2501
    assert verdicts[2].distance == math.inf and verdicts[2].adversarial is None


@dataclass(frozen=True)
class Nameless(FastGradient):
    """An attack whose repr hides the norm."""

    norm: Norm = field(default=L2, repr=False)


def test_attacks_of_one_repr_are_told_apart_or_refused(tmp_path: Path) -> None:
    both = (Nameless(L2), Nameless(LINF))
    with pytest.raises(InputError, match=r"-l2 in l2 and .*-linf in linf are both Nameless\(.*let the repr show"):
        run(tmp_path, suite=both)
    run(tmp_path, suite=both[:1])
    before = summarize(tmp_path).to_json()
    with pytest.raises(InputError, match=r"-l2 in l2 as Nameless\(.*, which .*-linf in linf is as well: let the repr"):
        run(tmp_path, suite=both[1:])
    assert summarize(tmp_path).to_json() == before


# Doubts about attacks


def test_a_planted_adversarial_is_adversarial_and_found_by_a_good_attack() -> None:
    model = models.Linear()
    pictures, labels = models.labeled(model, wrong=0)
    for norm in (L0, L2, LINF):
        planted, distance = plant(model, pictures[3:4], int(labels[3]), norm, seed=1)
        with torch.no_grad():
            assert planted(planted.clean + planted.delta).argmax() == planted.rival != labels[3]
        assert distance == pytest.approx({"l0": 6, "l2": 0.75, "linf": 0.15}[norm.name], rel=1e-5)
        assert planted_doubts("m", BoundaryProjection(norm), model, [3, 4], pictures, labels, 0) == []


def test_an_attack_that_misses_the_planted_adversarial_is_doubted() -> None:
    model = Bad("constant")
    labels = torch.zeros(4, dtype=torch.int64)
    (doubt,) = planted_doubts("m", FastGradient(L2, steps=1, bisections=0), model, [0, 1], models.images(4), labels, 0)
    assert doubt.code == "planted-missed" and "instead of 0.75" in doubt.message


@dataclass(frozen=True)
class Patient(Attack):
    """Finds the inverted image, with fewer than eight steps nothing but an error."""

    steps: int = 8
    norm: Any = field(default=L2, repr=False)
    family = "patient"
    kind = "minimum"
    knowledge = "decision"
    source = "tests"
    deterministic = True
    queries = "none"

    def search(self, problem: Problem) -> Proposals:
        if self.steps < 8:
            raise RuntimeError("too few steps")
        return Proposals(1 - problem.images, problem.met(1 - problem.images))


def test_an_error_with_half_of_the_steps_is_no_distance(tmp_path: Path) -> None:
    summary = run(tmp_path, suite=(Patient(),), probe=True)
    assert {doubt.code for doubt in summary["net"].doubts} == set()
    with Ledger(tmp_path) as ledger:
        assert {probe for probe, _ in ledger.probes(model_digest(Linear()))} == {"model"}  # the steps were not tried


def test_half_steps() -> None:
    assert with_half_steps(DeepFool(L2)) == DeepFool(L2, steps=25)
    assert with_half_steps(Foolbox(L2, "ddn")) == Foolbox(L2, "ddn", steps=100)  # of those it takes by default
    assert with_half_steps(Liar("clean")) is None
