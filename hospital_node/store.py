"""The store: what the hospital holds.

Immutable Arrow segments, and a SQLite catalogue that says which of them count.

An import is one transaction: the segments are written and synced first, then the catalogue's commit makes them
count. A crash in between leaves files that the catalogue does not name; nobody reads them and the next import
removes them.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
import pyarrow as pa

from data_schemas.canonical import bytes_hash, canonical_bytes
from data_schemas.errors import BadInput, StorageFailed, Tampered
from data_schemas.reading import COLUMNS, Flag, QualityReport, ValidReadings
from data_schemas.units import SENSOR_MAX_MG_DL, SENSOR_MIN_MG_DL
from pipeline.signing import write_durably

if TYPE_CHECKING:
    from pipeline.windows import Series

Kind = Literal["readings", "quarantine"]

# Rules of the store itself, beside those of the expectation suite.
FILE_ALREADY_IMPORTED = "file-already-imported"
ALREADY_STORED = "already-stored"
CONFLICTS_WITH_STORED = "conflicts-with-stored"

_SCHEMA = """
CREATE TABLE segments (name TEXT PRIMARY KEY, kind TEXT NOT NULL, rows INTEGER NOT NULL) STRICT;
CREATE TABLE sources (sha256 TEXT PRIMARY KEY) STRICT;
CREATE TABLE imports (number INTEGER PRIMARY KEY, report BLOB NOT NULL) STRICT;
"""
# Columns whose few values repeat: stored as a dictionary.
_REPEATING = ("patient", "zone", "source", "rule")
_MEND = "free space or mend the disk, then import again: nothing was changed"


@dataclass(frozen=True, slots=True)
class StoreCounts:
    """What the store holds: readings (interpolated among them), quarantined rows, people with readings, files."""

    readings: int
    interpolated: int
    quarantined: int
    patients: int
    files: int


class Store:
    """The readings of one node, in a folder of their own. Any number of readers and one writer at a time.

    Raises StorageFailed when the disk refuses, Tampered when a segment is not what was written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._segments = folder / "segments"
        self._catalogue = folder / "catalogue.db"
        self._held: dict[Kind, tuple[tuple[str, ...], pd.DataFrame]] = {}
        try:
            self._segments.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise StorageFailed(f"{folder}: not created ({error.strerror})", _MEND) from error
        if not self._catalogue.exists() or self._catalogue.stat().st_size == 0:
            self._create_catalogue()

    def add(
        self, valid: ValidReadings, quarantined: pd.DataFrame, report: QualityReport, sources: Sequence[str]
    ) -> QualityReport:
        """Store one import, whole or not at all, and return its report after comparing with what was stored.

        sources: SHA-256 of every glucose file of the import. Rows of a file imported before count as duplicates
        (FILE_ALREADY_IMPORTED), and so do readings already stored from another file (ALREADY_STORED); a reading
        whose person and second is stored with another value is quarantined (CONFLICTS_WITH_STORED). Raises
        StorageFailed, with nothing changed.
        """
        if not report.balanced:
            raise BadInput("the report of this import does not add up", "pass on the report that validate() returned")
        with self._transaction() as db:
            before = {str(row[0]) for row in db.execute("SELECT sha256 FROM sources")}
            fresh, held, final = _compare(valid.frame, quarantined, report, before, self._stored_values(db))
            self._remove_orphans(db)
            self._write_segments(db, {"readings": fresh, "quarantine": held})
            new = {*sources, *valid.frame["source"], *quarantined["source"]} - before
            db.executemany("INSERT INTO sources VALUES (?)", [(source,) for source in sorted(new)])
            if new:
                db.execute("INSERT INTO imports (report) VALUES (?)", (canonical_bytes(asdict(final)),))
        return final

    def patients(self) -> tuple[str, ...]:
        """Return pseudonyms of everybody with a reading, sorted."""
        return tuple(sorted(set(self._frame("readings")["patient"])))

    def readings(self, patient: str, since: datetime | None = None) -> pd.DataFrame:
        """Return one person's readings (canonical columns) from `since` (tz-aware) on, sorted by time."""
        frame = self._frame("readings")
        mine = frame["patient"] == patient
        if since is not None:
            mine &= frame["measured_at"] >= pd.Timestamp(since)
        return frame[mine].sort_values("measured_at", ignore_index=True)

    def series(self, patients: Sequence[str] | None = None) -> Series:
        """Return the sensor's own readings of these people (None: of everybody); interpolated rows are left out."""
        from pipeline.windows import Series

        names = self.state()
        if not names:
            return Series((), np.zeros(1, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))
        table = self._table(names)
        own = (table["flags"].to_numpy() & int(Flag.INTERPOLATED)) == 0
        patient = table["patient"].combine_chunks().dictionary_encode()
        people = np.array(patient.dictionary.to_pylist(), dtype=np.str_)
        if patients is not None:
            own &= np.isin(people, list(patients))[patient.indices.to_numpy()]
        moments = table["measured_at"].cast(pa.timestamp("s", tz="UTC"), safe=False).cast(pa.int64()).to_numpy()
        present, codes = np.unique(np.argsort(np.argsort(people))[patient.indices.to_numpy()[own]], return_inverse=True)
        names = tuple(str(name) for name in np.sort(people)[present])
        return Series.from_codes(names, codes, moments[own], table["glucose_mg_dl"].to_numpy()[own])

    def state(self) -> tuple[str, ...]:
        """Names of the segments of readings: they change with every import that adds readings, and only then."""
        with self._reading() as db:
            return self._names(db, "readings")

    def quarantined(self) -> pd.DataFrame:
        """Return every quarantined row (canonical columns and `rule`), for the hospital's own eyes."""
        return self._frame("quarantine").copy()

    def settle(self, ids: Collection[str], *, release: bool) -> int:
        """Take rows out of quarantine, for good, whole or not at all; returns how many.

        ids: as quarantine_ids gives them. release: they become readings; otherwise they are discarded. Raises
        BadInput, with nothing changed, when one is not there, has no time or value, or when its person has a reading
        at its second.
        """
        with self._transaction() as db:
            held = self._load(db, "quarantine")
            chosen = quarantine_ids(held).isin(list(ids)).to_numpy()
            if int(chosen.sum()) != len(set(ids)):
                raise BadInput("a row of these is not in quarantine", "see `islet node quarantine show`")
            freed = _as_readings(held[chosen], self._stored_values(db)) if release else held[:0]
            self._write_segments(db, {"readings": freed[list(COLUMNS)]})
            db.execute("DELETE FROM segments WHERE kind = 'quarantine'")
            self._write_segments(db, {"quarantine": held[~chosen]})
        with self._transaction() as db:
            self._remove_orphans(db)
        return int(chosen.sum())

    def counts(self) -> StoreCounts:
        """Return how much the store holds."""
        frame, held = self._frame("readings"), self._frame("quarantine")
        with self._reading() as db:
            files = int(db.execute("SELECT count(*) FROM sources").fetchone()[0])
        made = int(((frame["flags"] & int(Flag.INTERPOLATED)) != 0).sum())
        return StoreCounts(len(frame), made, len(held), int(frame["patient"].nunique()), files)

    def _frame(self, kind: Kind) -> pd.DataFrame:
        """Return the rows of one kind; what was read stays as long as the catalogue names the same segments."""
        with self._reading() as db:
            names = self._names(db, kind)
            held = self._held.get(kind)
            if held is None or held[0] != names:
                held = self._held[kind] = (names, self._load(db, kind))
        return held[1]

    def _load(self, db: sqlite3.Connection, kind: Kind) -> pd.DataFrame:
        names = self._names(db, kind)
        if not names:
            columns = COLUMNS | ({"rule": "str"} if kind == "quarantine" else {})
            return pd.DataFrame({name: [] for name in columns}).astype(columns)
        frame: pd.DataFrame = self._table(names).to_pandas(types_mapper=_string_type)
        return frame

    @staticmethod
    def _names(db: sqlite3.Connection, kind: Kind) -> tuple[str, ...]:
        rows = db.execute("SELECT name FROM segments WHERE kind = ? ORDER BY rowid", (kind,))
        return tuple(str(row[0]) for row in rows)

    def _table(self, names: Sequence[str]) -> pa.Table:
        return pa.concat_tables([self._read_segment(name) for name in names])

    def _stored_values(self, db: sqlite3.Connection) -> pd.Series:
        """Glucose stored before, by person and second."""
        frame = self._load(db, "readings")
        return frame.set_index(["patient", "measured_at"])["glucose_mg_dl"]

    def _create_catalogue(self) -> None:
        with self._transaction() as db:
            if db.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,):
                for statement in _SCHEMA.strip().split(";\n"):
                    db.execute(statement)
        self._catalogue.chmod(0o600)

    def _write_segments(self, db: sqlite3.Connection, frames: dict[Kind, pd.DataFrame]) -> None:
        """Write what is not empty and name it in the catalogue; if that fails, what was written goes again."""
        with ExitStack() as undo:
            for kind, frame in frames.items():
                if len(frame):
                    content = _arrow_bytes(frame)
                    path = self._segments / f"{bytes_hash(content)}.arrow"
                    if not path.exists():
                        undo.callback(path.unlink, missing_ok=True)
                    write_durably(path, content, 0o600)
                    db.execute("INSERT INTO segments VALUES (?, ?, ?)", (path.name, kind, len(frame)))
            undo.pop_all()

    def _read_segment(self, name: str) -> pa.Table:
        try:
            content = (self._segments / name).read_bytes()
        except OSError as error:
            raise StorageFailed(f"segment {name[:12]} cannot be read: {error.strerror}", "restore the store") from error
        if f"{bytes_hash(content)}.arrow" != name:
            raise Tampered(f"segment {name[:12]}", 0, "the bytes are not those that were stored", "restore the store")
        with pa.ipc.open_file(pa.BufferReader(content)) as reader:
            table = reader.read_all()
        plain = [field.with_type(pa.string()) if field.name in _REPEATING else field for field in table.schema]
        return table.cast(pa.schema(plain))

    def _remove_orphans(self, db: sqlite3.Connection) -> None:
        named = {str(row[0]) for row in db.execute("SELECT name FROM segments")}
        for path in self._segments.iterdir():
            if path.name not in named:
                path.unlink()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Return one writer's transaction, durable at its end; rolled back on any error."""
        with self._connection() as db:
            db.execute("PRAGMA synchronous = FULL")
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            finally:
                if db.in_transaction:
                    db.execute("ROLLBACK")

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """Return one snapshot of the catalogue."""
        with self._connection() as db:
            yield db

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        try:
            db = sqlite3.connect(self._catalogue, timeout=30, isolation_level=None)
        except sqlite3.Error as error:
            raise StorageFailed(f"the store's catalogue does not open ({error})", _MEND) from error
        try:
            yield db
        except sqlite3.Error as error:
            raise StorageFailed(f"the store's catalogue refused ({error})", _MEND) from error
        except OSError as error:
            raise StorageFailed(f"the store was not written ({error.strerror})", _MEND) from error
        finally:
            db.close()


