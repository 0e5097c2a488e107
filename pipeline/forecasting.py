"""From one person's readings to a forecast, or to the reason why there is none.

The rules refuse what a forecast must not be built on: old data (12 minutes and 5 minutes ahead are oref0's limits),
a sensor that sticks or jumps, a wrong unit, too little history. What is enough history is training's own rule.
"""

from __future__ import annotations

import itertools
import statistics
from bisect import bisect_left
from datetime import UTC, datetime
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from data_schemas.forecast import Forecast, GlucoseUnit, NoForecast
from data_schemas.plan import ModelSpec
from data_schemas.units import HORIZON_MINUTES, MG_DL_PER_MMOL_L, QUANTILES, SENSOR_MAX_MG_DL, SENSOR_MIN_MG_DL
from pipeline.model_card import ModelCard, privacy_statement
from pipeline.windows import JUMP_MG_DL, JUMP_MG_DL_PER_MIN, WindowSpec, history_features

Int64: TypeAlias = npt.NDArray[np.int64]
Float32: TypeAlias = npt.NDArray[np.float32]
Float64: TypeAlias = npt.NDArray[np.float64]

MAX_AGE_SECONDS = 12 * 60
MAX_AHEAD_SECONDS = 5 * 60
FLAT_SECONDS = 45 * 60
# A person's glucose moves by up to about 5 mg/dL a minute; a change beyond this allowance is the sensor's.
JUMP_ALLOWANCE_MG_DL = 30.0
JUMP_MG_DL_PER_MINUTE = 6.0
JUMP_WINDOW_SECONDS = 60 * 60
LOWEST_MG_DL, HIGHEST_MG_DL = 10.0, 600.0
# A median below 35 mg/dL is mmol/L read as mg/dL; one above 600 is mg/dL read as mmol/L.
UNIT_SUSPECT_MEDIAN_MG_DL = 35.0
LOW_MG_DL, HIGH_MG_DL = 70.0, 180.0
_DAY_SECONDS = 24 * 3600
_POINT_FIELDS = ("value", "p05", "p10", "p25", "p50", "p75", "p90", "p95")
_LEVELS = (0.0, *QUANTILES, 1.0)
# The tails continue the outer pieces: from 5% to 0 and from 95% to 1.
_LOW_TAIL = QUANTILES[0] / (QUANTILES[1] - QUANTILES[0])
_HIGH_TAIL = (1 - QUANTILES[-1]) / (QUANTILES[-1] - QUANTILES[-2])
# Where the 10% and 90% quantiles lie between their neighbours: 5 and 25%, 75 and 95%.
_P10_SHARE = (0.10 - QUANTILES[0]) / (QUANTILES[1] - QUANTILES[0])
_P90_SHARE = (0.90 - QUANTILES[3]) / (QUANTILES[4] - QUANTILES[3])


class Predictor(Protocol):
    """What a forecast needs of a model; pipeline.export.LoadedModel is one."""

    @property
    def spec(self) -> ModelSpec:
        """Shape of the model."""

    @property
    def model_hash(self) -> str:
        """SHA-256 of the weights."""

    @property
    def card(self) -> ModelCard:
        """Card of this model version."""

    def predict(self, x: Float32, last: Float32) -> tuple[Float32, Float32]:
        """Forecast [B,12] and quantiles [B,12,5] in mg/dL from x [B,T,F] and last [B] mg/dL."""


