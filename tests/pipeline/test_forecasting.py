"""Forecast or reason: every refusal, the clock, the units and the event probabilities."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_schemas.forecast import Forecast, NoForecast
from data_schemas.plan import ModelSpec
from pipeline.forecasting import Float32, Float64, Int64, make_forecast, probabilities_below
from pipeline.model_card import CardPrivacy, ModelCard, TrainedOn
from pipeline.reading_rules import judge
from pipeline.windows import Series, WindowSpec, cut_windows, history_features

NOW = 1_700_000_000.0
SPREAD = np.array([-20.0, -8.0, 0.0, 8.0, 20.0], np.float32)


@dataclass(frozen=True)
class Persistence:
    """A real, if simple, forecaster: the last reading, with a spread that does not grow."""

    spec: ModelSpec = field(default_factory=lambda: ModelSpec(history_minutes=180, hidden_size=8))
    model_hash: str = "ab" * 32

    @property
    def card(self) -> ModelCard:
        """A complete card."""
        return ModelCard(
            version="3",
            model_hash=self.model_hash,
            spec=self.spec,
            trained_on=(TrainedOn(node="north", declared_training_patients=9, declared_heldout_patients=3),),
            privacy=CardPrivacy(unit="patient", epsilon=3, delta=1e-5, rounds=5, noise_source="secure"),
        )

    def predict(self, x: Float32, last: Float32) -> tuple[Float32, Float32]:
        """Repeat the last reading twelve times, with the same quantiles around it."""
        assert len(x) == len(last)
        forecast = np.repeat(last[:, None], 12, axis=1)
        return forecast, np.clip(forecast[..., None] + SPREAD, 40, 400).astype(np.float32)


def readings(count: int = 24, *, age_s: float = 60, step_s: int = 300, start: float = 110) -> tuple[Int64, Float32]:
    """Make a gently rising series whose newest reading is age_s old."""
    time_s = (NOW - age_s - step_s * np.arange(count - 1, -1, -1)).astype(np.int64)
    return time_s, (start + np.arange(count)).astype(np.float32)


def reason(time_s: Int64, glucose: Float32) -> NoForecast:
    answer = make_forecast(Persistence(), time_s, glucose, NOW, "mg/dL")
    assert isinstance(answer, NoForecast)
    return answer


def forecast(time_s: Int64, glucose: Float32, units: str = "mg/dL") -> Forecast:
    answer = make_forecast(Persistence(), time_s, glucose, NOW, units)  # type: ignore[arg-type]
    assert isinstance(answer, Forecast)
    return answer


def test_forecast_counts_from_the_last_reading() -> None:
    """Points lie 5..60 minutes after the newest reading, whatever its age, and the age is stated."""
    answer = forecast(*readings(age_s=420))
    assert answer.age_seconds == 420
    assert answer.last_reading_at == datetime.fromtimestamp(NOW - 420, tz=UTC)
    assert [(p.at - answer.last_reading_at).total_seconds() for p in answer.points] == [300 * k for k in range(1, 13)]
    assert answer.points[0].value == 133.0
    assert answer.readings_used == 24
    assert "epsilon 3" in answer.privacy_statement


def test_units_of_the_answer() -> None:
    """The same forecast in mmol/L is the mg/dL one divided by 18.0156."""
    answer = forecast(*readings(), units="mmol/L")
    assert answer.units == "mmol/L"
    assert answer.points[0].value == round(133 / 18.0156, 2)


def test_order_and_duplicates_do_not_matter() -> None:
    """Shuffled readings, and later duplicates of a second, give the same forecast."""
    time_s, glucose = readings()
    order = np.random.default_rng(1).permutation(len(time_s))
    shuffled = forecast(np.append(time_s[order], time_s[0]), np.append(glucose[order], np.float32(300)))
    assert shuffled == forecast(time_s, glucose)


@pytest.mark.parametrize(("age_s", "expected"), [(721, NoForecast.STALE), (-301, NoForecast.FUTURE)])
def test_beyond_the_age_limits_there_is_no_forecast(age_s: float, expected: NoForecast) -> None:
    """Older than 12 minutes is stale, further ahead than 5 minutes is the future."""
    assert reason(*readings(age_s=age_s)) is expected


@pytest.mark.parametrize(("age_s", "stated_s"), [(720, 720), (-300, 0)])
def test_at_the_age_limits_there_is_a_forecast(age_s: float, stated_s: float) -> None:
    """Exactly 12 minutes old and 5 minutes ahead are accepted; an age is never negative."""
    assert forecast(*readings(age_s=age_s)).age_seconds == stated_s


def test_too_little_history() -> None:
    """No readings, less than an hour of them, or a gap before the newest one are too little."""
    assert reason(*readings(0)) is NoForecast.TOO_LITTLE_HISTORY
    assert reason(*readings(11)) is NoForecast.TOO_LITTLE_HISTORY
    assert forecast(*readings(13)).readings_used == 13
    time_s, glucose = readings()
    time_s[:-1] -= 1800
    assert reason(time_s, glucose) is NoForecast.TOO_LITTLE_HISTORY


def test_flat_sensor() -> None:
    """45 minutes without any change is a stuck sensor; 40 minutes are not."""
    time_s, glucose = readings()
    glucose[-9:] = 150
    assert forecast(time_s, glucose).points[0].value == 150
    glucose[-10:] = 150
    assert reason(time_s, glucose) is NoForecast.FLAT


def test_jump() -> None:
    """A change in 5 minutes beyond 60 mg/dL within the last hour is the sensor's; an older one does not matter."""
    time_s, glucose = readings()
    glucose[-3] += 61
    assert reason(time_s, glucose) is NoForecast.JUMP
    glucose[-3] -= 61
    glucose[2] += 61
    assert forecast(time_s, glucose).points[0].value == 133.0