def _compare(
    valid: pd.DataFrame, quarantined: pd.DataFrame, report: QualityReport, before: set[str], stored: pd.Series
) -> tuple[pd.DataFrame, pd.DataFrame, QualityReport]:
    """Return what is new: readings, quarantined rows, and the report in which every row still has one place."""
    known, known_held = valid["source"].isin(before).to_numpy(), quarantined["source"].isin(before).to_numpy()
    keys = pd.MultiIndex.from_frame(valid[["patient", "measured_at"]])
    value = stored.reindex(keys).to_numpy(dtype=np.float32)
    same = ~known & (value == valid["glucose_mg_dl"].to_numpy())
    other = ~known & ~same & ~np.isnan(value)
    conflicts = valid[other].assign(rule=CONFLICTS_WITH_STORED)
    held = pd.concat([quarantined[~known_held], conflicts], ignore_index=True)
    fresh = valid[~(known | same | other)]
    more = {FILE_ALREADY_IMPORTED: int(known.sum() + known_held.sum()), ALREADY_STORED: int(same.sum())}
    by_rule = held["rule"].value_counts().sort_index()
    final = replace(
        report,
        accepted=len(fresh),
        quarantined={str(rule): int(count) for rule, count in by_rule.items()},
        duplicates=report.duplicates | {rule: count for rule, count in more.items() if count},
    )
    return fresh, held, final


