"""Personal adaptation: causal, cautious, and better where a person differs from what the model expects."""

import numpy as np
import numpy.typing as npt

from data_schemas.units import QUANTILES
from pipeline.adaptation import REFRESH_SECONDS, Past, learned, replayed
from pipeline.windows import Series, WindowSpec, cut_windows

DAY = 86_400
START = 20_000 * DAY
SPREAD = np.array([-16.0, -6.0, 0.0, 6.0, 16.0], dtype=np.float32)


def past(days: int, *, seed: int = 0, offset_mg_dl: float = 0.0) -> Past:
    """A person whose glucose swings with the day, forecast by persistence with fixed bands."""
    rng = np.random.default_rng(seed)
    time_s = START + np.arange(days * 288, dtype=np.int64) * 300
    swing = 40 * np.sin(2 * np.pi * time_s / DAY) + 12 * np.sin(2 * np.pi * time_s / 9_000)
    glucose = (150 + swing + rng.normal(0, 3, len(time_s)) + offset_mg_dl).astype(np.float32)
    series = Series(("one",), np.array([0, len(time_s)]), time_s, glucose)
    windows = cut_windows(series, WindowSpec(history_minutes=120))
    batch = windows.gather(windows.anchors)
    forecast = np.repeat(batch.last[:, None], 12, axis=1)
    return Past.of(batch, forecast, forecast[..., None] + SPREAD, time_s[windows.anchors])


def rmse(forecast: npt.NDArray[np.float32], known: Past, after_s: int) -> float:
    seen = known.mask & (known.time_s[:, None] >= after_s)
    return float(np.sqrt(np.mean((forecast - known.truth)[seen] ** 2)))


def test_a_regular_person_is_forecast_better_after_some_days() -> None:
    """Where the error depends on what is known when forecasting, the correction takes most of it away."""
    known = past(8)
    forecast, _ = replayed(known)

    assert rmse(forecast, known, START + 4 * DAY) < 0.75 * rmse(known.forecast, known, START + 4 * DAY)


def test_the_first_hours_are_the_global_model_itself() -> None:
    """Until a forecast's outcome is known and a refresh has come, nothing is corrected."""
    known = past(2)
    forecast, quantiles = replayed(known)
    first = known.time_s < START + REFRESH_SECONDS

    assert first.sum() > 20
    np.testing.assert_array_equal(forecast[first], known.forecast[first])
    np.testing.assert_allclose(quantiles[first], known.quantiles[first], atol=1e-4)


def test_nothing_after_the_issue_reading_is_used() -> None:
    """Another future gives the same forecasts up to it, bit for bit."""
    known, cut = past(4), START + 3 * DAY
    truth = known.truth.copy()
    truth[known.time_s[:, None] + np.arange(300, 3601, 300) >= cut] = 400.0
    other = Past(known.time_s, known.inputs, known.forecast, known.quantiles, truth, known.mask)
    before = known.time_s < cut

    for mine, theirs in zip(replayed(known), replayed(other), strict=True):
        np.testing.assert_array_equal(mine[before], theirs[before])
    assert not np.array_equal(replayed(known)[0], replayed(other)[0])


def test_what_a_node_serves_is_what_a_replay_shows() -> None:
    """The adaptation learned at a moment corrects like the replay does at that moment."""
    known = past(5)
    forecast, quantiles = replayed(known)
    moment = START + 4 * DAY + 1_000
    now = known.time_s >= moment
    rows = np.flatnonzero(now)[:5]
    earlier = ~now
    so_far = Past(*(getattr(known, name)[earlier] for name in Past.__slots__))
    mine = learned(so_far, moment).apply(known.inputs[rows], known.forecast[rows], known.quantiles[rows])

    np.testing.assert_array_equal(mine[0], forecast[rows])
    np.testing.assert_array_equal(mine[1], quantiles[rows])


def test_bands_follow_how_wrong_forecasts_were() -> None:
    """Bands that were far too narrow become wider, far too wide ones narrower, and quantiles never cross."""
    known = past(6)
    coverage = {}
    for factor in (0.25, 4.0):
        bands = known.forecast[..., None] + SPREAD * np.float32(factor)
        given = Past(known.time_s, known.inputs, known.forecast, bands, known.truth, known.mask)
        _, quantiles = replayed(given)
        late = known.time_s >= START + 4 * DAY
        width = {
            name: float(np.mean(q[late, 5, 4] - q[late, 5, 0]))
            for name, q in (("plain", bands), ("adapted", quantiles))
        }
        coverage[factor] = width["adapted"] / width["plain"]
        assert (np.diff(quantiles, axis=-1) >= 0).all()

    assert coverage[0.25] > 1.3
    assert coverage[4.0] < 0.7


def test_a_person_without_evidence_is_left_alone() -> None:
    """A record without any known outcome gives no correction and leaves bands as they are."""
    known = past(1)
    blind = Past(known.time_s, known.inputs, known.forecast, known.quantiles, known.truth, np.zeros_like(known.mask))
    long_ago = -62_135_596_800  # the first moment that a request can name
    nobody = Past(
        *(array[:0] for array in (known.time_s, known.inputs, known.forecast, known.quantiles)),
        known.truth[:0],
        known.mask[:0],
    )
    for adaptation in (learned(blind, START + 30 * DAY), learned(nobody, long_ago)):
        assert not adaptation.weights.any()
        np.testing.assert_array_equal(adaptation.width, np.ones(4))


def test_evidence_fades() -> None:
    """A year after the last reading little of a correction is left."""
    known = past(6)
    fresh, stale = learned(known, START + 6 * DAY), learned(known, START + 371 * DAY)

    assert np.abs(stale.weights).max() < 0.15 * np.abs(fresh.weights).max()


def test_answers_stay_within_what_a_sensor_reports() -> None:
    """Corrections end at 40 and 400 mg/dL."""
    known = past(3, offset_mg_dl=235)
    forecast, quantiles = replayed(known)

    assert quantiles.shape[-1] == len(QUANTILES)
    assert forecast.max() <= 400
    assert quantiles.max() <= 400
