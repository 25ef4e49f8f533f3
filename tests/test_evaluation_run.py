"""Runs from end to end on tiny models: resuming, killing, bad folders, verification, comparison."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import evaluation_models as models
from absynth.attacks.binary import Thresholded
from absynth.attacks.catalog import ATTACKS
from absynth.attacks.gradient import FastGradient
from absynth.classifiers import ABS
from absynth.errors import InputError
from absynth.evaluation import (
    Certificate,
    Ledger,
    Plan,
    compare,
    load_model,
    merge,
    model_digest,
    summarize,
    verify,
)
from absynth.evaluation.folders import holds_evaluation
from absynth.evaluation.ledger import FILE_NAME
from absynth.evaluation.plan import choose_attacks, image_indices, row_seed
from absynth.evaluation.run import Progress
from absynth.norms import L2
from absynth.prototypes import PrototypeABS
from absynth.vae import Decoder, VAEConfig
from evaluation_models import ALL_NORMS, SUITE, Bad, run


def rows(folder: Path, model: nn.Module | None = None) -> dict[tuple[Any, ...], tuple[Any, ...]]:
    """Everything a ledger says, seconds apart."""
    with Ledger(folder) as ledger:
        found = ledger.rows(model_digest(model or models.Linear()))
    return {
        row.key: (
            replace(row, seconds=0.0, adversarial=None),
            None if row.adversarial is None else row.adversarial.numpy().tobytes(),
        )
        for row in found
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run of the linear model. Read only."""
    folder = tmp_path_factory.mktemp("finished")
    run(folder, probe=True)
    return folder


def test_a_run_finds_the_exact_distances_of_a_linear_model(finished: Path) -> None:
    model = models.Linear()
    pictures, labels = models.labeled(model)
    summary = summarize(finished)["net"]
    assert summary.clean_accuracy == 0.75
    weight = model.weight.detach().double()
    logits = (pictures.flatten(1).double() - 0.5) @ weight
    for image in range(8):
        own = int(labels[image])
        rivals = [c for c in range(3) if c != own]
        gaps = [(float(logits[image, own] - logits[image, c]), weight[:, own] - weight[:, c]) for c in rivals]
        exact = 0.0 if image < 2 else min(gap / float(normal.norm()) for gap, normal in gaps)
        found = summary.norms["l2"].all.distances[image]
        assert found == 0.0 if image < 2 else exact - 1e-6 <= found <= 1.05 * exact  # the box may add a little
    assert summary.union is not None and len(summary.union) == 8
    assert summary.norms["l2"].attacks["boundary-projection-l2"].backward > 0
    assert summary.norms["l2"].attacks["gaussian-noise-l2"].backward == 0


def test_everything_holds(finished: Path) -> None:
    calls: list[tuple[int, int]] = []
    result = verify(finished, models={"net": models.Linear()}, progress=lambda done, total: calls.append((done, total)))
    assert result.holds and result.rows == 32 and result.clean == 8
    assert calls[-1][0] == calls[-1][1]


def test_a_model_that_is_not_at_hand_is_reported(finished: Path) -> None:
    result = verify(finished)
    assert not result.holds and not result.failures and "unknown model 'net'" in result.unchecked[0]
    other = verify(finished, models={"net": models.Linear(seed=5)})
    assert "has digest" in other.unchecked[0]


TIE = zlib.compress(bytes(12)).hex()  # three equal logits: broken
TAMPERINGS = {
    "its distance is": "UPDATE rows SET distance = distance / 2 WHERE status = 'found' AND image = 4",
    "the model is not fooled": "UPDATE rows SET distance = 0, adversarial = "
    "(SELECT pixels FROM images WHERE image = 4) WHERE status = 'found' AND image = 4",
    "missing or damaged": "UPDATE rows SET adversarial = x'00' WHERE status = 'found' AND image = 4",
    "does not fit its distance": "UPDATE rows SET status = 'failed' WHERE image = 4",
    "but the clean image is classified rightly": "UPDATE rows SET status = 'misclassified', distance = 0, "
    "adversarial = NULL WHERE image = 4",
    "its label is": "UPDATE rows SET label = 1 - label WHERE image = 4",
    "the clean image was misclassified": f"UPDATE clean SET logits = x'{TIE}' WHERE image = 4",
    "the clean answer's label": "UPDATE clean SET label = 1 - label WHERE image = 4",
}


