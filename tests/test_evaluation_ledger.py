"""The ledger: what is written is read back, resuming is a set difference, and bad files are told apart."""

from __future__ import annotations

import math
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from absynth.errors import InputError
from absynth.evaluation.folders import ledger_folders, merge_ledgers, rows_at_hand
from absynth.evaluation.ledger import FILE_NAME, Ledger
from absynth.evaluation.rows import AttackRecord, Certificate, CleanRow, Doubt, ModelRecord, Row

ROW = Row("m", "A()", "l2", 3, 0, 1, 0.1 + 0.2, "found", 5, 2, 0.5, torch.rand(1, 8, 8), "")


def filled(folder: Path, rows: list[Row], data: str = "digits") -> Path:
    with Ledger(folder, write=True) as ledger:
        ledger.describe(data=data)
        ledger.add_models([ModelRecord("m", "model", 3)])
        ledger.add_rows(rows)
    return folder


def test_what_is_written_is_read_back_exactly(tmp_path: Path) -> None:
    rows = [
        ROW,
        replace(ROW, image=4, distance=math.inf, status="failed", adversarial=None),
        replace(ROW, image=5, distance=math.inf, status="error", adversarial=None, message="it raised"),
    ]
    clean = [CleanRow("m", 3, 1, 1, torch.tensor([0.1, 2.0, -1.0])), CleanRow("m", 4, 1, None, None, "NaN")]
    certificate = Certificate("m", 3, "l2", 0.25, "bisector", "exact", 1)
    with Ledger(tmp_path, write=True) as ledger:
        ledger.add_models([ModelRecord("m", "model", 3)])
        ledger.add_attacks([AttackRecord("A()", "a-l2", "l2", "gradient", "minimum")])
        ledger.add_images([3], torch.full((1, 1, 8, 8), 0.1), [1])
        ledger.add_rows(rows)
        ledger.add_clean(clean)
        ledger.add_certificates([certificate])
        ledger.add_probe("m", "steps", "A()", [Doubt("m", "steps-rising", "a-l2", "more")])
    with Ledger(tmp_path) as ledger:
        for written, read in zip(rows, ledger.rows("m"), strict=True):
            assert replace(read, adversarial=None) == replace(written, adversarial=None)
        stored = ledger.rows("m")[0].adversarial
        assert stored is not None and torch.equal(stored, ROW.adversarial)
        assert ledger.rows("m", images=False)[0].adversarial is None
        assert [row.prediction for row in ledger.clean("m")] == [1, None]
        assert torch.equal(ledger.clean("m")[0].logits, clean[0].logits)
        assert torch.equal(ledger.images()[3][0], torch.full((1, 8, 8), 0.1))
        assert ledger.certificates("m") == [certificate]
        assert ledger.probes("m") == {("steps", "A()")}
        assert [doubt.code for doubt in ledger.doubts("m")] == ["steps-rising"]
        assert ledger.keys("m") == {("A()", "l2", 3, 0), ("A()", "l2", 4, 0), ("A()", "l2", 5, 0)}
        assert ledger.attacks()["A()"].knowledge == "gradient"


def test_errors_give_way_to_what_comes_of_trying_again(tmp_path: Path) -> None:
    filled(tmp_path, [ROW, replace(ROW, image=5, distance=math.inf, status="error", adversarial=None)])
    with Ledger(tmp_path, write=True) as ledger:
        assert ledger.keys("m", errors=False) == {("A()", "l2", 3, 0)}
        ledger.add_rows([replace(ROW, distance=9.0), replace(ROW, image=5)])
        assert [(row.image, row.distance) for row in ledger.rows("m")] == [(3, ROW.distance), (5, ROW.distance)]


def test_a_known_row_stays(tmp_path: Path) -> None:
    filled(tmp_path, [ROW])
    filled(tmp_path, [replace(ROW, distance=9.0)])
    with Ledger(tmp_path) as ledger:
        assert [row.distance for row in ledger.rows("m")] == [ROW.distance]


def test_a_known_model_keeps_its_name_and_its_classes(tmp_path: Path) -> None:
    with Ledger(tmp_path, write=True) as ledger:
        for record in (ModelRecord("m", "first"), ModelRecord("m", "second", 3), ModelRecord("m", "third")):
            ledger.add_models([record])
        assert ledger.models() == [ModelRecord("m", "first", 3)]


