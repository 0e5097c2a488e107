"""The account of one import: every row has one place, by rule, by file and by day; it adds up over the parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import pandas as pd

from data_schemas.reading import QualityReport
from hospital_node.measures import seconds_of
from hospital_node.portrait import Portrait

_DAY_S = 86_400
Value = TypeVar("Value", int, "FileAccount")


@dataclass(frozen=True, slots=True)
class FileAccount:
    """Rows of one file: in = accepted + quarantined + duplicates."""

    rows_in: int = 0
    accepted: int = 0
    quarantined: int = 0
    duplicates: int = 0

    def __add__(self, other: FileAccount) -> FileAccount:
        return FileAccount(
            self.rows_in + other.rows_in,
            self.accepted + other.accepted,
            self.quarantined + other.quarantined,
            self.duplicates + other.duplicates,
        )


@dataclass(frozen=True, slots=True)
class Account:
    """report: counts by rule.  portrait: of the accepted readings.  files: by SHA-256.

    days: UTC days since 1970 -> accepted readings, and people with one.  held_people: rule -> people with such rows.
    """

    report: QualityReport
    portrait: Portrait
    files: Mapping[str, FileAccount] = field(default_factory=dict)
    days: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    held_people: Mapping[str, int] = field(default_factory=dict)

    def __add__(self, other: Account) -> Account:
        """Return the account of both; the people in them are different people."""
        return Account(
            add_reports(self.report, other.report),
            self.portrait + other.portrait,
            _added(self.files, other.files, FileAccount()),
            {
                day: (self.days.get(day, (0, 0))[0] + more[0], self.days.get(day, (0, 0))[1] + more[1])
                for day, more in (dict.fromkeys(self.days, (0, 0)) | dict(other.days)).items()
            },
            _added(self.held_people, other.held_people, 0),
        )


NOTHING = Account(QualityReport(0, 0, {}, {}, {}, 0), Portrait.empty())


def account_of(
    rows_by_file: Mapping[str, int], accepted: pd.DataFrame, quarantined: pd.DataFrame, report: QualityReport
) -> Account:
    """Return the account of a part: what became of the rows of each file.

    rows_by_file: SHA-256 -> rows in. accepted: sorted by person and time.
    """
    good, held = accepted["source"].value_counts(), quarantined["source"].value_counts()
    files = {}
    for source, rows in rows_by_file.items():
        taken, aside = int(good.get(source, 0)), int(held.get(source, 0))
        files[source] = FileAccount(rows, taken, aside, rows - taken - aside)
    people = quarantined.groupby("rule", observed=True)["patient"].nunique()
    return Account(
        report,
        Portrait.of(accepted),
        files,
        _days(accepted),
        {str(rule): int(count) for rule, count in people.items()},
    )


def add_reports(one: QualityReport, other: QualityReport) -> QualityReport:
    """Return the sums, rule by rule."""
    return QualityReport(
        one.rows_in + other.rows_in,
        one.accepted + other.accepted,
        _added(one.quarantined, other.quarantined, 0),
        _added(one.duplicates, other.duplicates, 0),
        _added(one.flagged, other.flagged, 0),
        one.patients + other.patients,
    )


def _days(frame: pd.DataFrame) -> dict[int, tuple[int, int]]:
    day, person = seconds_of(frame) // _DAY_S, pd.factorize(frame["patient"])[0]
    if not len(day):
        return {}
    first = np.ones(len(day), dtype=np.bool_)
    first[1:] = (np.diff(day) != 0) | (np.diff(person) != 0)
    origin = int(day.min())
    readings = np.bincount(day - origin)
    people = np.bincount(day[first] - origin, minlength=len(readings))
    return {origin + int(at): (int(readings[at]), int(people[at])) for at in np.flatnonzero(readings)}


def _added(one: Mapping[str, Value], other: Mapping[str, Value], nothing: Value) -> dict[str, Value]:
    return {name: one.get(name, nothing) + other.get(name, nothing) for name in {**one, **other}}
