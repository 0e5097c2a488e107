"""The answer of the forecast endpoint. There is no dose in it, and there never will be."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Literal

from pydantic import Field

from data_schemas.frozen import Frozen
from data_schemas.messages import Hex32
from data_schemas.units import RESEARCH_LABEL

GlucoseUnit = Literal["mg/dL", "mmol/L"]
SIMULATION_LABEL = (
    "Simulation of the scenario that was sent, not a forecast and not advice. What the plan would do was not learned "
    "from this person, and no dose follows from it."
)


class NoForecast(StrEnum):
    """Why there is no forecast (the problem types of the endpoint, RFC 9457)."""

    STALE = "stale-data"
    TOO_LITTLE_HISTORY = "insufficient-history"
    FLAT = "sensor-flat"
    NOISY = "sensor-noisy"
    JUMP = "sensor-jump"
    OUT_OF_RANGE = "out-of-range"
    UNIT_SUSPECT = "unit-suspect"
    FUTURE = "future-data"
    NO_MODEL = "no-model"
    UNKNOWN_PATIENT = "unknown-patient"


class Quality(StrEnum):
    """What makes the readings behind a forecast worse than they could be, though not bad enough to refuse it."""

    AGEING = "ageing"  # the newest is older than 7 minutes
    GAPS = "gaps"  # two neighbours of the history lie more than 20 minutes apart
    SHORT_HISTORY = "short-history"  # they span less than the history that the model looks at
    SHORT_DAY = "short-day"  # they span less than the day that tells the model what kind of person this is
    AT_SENSOR_LIMIT = "at-sensor-limit"  # one stands at an end of the sensor's range, so the true value is unknown
    JUMPS = "jumps"  # two neighbours differ by more than is likely


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


class LedgerPlace(Frozen):
    """Where the federation's ledger publishes a model: number of the entry, and its leaf hash (RFC 6962)."""

    entry: int = Field(ge=0)
    leaf_hash: Hex32


class Simulation(Frozen):
    """A second curve: what the forecast would be if what was planned happened. Always labelled, never advice.

    basis: `physiology` adds published curves of absorption and action to the forecast; `model` means a model with
    channels of its own for what was planned. assumes: what that takes for granted, a sentence each.
    """

    label: str = SIMULATION_LABEL
    basis: Literal["physiology", "model"]
    assumes: tuple[str, ...]
    points: tuple[ForecastPoint, ...]


class Forecast(Frozen):
    """A forecast every 5 minutes up to 60, with what is needed to judge it.

    as_of is set for a replay of the past: readings after that moment were hidden and age_seconds counts to it.
    ledger_entry is absent when this node's copy of the ledger does not publish the model. simulation is there when a
    scenario was sent; `points` and the probabilities never know of it. personal: corrected from what this node knows of
    the person's own past, which stays here.
    """

    model_version: str
    model_hash: str
    ledger_entry: LedgerPlace | None = None
    privacy_statement: str
    generated_at: datetime
    as_of: datetime | None = None
    last_reading_at: datetime
    age_seconds: float = Field(ge=0)
    readings_used: int
    quality: tuple[Quality, ...] = ()
    personal: bool = False
    units: GlucoseUnit
    interval_minutes: int = 5
    points: tuple[ForecastPoint, ...]
    probability_below_70_within_30: float
    probability_below_70_within_60: float
    probability_above_180_within_30: float
    probability_above_180_within_60: float
    simulation: Simulation | None = None
    use: str = RESEARCH_LABEL
