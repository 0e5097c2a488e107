"""A digital twin of the next hour: what planned carbohydrate and insulin would add to a forecast. Never advice.

The forecaster sees glucose only, so the effect comes from published physiology and two numbers of the person:

    insulin   the exponential activity curve of rapid-acting insulin for adults that Loop uses (D. Maksimovic, in
              LoopKit's ExponentialInsulinModel, 2017): action over 360 minutes, peak at 75, onset after 10; one unit
              lowers glucose by the person's sensitivity once it has acted in full (J. Walsh, R. Roberts, Pumping
              Insulin, on both)
    meals     two gut compartments in a row, each emptying with a time constant of 40 minutes (R. Hovorka et al.,
              Physiol. Meas. 25:905, 2004); a gram raises glucose by sensitivity / carbohydrate ratio
    spread    the same injection acts 20 to 30% differently from day to day in one person (L. Heinemann, Diabetes
              Technol. Ther. 4:673, 2002); 25% is taken as the standard deviation of both effects, so the curve's
              bands are never narrower than the forecast's

A model that has channels for what is planned answers itself: see ScenarioPredictor.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt

from data_schemas.errors import BadInput
from data_schemas.scenario import Scenario
from data_schemas.units import HORIZON_MINUTES, QUANTILES, SENSOR_MAX_MG_DL, SENSOR_MIN_MG_DL

Float32: TypeAlias = npt.NDArray[np.float32]
Float64: TypeAlias = npt.NDArray[np.float64]

ACTION_MINUTES, PEAK_MINUTES, ONSET_MINUTES = 360.0, 75.0, 10.0
GUT_MINUTES = 40.0
EFFECT_SPREAD = 0.25
PHYSIOLOGY_ASSUMES: tuple[str, ...] = (
    "Planned insulin is rapid-acting: onset 10 minutes, peak 75 minutes later, over after 6 hours.",
    "Planned carbohydrate is absorbed as a mixed meal: half of it within about 67 minutes.",
    "Insulin sensitivity and carbohydrate ratio are those that were sent, and hold for this hour.",
    "What was eaten and injected before the newest reading is in the forecast, as far as glucose shows it.",
    "Both effects vary by 25% from day to day; exercise, illness and stress are not in it.",
)
MODEL_ASSUMES: tuple[str, ...] = (
    "The served model was trained with channels for carbohydrate and insulin, on other people.",
)
# How many standard deviations each quantile lies from the median.
_Z = np.array([NormalDist().inv_cdf(level) for level in QUANTILES])


class UnusableScenario(BadInput):
    """A scenario that cannot be simulated: where it is wrong (JSON pointer within it), and what is expected there."""

    def __init__(self, pointer: str, expected: str) -> None:
        super().__init__(f"scenario{pointer}: {expected}", "mend the scenario and send it again")
        self.pointer, self.expected = pointer, expected


@runtime_checkable
class ScenarioPredictor(Protocol):
    """A model with channels for what is planned; one that has this method is asked instead of physiology."""

    def predict_planned(
        self, x: Float32, last: Float32, carbs_g: Float32, insulin_u: Float32
    ) -> tuple[Float32, Float32]:
        """Forecast [B,12] and quantiles [B,12,5] in mg/dL.

        x and last as for predict; carbs_g and insulin_u float32[B,12]: planned in the 5 minutes up to each horizon.
        """


@dataclass(frozen=True, slots=True)
class Effect:
    """Change of glucose by a plan at each horizon, and its standard deviation: float64[12] each, mg/dL."""

    change_mg_dl: Float64
    spread_mg_dl: Float64


def insulin_acted(minutes: Float64) -> Float64:
    """Share of a rapid-acting insulin's effect that is over so many minutes after it, 0..1."""
    t = np.clip(minutes - ONSET_MINUTES, 0.0, ACTION_MINUTES)
    tau = PEAK_MINUTES * (1 - PEAK_MINUTES / ACTION_MINUTES) / (1 - 2 * PEAK_MINUTES / ACTION_MINUTES)
    a = 2 * tau / ACTION_MINUTES
    scale = 1 / (1 - a + (1 + a) * np.exp(-ACTION_MINUTES / tau))
    shape: Float64 = (t * t / (tau * ACTION_MINUTES * (1 - a)) - t / tau - 1) * np.exp(-t / tau) + 1
    acted: Float64 = scale * (1 - a) * shape
    return acted