def quarantine_ids(held: pd.DataFrame) -> pd.Series:
    """Return a short name for each quarantined row: its file's SHA-256 prefix and its place in the import."""
    return held["source"].str[:12] + "-" + held["row"].astype("str")


def _as_readings(rows: pd.DataFrame, stored: pd.Series) -> pd.DataFrame:
    """Return rows as readings, clamped to the sensor's range and marked. Raises BadInput when they cannot be."""
    hint = "discard it, or correct the export at its source"
    if rows["measured_at"].isna().any() or rows["glucose_mg_dl"].isna().any():
        raise BadInput("a row without a time or a value cannot become a reading", hint)
    keys = pd.MultiIndex.from_frame(rows[["patient", "measured_at"]])
    if keys.duplicated().any() or keys.isin(stored.index).any():
        raise BadInput("a person would have two readings at one second", "release one of them and discard the others")
    glucose = rows["glucose_mg_dl"]
    low = np.where(glucose <= SENSOR_MIN_MG_DL, int(Flag.CENSORED_LOW), 0)
    high = np.where(glucose >= SENSOR_MAX_MG_DL, int(Flag.CENSORED_HIGH), 0)
    clamped = glucose.clip(SENSOR_MIN_MG_DL, SENSOR_MAX_MG_DL)
    return rows.assign(glucose_mg_dl=clamped, flags=rows["flags"] | low | high).astype(COLUMNS)


def _arrow_bytes(frame: pd.DataFrame) -> bytes:
    """Return an Arrow IPC file, uncompressed so that anybody can look for what must not be in it."""
    table = pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata(None)
    for name in _REPEATING:
        if name in frame.columns:
            table = table.set_column(table.column_names.index(name), name, table[name].dictionary_encode())
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue().to_pybytes())


def _string_type(kind: pa.DataType) -> pd.StringDtype | None:
    return pd.StringDtype(na_value=np.nan) if pa.types.is_string(kind) or pa.types.is_large_string(kind) else None