def test_a_batch_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    with Ledger(tmp_path, write=True) as ledger:
        with pytest.raises(sqlite3.IntegrityError):
            ledger.add_rows([ROW, replace(ROW, image=4, label=None)])  # type: ignore[arg-type]
        assert ledger.rows("m") == []


def test_merging_keeps_the_rows_of_both(tmp_path: Path) -> None:
    first = filled(tmp_path / "a", [ROW])
    second = filled(tmp_path / "b", [replace(ROW, distance=9.0), replace(ROW, image=7)])
    merge_ledgers([first, second], tmp_path / "c")
    with Ledger(tmp_path / "c") as ledger:
        assert [(row.image, row.distance) for row in ledger.rows("m")] == [(3, ROW.distance), (7, ROW.distance)]
        assert ledger.facts() == {"data": "digits"}
    merge_ledgers([second], first)  # into an existing one
    with Ledger(first) as ledger:
        assert len(ledger.rows("m")) == 2


@pytest.mark.parametrize("target", ["a", "b", "c", "new"])
def test_of_equal_keys_the_first_source_wins_whichever_is_the_target(tmp_path: Path, target: str) -> None:
    for distance, name in enumerate("abc", 1):
        rows = [replace(ROW, image=image, distance=float(distance)) for image in range(distance)]
        with Ledger(filled(tmp_path / name, rows), write=True) as ledger:
            ledger.add_clean([CleanRow("m", 0, 1, distance, torch.eye(4)[distance])])
    merge_ledgers([tmp_path / name for name in "abc"], tmp_path / target)
    with Ledger(tmp_path / target) as ledger:
        assert {row.image: row.distance for row in ledger.rows("m")} == {0: 1.0, 1: 2.0, 2: 3.0}
        assert [answer.prediction for answer in ledger.clean("m")] == [1]


