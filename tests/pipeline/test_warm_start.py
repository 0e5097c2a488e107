"""The recipe of the public start: copies of people, and intervals made narrower."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.forecaster import flatten, predict, unflatten
from pipeline.warm_start import SPEC, load, narrow, smoothed
from pipeline.windows import Series, WindowSpec, cut_windows


def noisy(people: int = 2, points: int = 200) -> Series:
    t = np.arange(points) * 5
    draw = np.random.default_rng(0)
    glucose = np.concatenate([130 + 40 * np.sin(t / 70 + p) + draw.normal(0, 6, points) for p in range(people)])
    starts = np.arange(people + 1, dtype=np.int64) * points
    times = np.tile(t.astype(np.int64) * 60, people)
    return Series(tuple(f"p{i}" for i in range(people)), starts, times, glucose.astype(np.float32))


def test_smoothing_calms_readings_and_keeps_people_and_gaps_apart() -> None:
    """Noise shrinks, a constant stays, and a reading more than 40 minutes or one person away has no weight."""
    series = noisy()
    assert (
        np.abs(np.diff(smoothed(series, 9.0).glucose_mg_dl)).mean() < 0.6 * np.abs(np.diff(series.glucose_mg_dl)).mean()
    )
    times = np.array([0, 5, 50, 55, 0, 5]) * 60
    flat = Series(("a", "b"), np.array([0, 4, 6]), times, np.array([90, 90, 200, 200, 300, 300], np.float32))
    assert np.allclose(smoothed(flat, 12.0).glucose_mg_dl, flat.glucose_mg_dl)


def test_narrower_intervals_keep_the_forecast() -> None:
    """The steps between quantiles shrink to about the asked share; forecast and median stay."""
    windows = cut_windows(noisy(), WindowSpec(history_minutes=120))
    batch = windows.gather(windows.anchors)
    before = predict(unflatten(load(), SPEC).eval(), batch.x, batch.last)
    model = unflatten(load(), SPEC)
    narrow(model, batch.x, 0.8)
    after = predict(unflatten(flatten(model), SPEC).eval(), batch.x, batch.last)
    assert np.allclose(before[0], after[0])
    assert np.allclose(before[1][..., 2], after[1][..., 2])
    width = [float((q[..., 4] - q[..., 0]).mean()) for _, q in (before, after)]
    assert width[1] / width[0] == pytest.approx(0.8, abs=0.02)
