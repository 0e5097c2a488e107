"""The node's readings in memory for the endpoint: the store, read again when it changes, and the journal on top."""

from __future__ import annotations

import threading
from bisect import bisect_left
from pathlib import Path

import numpy as np

from data_schemas.forecast import NoForecast
from hospital_node.problems import Declined
from hospital_node.store import Store
from pipeline.forecasting import Float32, Int64
from pipeline.windows import Series


class HeldReadings:
    """Readings of everybody at one node. Safe between threads."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(folder)
        self._catalogue = folder / "catalogue.db"
        self._lock = threading.Lock()
        self._version: tuple[int, int] | None = None
        self._series = Series((), np.zeros(1, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))

    def readings(self, pseudonym: str) -> tuple[Int64, Float32]:
        """Return one person's epoch seconds int64[N] and mg/dL float32[N], interpolated rows left out, or decline."""
        series = self._current()
        at = bisect_left(series.patients, pseudonym)
        if series.patients[at : at + 1] != (pseudonym,):
            raise Declined(NoForecast.UNKNOWN_PATIENT)
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
