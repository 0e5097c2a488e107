"""One import on its way into the store: compared, part by part, with what is there; named in the catalogue at its end.

Until then nobody reads its segments, and an import that fails removes them again.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pandas as pd

from data_schemas.canonical import canonical_bytes
from data_schemas.errors import BadInput
from data_schemas.reading import COLUMNS, QualityReport, ValidReadings
from hospital_node.account import NOTHING
from hospital_node.checked import CheckedPart, Span, spans_of
from hospital_node.measures import NEAR_S, seconds_of
from hospital_node.portrait import Portrait
from hospital_node.segments import Segments, arrow_bytes, rows_of

Int: TypeAlias = npt.NDArray[np.int64]
Float32: TypeAlias = npt.NDArray[np.float32]

# Rules of the store itself, beside those of the expectation suite.
FILE_ALREADY_IMPORTED = "file-already-imported"
ALREADY_STORED = "already-stored"
CONFLICTS_WITH_STORED = "conflicts-with-stored"
# The origin of readings that apps sent; that of an export is its folder.
APPS = "apps"
# Made when first needed: a store from before it goes on.
_ORIGINS = """
CREATE TABLE IF NOT EXISTS origins (origin TEXT PRIMARY KEY, newest_s INTEGER NOT NULL, imported_s INTEGER NOT NULL,
 files INTEGER NOT NULL, readings INTEGER NOT NULL) STRICT
"""


@dataclass(frozen=True, slots=True)
class Freshness:
    """What came from one origin: newest reading and last import (epoch seconds), files, readings."""

    newest_s: int
    imported_s: int
    files: int
    readings: int


class Incoming:
    """The parts of one import, inside one transaction of the catalogue. Parts hold different people.

    most_mg_dl: by which readings of a person within NEAR_S may differ.
    """

    def __init__(self, db: sqlite3.Connection, segments: Segments, most_mg_dl: float) -> None:
        self._db, self._segments, self._most_mg_dl = db, segments, most_mg_dl
        self._before = {str(row[0]) for row in db.execute("SELECT sha256 FROM sources")}
        self._new: list[str] = []
        self._newest_s = 0
        self.past = past(db)
        self.account = NOTHING
        self.number: int | None = None

    def add(self, part: CheckedPart) -> None:
        """Write what is new of a part. Raises StorageFailed, BadInput."""
        if not part.account.report.balanced:
            raise BadInput("the report of this import does not add up", "pass on the report that validate() returned")
        if self._before & part.account.files.keys() or any(places_of(self._db, span) for span in part.spans):
            part = self._what_is_new(part)
        if part.readings:
            self._newest_s = max(self._newest_s, *(span.last_s for span in part.spans))
            self._write("readings", part.readings, part.account.report.accepted, part.spans)
        if len(part.quarantined):
            self._write("quarantine", arrow_bytes(part.quarantined), len(part.quarantined))
        self.account += part.account

    def _what_is_new(self, part: CheckedPart) -> CheckedPart:
        """Return the part without what the store holds already."""
        valid = rows_of(part.readings) if part.readings else part.quarantined[list(COLUMNS)][:0]
        stored = stored_beside(self._db, self._segments, valid)
        fresh, held, report = _compare(
            valid, part.quarantined, part.account.report, self._before, stored, self._most_mg_dl
        )
        rows_by_file = {source: file.rows_in for source, file in part.account.files.items()}
        return CheckedPart.of(ValidReadings(fresh), held, report, rows_by_file)

    def finish(self, flagged: Mapping[str, int], origin: str = "") -> None:
        """Add flags about the people as a whole, and note the import, unless all of its files were there before.

        origin: where the files came from, for `freshness`.
        """
        report = self.account.report
        self.account = replace(self.account, report=replace(report, flagged=report.flagged | dict(flagged)))
        new = sorted(self.account.files.keys() - self._before)
        if not new:
            return
        self._db.executemany("INSERT INTO sources VALUES (?)", [(source,) for source in new])
        kept = (canonical_bytes(asdict(self.account.report)), canonical_bytes(self.account.portrait.to_json()))
        self._note_origin(origin, len(new))
        self.number = self._db.execute("INSERT INTO imports (report, portrait) VALUES (?, ?)", kept).lastrowid

    def _note_origin(self, origin: str, files: int) -> None:
        before = freshness(self._db).get(origin, Freshness(0, 0, 0, 0))
        self._db.execute(_ORIGINS)
        now = Freshness(
            max(before.newest_s, self._newest_s),
            int(time.time()),
            before.files + files,
            before.readings + self.account.report.accepted,
        )
        self._db.execute("INSERT OR REPLACE INTO origins VALUES (?, ?, ?, ?, ?)", (origin, *astuple(now)))

    def undo(self) -> None:
        """Remove the segments that this import wrote."""
        for name in self._new:
            self._segments.remove(name)

    def _write(self, kind: str, content: bytes, rows: int, spans: tuple[Span, ...] = ()) -> None:
        name, new = self._segments.write(content)
        self._new += [name] if new else []
        note_segment(self._db, name, kind, rows, spans)


def note_segment(db: sqlite3.Connection, name: str, kind: str, rows: int, spans: Sequence[Span] = ()) -> None:
    """Name a segment in the catalogue and, of readings, where each person's rows lie."""
    db.execute("INSERT INTO segments VALUES (?, ?, ?)", (name, kind, rows))
    db.executemany("INSERT INTO people VALUES (?, ?, ?, ?, ?, ?, ?)", [(s[0], name, *s[1:]) for s in spans])