def test_noisy_sensor() -> None:
    """Four turns within the hour of more than 12 mg/dL each way are the sensor's; smaller ones and three are not."""
    time_s, glucose = readings()
    calm, shaking = glucose.copy(), glucose.copy()
    calm[-12:] = 140 + 11 * (np.arange(12) % 2)
    assert forecast(time_s, calm).points[0].value == 151
    shaking[-6:] = 120 + 15 * (np.arange(6) % 2)
    assert reason(time_s, shaking) is NoForecast.NOISY
    shaking[-2] = shaking[-1]
    assert forecast(time_s, shaking).points[0].value == 135


def test_quality_flags() -> None:
    """What makes readings worse is told by name: young series, gaps, age, the sensor's limits, unlikely changes."""
    day = readings(300, start=-180)
    assert forecast(day[0], np.clip(day[1], 60, 200)).quality == ()
    assert forecast(*readings()).quality == ("short-history", "short-day")
    assert forecast(*readings(300, start=-230, age_s=430)).quality == ("ageing", "at-sensor-limit")
    time_s, glucose = day[0], np.clip(day[1], 60, 200)
    missing = np.delete(np.arange(300), [290, 291, 292, 293])
    assert forecast(time_s[missing], glucose[missing]).quality == ("gaps",)
    glucose[-20] += 45
    assert forecast(time_s, glucose).quality == ("jumps",)


@pytest.mark.parametrize("value", [9.0, 601.0])
def test_out_of_range(value: float) -> None:
    """A value no sensor reports is refused, not clipped."""
    time_s, glucose = readings()
    glucose[5] = value
    assert reason(time_s, glucose) is NoForecast.OUT_OF_RANGE


@pytest.mark.parametrize("factor", [1 / 18.0156, 18.0156])
def test_wrong_unit_is_suspected(factor: float) -> None:
    """mmol/L sent as mg/dL, and mg/dL sent as mmol/L, are noticed by the median."""
    time_s, glucose = readings()
    assert reason(time_s, (glucose * factor).astype(np.float32)) is NoForecast.UNIT_SUSPECT


