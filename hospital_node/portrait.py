"""What a set of readings looks like, in counts that add up over parts and imports: no person can be told from it.

The node keeps one portrait of each import in its store's catalogue; a new import is compared with the sum of them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pandas as pd

from data_schemas.reading import Flag
from data_schemas.units import SENSOR_MAX_MG_DL, SENSOR_MIN_MG_DL
from hospital_node.measures import measure_people, seconds_of

Int: TypeAlias = npt.NDArray[np.int64]

_LOWEST, _HIGHEST = int(SENSOR_MIN_MG_DL), int(SENSOR_MAX_MG_DL)
LONGEST_STEP_MINUTES = 120


@dataclass(frozen=True, slots=True, eq=False)
class Portrait:
    """Counts over readings of the sensors themselves; interpolated rows are left out.

    glucose: int64[361], readings by whole mg/dL from 40 to 400.  steps: int64[121], neighbouring readings of one person
    by the minutes between them, 120 and more in the last.  people: persons, counted once in each import.
    expected: readings that the people's sensors promise between their first and last one.
    """

    glucose: Int
    steps: Int
    people: int
    expected: int

    @classmethod
    def of(cls, frame: pd.DataFrame) -> Portrait:
        """Return the portrait of readings (canonical columns) sorted by person and time."""
        made = (frame["flags"].to_numpy() & int(Flag.INTERPOLATED)) != 0
        own = frame[~made] if made.any() else frame
        value = np.rint(own["glucose_mg_dl"].to_numpy(np.float64)).astype(np.int64).clip(_LOWEST, _HIGHEST) - _LOWEST
        person, second = pd.factorize(own["patient"])[0], seconds_of(own)
        minutes = np.rint(np.diff(second)[np.diff(person) == 0] / 60).astype(np.int64).clip(0, LONGEST_STEP_MINUTES)
        people = measure_people(own)
        return cls(
            np.bincount(value, minlength=_HIGHEST - _LOWEST + 1).astype(np.int64),
            np.bincount(minutes, minlength=LONGEST_STEP_MINUTES + 1).astype(np.int64),
            len(people),
            round(float(people["expected"].sum())),
        )

    @classmethod
    def empty(cls) -> Portrait:
        """Return the portrait of nothing."""
        return cls(
            np.zeros(_HIGHEST - _LOWEST + 1, np.int64),
            np.zeros(LONGEST_STEP_MINUTES + 1, np.int64),
            people=0,
            expected=0,
        )

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Portrait:
        """Return what to_json gave."""
        return cls(
            np.array(value["glucose"], np.int64),
            np.array(value["steps"], np.int64),
            int(value["people"]),
            int(value["expected"]),
        )

    def to_json(self) -> dict[str, Any]:
        """Return whole numbers and lists of them."""
        return {"glucose": self.glucose.tolist(), "steps": self.steps.tolist(), "people": self.people} | {
            "expected": self.expected
        }

    def __add__(self, other: Portrait) -> Portrait:
        return Portrait(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    @property
    def readings(self) -> int:
        """How many readings."""
        return int(self.glucose.sum())

    @property
    def median_mg_dl(self) -> float:
        """Median of the readings; nan without one."""
        return _median(self.glucose) + _LOWEST

    @property
    def usual_minutes(self) -> float:
        """Median distance of neighbouring readings of one person; nan without one."""
        return _median(self.steps)

    @property
    def share_missing(self) -> float:
        """Share of the expected readings that are not there."""
        return max(0.0, 1 - self.readings / self.expected) if self.expected else 0.0

    def share(self, low_mg_dl: int, high_mg_dl: int) -> float:
        """Share of the readings from low to high, both included."""
        inside = self.glucose[max(low_mg_dl - _LOWEST, 0) : high_mg_dl - _LOWEST + 1].sum()
        return float(inside) / self.readings if self.readings else 0.0

    def bins(self, width_mg_dl: int) -> Int:
        """Return readings in bins of this width from 40 on; 400 counts with the last."""
        at = np.minimum(np.arange(len(self.glucose)), _HIGHEST - _LOWEST - 1) // width_mg_dl
        return np.bincount(at, weights=self.glucose).astype(np.int64)


def _median(counts: Int) -> float:
    total = int(counts.sum())
    return float(np.searchsorted(np.cumsum(counts), (total + 1) // 2)) if total else float("nan")
