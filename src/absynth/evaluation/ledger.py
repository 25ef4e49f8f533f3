"""The ledger of an evaluation: one SQLite file, the only place that knows SQL.

One ledger holds one split of one data set and any number of models. A batch of rows is one transaction, so that a
process killed at any instant loses at most the batch in flight. Resuming is a set difference on the primary keys.

The tables are plain and may be read with any SQLite tool: ``rows``, ``clean``, ``images``, ``models``, ``attacks``,
``certificates``, ``probes``, ``doubts``, ``meta``. Images are zlib-compressed little-endian float32.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from types import NoneType, TracebackType
from typing import Any

from torch import Tensor

from absynth.errors import InputError
from absynth.evaluation.files import FILE_NAME, begun, connected, nothing_in
from absynth.evaluation.packing import pack, shape_text, unpack
from absynth.evaluation.rows import AttackRecord, Certificate, CleanRow, Doubt, ModelRecord, Row

SCHEMA_VERSION = 1
_APPLICATION = 0x41425359  # "ABSY" in the file's header: tells our ledgers from other SQLite files

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE models (digest TEXT PRIMARY KEY, name TEXT NOT NULL, classes INTEGER NOT NULL);
CREATE TABLE attacks (attack TEXT PRIMARY KEY, name TEXT NOT NULL, norm TEXT NOT NULL, knowledge TEXT NOT NULL,
    kind TEXT NOT NULL);
CREATE TABLE images (image INTEGER PRIMARY KEY, label INTEGER NOT NULL, shape TEXT NOT NULL, pixels BLOB NOT NULL);
CREATE TABLE clean (model TEXT, image INTEGER, label INTEGER NOT NULL, prediction INTEGER, logits BLOB,
    message TEXT NOT NULL, PRIMARY KEY (model, image));
CREATE TABLE rows (model TEXT, attack TEXT, norm TEXT, image INTEGER, seed INTEGER, label INTEGER NOT NULL,
    distance REAL NOT NULL, found INTEGER NOT NULL, status TEXT NOT NULL, forward INTEGER NOT NULL,
    backward INTEGER NOT NULL, seconds REAL NOT NULL, shape TEXT, adversarial BLOB, message TEXT NOT NULL,
    PRIMARY KEY (model, attack, norm, image, seed));
CREATE TABLE certificates (model TEXT, image INTEGER, norm TEXT, method TEXT, radius REAL NOT NULL, kind TEXT NOT NULL,
    label INTEGER NOT NULL, PRIMARY KEY (model, image, norm, method));
CREATE TABLE probes (model TEXT, probe TEXT, subject TEXT, PRIMARY KEY (model, probe, subject));
CREATE TABLE doubts (model TEXT, code TEXT, subject TEXT, message TEXT NOT NULL, PRIMARY KEY (model, code, subject));
"""
_ROW_FIELDS = (
    *("model", "attack", "norm", "image", "seed", "label", "distance", "status"),
    *("forward", "backward", "seconds", "message"),
)
#: What is no text, by column: SQLite keeps whatever does not fit a column's type as it is.
_KINDS: Mapping[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("image", "label", "seed", "classes", "forward", "backward"), int),
    **dict.fromkeys(("distance", "seconds", "radius"), float),
    **dict.fromkeys(("adversarial", "logits"), (bytes, NoneType)),
    "pixels": bytes,
    "prediction": (int, NoneType),
    "shape": (str, NoneType),
}
_COPIED = ("meta", "models", "attacks", "images", "clean", "rows", "certificates", "probes", "doubts")


