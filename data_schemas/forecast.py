"""The answer of the forecast endpoint. There is no dose in it, and there never will be."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Literal

from pydantic import Field

from data_schemas.frozen import Frozen
from data_schemas.units import RESEARCH_LABEL

GlucoseUnit = Literal["mg/dL", "mmol/L"]


class NoForecast(StrEnum):
    """Why there is no forecast (the problem types of the endpoint, RFC 9457)."""

    STALE = "stale-data"
    TOO_LITTLE_HISTORY = "insufficient-history"
    FLAT = "sensor-flat"
    JUMP = "sensor-jump"
    OUT_OF_RANGE = "out-of-range"
    UNIT_SUSPECT = "unit-suspect"
    FUTURE = "future-data"
    NO_MODEL = "no-model"
    UNKNOWN_PATIENT = "unknown-patient"


class ForecastPoint(Frozen):
    """Forecast for one moment, in the answer's unit: mean-optimal value and quantiles.

    The model has p05, p25, p50, p75 and p95; p10 and p90 lie on the straight line between their neighbours. So
    p05..p95 holds 90%, p10..p90 80% and p25..p75 50%.
    """

    at: datetime
    horizon_minutes: int
    value: float
    p05: float
    p10: float
    p25: float
    p50: float
    p75: float
    p90: float
    p95: float
    clipped: bool


class Forecast(Frozen):
    """A forecast every 5 minutes up to 60, with what is needed to judge it.

    as_of is set for a replay of the past: readings after that moment were hidden and age_seconds counts to it.
    """

    model_version: str
    model_hash: str
    privacy_statement: str
    generated_at: datetime
    as_of: datetime | None = None
    last_reading_at: datetime
    age_seconds: float = Field(ge=0)
    readings_used: int
    units: GlucoseUnit
    interval_minutes: int = 5
    points: tuple[ForecastPoint, ...]
    probability_below_70_within_30: float
    probability_below_70_within_60: float
    probability_above_180_within_30: float
    probability_above_180_within_60: float
    use: str = RESEARCH_LABEL
