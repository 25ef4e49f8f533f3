"""What verification says of a ledger beyond its rows: altered images, missing rows, failures, wrong kinds of values."""

from __future__ import annotations

import sqlite3
import zlib
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

import evaluation_models as models
from absynth import data, reproduction
from absynth.errors import InputError
from absynth.evaluation import Verification, evaluate, merge, report, verify
from absynth.evaluation.ledger import FILE_NAME
from command_line import Run, assert_error, document
from evaluation_models import SUITE, run

NAME = "evaluation_models:digits"
NET = {"net": models.Linear()}
FAILED = (
    "UPDATE rows SET status = 'failed', found = 0, distance = 9e999, adversarial = NULL "
    "WHERE rowid = (SELECT min(rowid) FROM rows WHERE status = 'found')"
)


@pytest.fixture(scope="module")
def tensors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run of the linear model, on images without a name. Read only."""
    folder = tmp_path_factory.mktemp("tensors")
    run(folder)
    return folder


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run on the embedded digits. Read only."""
    folder = tmp_path_factory.mktemp("digits")
    run(folder, models.digits(), data="digits", images=20, suite=SUITE[:1], name=NAME)
    return folder


@pytest.fixture
def tampered(tmp_path: Path) -> Callable[..., Path]:
    """Makes a copy of a run and carries out SQL on it, every statement of which has to change something."""

    def change(source: Path, *statements: str) -> Path:
        merge(source, source, tmp_path / "copy")
        with closing(sqlite3.connect(tmp_path / "copy" / FILE_NAME)) as connection:
            for statement in statements:
                assert connection.execute(statement).rowcount > 0
            connection.commit()
        return tmp_path / "copy"

    return change


def reasons(found: Verification) -> set[tuple[int | None, str]]:
    return {(failure.image, failure.reason) for failure in found.failures}


# Rows that nothing can be recomputed of, and rows that are not there


def test_rows_that_found_nothing_are_counted(tensors: Path, tampered: Callable[..., Path]) -> None:
    before = verify(tensors, models=NET)
    found = verify(tampered(tensors, FAILED), models=NET)
    assert found.holds and found.rows == before.rows and found.found_nothing == before.found_nothing + 1
    assert found.to_json()["found_nothing"] == found.found_nothing


def test_a_whole_run_is_compared_and_lacks_nothing(digits: Path) -> None:
    found = verify(digits, models={NAME: models.digits()})
    assert found.holds and found.notices == () and found.found_nothing == 0


@pytest.mark.parametrize(
    ("statements", "notice"),
    [
        (("DELETE FROM rows WHERE image = 4",), "net: image 4 has no row of any attack"),
        (("DELETE FROM rows WHERE image = 7",), "net: image 7 has no row of any attack"),  # the last one
        (
            ("DELETE FROM rows WHERE image IN (1, 2, 3, 6) AND attack LIKE 'Gaussian%'",),
            "net: images 1-3, 6 have no row of gaussian-noise-l2",
        ),
        (("DELETE FROM rows WHERE attack LIKE 'Gaussian%'",), "no image has a row of gaussian-noise-l2"),
        (
            ("DELETE FROM rows WHERE image = 4", "DELETE FROM clean WHERE image = 4"),
            "net: image 4 has no clean answer, later ones have",
        ),
        (
            tuple(f"DELETE FROM {table} WHERE image = 4" for table in ("rows", "clean", "images")),
            "image 4 has not been evaluated, later ones have",
        ),
    ],
)
def test_missing_rows_are_named(
    tensors: Path, tampered: Callable[..., Path], statements: tuple[str, ...], notice: str
) -> None:
    found = verify(tampered(tensors, *statements), models=NET)
    assert found.holds and notice in found.notices and notice in found.to_json()["notices"]
    assert len(found.notices) == 2  # the other one: the images have no name


