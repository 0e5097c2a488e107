"""What this node has learned of each person's past, for the endpoint: kept in memory, never written, never sent.

It changes only at the refreshes of pipeline.adaptation, every six hours, so it is worked out once for each of them.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TypeAlias

import numpy as np

from pipeline.adaptation import REFRESH_SECONDS, Adaptation, Past, learned, past_of
from pipeline.forecasting import Float32, Int64, Predictor
from pipeline.windows import Series, WindowSpec, cut_windows

# Older evidence counts for less than an eighth.
LOOK_BACK_SECONDS = 90 * 24 * 3600
# Forecasts are looked back on at every third reading of a five-minute sensor: those between tell the same.
_STRIDE_SECONDS = 14 * 60
_MOST_KEPT = 10_000
_Key: TypeAlias = tuple[str, str, int]


class PersonalAdaptations:
    """The adaptations in force, of the people asked for last. Safe between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[_Key, Adaptation] = OrderedDict()

    def kept(self, model: Predictor, pseudonym: str, moment_s: float) -> Adaptation | None:
        """What is in force for a person at a moment (epoch seconds), where it was worked out before."""
        with self._lock:
            return self._kept.get(_key(model, pseudonym, moment_s))

    def learn(self, model: Predictor, pseudonym: str, readings: tuple[Int64, Float32], moment_s: float) -> Adaptation:
        """Work it out from the person's readings (epoch seconds, mg/dL, in order of time): a part of a second."""
        key = _key(model, pseudonym, moment_s)
        adaptation = learned(recent_past(model, *readings, key[2] * REFRESH_SECONDS), moment_s)
        with self._lock:
            self._kept[key] = adaptation
            while len(self._kept) > _MOST_KEPT:
                self._kept.popitem(last=False)
        return adaptation


def recent_past(model: Predictor, time_s: Int64, glucose_mg_dl: Float32, until_s: int) -> Past:
    """A person's forecasts of the 90 days before `until_s`, about four an hour, with what happened by then."""
    rows = slice(*np.searchsorted(time_s, [until_s - LOOK_BACK_SECONDS, until_s]))
    series = Series(("one",), np.array([0, rows.stop - rows.start]), time_s[rows], glucose_mg_dl[rows])
    windows = cut_windows(series, WindowSpec(history_minutes=model.spec.history_minutes))
    anchors = windows.anchors
    if len(anchors):
        slot = series.time_s[anchors] // _STRIDE_SECONDS
        anchors = anchors[np.concatenate([[True], np.diff(slot) > 0])]
    return past_of(windows, anchors, model.predict)


def _key(model: Predictor, pseudonym: str, moment_s: float) -> _Key:
    return model.model_hash, pseudonym, int(moment_s // REFRESH_SECONDS)