def make_forecast(
    model: Predictor,
    time_s: Int64,
    glucose_mg_dl: Float32,
    now_s: float,
    units: GlucoseUnit,
    *,
    as_of_s: float | None = None,
) -> Forecast | NoForecast:
    """Forecast from one person's readings, or the first reason against it.

    time_s: int64[N] UTC epoch seconds, any order; glucose_mg_dl: float32[N]; of one second the first reading counts.
    now_s: the clock. as_of_s: pretend that it is this past moment, hiding every later reading; ages then count to it.
    units: of the answer. Points lie at the newest reading + 5..60 minutes, whatever its age.
    """
    moment = now_s if as_of_s is None else as_of_s
    time_s, glucose_mg_dl = _in_order(time_s, glucose_mg_dl)
    if as_of_s is not None:
        seen = time_s <= as_of_s
        time_s, glucose_mg_dl = time_s[seen], glucose_mg_dl[seen]
    windows = WindowSpec(history_minutes=model.spec.history_minutes)
    time_s, glucose_mg_dl = _newest(time_s, glucose_mg_dl, windows)
    if reason := reason_against(time_s, glucose_mg_dl, moment, windows):
        return reason
    x, last = history_features(time_s, glucose_mg_dl, windows)
    forecast, quantiles = model.predict(x, last)
    start = time_s[-1] - windows.history_minutes * 60 - windows.jitter_seconds
    low, high = _event_probabilities(quantiles[0].astype(np.float64))
    # Validated once as a whole: quicker than building twelve points one by one.
    return Forecast.model_validate(
        {
            "model_version": model.card.version,
            "model_hash": model.model_hash,
            "privacy_statement": privacy_statement(model.card),
            "generated_at": _utc(now_s),
            "as_of": None if as_of_s is None else _utc(as_of_s),
            "last_reading_at": _utc(int(time_s[-1])),
            "age_seconds": max(0.0, moment - float(time_s[-1])),
            "readings_used": len(time_s) - int(time_s.searchsorted(start)),
            "units": units,
            "points": _points(int(time_s[-1]), forecast[0], quantiles[0], units),
            "probability_below_70_within_30": low[0],
            "probability_below_70_within_60": low[1],
            "probability_above_180_within_30": high[0],
            "probability_above_180_within_60": high[1],
        }
    )


def reason_against(time_s: Int64, glucose_mg_dl: Float32, now_s: float, windows: WindowSpec) -> NoForecast | None:
    """Return the first reason against a forecast, or None. Readings sorted by time, one per second."""
    if not len(time_s):
        return NoForecast.TOO_LITTLE_HISTORY
    start = int(time_s.searchsorted(time_s[-1] - windows.history_minutes * 60 - windows.jitter_seconds))
    # A few dozen numbers: plain loops are quicker than array calls.
    times, glucose = time_s[start:].tolist(), glucose_mg_dl[start:].tolist()
    return _age_reason(now_s - times[-1]) or _value_reason(times, glucose, windows)


def _age_reason(age_s: float) -> NoForecast | None:
    if age_s < -MAX_AHEAD_SECONDS:
        return NoForecast.FUTURE
    return NoForecast.STALE if age_s > MAX_AGE_SECONDS else None


def _value_reason(times: list[int], glucose: list[float], windows: WindowSpec) -> NoForecast | None:
    if not UNIT_SUSPECT_MEDIAN_MG_DL <= statistics.median(glucose) <= HIGHEST_MG_DL:
        return NoForecast.UNIT_SUSPECT
    if not LOWEST_MG_DL <= min(glucose) <= max(glucose) <= HIGHEST_MG_DL:
        return NoForecast.OUT_OF_RANGE
    if not _enough_history(times, glucose, windows):
        return NoForecast.TOO_LITTLE_HISTORY
    if _flat_seconds(times, glucose) >= FLAT_SECONDS:
        return NoForecast.FLAT
    return NoForecast.JUMP if _jumps(times, glucose) else None


def probabilities_below(threshold_mg_dl: float, quantiles: Float64) -> Float64:
    """P(glucose < threshold) at each horizon, float64[H], from quantiles float64[H,5] in mg/dL.

    The quantile function is taken as straight between the five quantiles; its outer pieces are continued in a straight
    line from 5% to 0 and from 95% to 1. These are as good as the quantiles are calibrated, and no better.
    """
    return np.array([_level_at(threshold_mg_dl, _knots(row)) for row in quantiles.tolist()])


def _knots(q: list[float]) -> list[float]:
    """The five quantiles and the ends of the two straight tails, never decreasing."""
    return [
        q[0] - _LOW_TAIL * (q[1] - q[0]),
        *itertools.accumulate(q, max),
        max(*q, q[4] + _HIGH_TAIL * (q[4] - q[3])),
    ]


def _level_at(threshold: float, knots: list[float]) -> float:
    """Probability of less than the threshold; where knots coincide (clipped quantiles), of strictly less."""
    at = bisect_left(knots, threshold)
    if at in (0, len(knots)):
        return 0.0 if at == 0 else 1.0
    left, right = knots[at - 1], knots[at]
    return _LEVELS[at - 1] + (_LEVELS[at] - _LEVELS[at - 1]) * (threshold - left) / (right - left)


