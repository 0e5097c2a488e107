"""A checked part of an import, packed for the store: its readings as the file they will be, and its account."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pandas as pd

from data_schemas.reading import Flag, QualityReport, ValidReadings
from hospital_node.account import Account, account_of
from hospital_node.measures import seconds_of
from hospital_node.segments import arrow_bytes


class Span(NamedTuple):
    """Where one person's rows lie in a segment, and the first and last of their seconds."""

    patient: str
    first_row: int
    rows: int
    interpolated: int
    first_s: int
    last_s: int


@dataclass(frozen=True, slots=True)
class CheckedPart:
    """What validation made of a part.

    readings: the bytes of a segment; none without readings.  spans: in the order of its rows.  account: if everything
    of it is new to the store.  people: one row for each person (measures.measure_people).  labels: as in intake.Part.
    """

    readings: bytes
    spans: tuple[Span, ...]
    quarantined: pd.DataFrame
    account: Account
    people: pd.DataFrame = field(default_factory=pd.DataFrame)
    labels: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls, valid: ValidReadings, quarantined: pd.DataFrame, report: QualityReport, rows_by_file: Mapping[str, int]
    ) -> CheckedPart:
        """Pack what validate() returned. rows_by_file: rows in, by the file's SHA-256."""
        frame = valid.frame
        content = arrow_bytes(frame) if len(frame) else b""
        return cls(content, spans_of(frame), quarantined, account_of(rows_by_file, frame, quarantined, report))


def spans_of(frame: pd.DataFrame) -> tuple[Span, ...]:
    """Return where each person's rows lie (canonical columns, sorted by person and time)."""
    if not len(frame):
        return ()
    person, names = pd.factorize(frame["patient"])
    second = seconds_of(frame)
    first = np.flatnonzero(np.append(True, np.diff(person) != 0))
    last = np.append(first[1:], len(person)) - 1
    made = np.add.reduceat((frame["flags"].to_numpy() & int(Flag.INTERPOLATED)) != 0, first, dtype=np.int64)
    columns = ((last - first + 1).tolist(), made.tolist(), second[first].tolist(), second[last].tolist())
    return tuple(Span(str(names[person[at]]), at, *rest) for at, *rest in zip(first.tolist(), *columns, strict=True))