class Ledger:
    """The ledger in the run folder ``folder``. Use as a context manager.

    ``write=True`` makes folder and file when they are missing and keeps other writers out; readers may read meanwhile.
    The tables are made with the first thing that is written: until then the folder holds no ledger for anybody else.

    Raises InputError for a folder without a ledger, a damaged file or one that is no ledger, a ledger of another
    version, one that another process writes to, and a folder that cannot be written; reading does for values that no
    evaluation writes, such as text for a distance.
    """

    def __init__(self, folder: str | Path, *, write: bool = False) -> None:
        self.folder = Path(folder)
        self.path = self.folder / FILE_NAME
        self._lock: sqlite3.Connection | None = None
        self._connection: sqlite3.Connection | None = None
        self._made = False  # whether the tables are there
        try:
            with self._explained():
                if write:
                    self._claim()
                elif not begun(self.path):
                    raise nothing_in(self.folder)
                self._connection = connected(self.path, write)
                self._open()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file and let other writers in."""
        for connection in (self._connection, self._lock):
            if connection is not None:
                connection.close()
        self._connection = self._lock = None

    # What the ledger is about

    def describe(self, **facts: str) -> None:
        """Write down what the whole ledger is about: ``data``, ``split``, ``data_digest``. What is known stays.

        Raises InputError as ``check_facts`` does.
        """
        self.check_facts(**facts)
        self._write("INSERT INTO meta VALUES (?,?) ON CONFLICT DO NOTHING", facts.items())

    def check_facts(self, **facts: str) -> None:
        """Raises InputError when the ledger is already about something else."""
        known = self.facts()
        if key := different_fact(known, facts):
            raise InputError(
                f"{self.folder} holds an evaluation with {key.replace('_', ' ')} {known[key]!r}, this one has "
                f"{facts[key]!r}: give another output folder"
            )

    def facts(self) -> dict[str, str]:
        """What ``describe`` wrote down."""
        return dict(self._select("meta", ("key", "value")))

    # Adding

    def add_models(self, records: Iterable[ModelRecord]) -> None:
        """Add models; a known digest keeps its name, and the larger number of classes."""
        self._write(
            "INSERT INTO models VALUES (?,?,?) "
            "ON CONFLICT (digest) DO UPDATE SET classes = max(classes, excluded.classes)",
            [(r.digest, r.name, r.classes) for r in records],
        )

    def add_attacks(self, records: Iterable[AttackRecord]) -> None:
        """Add attacks; known ones stay."""
        values = [(r.attack, r.name, r.norm, r.knowledge, r.kind) for r in records]
        self._write("INSERT INTO attacks VALUES (?,?,?,?,?) ON CONFLICT DO NOTHING", values)

    def add_images(self, indices: Sequence[int], images: Tensor, labels: Sequence[int]) -> None:
        """Add the clean images (n,C,H,W); known indices stay."""
        values = [
            (index, label, shape_text(image), pack(image))
            for index, image, label in zip(indices, images, labels, strict=True)
        ]
        self._write("INSERT INTO images VALUES (?,?,?,?) ON CONFLICT DO NOTHING", values)

    def add_clean(self, rows: Iterable[CleanRow]) -> None:
        """Add clean answers; known ones are replaced."""
        values = [
            (r.model, r.image, r.label, r.prediction, None if r.logits is None else pack(r.logits), r.message)
            for r in rows
        ]
        self._write("INSERT OR REPLACE INTO clean VALUES (?,?,?,?,?,?)", values)

    def add_rows(self, rows: Iterable[Row]) -> None:
        """Add attack rows in one transaction; known keys stay as they are, but for errors, which are replaced."""
        rows = list(rows)
        with self._transaction() as connection:
            connection.executemany(
                "DELETE FROM rows WHERE (model, attack, norm, image, seed) = (?,?,?,?,?) AND status = 'error'",
                [row.key for row in rows],
            )
            connection.executemany(
                f"INSERT INTO rows VALUES ({','.join('?' * 15)}) ON CONFLICT DO NOTHING", map(_row_values, rows)
            )

    def add_certificates(self, certificates: Iterable[Certificate]) -> None:
        """Add certificates; known ones (same model, image, norm and method) are replaced."""
        values = [(c.model, c.image, c.norm, c.method, c.radius, c.kind, c.label) for c in certificates]
        self._write("INSERT OR REPLACE INTO certificates VALUES (?,?,?,?,?,?,?)", values)

    def add_probe(self, model: str, probe: str, subject: str, doubts: Iterable[Doubt]) -> None:
        """Write down that ``probe`` has been put to ``subject``, and the doubts it raised."""
        with self._transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO probes VALUES (?,?,?)", (model, probe, subject))
            values = [(d.model, d.code, d.subject, d.message) for d in doubts]
            connection.executemany("INSERT OR REPLACE INTO doubts VALUES (?,?,?,?)", values)

    def forget_failed_probe(self, model: str) -> None:
        """Forget the questions that were put to ``model`` where they failed, and what came of them, so that a run puts
        them again."""
        if any(doubt.code == "probe-failed" for doubt in self.doubts(model)):
            with self._transaction() as connection:
                connection.execute("DELETE FROM doubts WHERE model = ? AND subject = 'model'", (model,))
                connection.execute("DELETE FROM probes WHERE model = ? AND probe = 'model'", (model,))

    # Reading

    def keys(self, model: str, *, errors: bool = True) -> set[tuple[str, str, int, int]]:
        """The (attack, norm, image, seed) that have a row, with or without those marked as errors."""
        which = "WHERE model = ?" if errors else "WHERE model = ? AND status != 'error'"
        return set(self._select("rows", ("attack", "norm", "image", "seed"), which, model))

    def models(self) -> list[ModelRecord]:
        """All models, in the order of their names."""
        found = self._select("models", ("digest", "name", "classes"), "ORDER BY name, digest")
        return [ModelRecord(*values) for values in found]

    def attacks(self) -> dict[str, AttackRecord]:
        """All attacks by their repr."""
        found = self._select("attacks", ("attack", "name", "norm", "knowledge", "kind"), "ORDER BY rowid")
        return {values[0]: AttackRecord(*values) for values in found}

    def images(self) -> dict[int, tuple[Tensor, int]]:
        """Clean image (C,H,W) and label by index."""
        found = self._select("images", ("image", "pixels", "shape", "label"), "ORDER BY image")
        return {image: (unpack(pixels, shape), label) for image, pixels, shape, label in found}

    def clean(self, model: str) -> list[CleanRow]:
        """The clean answers of a model, by image."""
        columns = ("model", "image", "label", "prediction", "logits", "message")
        found = self._select("clean", columns, "WHERE model = ? ORDER BY image", model)
        rows = [
            CleanRow(model, image, label, prediction, None if logits is None else unpack(logits, None), message)
            for model, image, label, prediction, logits, message in found
        ]
        for row in rows:
            if row.logits is not None and not 0 <= row.label < len(row.logits):
                raise self._damaged(f"clean answer of image {row.image}: {len(row.logits)} logits, label {row.label}")
        return rows

    def rows(self, model: str, *, images: bool = True) -> list[Row]:
        """The attack rows of a model in the order they were written, with (``images``) or without adversarials."""
        columns = (*_ROW_FIELDS, "adversarial", "shape") if images else _ROW_FIELDS
        rows = []
        for values in self._select("rows", columns, "WHERE model = ? ORDER BY rowid", model):
            fields = dict(zip(columns, values, strict=True))
            pixels, shape = fields.pop("adversarial", None), fields.pop("shape", None)
            rows.append(Row(**fields, adversarial=None if pixels is None else unpack(pixels, shape)))
        return rows

    def certificates(self, model: str) -> list[Certificate]:
        """The certificates of a model."""
        columns = ("model", "image", "norm", "radius", "method", "kind", "label")
        found = self._select("certificates", columns, "WHERE model = ? ORDER BY method, norm, image", model)
        return [Certificate(*values) for values in found]

    def probes(self, model: str) -> set[tuple[str, str]]:
        """The (probe, subject) done for a model."""
        return set(self._select("probes", ("probe", "subject"), "WHERE model = ?", model))

    def doubts(self, model: str) -> list[Doubt]:
        """The doubts that probes of a model raised."""
        columns = ("model", "code", "subject", "message")
        found = self._select("doubts", columns, "WHERE model = ? ORDER BY code, subject", model)
        return [Doubt(*values) for values in found]

    def merge_from(self, other: Ledger, *, first: bool = False) -> None:
        """Take over everything of ``other`` that is not here yet; with ``first`` what is here under the same keys gives
        way to it.

        Raises InputError when it is about other data.
        """
        self.check_facts(**other.facts())
        how = ("INSERT OR REPLACE", "") if first else ("INSERT", "ON CONFLICT DO NOTHING")
        with self._transaction() as connection:
            for table in _COPIED:
                found = other._all(f"SELECT * FROM {table} ORDER BY rowid")
                if found:
                    places = ",".join("?" * len(found[0]))
                    connection.executemany(f"{how[0]} INTO {table} VALUES ({places}) {how[1]}", found)

    # SQLite

    def _claim(self) -> None:
        """Keep other writers out for as long as this ledger is open.

        An open exclusive transaction on a second, empty SQLite file: the system takes it back however the process ends,
        and unlike one on the ledger itself it keeps no reader out.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"cannot make the run folder {self.folder}: {error.strerror}; choose a writable one"
            ) from error
        self._lock = sqlite3.connect(self.folder / "writer.lock", timeout=0.2, isolation_level=None)
        self._lock.execute("BEGIN EXCLUSIVE")

    def _make(self, connection: sqlite3.Connection) -> None:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript(
            f"BEGIN IMMEDIATE; PRAGMA application_id = {_APPLICATION}; PRAGMA user_version = {SCHEMA_VERSION};"
            f"{_SCHEMA} COMMIT;"
        )
        self._made = True

    def _open(self) -> None:
        connection = self._checked()
        self._made = bool(connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0])
        if not self._made:
            return
        if connection.execute("PRAGMA application_id").fetchone()[0] != _APPLICATION:
            raise InputError(f"{self.path} is an SQLite file but no ledger of absynth: give another folder")
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version != SCHEMA_VERSION:
            raise InputError(
                f"{self.path} is a ledger of version {version}, this absynth reads version {SCHEMA_VERSION}: use the "
                "absynth that wrote it, or give another output folder"
            )
        problem = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        if problem != "ok":
            raise sqlite3.DatabaseError(problem)

    def _checked(self) -> sqlite3.Connection:
        if self._connection is None:
            raise InputError(f"the ledger in {self.folder} is closed: open it again")
        return self._connection

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """SQLite's errors as InputErrors."""
        try:
            yield
        except sqlite3.OperationalError as error:
            if "locked" in str(error) or "busy" in str(error):
                raise InputError(
                    f"{self.folder} is in use by another process: wait until it has ended, or give another output "
                    "folder"
                ) from error
            raise InputError(
                f"cannot use {self.path}: {error}; check the folder's permissions and free space"
            ) from error
        except sqlite3.IntegrityError:
            raise  # a value of the wrong kind: a mistake in the program, not in the file
        except sqlite3.DatabaseError as error:
            raise self._damaged(str(error)) from error

    def _damaged(self, what: str) -> InputError:
        return InputError(f"{self.path} is damaged ({what}): restore it from a copy, or move it away and run again")

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._explained():
            connection = self._checked()
            if not self._made:
                self._make(connection)
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
            except BaseException:
                connection.execute("ROLLBACK")
                raise
            connection.execute("COMMIT")

    def _write(self, statement: str, values: Iterable[Sequence[Any]]) -> None:
        with self._transaction() as connection:
            connection.executemany(statement, list(values))

    def _all(self, statement: str, *values: Any) -> list[Any]:
        if not self._made:
            return []
        with self._explained(), closing(self._checked().execute(statement, values)) as cursor:
            return cursor.fetchall()

    def _select(self, table: str, columns: Sequence[str], rest: str = "", *values: Any) -> list[Any]:
        """These columns of a table. Raises InputError for a value of a kind that is never written there."""
        found = self._all(f"SELECT {', '.join(columns)} FROM {table} {rest}", *values)
        kinds = [_KINDS.get(column, str) for column in columns]
        for record in found:
            for column, kind, value in zip(columns, kinds, record, strict=True):
                if not isinstance(value, kind):
                    image = dict(zip(columns, record, strict=True)).get("image")
                    where = "" if image is None else f" of image {image!r}"
                    raise self._damaged(f"{column}{where} in the table {table} is {repr(value)[:40]}")
        return found


def different_fact(known: Mapping[str, str], facts: Mapping[str, str]) -> str:
    """The fact that says that two ledgers are about different things, empty where none does. Data of one digest are
    the same under whatever name."""
    same = "data_digest" in known and known["data_digest"] == facts.get("data_digest")
    told = [key for key in facts if not (same and key == "data")]
    return next((key for key in told if key in known and known[key] != facts[key]), "")


def _row_values(row: Row) -> tuple[Any, ...]:
    blob = None if row.adversarial is None else pack(row.adversarial)
    shape = None if row.adversarial is None else shape_text(row.adversarial)
    return (
        *(row.model, row.attack, row.norm, row.image, row.seed, row.label, row.distance, int(row.found), row.status),
        *(row.forward, row.backward, row.seconds, shape, blob, row.message),
    )
