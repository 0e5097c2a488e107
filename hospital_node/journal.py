"""Readings that apps send one by one: a journal in SQLite, folded into the store's segments now and then.

A segment for every post would make thousands of files, and comparing with the whole store would make each post slow.
So a post is one small durable transaction here; folding moves what has gathered into the store as one import. It can
be cut short anywhere: a batch's source is the hash of its rows, and the store knows a source that it already has.

The rules on single rows and on neighbours are those of the expectation suite, with its thresholds: what the suite
would quarantine is quarantined here under the same names, and reaches the store's quarantine.
"""

from __future__ import annotations

import sqlite3
import threading
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from data_schemas.canonical import content_hash
from data_schemas.errors import StorageFailed
from data_schemas.reading import COLUMNS, Flag, QualityReport, ValidReadings
from data_schemas.units import SENSOR_MAX_MG_DL, SENSOR_MIN_MG_DL
from hospital_node.incoming import APPS
from hospital_node.measures import NEAR_S
from hospital_node.row_rules import RowRules
from hospital_node.store import ALREADY_STORED, CONFLICTS_WITH_STORED, Store
from pipeline.forecasting import Float32, Int64

# An Idempotency-Key is remembered this long.
REMEMBERED_SECONDS = 7 * 24 * 3600
_SCHEMA = """
CREATE TABLE IF NOT EXISTS readings
 (patient TEXT NOT NULL, time_s INTEGER NOT NULL, glucose REAL NOT NULL, PRIMARY KEY (patient, time_s)) STRICT;
CREATE TABLE IF NOT EXISTS held
 (patient TEXT NOT NULL, time_s INTEGER NOT NULL, glucose REAL NOT NULL, rule TEXT NOT NULL,
  PRIMARY KEY (patient, time_s, glucose, rule)) STRICT;
CREATE TABLE IF NOT EXISTS requests
 (key TEXT PRIMARY KEY, digest TEXT NOT NULL, reply BLOB NOT NULL, at REAL NOT NULL) STRICT;
"""
_MEND = "free space or mend the disk; what was sent is not stored and can be sent again"


class KeyReused(Exception):
    """An Idempotency-Key came again with another body."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one post, row by row: `stored`, or the rule that a row broke. Positions as sent."""

    rows: tuple[str, ...]

    def count(self, what: str) -> int:
        """How many rows ended so."""
        return self.rows.count(what)


STORED = "stored"


@dataclass(slots=True)
class _Person:
    """One person's rows of the journal in memory, in order of time."""

    times: list[int] = field(default_factory=list)
    glucose: dict[int, float] = field(default_factory=dict)


