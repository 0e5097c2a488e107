"""Windows: causal, honest about what is a real reading, and the same at training and at serving."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from pipeline.windows import FEATURES, Series, WindowSpec, cut_windows, history_features, shifted_levels

START_S = 1_700_000_000


def one_patient(minutes: np.ndarray, glucose: np.ndarray | None = None, name: str = "a") -> Series:
    values = 120.0 + 30.0 * np.sin(minutes / 40.0) if glucose is None else glucose
    time_s = (START_S + np.round(minutes * 60)).astype(np.int64)
    return Series((name,), np.array([0, len(minutes)]), time_s, values.astype(np.float32))


def joined(*parts: Series) -> Series:
    starts = np.concatenate([[0], np.cumsum([len(p.time_s) for p in parts])]).astype(np.int64)
    names = tuple(n for p in parts for n in p.patients)
    return Series(
        names,
        starts,
        np.concatenate([p.time_s for p in parts]),
        np.concatenate([p.glucose_mg_dl for p in parts]),
    )


def irregular(seed: int, count: int = 300) -> Series:
    rng = np.random.default_rng(seed)
    return one_patient(
        np.cumsum(rng.uniform(1.0, 16.0, count)),
        150.0 + np.clip(np.cumsum(rng.normal(0, 8, count)), -100, 200),
        f"p{seed}",
    )


@pytest.mark.parametrize("seed", range(5))
def test_no_reading_after_the_issue_time_changes_the_history(seed: int) -> None:
    """Replacing every reading after t0 leaves x and last bit for bit as they were."""
    series, spec = irregular(seed), WindowSpec(history_minutes=120)
    windows = cut_windows(series, spec)
    anchor = windows.anchors[len(windows) // 2 : len(windows) // 2 + 1]
    before = windows.gather(anchor)
    changed = series.glucose_mg_dl.copy()
    changed[anchor[0] + 1 :] = 399.0
    after = cut_windows(Series(series.patients, series.starts, series.time_s, changed), spec).gather(anchor)
    np.testing.assert_array_equal(before.x, after.x)
    np.testing.assert_array_equal(before.last, after.last)
    assert not np.array_equal(before.y, after.y)


def test_whether_a_forecast_is_issued_does_not_depend_on_the_future() -> None:
    """Without need_target, cutting the record at t0 keeps exactly the anchors up to t0."""
    series, spec = irregular(1), WindowSpec(history_minutes=120)
    every = cut_windows(series, spec, need_target=False).anchors
    end = 200
    short = Series(series.patients, np.array([0, end]), series.time_s[:end], series.glucose_mg_dl[:end])
    np.testing.assert_array_equal(cut_windows(short, spec, need_target=False).anchors, every[every < end])


@pytest.mark.parametrize("seed", range(5))
def test_serving_builds_the_same_features_as_training(seed: int) -> None:
    """history_features on the readings up to t0 equals gather at t0, also for a patient in the middle of a series."""
    series, spec = joined(irregular(seed + 10), irregular(seed), irregular(seed + 20)), WindowSpec()
    windows = cut_windows(series, spec)
    begin, end = windows.by_patient()[1]
    first = series.starts[1]
    for anchor in windows.anchors[begin:end:37]:
        batch = windows.gather(np.array([anchor]))
        x, last = history_features(series.time_s[first : anchor + 1], series.glucose_mg_dl[first : anchor + 1], spec)
        np.testing.assert_allclose(x, batch.x, rtol=0, atol=1e-6)
        np.testing.assert_array_equal(last, batch.last)


def test_fifteen_minute_sensor_is_carried_forward_with_its_age() -> None:
    """Between two readings the older one is carried and its age grows 0, 5, 10 minutes.

    Only 4 of 12 targets are real.
    """
    minutes = np.arange(0, 600, 15.0)
    windows = cut_windows(one_patient(minutes), WindowSpec(history_minutes=60))
    batch = windows.gather(windows.anchors[5:6])
    age_minutes = batch.x[0, :, FEATURES.index("age")] * 15.0
    np.testing.assert_allclose(age_minutes, [0, 5, 10] * 4 + [0], atol=1e-4)
    np.testing.assert_array_equal(np.flatnonzero(batch.mask[0]), [2, 5, 8, 11])
    level = batch.x[0, :, FEATURES.index("level")]
    assert level[0] == level[1] == level[2] != level[3]


def test_jitter_counts_for_its_grid_point() -> None:
    """A 5-minute sensor whose stamps wander by 20 s has all targets, no ages above 20 s, and no carried duplicates."""
    rng = np.random.default_rng(0)
    minutes = np.arange(0, 600, 5.0) + rng.uniform(-20, 20, 120) / 60.0
    windows = cut_windows(one_patient(minutes), WindowSpec(history_minutes=120))
    batch = windows.gather(windows.anchors[30:60])
    assert batch.mask.all()
    assert batch.x[..., FEATURES.index("age")].max() * 15.0 <= 41 / 60.0


def test_targets_are_real_readings_or_masked() -> None:
    """Across a gap the missing targets are masked, and those given equal the reading nearest to t0 + h."""
    minutes = np.concatenate([np.arange(0, 200, 5.0), np.arange(230, 400, 5.0)])
    series = one_patient(minutes)
    windows = cut_windows(series, WindowSpec(history_minutes=60))
    batch = windows.gather(windows.anchors)
    for row, anchor in enumerate(windows.anchors):
        for step, h in enumerate(range(5, 65, 5)):
            distance = np.abs(series.time_s - (series.time_s[anchor] + 60 * h))
            assert bool(batch.mask[row, step]) == bool(distance.min() <= 150)
            if batch.mask[row, step]:
                assert batch.y[row, step] == series.glucose_mg_dl[distance.argmin()]


def test_no_forecast_after_a_gap_or_without_history() -> None:
    """The first hour of a record and the first reading after a long gap are not issue readings."""
    minutes = np.concatenate([np.arange(0, 200, 5.0), np.arange(260, 400, 5.0)])
    series = one_patient(minutes)
    issued = (series.time_s[cut_windows(series, WindowSpec(history_minutes=120)).anchors] - START_S) / 60.0
    assert issued.min() == 60.0
    assert 260.0 not in issued
    assert 265.0 in issued


def test_interleaved_sensors_get_no_forecast() -> None:
    """Two sensors 100 mg/dL apart, minute by minute in one record, are refused; a single artefact is not."""
    minutes = np.arange(0, 600, 5.0)
    zigzag = np.where(np.arange(120) % 2 == 0, 100.0, 200.0)
    assert len(cut_windows(one_patient(minutes, zigzag), WindowSpec())) == 0
    spike = np.full(120, 110.0)
    spike[60] = 300.0
    assert len(cut_windows(one_patient(minutes, spike), WindowSpec())) > 90


def test_neighbouring_patients_never_mix() -> None:
    """Windows of a joined series equal those of each patient alone, even when their clocks overlap."""
    parts = [irregular(s) for s in (1, 2, 3)]
    spec = WindowSpec(history_minutes=120)
    whole = cut_windows(joined(*parts), spec)
    assert len(whole.by_patient()) == 3
    for (begin, end), part in zip(whole.by_patient(), parts, strict=True):
        alone = cut_windows(part, spec)
        got, want = whole.gather(whole.anchors[begin:end]), alone.gather(alone.anchors)
        np.testing.assert_allclose(got.x, want.x, atol=1e-5)
        np.testing.assert_array_equal(got.y, want.y)
        np.testing.assert_array_equal(got.mask, want.mask)


def test_values_outside_the_sensor_range_are_clipped() -> None:
    """30 and 500 mg/dL become 40 and 400 in features and targets."""
    minutes = np.arange(0, 300, 5.0)
    windows = cut_windows(one_patient(minutes, np.where(minutes < 150, 30.0, 500.0)), WindowSpec(history_minutes=60))
    batch = windows.gather(windows.anchors)
    assert set(np.unique(batch.last)) == {40.0, 400.0}
    assert set(np.unique(batch.y[batch.mask])) <= {40.0, 400.0}


def test_from_frame_sorts_and_refuses_local_times() -> None:
    """Rows come in any order, the first of equal stamps stays, and naive times are refused."""
    stamps = pd.to_datetime(["2024-01-01 00:05", "2024-01-01 00:00", "2024-01-01 00:00", "2024-01-01 00:00"], utc=True)
    frame = pd.DataFrame(
        {"patient_id": ["b", "b", "a", "b"], "measured_at": stamps, "glucose_mg_dl": [1.0, 2.0, 3.0, 4.0]}
    )
    series = Series.from_frame(frame)
    assert series.patients == ("a", "b")
    np.testing.assert_array_equal(series.glucose_mg_dl, [3.0, 2.0, 1.0])
    np.testing.assert_array_equal(series.select(["b"]).glucose_mg_dl, [2.0, 1.0])
    with pytest.raises(ValueError, match="timezone"):
        Series.from_frame(frame.assign(measured_at=stamps.tz_localize(None)))


def test_empty_series_has_no_windows() -> None:
    """A hospital without readings yields no windows rather than an error."""
    empty = Series((), np.zeros(1, dtype=np.int64), np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32))
    assert len(cut_windows(empty, WindowSpec())) == 0


def test_disorder_is_refused() -> None:
    """Times that do not increase within a patient are an error, not a silent sort."""
    with pytest.raises(ValueError, match="increase"):
        one_patient(np.array([0.0, 5.0, 5.0]))


def test_moving_levels_equals_moving_the_readings() -> None:
    """shifted_levels on features equals building features from scaled readings."""
    series = irregular(4)
    moved = Series(
        series.patients,
        series.starts,
        series.time_s,
        series.glucose_mg_dl * np.float32(0.5) + np.float32(60.0),
    )
    spec = WindowSpec(max_jumps=10_000)
    windows, want = cut_windows(series, spec), cut_windows(moved, spec)
    x = windows.gather(windows.anchors).x
    ones = np.ones(len(x), dtype=np.float32)
    got, last = shifted_levels(x, 0.5 * ones, 60.0 * ones, np.zeros(x.shape[:2], dtype=np.float32))
    expected = want.gather(windows.anchors)
    np.testing.assert_allclose(got, expected.x, atol=1e-4)
    np.testing.assert_allclose(last, expected.last, atol=1e-3)


@pytest.mark.parametrize("block", [1, 350, 1000])
def test_windows_cut_in_blocks_are_the_same_bit_for_bit(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """However many patients are looked at together, anchors and batches do not change by a bit."""
    series, spec = joined(*(irregular(seed) for seed in range(7))), WindowSpec(history_minutes=120)
    whole = cut_windows(series, spec)
    batch = whole.gather(whole.anchors)

    monkeypatch.setattr("pipeline.windows._BLOCK_READINGS", block)
    again = cut_windows(Series(series.patients, series.starts, series.time_s, series.glucose_mg_dl), spec)

    assert again.anchors.tobytes() == whole.anchors.tobytes()
    assert again.offsets.tobytes() == whole.offsets.tobytes()
    other = again.gather(again.anchors)
    assert all(getattr(batch, name).tobytes() == getattr(other, name).tobytes() for name in ("x", "y", "mask", "last"))
