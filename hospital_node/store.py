"""The store: what the hospital holds.

Immutable Arrow segments, and a SQLite catalogue that says which of them count and where each person's rows lie.

An import is one transaction: the segments are written and synced first, then the catalogue's commit makes them
count. A crash in between leaves files that the catalogue does not name; nobody reads them and the next import
removes them.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd

from data_schemas.errors import BadInput, StorageFailed
from data_schemas.reading import COLUMNS, Flag, QualityReport, ValidReadings
from data_schemas.units import SENSOR_MAX_MG_DL, SENSOR_MIN_MG_DL
from hospital_node.checked import CheckedPart, spans_of
from hospital_node.incoming import (
    ALREADY_STORED,
    CONFLICTS_WITH_STORED,
    FILE_ALREADY_IMPORTED,
    Freshness,
    Incoming,
    freshness,
    note_segment,
    past,
    stored_beside,
)
from hospital_node.measures import seconds_of
from hospital_node.portrait import Portrait
from hospital_node.row_rules import row_rules
from hospital_node.scratch import scratch
from hospital_node.segments import Segments, arrow_bytes
from hospital_node.suites import Suite

if TYPE_CHECKING:
    from pipeline.windows import Series

__all__ = ["ALREADY_STORED", "CONFLICTS_WITH_STORED", "FILE_ALREADY_IMPORTED", "Store", "StoreCounts", "quarantine_ids"]

Kind = Literal["readings", "quarantine"]

# The catalogue's form: a store of another one is not read wrongly but refused.
_FORM = 2
_SCHEMA = """
CREATE TABLE segments (name TEXT PRIMARY KEY, kind TEXT NOT NULL, rows INTEGER NOT NULL) STRICT;
CREATE TABLE people (patient TEXT NOT NULL, segment TEXT NOT NULL, first_row INTEGER NOT NULL, rows INTEGER NOT NULL,
 interpolated INTEGER NOT NULL, first_s INTEGER NOT NULL, last_s INTEGER NOT NULL,
 PRIMARY KEY (patient, segment)) STRICT;
