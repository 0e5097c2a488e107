"""The node's readings in memory for the endpoint: the store, read again when it changes, and the journal on top."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_schemas.forecast import NoForecast
from hospital_node.journal import Journal, Outcome
from hospital_node.problems import Declined
from hospital_node.row_rules import row_rules
from hospital_node.store import Store
from pipeline.forecasting import Float32, Int64
from pipeline.windows import Series


class HeldReadings:
    """Readings of everybody at one node. Safe between threads."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(folder)
        self.journal = Journal(folder, row_rules())
        self._catalogue = folder / "catalogue.db"
        self._lock = threading.Lock()
        self._version: tuple[int, int] | None = None
        self._series = Series((), np.zeros(1, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))

    def readings(self, pseudonym: str) -> tuple[Int64, Float32]:
        """Return one person's epoch seconds int64[N] and mg/dL float32[N], interpolated rows left out, or decline."""
        stored, live = self._stored(pseudonym), self.journal.readings(pseudonym)
        if not len(stored[0]) and not len(live[0]):
            raise Declined(NoForecast.UNKNOWN_PATIENT)
        if not len(live[0]):
            return stored
        times, first = np.unique(np.concatenate([stored[0], live[0]]), return_index=True)
        return times, np.concatenate([stored[1], live[1]])[first]

    def patients(self) -> tuple[str, ...]:
        """Everybody with a reading, sorted."""
        return tuple(sorted({*self._current().patients, *self.journal.patients()}))

    def newest_stored(self) -> int:
        """Epoch seconds of the store's newest reading; 0 when it holds none."""
        times = self._current().time_s
        return int(times.max()) if len(times) else 0

    def add(self, pseudonym: str, rows: Sequence[tuple[int, float]], now_s: float) -> Outcome:
        """Add one person's rows (epoch seconds, mg/dL) durably and tell what became of each. Raises StorageFailed."""
        return self.journal.add(pseudonym, rows, self._stored(pseudonym), now_s)

    def fold(self) -> int:
        """Move the journal into the store and return how many readings moved."""
        return self.journal.fold(self.store)

    def _stored(self, pseudonym: str) -> tuple[Int64, Float32]:
        series = self._current()
        at = bisect_left(series.patients, pseudonym)
        if series.patients[at : at + 1] != (pseudonym,):
            return np.zeros(0, np.int64), np.zeros(0, np.float32)
        rows = slice(series.starts[at], series.starts[at + 1])
        return series.time_s[rows], series.glucose_mg_dl[rows]

    def is_current(self) -> bool:
        """Whether the store is as it was when it was last read; if not, the next look at it takes a while."""
        return self._now() == self._version

    def _now(self) -> tuple[int, int]:
        status = self._catalogue.stat()
        return status.st_mtime_ns, status.st_size

    def _current(self) -> Series:
        with self._lock:
            version = self._now()
            if version != self._version:
                self._series, self._version = self.store.series(), version
            return self._series
