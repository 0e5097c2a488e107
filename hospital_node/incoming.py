"""One import on its way into the store: compared, part by part, with what is there; named in the catalogue at its end.

Until then nobody reads its segments, and an import that fails removes them again.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass, replace

import numpy as np
import numpy.typing as npt
import pandas as pd

from data_schemas.canonical import canonical_bytes
from data_schemas.errors import BadInput
from data_schemas.reading import Flag, QualityReport, ValidReadings
from hospital_node.account import NOTHING, account_of
from hospital_node.measures import seconds_of
from hospital_node.portrait import Portrait
from hospital_node.segments import Segments

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
    """The parts of one import, inside one transaction of the catalogue. Parts hold different people."""

    def __init__(self, db: sqlite3.Connection, segments: Segments) -> None:
        self._db, self._segments = db, segments
        self._before = {str(row[0]) for row in db.execute("SELECT sha256 FROM sources")}
        self._new: list[str] = []
        self._newest_s = 0
        self.past = past(db)
        self.account = NOTHING
        self.number: int | None = None

    def add(
        self, valid: ValidReadings, quarantined: pd.DataFrame, report: QualityReport, rows_by_file: Mapping[str, int]
    ) -> None:
        """Write what is new of a part. rows_by_file: rows in, by the file's SHA-256. Raises StorageFailed, BadInput."""
        if not report.balanced:
            raise BadInput("the report of this import does not add up", "pass on the report that validate() returned")
        stored = stored_values(self._db, self._segments, valid.frame)
        fresh, held, final = _compare(valid.frame, quarantined, report, self._before, stored)
        self._write("readings", fresh)
        self._write("quarantine", held)
        self.account += account_of(rows_by_file, fresh, held, final)

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

    def _write(self, kind: str, frame: pd.DataFrame) -> None:
        if not len(frame):
            return
        name, new = self._segments.write(frame)
        self._new += [name] if new else []
        if kind == "readings":
            self._newest_s = max(self._newest_s, int(seconds_of(frame).max()))
        note_segment(self._db, name, kind, frame)


def note_segment(db: sqlite3.Connection, name: str, kind: str, frame: pd.DataFrame) -> None:
    """Name a segment in the catalogue and, of readings, where each person's rows lie (sorted by person and time)."""
    db.execute("INSERT INTO segments VALUES (?, ?, ?)", (name, kind, len(frame)))
    if kind != "readings":
        return
    person, names = pd.factorize(frame["patient"])
    second = seconds_of(frame)
    first = np.flatnonzero(np.append(True, np.diff(person) != 0))
    last = np.append(first[1:], len(person)) - 1
    made = np.add.reduceat((frame["flags"].to_numpy() & int(Flag.INTERPOLATED)) != 0, first, dtype=np.int64)
    rows = zip(
        first.tolist(),
        (last - first + 1).tolist(),
        made.tolist(),
        second[first].tolist(),
        second[last].tolist(),
        strict=True,
    )
    db.executemany(
        "INSERT INTO people VALUES (?, ?, ?, ?, ?, ?, ?)",
        [(str(names[person[row[0]]]), name, *row) for row in rows],
    )


def freshness(db: sqlite3.Connection) -> dict[str, Freshness]:
    """Return, by origin, how fresh what came from it is."""
    if db.execute("SELECT 1 FROM sqlite_master WHERE name = 'origins'").fetchone() is None:
        return {}
    return {row[0]: Freshness(*row[1:]) for row in db.execute("SELECT * FROM origins")}


def past(db: sqlite3.Connection) -> Portrait:
    """Return the portrait of everything imported so far."""
    portraits = (Portrait.from_json(json.loads(row[0])) for row in db.execute("SELECT portrait FROM imports"))
    return sum(portraits, start=Portrait.empty())


def stored_values(db: sqlite3.Connection, segments: Segments, frame: pd.DataFrame) -> npt.NDArray[np.float32]:
    """Return, for each row, the glucose that is stored of its person at its second; nan where none is."""
    found = np.full(len(frame), np.nan, dtype=np.float32)
    if not len(frame):
        return found
    person, names = pd.factorize(frame["patient"])
    second = seconds_of(frame)
    times = pd.Series(second).groupby(person)
    first, last = times.min(), times.max()
    for code, name in enumerate(names):
        places = db.execute(
            "SELECT segment, first_row, rows FROM people WHERE patient = ? AND last_s >= ? AND first_s <= ?",
            (str(name), int(first[code]), int(last[code])),
        ).fetchall()
        if places:
            mine = np.flatnonzero(person == code)
            there = segments.frame(places, ("measured_at", "glucose_mg_dl"))
            held = pd.Series(there["glucose_mg_dl"].to_numpy(), index=seconds_of(there))
            held = held[~held.index.duplicated()]
            found[mine] = held.reindex(second[mine]).to_numpy(dtype=np.float32)
    return found


def _compare(
    valid: pd.DataFrame,
    quarantined: pd.DataFrame,
    report: QualityReport,
    before: set[str],
    stored: npt.NDArray[np.float32],
) -> tuple[pd.DataFrame, pd.DataFrame, QualityReport]:
    """Return what is new: readings, quarantined rows, and the report in which every row still has one place."""
    known, known_held = valid["source"].isin(before).to_numpy(), quarantined["source"].isin(before).to_numpy()
    same = ~known & (stored == valid["glucose_mg_dl"].to_numpy())
    other = ~known & ~same & ~np.isnan(stored)
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
