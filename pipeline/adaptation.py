"""Personal adaptation: a person's own past corrects the global model's forecasts of that person.

The global model's error is regressed on what was known when it forecast: the forecast, the newest readings, the last
day and the time of day. The regression is Bayesian with a Gaussian prior around no correction (Bishop 2006, section
3.3), so a person departs from the global model only as far as their own past gives reason to. Intervals are widened or
narrowed by how large past errors were beside them. Evidence halves every 30 days, because people change.

It is a function of one person's readings, made where these are, and no part of any message: it costs no privacy budget
and tells nobody about anybody else. Nothing is learned from a forecast that is still open, and nothing is random.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from data_schemas.units import HORIZON_MINUTES, QUANTILES, SENSOR_MAX_MG_DL, SENSOR_MIN_MG_DL
from pipeline.windows import FEATURES, RESIDUAL_SCALE_MG_DL, Batch, Bool, Float32, Int64, Windows

Float64: TypeAlias = npt.NDArray[np.float64]
Predict: TypeAlias = Callable[[Float32, Float32], tuple[Float32, Float32]]

# Corrections are fitted at these horizons, where 15-minute sensors have readings too; straight lines lie between.
KNOT_MINUTES = (15, 30, 45, 60)
LAGS = 12
HARMONICS = 6
HALF_LIFE_DAYS = 30.0
# So many hours of a person's evidence weigh as much as the prior; chosen on validation people.
PRIOR_HOURS = 40.0
# What has become known is taken up at these moments of the UTC day, by node and backtest alike.
REFRESH_SECONDS = 6 * 3600
# A forecast stands for the time since the one before, up to this much; the first for as long as a reading.
_MOST_HOURS, _FIRST_HOURS = 0.25, 5 / 60
# Mean of |error| over half the width of the 50% interval where 80% intervals cover 80%; for a Gaussian it is 1.183, but
# errors have heavier tails. Chosen on validation people.
TYPICAL_MISFIT = 1.33
_LEAST_HALF_WIDTH_MG_DL = 0.5
# After this the outcome of a forecast is known at all horizons.
_KNOWN_AFTER_SECONDS = HORIZON_MINUTES[-1] * 60 + 150
_DAY_SECONDS = 86_400
_BATCH = 4096
_K = len(KNOT_MINUTES)
_KNOTS = np.array([HORIZON_MINUTES.index(m) for m in KNOT_MINUTES])
# From the knots to all horizons, float64[12,K]: straight lines that start at nothing at the issue reading.
_SPREAD_OUT = np.stack([np.interp(HORIZON_MINUTES, (0, *KNOT_MINUTES), (0, *row)) for row in np.eye(_K)], axis=1)
_SCALE_MG_DL = np.array(RESIDUAL_SCALE_MG_DL)[_KNOTS]
_CHANGE, _LEVEL = FEATURES.index("change_from_last"), FEATURES.index("level")
_DAY = [FEATURES.index(name) for name in ("day_mean", "day_spread", "day_covered")]
_LOW, _MEDIAN, _HIGH = (QUANTILES.index(q) for q in (0.25, 0.5, 0.75))
INPUTS = 2 + _K + LAGS + len(_DAY) + 2 * HARMONICS


@dataclass(frozen=True, slots=True)
class Past:
    """The global model's forecasts of one person in order of issue, and what happened.

    time_s: int64[B]; inputs: float64[B,D]; forecast, truth: float32[B,12] and quantiles: float32[B,12,5] in mg/dL;
    mask: bool[B,12], True where truth is a real reading.
    """

    time_s: Int64
    inputs: Float64
    forecast: Float32
    quantiles: Float32
    truth: Float32
    mask: Bool

    @classmethod
    def of(cls, batch: Batch, forecast: Float32, quantiles: Float32, time_s: Int64) -> Past:
        """From one person's windows, in order of time, and the model's answer to them."""
        return cls(time_s, inputs_of(batch.x, batch.last, forecast, time_s), forecast, quantiles, batch.y, batch.mask)

    @classmethod
    def joined(cls, parts: Sequence[Past]) -> Past:
        """One past of several, one after the other in time; at least one."""
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in cls.__slots__))


@dataclass(frozen=True, slots=True)
class Adaptation:
    """A correction of one person's forecasts: weights float64[K,D] and width float64[K], a factor on half-widths."""

    weights: Float64
    width: Float64

    def apply(self, inputs: Float64, forecast: Float32, quantiles: Float32) -> tuple[Float32, Float32]:
        """Corrected forecast float32[B,12] and quantiles float32[B,12,5], mg/dL in 40..400, of inputs float64[B,D]."""
        shift = (inputs @ self.weights.T * _SCALE_MG_DL) @ _SPREAD_OUT.T
        width = 1.0 + _SPREAD_OUT @ (self.width - 1.0)
        median = quantiles[..., _MEDIAN : _MEDIAN + 1]
        levels = median + (quantiles - median) * width[:, None] + shift[..., None]
        return _clip(forecast + shift), _clip(levels)


