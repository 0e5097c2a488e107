"""What a node has learned of a person's past: served, kept until the next refresh, and only that person's."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from data_schemas.plan import ModelSpec
from hospital_node.personal import PersonalAdaptations, recent_past
from pipeline.adaptation import REFRESH_SECONDS, learned
from pipeline.forecasting import Float32, Int64, make_forecast
from tests.pipeline.test_forecasting import Persistence

DAY = 86_400
NOW = 20_010 * DAY + 9 * 3600 + 120


@dataclass(frozen=True)
class Counting(Persistence):
    """Persistence that notes how many windows it was asked about."""

    asked: tuple[list[int], ...] = ([],)

    def predict(self, x: Float32, last: Float32) -> tuple[Float32, Float32]:
        """Forecast the last reading."""
        self.asked[0].append(len(last))
        return super().predict(x, last)


def readings(days: int = 6, phase: float = 0.0) -> tuple[Int64, Float32]:
    """A person whose glucose swings with the day."""
    time_s = NOW - 120 - 300 * np.arange(days * 288, dtype=np.int64)[::-1]
    swing = 50 * np.sin(2 * np.pi * time_s / DAY + phase)
    return time_s, (150 + swing + 3 * np.sin(time_s / 700.0)).astype(np.float32)


def test_a_forecast_is_corrected_towards_what_this_person_does() -> None:
    """With the person's past the forecast comes nearer to what that person's glucose then does."""
    model, mine = Persistence(), readings()
    adaptation = PersonalAdaptations().learn(model, "p", mine, NOW)
    plain = make_forecast(model, *mine, NOW, "mg/dL")
    personal = make_forecast(model, *mine, NOW, "mg/dL", adaptation=adaptation)
    truth = 150 + 50 * np.sin(2 * np.pi * (NOW - 120 + 3600) / DAY) + 3 * np.sin((NOW - 120 + 3600) / 700.0)

    assert not plain.personal  # type: ignore[union-attr]
    assert personal.personal  # type: ignore[union-attr]
    errors = [abs(made.points[-1].value - truth) for made in (plain, personal)]  # type: ignore[union-attr]
    assert errors[1] < 0.7 * errors[0]


def test_another_person_gets_another_correction() -> None:
    """Nothing of one person's past is in what another is served."""
    known = PersonalAdaptations()
    alone = known.learn(Persistence(), "q", readings(phase=2.0), NOW)
    known.learn(Persistence(), "p", readings(), NOW)
    after_other = PersonalAdaptations()
    after_other.learn(Persistence(), "p", readings(), NOW)

    np.testing.assert_array_equal(
        after_other.learn(Persistence(), "q", readings(phase=2.0), NOW).weights, alone.weights
    )
    assert not np.allclose(known.learn(Persistence(), "p", readings(), NOW).weights, alone.weights)


def test_it_is_worked_out_once_for_each_refresh() -> None:
    """Within six hours the same correction is in force; after them, or under another model, it is worked out anew."""
    known, model, mine = PersonalAdaptations(), Persistence(), readings()
    assert known.kept(model, "p", NOW) is None
    learned_now = known.learn(model, "p", mine, NOW)

    assert known.kept(model, "p", NOW + 60) is learned_now
    assert known.kept(model, "p", NOW + REFRESH_SECONDS) is None
    assert known.kept(model, "q", NOW) is None


def test_readings_after_the_refresh_do_not_matter() -> None:
    """What came since the refresh cannot change the correction, so a replayed past is served as it was."""
    model, (time_s, glucose) = Persistence(), readings()
    refresh = NOW // REFRESH_SECONDS * REFRESH_SECONDS
    changed = np.where(time_s >= refresh, 300.0, glucose).astype(np.float32)
    weights = [PersonalAdaptations().learn(model, "p", (time_s, g), NOW).weights for g in (glucose, changed)]

    np.testing.assert_array_equal(weights[0], weights[1])


@pytest.mark.parametrize("days", [0, 1])
def test_little_or_no_past_is_no_error(days: int) -> None:
    """Who has just come is forecast by the model alone."""
    model = Counting(asked=([],))
    time_s, glucose = readings(1)
    cut = len(time_s) if days else 0
    past = recent_past(model, time_s[:cut], glucose[:cut], NOW - DAY)

    assert not learned(past, NOW).weights.any()


def test_the_past_is_looked_back_on_in_steps_of_a_quarter_of_an_hour() -> None:
    """The model is asked about at most four windows an hour of the last 90 days."""
    model = Counting(asked=([],))
    recent_past(model, *readings(120), NOW)

    assert 0.8 * 90 * 96 < sum(model.asked[0]) < 1.1 * 90 * 96


def test_the_spec_of_the_model_cuts_the_windows() -> None:
    """A model that looks at an hour only is replayed on windows of an hour."""
    model = Persistence()
    short = ModelSpec(history_minutes=60, hidden_size=model.spec.hidden_size)

    @dataclass(frozen=True)
    class Short(Persistence):
        spec: ModelSpec = short

    assert recent_past(Short(), *readings(2), NOW).inputs.shape == recent_past(model, *readings(2), NOW).inputs.shape