def _event_probabilities(quantiles: Float64) -> tuple[tuple[float, float], tuple[float, float]]:
    """P(below 70) and P(above 180), each within 30 and within 60 minutes: the largest over the horizons up to there.

    The event "at some horizon" contains each horizon's event, so this is a lower bound on the event's probability
    under the same quantiles; five marginal quantiles say nothing about how horizons move together.
    """
    knots = [_knots(row) for row in quantiles.tolist()]
    below = [_level_at(LOW_MG_DL, row) for row in knots]
    above = [1.0 - _level_at(HIGH_MG_DL, row) for row in knots]
    half = HORIZON_MINUTES.index(30) + 1
    low, high = ((round(max(p[:half]), 3), round(max(p), 3)) for p in (below, above))
    return low, high


def _points(last_s: int, forecast: Float32, quantiles: Float32, units: GlucoseUnit) -> list[dict[str, Any]]:
    """Fields of the twelve ForecastPoints."""
    q = quantiles.astype(np.float64)
    table = np.empty((len(HORIZON_MINUTES), 8))
    table[:, 0] = forecast
    table[:, [1, 3, 4, 5, 7]] = q
    table[:, 2] = q[:, 0] + _P10_SHARE * (q[:, 1] - q[:, 0])
    table[:, 6] = q[:, 3] + _P90_SHARE * (q[:, 4] - q[:, 3])
    # 0.1 mg/dL or 0.01 mmol/L: finer than any sensor.
    shown = table.round(1) if units == "mg/dL" else (table / MG_DL_PER_MMOL_L).round(2)
    return [
        dict(
            zip(_POINT_FIELDS, values, strict=True),
            at=_utc(last_s + minutes * 60),
            horizon_minutes=minutes,
            clipped=not SENSOR_MIN_MG_DL < value < SENSOR_MAX_MG_DL,
        )
        for minutes, value, values in zip(HORIZON_MINUTES, forecast.tolist(), shown.tolist(), strict=True)
    ]


def _newest(time_s: Int64, glucose_mg_dl: Float32, windows: WindowSpec) -> tuple[Int64, Float32]:
    """The readings that a forecast at the newest one can depend on: its history and the day before it."""
    if not len(time_s):
        return time_s, glucose_mg_dl
    reach = max(_DAY_SECONDS, windows.history_minutes * 60 + windows.jitter_seconds)
    start = int(time_s.searchsorted(time_s[-1] - reach))
    return time_s[start:], glucose_mg_dl[start:]


def _in_order(time_s: Int64, glucose_mg_dl: Float32) -> tuple[Int64, Float32]:
    times, glucose = np.asarray(time_s, np.int64), np.asarray(glucose_mg_dl, np.float32)
    if bool((times[1:] > times[:-1]).all()):
        return times, glucose
    times, first = np.unique(times, return_index=True)
    return times, glucose[first]


def _enough_history(times: list[int], glucose: list[float], windows: WindowSpec) -> bool:
    """Whether training would have cut a window at the newest reading: the rules of windows.cut_windows, for one."""
    if len(times) < 2 or times[-1] - times[-2] > windows.max_last_gap_minutes * 60:
        return False
    if times[-1] - times[0] < windows.min_history_minutes * 60 - windows.jitter_seconds:
        return False
    inside = [min(max(value, SENSOR_MIN_MG_DL), SENSOR_MAX_MG_DL) for value in glucose]
    jumps = sum(
        abs(new - old) > JUMP_MG_DL + JUMP_MG_DL_PER_MIN * (after - before) / 60.0
        for old, new, before, after in zip(inside, inside[1:], times, times[1:], strict=False)
    )
    return jumps <= windows.max_jumps


def _flat_seconds(times: list[int], glucose: list[float]) -> int:
    """For how long the newest reading has not changed at all."""
    start = len(glucose) - 1
    while start > 0 and glucose[start - 1] == glucose[-1]:
        start -= 1
    return times[-1] - times[start]


def _jumps(times: list[int], glucose: list[float]) -> bool:
    """Whether two consecutive readings of the last hour lie further apart than a person's glucose can move."""
    start = bisect_left(times, times[-1] - JUMP_WINDOW_SECONDS)
    recent, values = times[start:], glucose[start:]
    return any(
        abs(new - old) > JUMP_ALLOWANCE_MG_DL + JUMP_MG_DL_PER_MINUTE * (after - before) / 60.0
        for old, new, before, after in zip(values, values[1:], recent, recent[1:], strict=False)
    )


def _utc(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, tz=UTC)
