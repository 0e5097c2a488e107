"""Episodes and alarms on curves whose answer is plain to see."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pipeline.events import alarms_by_forecast, count_alarms, episode_score, episodes
from pipeline.scored import Scored
from pipeline.windows import Series


def series(*people: list[float], every: int = 5) -> Series:
    """One person per list, a reading every few minutes."""
    starts = np.concatenate([[0], np.cumsum([len(p) for p in people])]).astype(np.int64)
    times = np.concatenate([np.arange(len(p), dtype=np.int64) * every * 60 for p in people])
    return Series(tuple(f"p{i}" for i in range(len(people))), starts, times, np.concatenate(people).astype(np.float32))


def test_an_episode_lasts_fifteen_minutes() -> None:
    """Four five-minute readings below 70 are an episode, three are not; 70 itself is not below 70."""
    short = [100.0] * 4 + [65.0] * 3 + [100.0] * 4
    long = [100.0] * 4 + [65.0] * 4 + [100.0] * 4
    edge = [100.0] * 4 + [70.0] * 6 + [100.0] * 4
    found = episodes(series(short, long, edge), 70.0, -1.0)
    assert found.person.tolist() == [1]
    assert (found.start_s.tolist(), found.end_s.tolist()) == ([4 * 300], [7 * 300])


def test_two_readings_of_a_fifteen_minute_sensor_are_an_episode() -> None:
    """Sensors that read every 15 minutes have episodes too, though their stamps jitter by a minute."""
    curve = series([100.0, 60.0, 60.0, 100.0], every=14)
    assert episodes(curve, 70.0, -1.0).start_s.tolist() == [14 * 60]


def test_a_short_return_does_not_end_an_episode() -> None:
    """Glucose back in range for five minutes leaves one episode; for 15 minutes it makes two."""
    once = [100.0] * 4 + [65.0] * 5 + [75.0] * 2 + [65.0] * 5 + [100.0] * 4
    twice = [100.0] * 4 + [65.0] * 5 + [75.0] * 4 + [65.0] * 5 + [100.0] * 4
    assert episodes(series(once, twice), 70.0, -1.0).person.tolist() == [0, 1, 1]


def test_missing_readings_end_an_episode() -> None:
    """More than 30 minutes without a reading cut an episode, and no episode runs over two people."""
    times = np.array([0, 5, 10, 15, 60, 65, 70, 75]) * 60
    gap = Series(("p",), np.array([0, 8]), times, np.full(8, 60, np.float32))
    assert episodes(gap, 70.0, -1.0).start_s.tolist() == [0, 3600]
    assert episodes(series([60.0] * 2, [60.0] * 2), 70.0, -1.0).person.tolist() == []


def scored(curve: Series, ahead: np.ndarray) -> Scored:
    """Issue points at every reading, forecasting the same value at all horizons."""
    count = len(curve.time_s)
    wide = np.repeat(ahead[:, None], 12, axis=1)
    person = np.repeat(np.arange(len(curve.patients)), np.diff(curve.starts))
    none = np.zeros((count, 12), dtype=bool)
    site = np.zeros(count, dtype=np.int64)
    return Scored(wide, none, wide, curve.glucose_mg_dl, person, site, ("here",), time_s=curve.time_s)


def test_alarms_are_matched_to_episodes() -> None:
    """One episode announced 20 minutes before, one missed, one false alarm: each score is what one counts by hand."""
    first = [100.0] * 20 + [65.0] * 4 + [100.0] * 20
    second = [100.0] * 20 + [65.0] * 4 + [100.0] * 60
    curve = series(first, second)
    ahead = np.full(len(curve.time_s), 100.0)
    ahead[[16, 17]] = 60.0
    ahead[len(first) + 60] = 60.0
    s = scored(curve, ahead)
    found = episode_score("low", count_alarms(curve, s, alarms_by_forecast(s, 70.0, -1.0), 70.0, -1.0))
    days = (len(first) - 1 + len(second) - 1) * 5 / 1440
    assert (found.episodes, found.recall, found.precision) == (2, 0.5, 0.5)
    assert found.median_lead_minutes == 20
    assert found.false_alarms_per_day == pytest.approx(1 / days)
    assert found.f1 == pytest.approx(0.5)


def test_an_alarm_within_the_episode_announces_nothing() -> None:
    """A forecast of a low while glucose is low already is no alarm: persistence detects no episode."""
    curve = series([100.0] * 20 + [65.0] * 6 + [100.0] * 20)
    s = scored(curve, curve.glucose_mg_dl.astype(np.float64))
    found = episode_score("low", count_alarms(curve, s, alarms_by_forecast(s, 70.0, -1.0), 70.0, -1.0))
    assert found.recall == 0
    assert math.isnan(found.precision)
    assert found.false_alarms_per_day == 0


def test_ringing_on_is_one_alarm() -> None:
    """Alarms at every issue point for an hour count once: a person hears one."""
    curve = series([100.0] * 60)
    ahead = np.full(60, 100.0)
    ahead[20:33] = 60.0
    s = scored(curve, ahead)
    counts = count_alarms(curve, s, alarms_by_forecast(s, 70.0, -1.0), 70.0, -1.0)
    assert (counts.alarms.tolist(), counts.true_alarms.tolist()) == ([1], [0])
