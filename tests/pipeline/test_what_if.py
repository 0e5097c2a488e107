"""The simulated curve: published physiology, bands that never promise more than the forecast's, and nothing to obey."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_schemas.forecast import SIMULATION_LABEL, Forecast, Simulation
from data_schemas.scenario import Planned, Scenario
from pipeline.forecasting import Float32, make_forecast
from pipeline.what_if import (
    ONSET_MINUTES,
    PEAK_MINUTES,
    Effect,
    ScenarioPredictor,
    UnusableScenario,
    add_effect,
    carbs_absorbed,
    insulin_acted,
)
from tests.pipeline.test_forecasting import NOW, Persistence, readings

NEWEST = datetime.fromtimestamp(NOW - 60, tz=UTC)


def scenario(minutes: float = 0, carbs_g: float = 0, insulin_u: float = 0, **person: float) -> Scenario:
    planned = Planned(at=NEWEST + timedelta(minutes=minutes), carbs_g=carbs_g, insulin_u=insulin_u)
    return Scenario(planned=(planned,), **{"insulin_sensitivity": 40, "carbohydrate_ratio": 10, **person})


def simulated(plan: Scenario, units: str = "mg/dL", model: Persistence | None = None) -> tuple[Forecast, Simulation]:
    made = make_forecast(model or Persistence(), *readings(), NOW, units, scenario=plan)  # type: ignore[arg-type]
    assert isinstance(made, Forecast)
    assert made.simulation is not None
    return made, made.simulation


def test_insulin_acts_as_published() -> None:
    """Nothing before its onset, everything after 370 minutes, and quickest 75 minutes after the onset."""
    minutes = np.arange(0, 400, 1.0)
    acted = insulin_acted(minutes)
    assert (acted[minutes <= ONSET_MINUTES] == 0).all()
    assert acted[minutes >= 370] == pytest.approx(1)
    assert (np.diff(acted) >= -1e-12).all()
    assert abs(float(minutes[np.diff(acted).argmax()]) - ONSET_MINUTES - PEAK_MINUTES) <= 1


def test_meals_are_absorbed_as_published() -> None:
    """Nothing before the meal, half after 67 minutes, quickest after 40, all in the end."""
    minutes = np.arange(-10, 600, 1.0)
    absorbed = carbs_absorbed(minutes)
    assert (absorbed[minutes <= 0] == 0).all()
    assert absorbed[minutes == 67] == pytest.approx(0.5, abs=0.005)
    assert abs(float(minutes[np.diff(absorbed).argmax()]) - 40) <= 1
    assert absorbed[-1] == pytest.approx(1, abs=1e-4)


def test_a_plan_moves_the_curve_and_not_the_forecast() -> None:
    """Carbohydrate raises, insulin lowers, by sensitivity and ratio; points and probabilities stay as they were."""
    plain = make_forecast(Persistence(), *readings(), NOW, "mg/dL")
    assert isinstance(plain, Forecast)
    eaten, meal = simulated(scenario(carbs_g=20))
    injected, insulin = simulated(scenario(insulin_u=2))
    for made in (eaten, injected):
        assert made.model_dump(exclude={"simulation"}) == plain.model_dump(exclude={"simulation"})
    rise = meal.points[-1].value - plain.points[-1].value
    assert rise == pytest.approx(20 * 40 / 10 * carbs_absorbed(np.array([60.0]))[0], abs=0.1)
    fall = plain.points[-1].value - insulin.points[-1].value
    assert fall == pytest.approx(2 * 40 * insulin_acted(np.array([60.0]))[0], abs=0.1)
    assert meal.points[5].value < simulated(scenario(carbs_g=20, insulin_sensitivity=60))[1].points[5].value
    assert meal.points[5].value > simulated(scenario(20, carbs_g=20))[1].points[5].value


def test_a_simulation_says_what_it_is() -> None:
    """It carries its label, its basis and what it assumes; a plan of nothing is the forecast itself."""
    made, simulation = simulated(scenario())
    assert simulation.points == made.points
    assert simulation.label == SIMULATION_LABEL
    assert "not advice" in simulation.label
    assert simulation.basis == "physiology"
    assert len(simulation.assumes) == 5
    assert made.use.startswith("Research use")


def test_units_of_a_scenario() -> None:
    """Sensitivity in the request's unit: 40 mg/dL a unit and 40 / 18.0156 mmol/L a unit give the same curve."""
    _, in_mg = simulated(scenario(insulin_u=1))
    _, in_mmol = simulated(scenario(insulin_u=1, insulin_sensitivity=40 / 18.0156), units="mmol/L")
    assert in_mmol.points[-1].p50 == pytest.approx(in_mg.points[-1].p50 / 18.0156, abs=0.01)


@pytest.mark.parametrize(
    ("plan", "pointer"),
    [
        (Scenario(planned=(Planned(at=NEWEST, insulin_u=1),)), "/insulin_sensitivity"),
        (Scenario(planned=(Planned(at=NEWEST, carbs_g=9),), insulin_sensitivity=40), "/carbohydrate_ratio"),
        (scenario(-1, carbs_g=9), "/planned/0/at"),
        (scenario(61, carbs_g=9), "/planned/0/at"),
    ],
)
def test_what_cannot_be_simulated_is_pointed_at(plan: Scenario, pointer: str) -> None:
    """A number of the person that is missing and a moment outside the hour are named, not guessed."""
    with pytest.raises(UnusableScenario) as refused:
        simulated(plan)
    assert refused.value.pointer == pointer


@given(
    levels=st.lists(st.floats(40, 400, width=32), min_size=5, max_size=5).map(sorted),
    up=st.floats(0, 2000),
    down=st.floats(0, 2000),
)
def test_bands_are_never_narrower_than_the_forecasts(levels: list[float], up: float, down: float) -> None:
    """For any forecast and any effect the quantiles stay in order, in the sensor's range, and as wide at least."""
    quantiles = np.array([levels], np.float32)
    effect = Effect(np.array([up - down]), 0.25 * np.hypot(np.array([up]), np.array([down])))
    value, changed = add_effect(quantiles[:, 2], quantiles, effect)
    assert 40 <= value[0] <= 400
    assert 40 - 1e-6 <= changed[0, 0] <= changed[0, -1] <= 400 + 1e-6
    assert (np.diff(changed[0]) >= -1e-6).all()
    for low, high in ((0, 4), (1, 3)):
        assert changed[0, high] - changed[0, low] >= levels[high] - levels[low] - 1e-3


@dataclass(frozen=True)
class Informed(Persistence):
    """A model with channels for what is planned: 2 mg/dL up for each gram up to a horizon, 30 down for each unit."""

    def predict_planned(
        self, x: Float32, last: Float32, carbs_g: Float32, insulin_u: Float32
    ) -> tuple[Float32, Float32]:
        """Persistence plus what was planned so far."""
        forecast, quantiles = self.predict(x, last)
        change = (2 * carbs_g - 30 * insulin_u).cumsum(axis=1)
        return forecast + change, quantiles + change[..., None]


def test_a_model_with_channels_answers_itself() -> None:
    """Such a model is asked instead of physiology, gets each amount in its five minutes, and says so."""
    model = Informed()
    assert isinstance(model, ScenarioPredictor)
    assert not isinstance(Persistence(), ScenarioPredictor)
    plan = Scenario(planned=(Planned(at=NEWEST + timedelta(minutes=12), carbs_g=10),))
    made, simulation = simulated(plan, model=model)
    assert simulation.basis == "model"
    differences = [ours.value - plain.value for ours, plain in zip(simulation.points, made.points, strict=True)]
    assert differences == [0, 0] + [20] * 10
