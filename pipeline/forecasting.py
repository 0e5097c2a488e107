"""From one person's readings to a forecast, or to the reason why there is none.

The rules refuse what a forecast must not be built on: old data (12 minutes and 5 minutes ahead are oref0's limits),
a sensor that sticks or jumps, a wrong unit, too little history. What is enough history is training's own rule.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from data_schemas.forecast import Forecast, ForecastPoint, GlucoseUnit, NoForecast
from data_schemas.plan import ModelSpec
from data_schemas.units import HORIZON_MINUTES, QUANTILES, SENSOR_MAX_MG_DL, SENSOR_MIN_MG_DL, mmol_l
from pipeline.model_card import ModelCard, privacy_statement
from pipeline.windows import Series, WindowSpec, cut_windows, history_features

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
    if reason := reason_against(time_s, glucose_mg_dl, moment, windows):
        return reason
    x, last = history_features(time_s, glucose_mg_dl, windows)
    forecast, quantiles = model.predict(x, last)
    start = time_s[-1] - windows.history_minutes * 60 - windows.jitter_seconds
    low, high = _event_probabilities(quantiles[0].astype(np.float64))
    return Forecast(
        model_version=model.card.version,
        model_hash=model.model_hash,
        privacy_statement=privacy_statement(model.card),
        generated_at=_utc(now_s),
        as_of=None if as_of_s is None else _utc(as_of_s),
        last_reading_at=_utc(int(time_s[-1])),
        age_seconds=max(0.0, moment - float(time_s[-1])),
        readings_used=int(np.count_nonzero(time_s >= start)),
        units=units,
        points=_points(int(time_s[-1]), forecast[0], quantiles[0], units),
        probability_below_70_within_30=low[0],
        probability_below_70_within_60=low[1],
        probability_above_180_within_30=high[0],
        probability_above_180_within_60=high[1],
    )


def reason_against(time_s: Int64, glucose_mg_dl: Float32, now_s: float, windows: WindowSpec) -> NoForecast | None:
    """Return the first reason against a forecast, or None. Readings sorted by time, one per second."""
    if not len(time_s):
        return NoForecast.TOO_LITTLE_HISTORY
    recent = time_s >= time_s[-1] - windows.history_minutes * 60 - windows.jitter_seconds
    return _age_reason(now_s - float(time_s[-1])) or _value_reason(time_s[recent], glucose_mg_dl[recent], windows)


def _age_reason(age_s: float) -> NoForecast | None:
    if age_s < -MAX_AHEAD_SECONDS:
        return NoForecast.FUTURE
    return NoForecast.STALE if age_s > MAX_AGE_SECONDS else None


def _value_reason(times: Int64, glucose: Float32, windows: WindowSpec) -> NoForecast | None:
    if not UNIT_SUSPECT_MEDIAN_MG_DL <= float(np.median(glucose)) <= HIGHEST_MG_DL:
        return NoForecast.UNIT_SUSPECT
    if bool(np.any((glucose < LOWEST_MG_DL) | (glucose > HIGHEST_MG_DL))):
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
    levels = np.array([0.0, *QUANTILES, 1.0])
    low_tail = QUANTILES[0] / (QUANTILES[1] - QUANTILES[0])
    high_tail = (1 - QUANTILES[-1]) / (QUANTILES[-1] - QUANTILES[-2])
    lowest = quantiles[:, :1] - low_tail * (quantiles[:, 1:2] - quantiles[:, :1])
    highest = quantiles[:, -1:] + high_tail * (quantiles[:, -1:] - quantiles[:, -2:-1])
    knots = np.concatenate([lowest, quantiles, highest], axis=1)
    # np.interp needs increasing knots; clipped quantiles coincide. A nudge upwards makes "<" strict at a tie.
    knots = np.maximum.accumulate(knots, axis=1) + 1e-9 * np.arange(len(levels))
    return np.array([np.interp(threshold_mg_dl, row, levels, left=0.0, right=1.0) for row in knots])


def _event_probabilities(quantiles: Float64) -> tuple[tuple[float, float], tuple[float, float]]:
    """P(below 70) and P(above 180), each within 30 and within 60 minutes: the largest over the horizons up to there.

    The event "at some horizon" contains each horizon's event, so this is a lower bound on the event's probability
    under the same quantiles; five marginal quantiles say nothing about how horizons move together.
    """
    below = probabilities_below(LOW_MG_DL, quantiles)
    above = 1.0 - probabilities_below(HIGH_MG_DL, quantiles)
    half = HORIZON_MINUTES.index(30) + 1
    low, high = ((round(float(p[:half].max()), 3), round(float(p.max()), 3)) for p in (below, above))
    return low, high


def _points(last_s: int, forecast: Float32, quantiles: Float32, units: GlucoseUnit) -> tuple[ForecastPoint, ...]:
    return tuple(
        ForecastPoint(
            at=_utc(last_s + minutes * 60),
            horizon_minutes=minutes,
            value=_shown(float(value), units),
            **dict(zip(("p05", "p25", "p50", "p75", "p95"), (_shown(float(q), units) for q in levels), strict=True)),
            clipped=not SENSOR_MIN_MG_DL < float(value) < SENSOR_MAX_MG_DL,
        )
        for minutes, value, levels in zip(HORIZON_MINUTES, forecast, quantiles, strict=True)
    )


def _shown(value_mg_dl: float, units: GlucoseUnit) -> float:
    """0.1 mg/dL or 0.01 mmol/L: finer than any sensor."""
    return round(value_mg_dl, 1) if units == "mg/dL" else round(mmol_l(value_mg_dl), 2)


def _in_order(time_s: Int64, glucose_mg_dl: Float32) -> tuple[Int64, Float32]:
    times, first = np.unique(np.asarray(time_s, np.int64), return_index=True)
    return times, np.asarray(glucose_mg_dl, np.float32)[first]


def _enough_history(times: Int64, glucose: Float32, windows: WindowSpec) -> bool:
    """Whether training would have cut a window at the newest reading."""
    series = Series(("one",), np.array([0, len(times)], dtype=np.int64), times, glucose)
    anchors = cut_windows(series, windows, need_target=False).anchors
    return bool(len(anchors)) and int(anchors[-1]) == len(times) - 1


def _flat_seconds(times: Int64, glucose: Float32) -> int:
    """For how long the newest reading has not changed at all."""
    other = np.flatnonzero(glucose != glucose[-1])
    start = int(other[-1]) + 1 if len(other) else 0
    return int(times[-1] - times[start])


def _jumps(times: Int64, glucose: Float32) -> bool:
    """Whether two consecutive readings of the last hour lie further apart than a person's glucose can move."""
    recent = times >= times[-1] - JUMP_WINDOW_SECONDS
    minutes = np.diff(times[recent]) / 60.0
    change = np.abs(np.diff(glucose[recent]))
    return bool(np.any(change > JUMP_ALLOWANCE_MG_DL + JUMP_MG_DL_PER_MINUTE * minutes))


def _utc(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, tz=UTC)