def test_folders_of_runs_are_merged_whole_or_nothing_is_made(tmp_path: Path) -> None:
    for model in ("a", "b"):
        filled(tmp_path / "runs" / model, [replace(ROW, model=model)])
    filled(tmp_path / "more" / "c", [replace(ROW, model="c")])
    with pytest.raises(InputError, match="no evaluation in"):
        merge_ledgers([tmp_path / "runs", tmp_path / "none"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match=r"runs holds a run in .*a: give another folder, or that one"):
        merge_ledgers([tmp_path / "more"], tmp_path / "runs")
    assert not (tmp_path / "runs" / FILE_NAME).exists()
    merge_ledgers([tmp_path / "runs", tmp_path / "more"], tmp_path / "out")
    with Ledger(tmp_path / "out") as ledger:
        assert [len(ledger.rows(model)) for model in ("a", "b", "c")] == [1, 1, 1]


def test_merging_different_data_is_refused(tmp_path: Path) -> None:
    first, second = filled(tmp_path / "a", [ROW]), filled(tmp_path / "b", [ROW], data="mnist")
    with pytest.raises(InputError, match=r"a and \S+b are about different data \(data 'digits' and 'mnist'\): merge"):
        merge_ledgers([second], first)
    with pytest.raises(InputError, match=r"a and \S+b are about different data"):
        merge_ledgers([first, second], tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_merging_two_attacks_of_one_repr_is_refused(tmp_path: Path) -> None:
    for name, norm in (("a", "l2"), ("b", "linf")):
        with Ledger(filled(tmp_path / name, [ROW]), write=True) as ledger:
            ledger.add_attacks([AttackRecord("A()", f"far-{norm}", norm, "gradient", "minimum")])
    with pytest.raises(InputError, match=r"A\(\) is far-l2 in l2 in \S+a, and far-linf in linf in \S+b"):
        merge_ledgers([tmp_path / "a", tmp_path / "b"], tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_digest_says_what_the_data_are_not_their_name(tmp_path: Path) -> None:
    with Ledger(tmp_path, write=True) as ledger:
        ledger.describe(data="pictures", split="test", data_digest="1a")
        ledger.describe(data="./pictures", split="test", data_digest="1a")
        assert ledger.facts()["data"] == "pictures"
        for other in ({"split": "train", "data_digest": "1a"}, {"split": "test", "data_digest": "2b"}):
            with pytest.raises(InputError, match="give another output folder"):
                ledger.describe(data="pictures", **other)


def test_no_ledger(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no evaluation in .*: run `absynth evaluate --suite quick --out"):
        Ledger(tmp_path)
    with pytest.raises(InputError, match="no evaluation in"):
        ledger_folders([tmp_path])
    assert not list(tmp_path.iterdir())


def test_runs_of_others_deeper_below_are_not_taken(tmp_path: Path) -> None:
    for name in ("run/abs", "run/cnn", "run/abs/old"):
        filled(tmp_path / name, [ROW])
    assert ledger_folders([tmp_path / "run"]) == [tmp_path / "run" / "abs", tmp_path / "run" / "cnn"]
    assert rows_at_hand(tmp_path) == 0
    with pytest.raises(InputError, match=f"no evaluation in {tmp_path} itself: name the run, {tmp_path / 'run'}$"):
        ledger_folders([tmp_path])


@pytest.mark.parametrize("statement", ["", "PRAGMA journal_mode = WAL"])
def test_a_run_that_ended_while_it_made_its_ledger(tmp_path: Path, statement: str) -> None:
    (tmp_path / FILE_NAME).touch()
    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as connection:
        connection.execute(statement)
    assert rows_at_hand(tmp_path) == 0
    for read in (Ledger, lambda folder: ledger_folders([folder])):
        with pytest.raises(InputError, match="no evaluation in"):
            read(tmp_path)
    filled(tmp_path, [ROW])
    assert rows_at_hand(tmp_path) == 1
    with Ledger(tmp_path) as ledger:
        assert len(ledger.rows("m")) == 1


def test_another_version(tmp_path: Path) -> None:
    filled(tmp_path, [ROW])
    with sqlite3.connect(tmp_path / FILE_NAME) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(InputError, match="ledger of version 99, this absynth reads version 1"):
        Ledger(tmp_path)


def test_another_kind_of_database(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / FILE_NAME)
    connection.execute("CREATE TABLE stamps (price)")
    connection.close()
    for write in (False, True):
        with pytest.raises(InputError, match="no ledger of absynth"):
            Ledger(tmp_path, write=write)


@pytest.mark.parametrize("damage", ["garbage", "truncated", "overwritten"])
def test_a_damaged_file(tmp_path: Path, damage: str) -> None:
    filled(tmp_path, [replace(ROW, image=image, adversarial=torch.rand(1, 28, 28)) for image in range(40)])
    file = tmp_path / FILE_NAME
    with sqlite3.connect(file) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    content = bytearray(file.read_bytes())
    if damage == "garbage":
        content[:] = b"no database" * 1000
    elif damage == "truncated":
        del content[len(content) // 2 :]
    else:
        content[8192:12288] = bytes(4096)
    file.write_bytes(content)
    with pytest.raises(InputError, match="is damaged"):
        Ledger(tmp_path)


def test_one_writer_at_a_time_and_readers_meanwhile(tmp_path: Path) -> None:
    script = "import sys; from absynth.evaluation.ledger import Ledger; Ledger(sys.argv[1], write=True)"
    with Ledger(tmp_path, write=True) as ledger:
        ledger.add_rows([ROW])
        other = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
        assert other.returncode != 0 and "in use by another process" in other.stderr
        with Ledger(tmp_path) as reader:
            assert len(reader.rows("m")) == 1
    Ledger(tmp_path, write=True).close()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="choose a writable one"):
        Ledger(tmp_path / "file" / "run", write=True)


def test_a_finished_ledger_is_read_where_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(tmp_path / "a b?#%", [ROW])
    monkeypatch.setattr(os, "access", lambda *_arguments: False)
    opened, connect = [], sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda file, **options: (opened.append(file), connect(file, **options))[1])
    (place,) = ledger_folders([tmp_path])
    with Ledger(place) as ledger:
        assert len(ledger.rows("m")) == 1
        assert sorted(file.name for file in place.iterdir()) == [FILE_NAME, "writer.lock"]  # nothing beside it
    assert opened and all(uri.endswith("?mode=ro&immutable=1") for uri in opened)
    with Ledger(place, write=True) as ledger:  # a log of one who still writes is read, too
        ledger.add_rows([replace(ROW, image=7)])
        with Ledger(place) as reader:
            assert len(reader.rows("m")) == 2 and opened[-1].endswith("?mode=ro")
