"""From one person's readings to a forecast, or to the reason why there is none.

Which readings are good enough is told by pipeline.reading_rules; what a planned meal would add by pipeline.what_if.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from datetime import UTC, datetime
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from data_schemas.forecast import Forecast, GlucoseUnit, LedgerPlace, NoForecast
from data_schemas.plan import ModelSpec
from data_schemas.scenario import Scenario
from data_schemas.units import HORIZON_MINUTES, MG_DL_PER_MMOL_L, QUANTILES, SENSOR_MAX_MG_DL, SENSOR_MIN_MG_DL
from pipeline.adaptation import Adaptation, inputs_of
from pipeline.model_card import ModelCard, privacy_statement
from pipeline.reading_rules import DAY_SECONDS, judge
from pipeline.what_if import (
    MODEL_ASSUMES,
    PHYSIOLOGY_ASSUMES,
    ScenarioPredictor,
    add_effect,
    effect_of,
    planned_channels,
)
from pipeline.windows import WindowSpec, history_features

Int64: TypeAlias = npt.NDArray[np.int64]
Float32: TypeAlias = npt.NDArray[np.float32]
Float64: TypeAlias = npt.NDArray[np.float64]

LOW_MG_DL, HIGH_MG_DL = 70.0, 180.0
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
    adaptation: Adaptation | None = None,
    ledger_entry: LedgerPlace | None = None,
    scenario: Scenario | None = None,
) -> Forecast | NoForecast:
    """Forecast from one person's readings, or the first reason against it.

    time_s: int64[N] UTC epoch seconds, any order; glucose_mg_dl: float32[N]; of one second the first reading counts.
    now_s: the clock. as_of_s: pretend that it is this past moment, hiding every later reading; ages then count to it.
    units: of the answer and of the scenario. Points lie at the newest reading + 5..60 minutes, whatever its age.
    adaptation: what the person's own past corrects. ledger_entry: where the ledger publishes the model.
    Raises UnusableScenario.
    """
    moment = now_s if as_of_s is None else as_of_s
    time_s, glucose_mg_dl = _in_order(time_s, glucose_mg_dl)
    if as_of_s is not None:
        seen = time_s <= as_of_s
        time_s, glucose_mg_dl = time_s[seen], glucose_mg_dl[seen]
    windows = WindowSpec(history_minutes=model.spec.history_minutes)
    time_s, glucose_mg_dl = _newest(time_s, glucose_mg_dl, windows)
    fit = judge(time_s, glucose_mg_dl, moment, windows)
    if isinstance(fit, NoForecast):
        return fit
    x, last = history_features(time_s, glucose_mg_dl, windows)
    forecast, quantiles = model.predict(x, last)
    start_s = int(time_s[-1])
    if adaptation is not None:
        forecast, quantiles = adaptation.apply(inputs_of(x, last, forecast, time_s[-1:]), forecast, quantiles)
    low, high = _event_probabilities(quantiles[0].astype(np.float64))
    # Validated once as a whole: quicker than building twelve points one by one.
    return Forecast.model_validate(
        {
            "model_version": model.card.version,
            "model_hash": model.model_hash,
            "ledger_entry": ledger_entry,
            "privacy_statement": privacy_statement(model.card),
            "generated_at": _utc(now_s),
            "as_of": None if as_of_s is None else _utc(as_of_s),
            "last_reading_at": _utc(start_s),
            "age_seconds": max(0.0, moment - start_s),
            "readings_used": fit.readings_used,
            "quality": fit.quality,
            "personal": adaptation is not None,
            "units": units,
            "points": _points(start_s, forecast[0], quantiles[0], units),
            "probability_below_70_within_30": low[0],
            "probability_below_70_within_60": low[1],
            "probability_above_180_within_30": high[0],
            "probability_above_180_within_60": high[1],
            "simulation": None
            if scenario is None
            else _simulation(model, (x, last), (forecast[0], quantiles[0]), scenario, start_s, units),
        }
    )


def _simulation(
    model: Predictor,
    window: tuple[Float32, Float32],
    plain: tuple[Float32, Float32],
    scenario: Scenario,
    start_s: int,
    units: GlucoseUnit,
) -> dict[str, Any]:
    """Fields of the Simulation: the model's own, where it has channels for what is planned, else physiology's."""
    if isinstance(model, ScenarioPredictor):
        forecast, quantiles = (part[0] for part in model.predict_planned(*window, *planned_channels(scenario, start_s)))
        basis, assumes = "model", MODEL_ASSUMES
    else:
        effect = effect_of(scenario, start_s, 1.0 if units == "mg/dL" else MG_DL_PER_MMOL_L)
        forecast, quantiles = add_effect(*plain, effect)
        basis, assumes = "physiology", PHYSIOLOGY_ASSUMES
    return {"basis": basis, "assumes": assumes, "points": _points(start_s, forecast, quantiles, units)}


def probabilities_below(threshold_mg_dl: float, quantiles: Float64) -> Float64:
    """P(glucose < threshold) at each horizon, float64[H], from quantiles float64[H,5] in mg/dL.

    The quantile function is taken as straight between the five quantiles; its outer pieces are continued in a straight
    line from 5% to 0 and from 95% to 1. These are as good as the quantiles are calibrated, and no better.
    """
    return np.array([_level_at(threshold_mg_dl, _knots(row)) for row in quantiles.tolist()])


def _knots(q: list[float]) -> list[float]:
    """The five quantiles and the ends of the two straight tails, never decreasing."""
    rising = list(itertools.accumulate(q, max))
    return [q[0] - _LOW_TAIL * (q[1] - q[0]), *rising, max(rising[-1], q[4] + _HIGH_TAIL * (q[4] - q[3]))]


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


def _points(
    last_s: int, forecast: npt.NDArray[Any], quantiles: npt.NDArray[Any], units: GlucoseUnit
) -> list[dict[str, Any]]:
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
    reach = max(DAY_SECONDS, windows.history_minutes * 60 + windows.jitter_seconds)
    start = int(time_s.searchsorted(time_s[-1] - reach))
    return time_s[start:], glucose_mg_dl[start:]


def _in_order(time_s: Int64, glucose_mg_dl: Float32) -> tuple[Int64, Float32]:
    times, glucose = np.asarray(time_s, np.int64), np.asarray(glucose_mg_dl, np.float32)
    if bool((times[1:] > times[:-1]).all()):
        return times, glucose
    times, first = np.unique(times, return_index=True)
    return times, glucose[first]


def _utc(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, tz=UTC)