def freshness(db: sqlite3.Connection) -> dict[str, Freshness]:
    """Return, by origin, how fresh what came from it is."""
    if db.execute("SELECT 1 FROM sqlite_master WHERE name = 'origins'").fetchone() is None:
        return {}
    return {row[0]: Freshness(*row[1:]) for row in db.execute("SELECT * FROM origins")}


def past(db: sqlite3.Connection) -> Portrait:
    """Return the portrait of everything imported so far."""
    portraits = (Portrait.from_json(json.loads(row[0])) for row in db.execute("SELECT portrait FROM imports"))
    return sum(portraits, start=Portrait.empty())


def places_of(db: sqlite3.Connection, span: Span) -> list[tuple[str, int, int]]:
    """Return where the person's stored rows lie (segment, first row, rows) that may be at these times or near."""
    return db.execute(
        "SELECT segment, first_row, rows FROM people WHERE patient = ? AND last_s >= ? AND first_s <= ?",
        (span.patient, span.first_s - NEAR_S, span.last_s + NEAR_S),
    ).fetchall()


@dataclass(frozen=True, slots=True)
class Stored:
    """What the store holds of each row's person. value: mg/dL at its second, nan: none.

    difference: mg/dL, the largest to a stored reading at another second within NEAR_S; 0 without one.
    """

    value: Float32
    difference: Float32


def stored_beside(db: sqlite3.Connection, segments: Segments, frame: pd.DataFrame) -> Stored:
    """Return what is stored at and beside each row of `frame`, which is sorted by person and time."""
    value, difference = np.full(len(frame), np.nan, dtype=np.float32), np.zeros(len(frame), dtype=np.float32)
    second, glucose = seconds_of(frame), frame["glucose_mg_dl"].to_numpy(np.float32)
    for span in spans_of(frame):
        places = places_of(db, span)
        if places:
            mine = slice(span.first_row, span.first_row + span.rows)
            there = segments.frame(places, ("measured_at", "glucose_mg_dl"))
            times, first = np.unique(seconds_of(there), return_index=True)
            held = there["glucose_mg_dl"].to_numpy(np.float32)[first]
            value[mine], difference[mine] = _beside(second[mine], glucose[mine], times, held)
    return Stored(value, difference)


def _beside(second: Int, glucose: Float32, times: Int, held: Float32) -> tuple[Float32, Float32]:
    """Return the value held at each second, and the largest difference to those held near it; times increase."""
    after = np.searchsorted(times, second, side="left")
    there = times.take(after, mode="clip") == second
    value = np.where(there, held.take(after, mode="clip"), np.float32(np.nan))
    difference = np.zeros(len(second), dtype=np.float32)
    for at in (after - 1, after + there):
        inside = (at >= 0) & (at < len(times))
        near = inside & (np.abs(times.take(at, mode="clip") - second) <= NEAR_S)
        apart = np.abs(held.take(at, mode="clip") - glucose)
        difference = np.where(near, np.maximum(difference, apart), difference)
    return value, difference


def _compare(
    valid: pd.DataFrame,
    quarantined: pd.DataFrame,
    report: QualityReport,
    before: set[str],
    stored: Stored,
    most_mg_dl: float,
) -> tuple[pd.DataFrame, pd.DataFrame, QualityReport]:
    """Return what is new: readings, quarantined rows, and the report in which every row still has one place."""
    known, known_held = valid["source"].isin(before).to_numpy(), quarantined["source"].isin(before).to_numpy()
    same = ~known & (stored.value == valid["glucose_mg_dl"].to_numpy())
    other = ~known & ~same & (~np.isnan(stored.value) | (stored.difference > most_mg_dl))
    held = quarantined[~known_held]
    if other.any():
        held = pd.concat([held, valid[other].assign(rule=CONFLICTS_WITH_STORED)], ignore_index=True)
    gone = known | same | other
    fresh = valid[~gone] if gone.any() else valid
    more = {FILE_ALREADY_IMPORTED: int(known.sum() + known_held.sum()), ALREADY_STORED: int(same.sum())}
    by_rule = held["rule"].value_counts().sort_index()
    final = replace(
        report,
        accepted=len(fresh),
        quarantined={str(rule): int(count) for rule, count in by_rule.items()},
        duplicates=report.duplicates | {rule: count for rule, count in more.items() if count},
    )
    return fresh, held, final