@pytest.mark.parametrize("reason", TAMPERINGS)
def test_verify_catches_tampering(finished: Path, tmp_path: Path, reason: str) -> None:
    merge(finished, finished, tmp_path)
    connection = sqlite3.connect(tmp_path / FILE_NAME)
    connection.execute(TAMPERINGS[reason])
    connection.commit()
    connection.close()
    result = verify(tmp_path, models={"net": models.Linear()})
    assert result.failures and any(reason in failure.reason for failure in result.failures)
    assert {failure.image for failure in result.failures} == {4}


def test_no_attack_below_a_certificate(finished: Path, tmp_path: Path) -> None:
    merge(finished, finished, tmp_path)
    model = summarize(tmp_path)["net"]
    nearest = model.norms["l2"].all.distances[5]
    good = Certificate(model.digest, 5, "l2", nearest, "closed form", "exact", 0)
    guess = Certificate(model.digest, 6, "l2", 100.0, "guess", "estimate", 0)
    with Ledger(tmp_path, write=True) as ledger:
        ledger.add_certificates([good, guess])
    assert verify(tmp_path, models={"net": models.Linear()}).holds
    with Ledger(tmp_path, write=True) as ledger:
        ledger.add_certificates([replace(good, radius=1.001 * nearest)])
        # An adversarial of any attack counts: L-infinity is only bounded by what the L2 attack found.
        ledger.add_certificates([replace(good, norm="l1", radius=100.0)])
    failures = verify(tmp_path, models={"net": models.Linear()}).failures
    assert [(failure.norm, failure.image) for failure in failures] == [("l1", 5), ("l2", 5)]


def test_resuming_is_a_set_difference(tmp_path: Path, finished: Path) -> None:
    seen: list[Progress] = []

    def stop(progress: Progress) -> None:
        seen.append(progress)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, progress=stop)
    before = rows(tmp_path)
    assert len(before) == 9 and seen[-1].done == 9 and seen[-1].total == 32
    again: list[Progress] = []
    run(tmp_path, progress=again.append)
    assert again[0].done == 12 and again[-1].done == 32 and again[-1].seconds_left == 0
    assert rows(tmp_path) == rows(finished)
    run(tmp_path, progress=lambda progress: pytest.fail("nothing was left to do"))


def test_attacks_put_to_the_test_are_work_that_shows(tmp_path: Path) -> None:
    seen: list[Progress] = []
    run(tmp_path, probe=True, progress=seen.append)
    tests = [one for one in seen if one.attack.startswith("testing ")]
    assert (
        [one.attack for one in tests] == [f"testing {attack.name}" for attack in SUITE] == [o.attack for o in seen[-4:]]
    )
    assert [one.done for one in tests] == [35, 38, 41, 44]  # three images each, after 32 rows
    assert all(one.total == 44 for one in seen) and seen[-1].seconds_left == 0
    run(tmp_path, probe=True, progress=seen.append)
    assert len(seen) == len({one.done for one in seen}) + len(SUITE)  # asked again, they are done at once


def test_more_images_and_attacks_extend_a_run(tmp_path: Path, finished: Path) -> None:
    run(tmp_path, images=4, suite=SUITE[:2])
    run(tmp_path, batch_size=5)
    found = rows(tmp_path)
    assert found.keys() == rows(finished).keys()
    for key, (row, _) in rows(finished).items():  # the batch size changes no more than rounding
        assert found[key][0].distance == pytest.approx(row.distance, rel=1e-3)


KILLED = """
import sys, torch
sys.path.insert(0, "tests")
torch.set_num_threads(1)
import evaluation_models as models, test_evaluation_run as this
from pathlib import Path
def pause(progress):
    print(progress.done, flush=True)
    sys.stdin.readline()
this.run(Path(sys.argv[1]), progress=pause)
"""