CREATE TABLE sources (sha256 TEXT PRIMARY KEY) STRICT;
CREATE TABLE imports (number INTEGER PRIMARY KEY, report BLOB NOT NULL, portrait BLOB NOT NULL) STRICT;
PRAGMA user_version = 2
"""
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
        self._catalogue = folder / "catalogue.db"
        try:
            (folder / "segments").mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise StorageFailed(f"{folder}: not created ({error.strerror})", _MEND) from error
        self._segments = Segments(folder / "segments")
        if not self._catalogue.exists() or self._catalogue.stat().st_size == 0:
            self._create_catalogue()
        with self._reading() as db:
            if db.execute("PRAGMA user_version").fetchone() != (_FORM,):
                raise BadInput(
                    f"{folder} was written by another version of Islet",
                    f"move it elsewhere (mv {folder} {folder}.old), then run `islet node import`: it makes a new store",
                )

    @contextmanager
    def importing(self, suite: Suite | None = None) -> Iterator[Incoming]:
        """Return one import to add parts to: stored whole at the end of the block, or not at all after an error.

        Rows of a file imported before count as duplicates (FILE_ALREADY_IMPORTED), and so do readings already stored
        from another file (ALREADY_STORED); a reading whose person and second is stored with another value is
        quarantined (CONFLICTS_WITH_STORED), and so is one that differs from a stored one right beside it by more than
        the suite (None: Islet's own) allows. Raises StorageFailed, with nothing changed.
        """
        most_mg_dl = row_rules(suite).beside_limit.high
        with self._transaction() as db:
            self._segments.remove_all_but(self._named(db))
            incoming = Incoming(db, self._segments, most_mg_dl)
            try:
                yield incoming
                db.execute("COMMIT")
            except BaseException:
                incoming.undo()
                raise

    def add(
        self,
        valid: ValidReadings,
        quarantined: pd.DataFrame,
        report: QualityReport,
        sources: Sequence[str],
        origin: str = "",
    ) -> QualityReport:
        """Store an import of one part and return its report after comparing with what was stored; see importing().

        sources: SHA-256 of every file of the import; origin: where they came from.
        """
        rows = valid.frame["source"].value_counts().add(quarantined["source"].value_counts(), fill_value=0)
        with self.importing() as incoming:
            by_file = {source: int(rows.get(source, 0)) for source in sources}
            incoming.add(CheckedPart.of(valid, quarantined, report, by_file))
            incoming.finish({}, origin)
        return incoming.account.report

    def patients(self) -> tuple[str, ...]:
        """Return pseudonyms of everybody with a reading, sorted."""
        with self._reading() as db:
            return tuple(str(row[0]) for row in db.execute("SELECT DISTINCT patient FROM people ORDER BY patient"))

    def readings(self, patient: str, since: datetime | None = None) -> pd.DataFrame:
        """Return one person's readings (canonical columns) from `since` (tz-aware) on, sorted by time."""
        with self._reading() as db:
            places = db.execute(
                "SELECT segment, first_row, rows FROM people WHERE patient = ? ORDER BY first_s", (patient,)
            ).fetchall()
            frame = self._segments.frame(places) if places else _no_rows()
        if since is not None:
            frame = frame[frame["measured_at"] >= pd.Timestamp(since)]
        return frame.sort_values("measured_at", ignore_index=True)

    def series(self, patients: Collection[str] | None = None) -> Series:
        """Return the sensor's own readings of these people (None: of everybody); interpolated rows are left out.

        The arrays lie in files, so that a store of any size takes no memory.
        """
        from pipeline.windows import Series

        with self._reading() as db:
            places = [
                row
                for row in db.execute(
                    "SELECT patient, segment, first_row, rows, interpolated FROM people ORDER BY patient, first_s"
                )
                if (patients is None or row[0] in patients) and row[3] > row[4]
            ]
            total, allocate = sum(row[3] - row[4] for row in places), scratch(self.folder)
            time_s, glucose = allocate(total, np.int64), allocate(total, np.float32)
            names, starts, end = [], [0], 0
            for name, own in groupby(places, key=lambda row: str(row[0])):
                seconds, values = self._own_readings([(row[1], row[2], row[3]) for row in own])
                time_s[end : end + len(seconds)], glucose[end : end + len(seconds)] = seconds, values
                end += len(seconds)
                names.append(name)
                starts.append(end)
        return Series(tuple(names), np.array(starts, np.int64), time_s[:end], glucose[:end])

    def _own_readings(self, places: Sequence[tuple[str, int, int]]) -> tuple[np.ndarray, np.ndarray]:
        frame = self._segments.frame(places, ("measured_at", "glucose_mg_dl", "flags"))
        own = (frame["flags"].to_numpy() & int(Flag.INTERPOLATED)) == 0
        seconds, glucose = seconds_of(frame)[own], frame["glucose_mg_dl"].to_numpy()[own]
        if (np.diff(seconds) <= 0).any():
            seconds, first = np.unique(seconds, return_index=True)
            glucose = glucose[first]
        return seconds, glucose

    def state(self) -> tuple[str, ...]:
        """Names of the segments of readings: they change with every import that adds readings, and only then."""
        with self._reading() as db:
            return self._names(db, "readings")

    def past(self) -> Portrait:
        """Return the portrait of everything imported so far."""
        with self._reading() as db:
            return past(db)

    def freshness(self) -> dict[str, Freshness]:
        """Return, by origin, how fresh what came from it is."""
        with self._reading() as db:
            return freshness(db)

    def quarantined(self) -> pd.DataFrame:
        """Return every quarantined row (canonical columns and `rule`), for the hospital's own eyes."""
        with self._reading() as db:
            return self._held_rows(db)

    def settle(self, ids: Collection[str], *, release: bool) -> int:
        """Take rows out of quarantine, for good, whole or not at all; returns how many.

        ids: as quarantine_ids gives them. release: they become readings; otherwise they are discarded. Raises
        BadInput, with nothing changed, when one is not there, has no time or value, or when its person has a reading
        at its second.
        """
        written: list[str] = []
        with self._transaction() as db:
            held = self._held_rows(db)
            chosen = quarantine_ids(held).isin(list(ids)).to_numpy()
            if int(chosen.sum()) != len(set(ids)):
                raise BadInput("a row of these is not in quarantine", "see `islet node quarantine show`")
            freed = self._as_readings(db, held[chosen]) if release else held[:0]
            db.execute("DELETE FROM segments WHERE kind = 'quarantine'")
            try:
                for kind, frame in (("readings", freed[list(COLUMNS)]), ("quarantine", held[~chosen])):
                    if len(frame):
                        name, new = self._segments.write(arrow_bytes(frame))
                        written += [name] if new else []
                        note_segment(db, name, kind, len(frame), spans_of(frame) if kind == "readings" else ())
                db.execute("COMMIT")
            except BaseException:
                for name in written:
                    self._segments.remove(name)
                raise
        with self._transaction() as db:
            self._segments.remove_all_but(self._named(db))
        return int(chosen.sum())

    def counts(self) -> StoreCounts:
        """Return how much the store holds."""
        with self._reading() as db:
            rows, made, people = db.execute(
                "SELECT coalesce(sum(rows), 0), coalesce(sum(interpolated), 0), count(DISTINCT patient) FROM people"
            ).fetchone()
            held = db.execute("SELECT coalesce(sum(rows), 0) FROM segments WHERE kind = 'quarantine'").fetchone()[0]
            files = db.execute("SELECT count(*) FROM sources").fetchone()[0]
        return StoreCounts(int(rows), int(made), int(held), int(people), int(files))

    def _held_rows(self, db: sqlite3.Connection) -> pd.DataFrame:
        places = db.execute("SELECT name, 0, rows FROM segments WHERE kind = 'quarantine' ORDER BY rowid").fetchall()
        return self._segments.frame(places) if places else _no_rows(rule="str")

    def _as_readings(self, db: sqlite3.Connection, rows: pd.DataFrame) -> pd.DataFrame:
        """Return rows as readings, clamped to the sensor's range and marked. Raises BadInput when they cannot be."""
        hint = "discard it, or correct the export at its source"
        if rows["measured_at"].isna().any() or rows["glucose_mg_dl"].isna().any():
            raise BadInput("a row without a time or a value cannot become a reading", hint)
        rows = rows.sort_values(["patient", "measured_at"], ignore_index=True)
        again = rows.duplicated(["patient", "measured_at"]).any()
        if again or not np.isnan(stored_beside(db, self._segments, rows).value).all():
            raise BadInput(
                "a person would have two readings at one second", "release one of them and discard the others"
            )
        glucose = rows["glucose_mg_dl"]
        low = np.where(glucose <= SENSOR_MIN_MG_DL, int(Flag.CENSORED_LOW), 0)
        high = np.where(glucose >= SENSOR_MAX_MG_DL, int(Flag.CENSORED_HIGH), 0)
        clamped = glucose.clip(SENSOR_MIN_MG_DL, SENSOR_MAX_MG_DL)
        return rows.assign(glucose_mg_dl=clamped, flags=rows["flags"] | low | high)[list(COLUMNS)].astype(COLUMNS)

    @staticmethod
    def _names(db: sqlite3.Connection, kind: Kind) -> tuple[str, ...]:
        rows = db.execute("SELECT name FROM segments WHERE kind = ? ORDER BY rowid", (kind,))
        return tuple(str(row[0]) for row in rows)

    @staticmethod
    def _named(db: sqlite3.Connection) -> set[str]:
        return {str(row[0]) for row in db.execute("SELECT name FROM segments")}

    def _create_catalogue(self) -> None:
        with self._transaction() as db:
            if db.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,):
                for statement in _SCHEMA.strip().split(";\n"):
                    db.execute(statement)
        self._catalogue.chmod(0o600)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Return one writer's transaction, durable at its end; rolled back on any error."""
        with self._connection() as db:
            db.execute("PRAGMA synchronous = FULL")
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                if db.in_transaction:
                    db.execute("COMMIT")
            finally:
                if db.in_transaction:
                    db.execute("ROLLBACK")

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """Return one snapshot of the catalogue."""
        with self._connection() as db:
            db.execute("BEGIN")
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


def _no_rows(**more: str) -> pd.DataFrame:
    columns = COLUMNS | more
    return pd.DataFrame({name: [] for name in columns}).astype(columns)


def quarantine_ids(held: pd.DataFrame) -> pd.Series:
    """Return a short name for each quarantined row: its file's SHA-256 prefix and its place in the import."""
    return held["source"].str[:12] + "-" + held["row"].astype("str")