def test_replay_hides_what_came_later() -> None:
    """As of a past moment the answer is what it would have been then, and says so."""
    time_s, glucose = readings(40)
    moment = float(time_s[29]) + 100
    replay = make_forecast(Persistence(), time_s, glucose, NOW, "mg/dL", as_of_s=moment)
    assert isinstance(replay, Forecast)
    assert replay.as_of == datetime.fromtimestamp(moment, tz=UTC)
    assert replay.generated_at == datetime.fromtimestamp(NOW, tz=UTC)
    assert replay.last_reading_at == datetime.fromtimestamp(int(time_s[29]), tz=UTC)
    assert replay.age_seconds == 100
    then = make_forecast(Persistence(), time_s[:30], glucose[:30], moment, "mg/dL")
    assert isinstance(then, Forecast)
    assert replay.points == then.points


def test_event_probabilities_follow_the_quantiles() -> None:
    """At the median the probability is one half; a low person is likelier low; a clipped forecast is certain."""
    at_70 = forecast(*readings(start=70 - 23))
    assert at_70.probability_below_70_within_30 == pytest.approx(0.5, abs=0.01)
    assert at_70.probability_above_180_within_60 == 0
    high = forecast(*readings(start=380))
    assert high.probability_above_180_within_30 == 1
    assert high.points[0].clipped


@given(
    st.lists(st.floats(40, 400), min_size=5, max_size=5).map(sorted),
    st.floats(30, 420),
    st.floats(0, 50),
)
def test_probability_is_monotone(levels: list[float], threshold: float, more: float) -> None:
    """Probabilities lie in 0..1 and grow with the threshold, for any quantiles, coinciding ones included."""
    quantiles: Float64 = np.array([levels])
    lower, upper = (probabilities_below(t, quantiles)[0] for t in (threshold, threshold + more))
    assert 0 <= lower <= upper <= 1


def test_probability_agrees_with_each_quantile() -> None:
    """P(glucose < q_a) is a at every quantile of distinct quantiles."""
    levels = np.array([[80.0, 95.0, 110.0, 130.0, 170.0]])
    found = [probabilities_below(q, levels)[0] for q in levels[0]]
    np.testing.assert_allclose(found, [0.05, 0.25, 0.5, 0.75, 0.95], atol=1e-6)


@given(
    steps=st.lists(st.integers(60, 2400), min_size=0, max_size=60),
    moves=st.lists(st.floats(-60, 60), min_size=61, max_size=61),
)
def test_enough_history_is_the_rule_of_training(steps: list[int], moves: list[float]) -> None:
    """A forecast is refused for its history exactly where training would not have cut a window."""
    times = np.cumsum([1_700_000_000, *steps]).astype(np.int64)
    glucose = np.clip(150 + np.cumsum(moves[: len(times)]), 45, 395).astype(np.float32)
    spec = WindowSpec(history_minutes=180)
    series = Series(("one",), np.array([0, len(times)], dtype=np.int64), times, glucose)
    anchors = cut_windows(series, spec, need_target=False).anchors
    would_cut = len(anchors) > 0 and anchors[-1] == len(times) - 1
    told = judge(times, glucose, float(times[-1]), spec)
    assert (told == NoForecast.TOO_LITTLE_HISTORY) == (not would_cut)


@given(count=st.integers(1, 700), seed=st.integers(0, 99))
def test_serving_sees_what_training_saw(count: int, seed: int) -> None:
    """history_features gives the numbers that windows.gather gives for the same reading."""
    draw = np.random.default_rng(seed)
    times = np.cumsum(draw.integers(200, 400, count)).astype(np.int64) + 1_700_000_000
    glucose = draw.uniform(60, 300, count).astype(np.float32)
    spec = WindowSpec(history_minutes=180)
    series = Series(("one",), np.array([0, count], dtype=np.int64), times, glucose)
    batch = cut_windows(series, spec, need_target=False).gather(np.array([count - 1], dtype=np.int64))
    x, last = history_features(times, glucose, spec)
    np.testing.assert_allclose(x, batch.x, atol=1e-5)
    np.testing.assert_array_equal(last, batch.last)


def test_80_percent_interval_lies_between_its_neighbours() -> None:
    """p10 and p90 lie a quarter of the way from 5 to 25% and from 95 to 75%."""
    point = forecast(*readings(40)).points[0]
    assert point.p10 == pytest.approx(point.p05 + 0.25 * (point.p25 - point.p05), abs=0.06)
    assert point.p90 == pytest.approx(point.p95 - 0.25 * (point.p95 - point.p75), abs=0.06)