def carbs_absorbed(minutes: Float64) -> Float64:
    """Share of a meal's carbohydrate that has reached the blood so many minutes after it, 0..1."""
    t = np.maximum(minutes, 0.0) / GUT_MINUTES
    absorbed: Float64 = 1 - (1 + t) * np.exp(-t)
    return absorbed


def effect_of(scenario: Scenario, start_s: int, mg_dl_per_unit: float) -> Effect:
    """Effect at 5..60 minutes after start_s (epoch seconds, the newest reading).

    mg_dl_per_unit: mg/dL in one unit of the request. Raises UnusableScenario: a number of the person is missing.
    """
    sensitivity = _needed(scenario.insulin_sensitivity, "insulin_sensitivity", "by how much one unit lowers glucose")
    sensitivity *= mg_dl_per_unit
    horizons = np.array(HORIZON_MINUTES, np.float64)
    up, down = np.zeros(len(horizons)), np.zeros(len(horizons))
    for minutes, carbs_g, insulin_u in _moments(scenario, start_s):
        if carbs_g:
            ratio = _needed(scenario.carbohydrate_ratio, "carbohydrate_ratio", "grams that one unit covers")
            up += carbs_g * sensitivity / ratio * carbs_absorbed(horizons - minutes)
        down += insulin_u * sensitivity * insulin_acted(horizons - minutes)
    return Effect(up - down, EFFECT_SPREAD * np.hypot(up, down))


def planned_channels(scenario: Scenario, start_s: int) -> tuple[Float32, Float32]:
    """Carbohydrate (g) and insulin (u) float32[1,12] of each 5 minutes, for a ScenarioPredictor."""
    carbs, insulin = np.zeros((1, len(HORIZON_MINUTES)), np.float32), np.zeros((1, len(HORIZON_MINUTES)), np.float32)
    for minutes, carbs_g, insulin_u in _moments(scenario, start_s):
        at = min(int(np.searchsorted(HORIZON_MINUTES, minutes)), len(HORIZON_MINUTES) - 1)
        carbs[0, at] += carbs_g
        insulin[0, at] += insulin_u
    return carbs, insulin


def add_effect(forecast: Float32, quantiles: Float32, effect: Effect) -> tuple[Float64, Float64]:
    """Forecast [12] and quantiles [12,5] with an effect, mg/dL in the sensor's range, from those without it.

    Each quantile's distance from the median grows by the effect's spread in quadrature. Where an end of the range cuts
    a band, its other side moves out, so that every band stays at least as wide as the forecast's.
    """
    plain = quantiles.astype(np.float64)
    median = plain[:, 2:3]
    wider = np.sign(_Z) * np.hypot(plain - median, _Z * effect.spread_mg_dl[:, None])
    changed = _in_range(median + wider + effect.change_mg_dl[:, None])
    for low, high in ((1, 3), (0, 4)):
        width = plain[:, high] - plain[:, low]
        changed[:, low] = _in_range(np.minimum(changed[:, low], changed[:, high] - width))
        changed[:, high] = np.maximum(changed[:, high], changed[:, low] + width)
    return _in_range(forecast.astype(np.float64) + effect.change_mg_dl), changed


def _in_range(mg_dl: Float64) -> Float64:
    return np.clip(mg_dl, SENSOR_MIN_MG_DL, SENSOR_MAX_MG_DL)


def _moments(scenario: Scenario, start_s: int) -> list[tuple[float, float, float]]:
    """Minutes after the newest reading, grams and units of everything planned. Raises UnusableScenario."""
    found = []
    for number, planned in enumerate(scenario.planned):
        minutes = (planned.at.timestamp() - start_s) / 60
        if not 0 <= minutes <= HORIZON_MINUTES[-1]:
            expected = "a moment between the newest reading and 60 minutes after it"
            raise UnusableScenario(f"/planned/{number}/at", expected)
        found.append((minutes, planned.carbs_g, planned.insulin_u))
    return found


def _needed(value: float | None, name: str, what: str) -> float:
    if value is None:
        raise UnusableScenario(f"/{name}", f"needed to simulate this plan: {what}, for this person")
    return value