def test_kill_9_loses_only_the_batch_in_flight(tmp_path: Path, finished: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert process.stdin is not None and process.stdout is not None
    with process:
        for _ in range(4):
            done = int(process.stdout.readline())
            process.stdin.write("\n")
            process.stdin.flush()
        process.send_signal(signal.SIGKILL)
    kept = len(rows(tmp_path))
    assert done <= kept <= done + 3  # what was in flight may have got through
    run(tmp_path)
    assert rows(tmp_path) == rows(finished)
    assert verify(tmp_path, models={"net": models.Linear()}).holds


def test_merging_two_halves_gives_the_whole(tmp_path: Path, finished: Path) -> None:
    run(tmp_path / "a", images=[0, 1, 2, 3, 4, 5])
    run(tmp_path / "b", images=[3, 4, 5, 6, 7])
    summary = merge(tmp_path / "a", tmp_path / "b", tmp_path / "c")
    assert rows(tmp_path / "c").keys() == rows(finished).keys()
    assert len(summary["net"].clean) == 8


def test_comparing_runs(tmp_path: Path, finished: Path) -> None:
    run(tmp_path, images=6, suite=(FastGradient(L2), SUITE[1]))
    found = {(d.norm, d.attack): d for d in compare(finished, tmp_path)}
    assert set(found) == {("l2", "all"), ("l2", "gaussian-noise-l2")}
    same = found["l2", "gaussian-noise-l2"]
    assert same.images == 6 and same.medians[0] == same.medians[1] and same.p_value == 1.0
    assert found["l2", "all"].nearer + found["l2", "all"].farther <= 4
    json.dumps([d.to_json() for d in found.values()], allow_nan=False)
    run(tmp_path / "other", data=models.labeled(models.Linear(), wrong=1))
    with pytest.raises(InputError, match="different data"):
        compare(finished, tmp_path / "other")


# Plans, models and folders


def test_rows_have_seeds_of_their_own() -> None:
    seeds = {row_seed(seed, image, attack) for seed in range(3) for image in range(50) for attack in ("A()", "B()")}
    assert len(seeds) == 300 and all(0 <= seed < 2**63 for seed in seeds)
    assert row_seed(0, 1, "A()") == row_seed(0, 1, "A()")


def test_the_digest_names_weights_and_settings() -> None:
    digests = [
        model_digest(models.Linear()),
        model_digest(models.Linear(seed=1)),
        model_digest(Bad("random")),
        model_digest(Bad("constant")),
        model_digest(nn.Sequential(models.Linear())),
    ]
    assert len(set(digests)) == 5 and model_digest(models.Linear()) == digests[0]


def test_the_digest_is_the_same_on_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def prototype_model(seed: int = 0) -> PrototypeABS:
        torch.manual_seed(seed)
        return PrototypeABS([Decoder(VAEConfig()).eval() for _ in range(2)], [torch.randn(3, 8) for _ in range(2)])

    torch.manual_seed(2)
    network = ABS([Decoder(VAEConfig()).eval() for _ in range(2)], torch.randn(2, 5, 8))  # its decoders have batch norm
    model = prototype_model()
    before = model_digest(network), model_digest(model)
    monkeypatch.setattr(nn.BatchNorm2d, "extra_repr", lambda module: "as another version says it")
    model.points += 1e-7  # as another processor decodes it
    assert (model_digest(network), model_digest(model)) == before
    assert model_digest(prototype_model(1)) != before[1]
    other = PrototypeABS([Decoder(VAEConfig()).eval() for _ in range(2)], list(model.latents.split(model.class_counts)))
    assert model_digest(other) != before[1]  # the same latents, decoded by others


def test_jobs_cover_what_is_missing() -> None:
    plan = Plan("net", "d", SUITE[:2], (5, 6, 7), "x", "test", "e", batch_size=2)
    first, second = map(repr, SUITE[:2])
    assert [job.images for job in plan.jobs()] == [(5, 6), (5, 6), (7,), (7,)]
    left = plan.jobs({(first, "l2", 5, 0), (second, "l2", 7, 0), (first, "l2", 7, 1), (first, "l0", 6, 0)})
    assert [(repr(job.attack) == first, job.images) for job in left] == [(True, (6,)), (False, (5, 6)), (True, (7,))]
    assert plan.norms == ("l2",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": models.Linear(seed=3)}, "another model"),
        ({"seed": 7}, "holds rows of seed 0, this plan has seed 7"),
        ({"data": (models.images(seed=9), torch.zeros(12, dtype=torch.int64))}, "another output folder"),
    ],
)
def test_another_evaluation_in_the_folder(tmp_path: Path, finished: Path, change: dict[str, Any], message: str) -> None:
    merge(finished, finished, tmp_path)
    with pytest.raises(InputError, match=message):
        run(tmp_path, **change)
    assert rows(tmp_path) == rows(finished)