class Journal:
    """The journal of one node's store. Safe between threads; one process at a time writes it."""

    def __init__(self, folder: Path, rules: RowRules) -> None:
        self._path = folder / "journal.db"
        self._rules = rules
        # One writer at a time holds _writing, also while the disk works; _lock guards the memory and is held briefly,
        # so that nobody who reads waits for a disk.
        self._writing, self._lock = threading.Lock(), threading.Lock()
        self._people: dict[str, _Person] = {}
        with self._transaction() as db:
            for statement in _SCHEMA.strip().rstrip(";").split(";\n"):
                db.execute(statement)
        self._path.chmod(0o600)
        self._remember()

    def __len__(self) -> int:
        """How many readings wait to be folded."""
        with self._lock:
            return sum(len(person.times) for person in self._people.values())

    def patients(self) -> tuple[str, ...]:
        """Everybody with a reading here."""
        with self._lock:
            return tuple(sorted(self._people))

    def readings(self, patient: str) -> tuple[Int64, Float32]:
        """Return epoch seconds int64[N], increasing, and mg/dL float32[N] of one person; empty when there are none."""
        with self._lock:
            person = self._people.get(patient, _Person())
            values = [person.glucose[t] for t in person.times]
            return np.array(person.times, np.int64), np.array(values, np.float32)

    def replayed(self, key: str, digest: str) -> bytes | None:
        """Return the reply of an earlier request with this key, or None. Raises KeyReused for another body."""
        with self._writing, self._transaction() as db:
            row = db.execute("SELECT digest, reply FROM requests WHERE key = ?", (key,)).fetchone()
        if row is None:
            return None
        if row[0] != digest:
            raise KeyReused
        return bytes(row[1])

    def remember(self, key: str, digest: str, reply: bytes, now_s: float) -> None:
        """Keep a request's reply under its Idempotency-Key."""
        with self._writing, self._transaction() as db:
            db.execute("DELETE FROM requests WHERE at < ?", (now_s - REMEMBERED_SECONDS,))
            db.execute("INSERT OR IGNORE INTO requests VALUES (?, ?, ?, ?)", (key, digest, reply, now_s))

    def add(
        self, patient: str, rows: Sequence[tuple[int, float]], stored: tuple[Int64, Float32], now_s: float
    ) -> Outcome:
        """Add one person's rows (epoch seconds, mg/dL), durably when this returns, and tell what became of each.

        stored: what the store holds of this person, in order of time. A row that is there already, with the same
        value, is a duplicate and changes nothing, so the same post may be sent again.
        """
        with self._writing:
            outcomes = self._judge(patient, rows, stored, now_s)
            fresh = [(patient, t, g) for (t, g), (o, g) in zip(rows, outcomes, strict=True) if o == STORED]
            kept = {STORED, ALREADY_STORED}
            held = [(patient, t, g, o) for (t, g), (o, _) in zip(rows, outcomes, strict=True) if o not in kept]
            with self._transaction() as db:
                db.executemany("INSERT OR IGNORE INTO readings VALUES (?, ?, ?)", fresh)
                db.executemany("INSERT OR IGNORE INTO held VALUES (?, ?, ?, ?)", held)
            for _, time_s, glucose in fresh:
                self._note(patient, time_s, glucose)
        return Outcome(tuple(outcome for outcome, _ in outcomes))

    def fold(self, store: Store) -> int:
        """Move everything into the store as one import and return how many readings moved."""
        with self._writing, self._transaction() as db:
            rows = db.execute("SELECT patient, time_s, glucose FROM readings ORDER BY 1, 2").fetchall()
            held = db.execute("SELECT patient, time_s, glucose, rule FROM held ORDER BY 1, 2, 3, 4").fetchall()
        if not rows and not held:
            return 0
        store.add(*_import(rows, held), origin=APPS)
        with self._writing:
            with self._transaction() as db:
                db.executemany("DELETE FROM readings WHERE patient = ? AND time_s = ?", [row[:2] for row in rows])
                db.executemany("DELETE FROM held WHERE patient = ? AND time_s = ? AND glucose = ? AND rule = ?", held)
            self._forget(rows)
        return len(rows)

    def _judge(
        self, patient: str, rows: Sequence[tuple[int, float]], stored: tuple[Int64, Float32], now_s: float
    ) -> list[tuple[str, float]]:
        """For each row the rule it breaks or STORED, and the value to keep."""
        person = self._people.get(patient, _Person())
        seen = _Person(list(person.times), dict(person.glucose))
        judged = []
        for time_s, sent in rows:
            glucose = float(np.float32(min(max(sent, SENSOR_MIN_MG_DL), SENSOR_MAX_MG_DL)))
            outcome = self._rules.broken(time_s, sent, now_s) or self._against(seen, stored, time_s, glucose)
            judged.append((outcome, glucose if outcome == STORED else sent))
            if outcome == STORED:
                insort(seen.times, time_s)
                seen.glucose[time_s] = glucose
        return judged

    def _against(self, seen: _Person, stored: tuple[Int64, Float32], time_s: int, glucose: float) -> str:
        """Compare a row with what is known of the same moment and right beside it."""
        times, values = stored
        first, last = np.searchsorted(times, (time_s - NEAR_S, time_s + NEAR_S + 1)).tolist()
        near = dict(zip(times[first:last].tolist(), values[first:last].tolist(), strict=True))
        low = bisect_left(seen.times, time_s - NEAR_S)
        high = bisect_left(seen.times, time_s + NEAR_S + 1)
        near |= {t: seen.glucose[t] for t in seen.times[low:high]}
        if time_s in near:
            return ALREADY_STORED if near[time_s] == glucose else CONFLICTS_WITH_STORED
        return self._rules.beside(glucose, near.values()) or STORED

    def _remember(self) -> None:
        with self._transaction() as db:
            for patient, time_s, glucose in db.execute("SELECT patient, time_s, glucose FROM readings"):
                self._note(patient, time_s, glucose)

    def _note(self, patient: str, time_s: int, glucose: float) -> None:
        with self._lock:
            person = self._people.setdefault(patient, _Person())
            if time_s not in person.glucose:
                insort(person.times, time_s)
            person.glucose[time_s] = glucose

    def _forget(self, rows: Sequence[tuple[str, int, float]]) -> None:
        """Drop what the store has now; what came meanwhile stays."""
        gone = {(patient, time_s) for patient, time_s, _ in rows}
        with self._lock:
            for patient in {patient for patient, _ in gone}:
                left = {t: g for t, g in self._people[patient].glucose.items() if (patient, t) not in gone}
                if left:
                    self._people[patient] = _Person(sorted(left), left)
                else:
                    del self._people[patient]

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Return one durable transaction; rolled back on any error."""
        try:
            db = sqlite3.connect(self._path, timeout=30, isolation_level=None)
        except sqlite3.Error as error:
            raise StorageFailed(f"the journal does not open ({error})", _MEND) from error
        try:
            db.execute("PRAGMA synchronous = FULL")
            db.execute("BEGIN IMMEDIATE")
            yield db
            db.execute("COMMIT")
        except sqlite3.Error as error:
            raise StorageFailed(f"the journal was not written ({error})", _MEND) from error
        finally:
            if db.in_transaction:
                db.execute("ROLLBACK")
            db.close()


def _import(
    rows: Sequence[tuple[str, int, float]], held: Sequence[tuple[str, int, float, str]]
) -> tuple[ValidReadings, pd.DataFrame, QualityReport, list[str]]:
    """What Store.add takes: readings, quarantined rows, the account, and the batch's hash as its source."""
    source = content_hash([[p, t, f"{g:.6f}"] for p, t, g, *_ in (*rows, *held)])
    frame = _frame(rows, source)
    refused = _frame([row[:3] for row in held], source, first_row=len(rows)).assign(rule=[row[3] for row in held])
    report = QualityReport(
        rows_in=len(rows) + len(held),
        accepted=len(rows),
        quarantined=dict(sorted(Counter(row[3] for row in held).items())),
        duplicates={},
        flagged={},
        patients=int(frame["patient"].nunique()),
    )
    return ValidReadings(frame), refused.astype({"rule": "str"}), report, [source]


def _frame(rows: Sequence[tuple[str, int, float]], source: str, first_row: int = 0) -> pd.DataFrame:
    """Return canonical columns; values at an end of the sensor's range are marked as censored."""
    frame = pd.DataFrame(rows, columns=["patient", "time_s", "glucose_mg_dl"])
    low = np.where(frame["glucose_mg_dl"] <= SENSOR_MIN_MG_DL, int(Flag.CENSORED_LOW), 0)
    high = np.where(frame["glucose_mg_dl"] >= SENSOR_MAX_MG_DL, int(Flag.CENSORED_HIGH), 0)
    frame = frame.assign(
        row=np.arange(first_row, first_row + len(frame)),
        measured_at=frame["time_s"].astype("int64").astype("datetime64[s]").dt.tz_localize("UTC"),
        zone="UTC",
        flags=low | high,
        source=source,
    )
    return frame.reindex(columns=list(COLUMNS)).astype(COLUMNS)
