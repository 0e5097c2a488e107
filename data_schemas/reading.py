"""Canonical readings: the one table that every export becomes."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntFlag

import pandas as pd


class Flag(IntFlag):
    """What is known about a reading beyond its value."""

    NONE = 0
    CENSORED_LOW = 1  # the device said "Low" or clamped at its lower end
    CENSORED_HIGH = 2
    INTERPOLATED = 4  # made by the source's authors, not by a sensor; never scored, never trained on
    CLOCK_CHANGE = 8  # local time that a clock change skipped or repeated, and order did not settle; has no UTC time
    UNREADABLE = 16  # the device wrote something that is neither a number nor a word for low or high; has no value


# Column -> dtype of a Readings frame. measured_at is UTC; optional channels are NaN where absent.
COLUMNS: dict[str, str] = {
    "row": "int64",  # position in the import, 0-based: identifies a raw row in quarantine
    "patient": "str",  # keyed hash of the source's identity; the key stays at the node
    "measured_at": "datetime64[s, UTC]",
    "zone": "str",
    "glucose_mg_dl": "float32",
    "flags": "int32",
    "source": "str",  # SHA-256 of the source file
    "carbs_g": "float32",
    "bolus_u": "float32",
    "basal_u_per_h": "float32",
    "heart_rate": "float32",
}


@dataclass(frozen=True, slots=True)
class Readings:
    """Rows as read from an export, in canonical columns (COLUMNS), not yet validated.

    Guaranteed: columns and dtypes as in COLUMNS; UTC times; mg/dL; no identity of the source.
    rows_in counts glucose rows of the raw files, including those dropped as exact duplicates.
    """

    frame: pd.DataFrame
    rows_in: int


@dataclass(frozen=True, slots=True)
class ValidReadings:
    """Rows that passed every rule of the expectation suite.

    Guaranteed beyond Readings: sorted by patient and time, one reading per patient and second, 40..400 mg/dL.
    """

    frame: pd.DataFrame


@dataclass(frozen=True, slots=True)
class QualityReport:
    """rows_in = accepted + quarantined + duplicates, always; counts by rule, never a value."""

    rows_in: int
    accepted: int
    quarantined: dict[str, int]
    duplicates: dict[str, int]
    flagged: dict[str, int]
    patients: int

    @property
    def balanced(self) -> bool:
        """Whether every row that came in is accounted for."""
        return self.rows_in == self.accepted + sum(self.quarantined.values()) + sum(self.duplicates.values())