class _Learner:
    """Walks through a person's past: what was known at each refresh, and what was shown until the next.

    gram float64[K,D,D], moment float64[K,D], misfit, hours float64[K]: sums over forecasts whose outcome is known.
    """

    def __init__(self, past: Past) -> None:
        self.past = past
        self.forecast, self.quantiles = past.forecast.copy(), past.quantiles.copy()
        gaps = np.diff(past.time_s) / 3600
        self._hours = np.concatenate([[_FIRST_HOURS], np.minimum(gaps, _MOST_HOURS)])[: len(past.time_s)]
        self._gram, self._moment = np.zeros((_K, INPUTS, INPUTS)), np.zeros((_K, INPUTS))
        self._misfit, self._known_hours = np.zeros(_K), np.zeros(_K)
        self._taken, self._refresh = 0, 0

    def replay(self) -> None:
        """Fill in what was shown, in order of time."""
        refresh = self.past.time_s // REFRESH_SECONDS
        begins = np.flatnonzero(np.diff(refresh, prepend=-1))
        for begin, end in pairwise([*begins.tolist(), len(refresh)]):
            rows = slice(begin, end)
            shown = self.at(int(refresh[begin])).apply(
                self.past.inputs[rows], self.past.forecast[rows], self.past.quantiles[rows]
            )
            self.forecast[rows], self.quantiles[rows] = shown

    def at(self, refresh: int) -> Adaptation:
        """What the past gives reason to at this refresh; refreshes must not go back."""
        # Nothing fades before there is something, and 1970 is no beginning: a moment may lie before it.
        passed = refresh - self._refresh if self._taken else 0
        kept = 0.5 ** (passed * REFRESH_SECONDS / _DAY_SECONDS / HALF_LIFE_DAYS)
        self._refresh = refresh
        self._gram, self._moment = self._gram * kept, self._moment * kept
        self._misfit, self._known_hours = self._misfit * kept, self._known_hours * kept
        open_since = refresh * REFRESH_SECONDS - _KNOWN_AFTER_SECONDS
        known = int(np.searchsorted(self.past.time_s, open_since, side="right"))
        if known > self._taken:
            self._take(slice(self._taken, known))
            self._taken = known
        weights = np.linalg.solve(self._gram + PRIOR_HOURS * np.eye(INPUTS), self._moment[..., None])
        width = self._misfit / TYPICAL_MISFIT + PRIOR_HOURS
        return Adaptation(weights[..., 0].astype(np.float64), width / (self._known_hours + PRIOR_HOURS))

    def _take(self, rows: slice) -> None:
        past, x = self.past, self.past.inputs[rows]
        truth, levels = past.truth[rows][:, _KNOTS].astype(np.float64), past.quantiles[rows][:, _KNOTS]
        worth = self._hours[rows, None] * past.mask[rows][:, _KNOTS]
        half = np.maximum(0.5 * (levels[..., _HIGH] - levels[..., _LOW]), _LEAST_HALF_WIDTH_MG_DL)
        self._misfit += (worth * np.abs(truth - self.quantiles[rows][:, _KNOTS, _MEDIAN]) / half).sum(axis=0)
        self._known_hours += worth.sum(axis=0)
        self._moment += (worth * (truth - past.forecast[rows][:, _KNOTS]) / _SCALE_MG_DL).T @ x
        for knot in range(_K):
            self._gram[knot] += (x * worth[:, knot, None]).T @ x


def inputs_of(x: Float32, last: Float32, forecast: Float32, time_s: Int64) -> Float64:
    """float64[B,D] from features x [B,T,F], last [B] and the model's forecast [B,12] in mg/dL, moments of issue [B].

    One prior fits all columns: their scales are about one, and faster harmonics of the day get less.
    """
    order = np.arange(1, HARMONICS + 1)
    turn = 2 * np.pi * (time_s % _DAY_SECONDS)[:, None] / _DAY_SECONDS * order
    fade = 1.0 / np.sqrt(1.0 + (order / 4.0) ** 2)
    lags = 2.0 * x[:, -1 - LAGS : -1, _CHANGE]
    columns = (
        np.ones((len(time_s), 1)),
        x[:, -1, [_LEVEL]],
        (forecast[:, _KNOTS] - last[:, None]) / _SCALE_MG_DL,
        np.pad(lags, ((0, 0), (LAGS - lags.shape[1], 0))),
        x[:, -1, _DAY],
        np.cos(turn) * fade,
        np.sin(turn) * fade,
    )
    return np.concatenate(columns, axis=1, dtype=np.float64)


def past_of(windows: Windows, anchors: Int64, predict: Predict) -> Past:
    """One person's past at these rows of the series, in order of time; predict is asked about a part at a time."""
    parts = []
    for issued in np.split(anchors, range(_BATCH, len(anchors), _BATCH)):
        batch = windows.gather(issued)
        parts.append(Past.of(batch, *predict(batch.x, batch.last), windows.series.time_s[issued]))
    return Past.joined(parts)


def replayed(past: Past) -> tuple[Float32, Float32]:
    """Forecast float32[B,12] and quantiles float32[B,12,5], mg/dL, as the person would have been shown them."""
    learner = _Learner(past)
    learner.replay()
    return learner.forecast, learner.quantiles


def learned(past: Past, now_s: float) -> Adaptation:
    """The adaptation in force at `now_s` (epoch seconds), which no forecast of the past may be later than."""
    learner = _Learner(past)
    learner.replay()
    return learner.at(int(now_s // REFRESH_SECONDS))


def _clip(values: Float64) -> Float32:
    return np.clip(values, SENSOR_MIN_MG_DL, SENSOR_MAX_MG_DL).astype(np.float32)