def test_what_has_no_seed_goes_into_a_folder_of_any(tmp_path: Path) -> None:
    run(tmp_path, suite=SUITE[:1], images=3, seed=7)
    assert len(run(tmp_path, suite="none")["net"].clean) == 8


def test_code_that_changed_between_two_runs(tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The digest of a module is of its weights: what its forward does with them is found by asking."""
    merge(finished, finished, tmp_path)
    plain, data = models.Linear.forward, models.labeled(models.Linear())
    monkeypatch.setattr(models.Linear, "forward", lambda self, images: 1.001 * plain(self, images))  # as after a GPU
    run(tmp_path, data=data)
    monkeypatch.setattr(models.Linear, "forward", lambda self, images: plain(self, images.flip(3)))
    with pytest.raises(InputError, match=r"image 0: then \d, now \d.*its code has changed; give another"):
        run(tmp_path, images=12, data=data)
    assert rows(tmp_path) == rows(finished)
    # a random model has no answer to keep to; its rows say so
    monkeypatch.setattr(models.Linear, "forward", lambda self, images: plain(self, images) + torch.rand(3))
    run(tmp_path, data=data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": 99}, "images is 99; this split has 12"),
        ({"images": [0, 12]}, "image index 12 is out of range"),
        ({"images": [1, 1]}, "an image index comes twice"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"norms": ("l7",)}, "unknown norm 'l7'"),
        ({"suite": "quik"}, "unknown attack or suite 'quik'.*quick"),
        ({"data": (models.images() * 255, torch.zeros(12, dtype=torch.int64))}, "values in \\[0,1\\]"),
        ({"data": (models.images(), torch.zeros(3, dtype=torch.int64))}, "expected 12 integers"),
        ({"data": (models.images(), torch.full((12,), 3))}, "image 0 has label 3, the model has 3 classes"),
        ({"data": (models.images(), torch.full((12,), -1))}, "image 0 has label -1"),
    ],
)
def test_bad_options(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        run(tmp_path, **options)
    assert "\n" not in str(caught.value)
    assert not holds_evaluation(tmp_path)  # which would be in the way of the run that is meant


def test_labels_are_checked_before_anything_is_written(tmp_path: Path) -> None:
    pictures, labels = models.labeled(models.Linear(), 300)
    labels[299] = 3  # of the second batch of clean answers
    with pytest.raises(InputError, match="image 299 has label 3, the model has 3 classes"):
        run(tmp_path, data=(pictures, labels), images=300, suite="none")
    assert run(tmp_path, suite="none")["net"].clean_accuracy == 0.75


def test_a_count_of_images_may_be_numpys() -> None:
    assert image_indices(np.int64(3), 5) == (0, 1, 2)


def test_models_by_factory() -> None:
    assert model_digest(load_model("evaluation_models:linear")) == model_digest(models.Linear())
    for name, message in {
        "evaluation_models:nothing": "has no function 'nothing'",
        "no_such_package:model": "cannot import 'no_such_package'",
        "evaluation_models:no_module": "returned a str",
        "evaluation_models:broken": "failed: RuntimeError: no weights here",
        "apps": "unknown model 'apps'",
    }.items():
        with pytest.raises(InputError, match=message) as caught:
            load_model(name)
        assert "\n" not in str(caught.value)


def test_suites_fit_the_model() -> None:
    names = {attack.name for attack in choose_attacks("latent-descent-l2,deepfool-l2", ("l2",), models.Linear())}
    assert names == {"deepfool-l2"}
    thresholded = models.Linear()
    thresholded.threshold = 0.5  # type: ignore[assignment]
    (attack,) = choose_attacks("deepfool-l2", ALL_NORMS, thresholded)
    assert attack.name == "deepfool-refined-l2"
    assert choose_attacks("none", ALL_NORMS, models.Linear()) == ()


def test_attacks_that_are_not_installed_are_refused_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "autoattack", None)
    with pytest.raises(InputError, match="AutoAttack is not installed: pip install"):
        run(tmp_path, suite="autoattack")
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="AutoAttack is not installed: pip install"):
        choose_attacks([Thresholded(ATTACKS["autoattack-l2"], 0.5)], ALL_NORMS, models.Linear())


def test_clean_accuracy_alone(tmp_path: Path) -> None:
    summary = run(tmp_path, suite="none")
    assert summary["net"].clean_accuracy == 0.75 and summary["net"].norms == {}
    assert summary.to_json()["models"]["net"]["clean_accuracy"] == 0.75