def test_a_run_that_was_stopped_or_extended_holds(tmp_path: Path) -> None:
    def stop(_progress: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", progress=stop)
    found = verify(tmp_path / "stopped", models=NET)
    assert found.holds and found.rows == 3 and "net: images 3-7 have no row of boundary-projection-l2" in found.notices
    run(tmp_path / "extended", suite=SUITE[:1])
    run(tmp_path / "extended", suite=SUITE[:2], images=3)
    found = verify(tmp_path / "extended", models=NET)
    assert found.holds and "net: images 3-7 have no row of gaussian-noise-l2" in found.notices


def test_seeds_are_told_apart(tmp_path: Path) -> None:
    run(tmp_path / "a", suite=SUITE[:1], images=4)
    run(tmp_path / "b", suite=SUITE[:1], images=3, seed=1)
    merge(tmp_path / "a", tmp_path / "b", tmp_path / "c")
    found = verify(tmp_path / "c", models=NET)
    assert found.holds and "net: image 3 has no row of boundary-projection-l2 (seed 1)" in found.notices


def test_many_missing_images_are_one_line(tensors: Path, tmp_path: Path) -> None:
    run(tmp_path, data=models.labeled(models.Linear(), 40), images=40, suite="none")
    run(tmp_path, data=models.labeled(models.Linear(), 40), images=range(0, 40, 3), suite=SUITE[1:2])
    (line,) = [line for line in verify(tmp_path, models=NET).notices if "no row" in line]
    assert line == "net: images 1-2, 4-5, 7-8, 10-11, 13-14 and 16 more have no row of gaussian-noise-l2"


def test_several_runs_are_told_apart(tensors: Path, tampered: Callable[..., Path]) -> None:
    copy = tampered(tensors, "DELETE FROM rows WHERE image = 4")
    notices = verify(tensors, copy, models=NET).notices
    assert f"{copy}: net: image 4 has no row of any attack" in notices
    assert sum("not compared" in notice for notice in notices) == 1


# Images that are not the data set's


def copied(table: str, *columns: str) -> str:
    """Puts what a table says of image 2 in the place of image 1."""
    names = ", ".join(columns)
    return f"UPDATE {table} SET ({names}) = (SELECT {names} FROM {table} WHERE image = 2) WHERE image = 1"


REPLACED = (
    copied("images", "label", "shape", "pixels"),
    copied("clean", "label", "prediction", "logits", "message"),
    copied("rows", "label", "distance", "found", "status", "shape", "adversarial"),
)


def test_an_image_put_in_the_place_of_another_does_not_hold(digits: Path, tampered: Callable[..., Path]) -> None:
    found = verify(tampered(digits, *REPLACED), models={NAME: models.digits()})
    assert reasons(found) == {(1, "the stored image is not that of digits, test")}


@pytest.mark.parametrize(
    ("statement", "image", "reason"),
    [
        ("UPDATE meta SET value = 'train' WHERE key = 'split'", None, "none of the 20 stored images"),
        ("UPDATE meta SET value = 'all' WHERE key = 'split'", None, "the data set digits has no split 'all'"),
        ("UPDATE images SET label = 9 - label WHERE image = 3", 3, "the stored label is"),
        ("UPDATE images SET image = 500 WHERE image = 3", 500, "digits, test has no such image"),
        ("UPDATE images SET pixels = x'00' WHERE image = 3", 3, "the stored image is not that of digits, test"),
    ],
)
def test_other_data_do_not_hold(
    digits: Path, tampered: Callable[..., Path], statement: str, image: int | None, reason: str
) -> None:
    found = verify(tampered(digits, statement), models={NAME: models.digits()})
    assert any(where == image and reason in said for where, said in reasons(found))


def test_another_name_of_the_data_does_not_hold(
    digits: Path, tampered: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tampered(digits, "UPDATE meta SET value = 'mnist' WHERE key = 'data'")
    monkeypatch.setattr(data, "at_hand", lambda *_arguments: True)
    monkeypatch.setattr(data, "load", lambda *_arguments: (models.images(30, 3), models.images(30)[:, 0, 0, 0].long()))
    found = verify(copy, models={NAME: models.digits()})
    assert reasons(found) == {(None, "none of the 20 stored images, with its label, is that of mnist, test")}


def test_images_that_were_not_compared_are_told(
    digits: Path, tensors: Path, tampered: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said = "images not compared with the data set: "
    assert f"{said}the run was made on tensors, which is no data set at hand" in verify(tensors, models=NET).notices
    copy = tampered(digits, "UPDATE meta SET value = 'kmnist' WHERE key = 'data'")
    monkeypatch.setattr(data, "at_hand", lambda _name, _split, root: root != tmp_path)
    found = verify(copy, models={NAME: models.digits()}, root=tmp_path)
    assert found.holds and f"{said}the files of kmnist are not at hand, --root names their folder" in found.notices


def test_damaged_files_of_the_data_set_are_told(digits: Path, tampered: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(b"no images")
    copy = tampered(digits, "UPDATE meta SET value = 'mnist' WHERE key = 'data'")
    (notice,) = verify(copy, models={NAME: models.digits()}, root=tmp_path).notices
    assert "images not compared" in notice and "t10k-images-idx3-ubyte" in notice


@pytest.mark.parametrize("home", [False, True])
def test_a_folder_of_pictures_counts_as_long_as_it_is_what_it_was(
    tmp_path: Path, tampered: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, home: bool
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    name = "~/pictures" if home else tmp_path / "pictures"
    pictures, labels = data.load("digits", "test")
    for index in range(60):
        where = tmp_path / "pictures" / str(int(labels[index]))
        where.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pictures[index, 0] * 255).byte().numpy()).save(where / f"{index}.png")
    assert data.at_hand(str(name))
    evaluate(models.digits(), name, suite="none", images=5, out=tmp_path / "run", name=NAME)
    known = {NAME: models.digits()}
    assert verify(tmp_path / "run", models=known).notices == ()
    copy = tampered(tmp_path / "run", *REPLACED[:2])
    assert {image for image, _ in reasons(verify(copy, models=known))} == {1}
    Image.fromarray((pictures[60, 0] * 255).byte().numpy()).save(tmp_path / "pictures" / "0" / "more.png")
    found = verify(copy, models=known)
    assert found.holds and "are not those of the run" in found.notices[0]


# Clean answers


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ("UPDATE clean SET prediction = (prediction + 1) % 3 WHERE image = 4", "its logits say"),
        ("UPDATE clean SET prediction = 99 WHERE image = 4", "its logits say"),
        ("UPDATE clean SET prediction = NULL WHERE image = 4", "logits without one"),
        ("UPDATE clean SET logits = NULL WHERE image = 4", "a prediction without logits"),
    ],
)
def test_a_prediction_is_what_the_logits_say(
    tensors: Path, tampered: Callable[..., Path], statement: str, reason: str
) -> None:
    (failure,) = verify(tampered(tensors, statement), models=NET).failures
    assert failure.image == 4 and failure.attack == "" and reason in failure.reason


def test_a_prediction_is_what_the_model_says(tensors: Path, tampered: Callable[..., Path]) -> None:
    """Image 0, which the model gets wrong, gets the logits and the prediction of a third class, wrong as well."""
    pictures, labels = models.labeled(models.Linear())
    said = int(models.Linear()(pictures[:1]).argmax())
    third = 3 - said - int(labels[0])
    blob = zlib.compress(torch.eye(3)[third].numpy().tobytes()).hex()
    copy = tampered(tensors, f"UPDATE clean SET prediction = {third}, logits = x'{blob}' WHERE image = 0")
    assert reasons(verify(copy, models=NET)) == {(0, f"the clean answer's prediction is {third}, not so now")}


class Level(models.Linear):
    """Two classes are ahead, level."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * 0 + torch.tensor([3.0, 3.0, 0.0])


def test_level_classes_may_both_be_predicted(tmp_path: Path, tampered: Callable[..., Path]) -> None:
    run(tmp_path / "run", Level(), suite="none")
    copy = tampered(tmp_path / "run", "UPDATE clean SET prediction = 1 - prediction")
    assert verify(copy, models={"net": Level()}).holds


# Values of a wrong kind


@pytest.mark.parametrize(
    ("statement", "what"),
    [
        ("UPDATE rows SET distance = 'abc'", "distance of image 0 in the table rows is 'abc'"),
        ("UPDATE rows SET image = NULL WHERE image = 4", "image in the table rows is None"),
        ("UPDATE rows SET adversarial = 'none' WHERE image = 4", "adversarial of image 4 in the table rows is 'none'"),
        ("UPDATE images SET label = 'x' WHERE image = 4", "label of image 4 in the table images is 'x'"),
        ("UPDATE clean SET prediction = 0.5 WHERE image = 4", "prediction of image 4 in the table clean is 0.5"),
        ("UPDATE clean SET label = 99 WHERE image = 4", "clean answer of image 4: 3 logits, label 99"),
        ("UPDATE clean SET logits = x'00' WHERE image = 4", "clean answer of image 4: "),
        ("UPDATE models SET classes = 'many'", "classes in the table models is 'many'"),
        ("UPDATE meta SET value = x'00' WHERE key = 'data'", "value in the table meta is b'"),
    ],
)
def test_values_of_a_wrong_kind_are_damage(
    tensors: Path, tampered: Callable[..., Path], statement: str, what: str
) -> None:
    copy = tampered(tensors, statement)
    for read in (lambda: verify(copy, models=NET), lambda: report(copy)):
        with pytest.raises(InputError, match="is damaged") as caught:
            read()
        assert what in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ("UPDATE rows SET shape = 'axb' WHERE status = 'found' AND image = 4", "missing or damaged"),
        ("UPDATE rows SET shape = '-1x-8x8' WHERE status = 'found' AND image = 4", "missing or damaged"),
        ("UPDATE rows SET label = 99 WHERE image = 4", "its label is 99"),
        (
            "UPDATE rows SET status = 'none', distance = 9e999, adversarial = NULL WHERE image = 4",
            "its status 'none' is unknown",
        ),
    ],
)
def test_impossible_rows_do_not_hold(tensors: Path, tampered: Callable[..., Path], statement: str, reason: str) -> None:
    found = verify(tampered(tensors, statement), models=NET)
    assert {image for image, _ in reasons(found)} == {4} and any(reason in said for _, said in reasons(found))


def test_rows_of_an_attack_the_ledger_does_not_know_do_not_hold(tensors: Path, tampered: Callable[..., Path]) -> None:
    copy = tampered(tensors, "DELETE FROM attacks WHERE name = 'gaussian-noise-l2'")
    (failure,) = verify(copy, models=NET).failures
    assert failure.attack.startswith("GaussianNoise(") and failure.image is None
    assert failure.reason == "the ledger has no entry of this attack, which says its name and norm"
    copy = tampered(tensors, "UPDATE attacks SET norm = 'l0' WHERE name = 'boundary-projection-l2'")
    assert any("its rows are in l2, its entry says l0" in reason for _, reason in reasons(verify(copy, models=NET)))


# The command


def test_a_ledger_made_by_python_or_merge_goes_on_itself(run: Run, tmp_path: Path) -> None:
    evaluate(models.digits(), "digits", suite="fgm-l2", norms=("l2",), images=3, out=tmp_path, name=NAME, probe=False)
    options = ("--data", "digits", "--norms", "l2", "--images", 3, "--out", tmp_path)
    shown = run("evaluate", "--model", NAME, "--attacks", "fgm-l2", *options)
    assert shown.code == 0 and "holds 3 rows already" in shown.err
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    run("evaluate", "--model", "evaluation_models:silent", "--attacks", "fgm-l2", *options)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["evaluation_models-silent"]


def test_models_of_one_name_are_told_apart_by_their_digests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed, name in enumerate("ab"):
        models.run(tmp_path / name, models.Linear(seed=seed), suite=SUITE[:1])
    merge(tmp_path / "a", tmp_path / "b", tmp_path / "c")
    given = {"own": models.Linear(seed=0), None: models.Linear(seed=1)}  # by the folder of the weights
    monkeypatch.setattr(reproduction, "load_any", lambda _name, weights, root: given[weights])
    found = reproduction.verify_runs(tmp_path / "c", weights="own")
    assert found.holds and found.rows == 16
    assert "net" in reproduction.verify_runs(tmp_path / "c").unchecked[0]


def test_the_command_says_it(run: Run, digits: Path, tampered: Callable[..., Path]) -> None:
    shown = run("verify", digits)
    assert shown.code == 0 and shown.out == "20 rows, 20 clean answers, 0 certificates: everything holds\n"
    copy = tampered(digits, FAILED, "DELETE FROM rows WHERE image = 7")
    shown = run("verify", copy)
    assert shown.code == 0 and shown.out.splitlines() == [
        f"note: {NAME}: image 7 has no row of boundary-projection-l2",
        "1 row found nothing: an attack that fails leaves nothing to recompute",
        "19 rows, 20 clean answers, 0 certificates: everything holds",
    ]
    found = document(run("verify", copy, "--json"))
    assert found["found_nothing"] == 1 and "image 7" in found["notices"][0]
    shown = run("verify", tampered(copy, "UPDATE meta SET value = 'train' WHERE key = 'split'"))
    assert shown.code == 1 and shown.out.startswith("all images: none of the 20 stored images")
    assert_error(run("verify", tampered(copy, "UPDATE rows SET distance = 'abc'")), "is damaged")
