"""Baselines: exact on series they can describe, causal, deterministic."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from data_schemas.errors import BadInput
from data_schemas.units import HORIZON_MINUTES
from pipeline.baselines import fit_ridge, linear, persistence, ridge
from pipeline.windows import Series, Windows, WindowSpec, cut_windows


def windows_of(*curves: np.ndarray, every: int = 5) -> Windows:
    """One person per curve, a reading every few minutes."""
    frames = [
        pd.DataFrame(
            {
                "patient_id": f"p{i}",
                "measured_at": pd.Timestamp("2026-01-01", tz="UTC")
                + pd.to_timedelta(np.arange(len(c)) * every, unit="min"),
                "glucose_mg_dl": c,
            }
        )
        for i, c in enumerate(curves)
    ]
    return cut_windows(Series.from_frame(pd.concat(frames)), WindowSpec())


def wave(seed: int, points: int = 400) -> np.ndarray:
    """Draw a smooth curve between 70 and 230 mg/dL with a little noise."""
    draw = np.random.default_rng(seed)
    t = np.arange(points)
    return 150 + 60 * np.sin(t / 20 + seed) + 15 * np.sin(t / 7) + draw.normal(0, 2, points)


def test_persistence_repeats_the_issue_reading() -> None:
    """Every horizon carries the last reading."""
    batch = (w := windows_of(wave(1))).gather(w.anchors[:5])
    assert np.array_equal(persistence(batch), np.repeat(batch.last[:, None], 12, axis=1))


def test_linear_continues_a_straight_line() -> None:
    """On a steady rise the line hits every target."""
    w = windows_of(60 + 0.5 * 5 * np.arange(60))
    batch = w.gather(w.anchors)
    assert batch.mask.any()
    assert np.abs(linear(batch) - batch.y)[batch.mask].max() < 1e-3


def test_linear_stays_in_the_sensor_range() -> None:
    """A steep fall ends at 40 mg/dL."""
    w = windows_of(400 - 6.0 * np.arange(50))
    batch = w.gather(w.anchors)
    assert linear(batch).min() == 40


def test_ridge_beats_persistence_on_people_it_never_saw() -> None:
    """On smooth curves of other people the fitted model halves persistence's error at 30 minutes."""
    model = fit_ridge([windows_of(wave(1), wave(2)), windows_of(wave(3))])
    batch = (w := windows_of(wave(9))).gather(w.anchors)
    h = HORIZON_MINUTES.index(30)
    keep = batch.mask[:, h]
    errors = [np.sqrt(np.mean((f[keep, h] - batch.y[keep, h]) ** 2)) for f in (ridge(model, batch), persistence(batch))]
    assert errors[0] < errors[1] / 2
    assert model.coefficients.shape == (12, 24)


def test_ridge_is_deterministic_and_subsamples_by_stride() -> None:
    """Equal windows give equal coefficients; a limit takes every n-th window."""
    w = windows_of(wave(1), wave(2))
    one, two = fit_ridge([w]), fit_ridge([w])
    assert np.array_equal(one.coefficients, two.coefficients)
    limited = fit_ridge([w], max_windows=200)
    assert limited.windows == -(-len(w) // -(-len(w) // 200))


def test_ridge_uses_each_horizon_where_it_exists() -> None:
    """15-minute sensors have no target at most horizons: those lie on the line between their neighbours."""
    sparse, dense = windows_of(wave(4), every=15), windows_of(wave(5))
    assert np.isfinite(fit_ridge([sparse, dense]).coefficients).all()
    alone = fit_ridge([sparse])
    fifteen, thirty = (alone.coefficients[HORIZON_MINUTES.index(m)] for m in (15, 30))
    assert np.allclose(alone.coefficients[HORIZON_MINUTES.index(20)], fifteen + (thirty - fifteen) / 3)
    assert np.allclose(alone.coefficients[HORIZON_MINUTES.index(5)], fifteen / 3)


def test_ridge_without_windows_is_refused() -> None:
    """Nothing to fit on is an error that says so."""
    with pytest.raises(BadInput, match="no window"):
        fit_ridge([windows_of(wave(1, 3))])
