"""Scores: each definition against a plain loop, masks, groups, events and intervals."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from data_schemas.units import HORIZON_MINUTES, QUANTILES
from pipeline.error_grids import clarke_zones, parkes_zones
from pipeline.evaluation import evaluate
from pipeline.scored import Scored, concat, coverage_curve, level_at, score_windows
from pipeline.windows import Batch, Series, WindowSpec, cut_windows


def make(rows: int = 300, seed: int = 0, *, sites: tuple[str, ...] = ("a", "b", "c")) -> Scored:
    """Random but plausible forecasts with holes in the truth."""
    draw = np.random.default_rng(seed)
    last = draw.uniform(45, 300, rows)
    truth = np.clip(last[:, None] + draw.normal(0, 30, (rows, 12)), 40, 400)
    forecast = np.clip(truth + draw.normal(3, 15, (rows, 12)), 40, 400)
    quantiles = np.sort(forecast[..., None] + draw.normal(0, 20, (rows, 12, 5)), axis=-1)
    site = draw.integers(0, len(sites), rows)
    return Scored(
        truth, draw.random((rows, 12)) < 0.7, forecast, last, draw.integers(0, 4, rows), site, sites, quantiles
    )


def pairs(s: Scored, minutes: int, keep: list[int] | None = None) -> list[tuple[float, float, float, int]]:
    """(truth, forecast, last, row) of the real readings at this horizon."""
    h = HORIZON_MINUTES.index(minutes)
    rows = range(len(s.last)) if keep is None else keep
    return [(s.truth[i, h], s.forecast[i, h], s.last[i], i) for i in rows if s.mask[i, h]]


@pytest.mark.parametrize("minutes", [15, 30, 45, 60])
def test_point_errors_are_their_definitions(minutes: int) -> None:
    """RMSE, MAE, MARD, bias and skill equal a plain loop over the pairs with a real reading."""
    s = make()
    found = evaluate(s).pooled.at(minutes)
    p = pairs(s, minutes)
    rmse = math.sqrt(sum((f - t) ** 2 for t, f, _, _ in p) / len(p))
    stay = math.sqrt(sum((last - t) ** 2 for t, _, last, _ in p) / len(p))
    assert found.pairs == len(p)
    assert found.rmse == pytest.approx(rmse)
    assert found.mae == pytest.approx(sum(abs(f - t) for t, f, _, _ in p) / len(p))
    assert found.mard_percent == pytest.approx(100 * sum(abs(f - t) / t for t, f, _, _ in p) / len(p))
    assert found.bias == pytest.approx(sum(f - t for t, f, _, _ in p) / len(p))
    assert found.persistence_rmse == pytest.approx(stay)
    assert found.skill == pytest.approx(1 - rmse / stay)


def test_masked_truth_never_counts() -> None:
    """Whatever stands where there is no real reading, every score stays the same."""
    s = make()
    other = Scored(np.where(s.mask, s.truth, 1.0), s.mask, s.forecast, s.last, s.patient, s.site, s.sites, s.quantiles)
    assert evaluate(other) == evaluate(s)


def test_means_over_hospitals_and_people() -> None:
    """Each hospital, and each person of a hospital, counts once however many pairs it has."""
    s = make()
    found = evaluate(s)
    for groups, name in ((s.site, "mean_over_sites"), (s.site * 10 + s.patient, "mean_over_people")):
        values = []
        for group in sorted(set(groups.tolist())):
            p = pairs(s, 30, [i for i in range(len(groups)) if groups[i] == group])
            values.append(math.sqrt(sum((f - t) ** 2 for t, f, _, _ in p) / len(p)))
        score = getattr(found, name)[1]
        assert (score.horizon_minutes, score.groups) == (30, len(values))
        assert score.rmse == pytest.approx(sum(values) / len(values))
    assert found.pooled.people == len(set((s.site * 10 + s.patient).tolist()))
    assert [g.name for g in found.sites] == ["a", "b", "c"]
    assert found.sites[1].at(60).pairs == len(pairs(s, 60, np.flatnonzero(s.site == 1).tolist()))


def test_intervals_are_their_definitions() -> None:
    """Coverage, width and pinball loss of the 50% and 90% intervals equal a plain loop."""
    s = make()
    assert s.quantiles is not None
    found = {(i.horizon_minutes, i.nominal): i for i in evaluate(s).pooled.intervals}
    assert {n for _, n in found} == {0.5, 0.8, 0.9}
    for nominal, low, high in ((0.5, 1, 3), (0.9, 0, 4)):
        score, h = found[45, nominal], HORIZON_MINUTES.index(45)
        inside, width, loss = [], [], []
        for t, _, _, i in pairs(s, 45):
            inside.append(s.quantiles[i, h, low] <= t <= s.quantiles[i, h, high])
            width.append(s.quantiles[i, h, high] - s.quantiles[i, h, low])
            for k in (low, high):
                d = t - s.quantiles[i, h, k]
                loss.append(QUANTILES[k] * d if d >= 0 else (QUANTILES[k] - 1) * d)
        assert score.coverage == pytest.approx(np.mean(inside))
        assert score.width == pytest.approx(np.mean(width))
        assert score.pinball == pytest.approx(np.mean(loss))


def test_events_are_their_definitions() -> None:
    """Recall, precision and F1 of lows and highs within 30 minutes equal a plain loop over issue points."""
    s = make()
    for event, threshold, beyond in zip(
        evaluate(s).pooled.events, (70, 180), (lambda v: v < 70, lambda v: v > 180), strict=True
    ):
        points = [i for i in range(len(s.last)) if any(s.mask[i, :6])]
        happened = [any(s.mask[i, h] and beyond(s.truth[i, h]) for h in range(6)) for i in points]
        alert = [any(beyond(v) for v in s.forecast[i, :6]) for i in points]
        fresh = [not beyond(s.last[i]) for i in points]
        hits = sum(a and b for a, b in zip(happened, alert, strict=True))
        assert (event.threshold_mg_dl, event.points, event.events) == (threshold, len(points), sum(happened))
        assert event.recall == pytest.approx(hits / sum(happened))
        assert event.precision == pytest.approx(hits / sum(alert))
        assert event.f1 == pytest.approx(2 * event.recall * event.precision / (event.recall + event.precision))
        new = [(a, b) for a, b, f in zip(happened, alert, fresh, strict=True) if f]
        assert event.onset_events == sum(a for a, _ in new)
        assert event.onset_recall == pytest.approx(sum(a and b for a, b in new) / sum(a for a, _ in new))
        assert event.onset_precision == pytest.approx(sum(a and b for a, b in new) / sum(b for _, b in new))


def test_persistence_finds_no_new_event() -> None:
    """A forecast of the issue reading has skill 0 and no recall of events that have not begun."""
    s = make()
    still = np.repeat(s.last[:, None], 12, axis=1)
    found = evaluate(Scored(s.truth, s.mask, still, s.last, s.patient, s.site, s.sites)).pooled
    assert [h.skill for h in found.horizons] == pytest.approx([0, 0, 0, 0])
    assert [e.onset_recall for e in found.events] == [0, 0]
    assert found.intervals == ()


def test_grid_shares_add_up() -> None:
    """Zone shares are those of the pairs with a real reading and sum to one."""
    s = make()
    grid = evaluate(s).pooled.grids[0]
    zones = [int(clarke_zones(np.array(t), np.array(f))) for t, f, _, _ in pairs(s, 30)]
    assert grid.clarke == pytest.approx([zones.count(z) / len(zones) for z in range(5)])
    assert sum(grid.parkes) == pytest.approx(1)


def test_nothing_to_score_is_nan_not_an_error() -> None:
    """A site without a real reading has NaN scores, and the other sites' means are untouched."""
    s = make(sites=("a", "b", "c"))
    mask = s.mask & (s.site != 1)[:, None]
    found = evaluate(Scored(s.truth, mask, s.forecast, s.last, s.patient, s.site, s.sites, s.quantiles))
    assert found.sites[1].at(30).pairs == 0
    assert math.isnan(found.sites[1].at(30).rmse)
    assert math.isnan(found.sites[1].grids[0].clarke[0])
    assert found.mean_over_sites[0].groups == 2
    assert math.isfinite(found.mean_over_sites[0].rmse)


def test_concat_keeps_sites_apart() -> None:
    """Cohorts put together score as each does alone."""
    parts = [make(120, 1, sites=("a",)), make(80, 2, sites=("b",))]
    found = evaluate(concat(parts))
    for part, site in zip(parts, found.sites, strict=True):
        alone = evaluate(part).pooled
        assert (site.horizons, site.people) == (alone.horizons, alone.people)


def test_coverage_curve() -> None:
    """The observed share at or below each quantile is counted over real readings only."""
    s = make()
    assert s.quantiles is not None
    h = HORIZON_MINUTES.index(30)
    for (level, share), k in zip(coverage_curve(s, 30), range(5), strict=True):
        below = [t <= s.quantiles[i, h, k] for t, _, _, i in pairs(s, 30)]
        assert (level, share) == (QUANTILES[k], pytest.approx(np.mean(below)))


def test_score_windows_pairs_each_forecast_with_its_truth() -> None:
    """A model that knows the rule of the series has no error, and every window keeps its person."""
    minutes = np.arange(0, 600, 5)
    frame = pd.DataFrame(
        {
            "patient_id": np.repeat(["p", "q"], len(minutes)),
            "measured_at": np.tile(pd.Timestamp("2026-01-01", tz="UTC") + pd.to_timedelta(minutes, unit="min"), 2),
            "glucose_mg_dl": np.concatenate([100 + minutes / 10, 200 - minutes / 10]),
        }
    )
    windows = cut_windows(Series.from_frame(frame), WindowSpec())

    def rule(batch: Batch) -> tuple[np.ndarray, None]:
        slope = np.sign(batch.x[:, -2, 0])[:, None] * -0.1
        return batch.last[:, None] + slope * np.array(HORIZON_MINUTES), None

    scored = score_windows(windows, rule, "here")
    assert scored.sites == ("here",)
    assert set(scored.patient.tolist()) == {0, 1}
    assert evaluate(scored).pooled.at(60).rmse < 1e-3


def test_wrong_shapes_are_refused() -> None:
    """Arrays that do not belong together are an error, not a wrong score."""
    s = make(10)
    with pytest.raises(ValueError, match="shape"):
        Scored(s.truth[:, :6], s.mask, s.forecast, s.last, s.patient, s.site, s.sites)
    with pytest.raises(ValueError, match="site must index"):
        Scored(s.truth, s.mask, s.forecast, s.last, s.patient, s.site + 3, s.sites)


def test_scores_agree_with_an_independent_library() -> None:
    """RMSE, MAE, MARD and pinball loss are scikit-learn's on the same pairs."""
    from sklearn import metrics

    s = make(3000, 5)
    assert s.quantiles is not None
    found = evaluate(s).pooled
    for minutes in (15, 30, 45, 60):
        h = HORIZON_MINUTES.index(minutes)
        keep = s.mask[:, h]
        truth, forecast = s.truth[keep, h], s.forecast[keep, h]
        assert found.at(minutes).rmse == pytest.approx(metrics.root_mean_squared_error(truth, forecast))
        assert found.at(minutes).mae == pytest.approx(metrics.mean_absolute_error(truth, forecast))
        share = metrics.mean_absolute_percentage_error(truth, forecast)
        assert found.at(minutes).mard_percent == pytest.approx(100 * share)
        for interval in (i for i in found.intervals if i.horizon_minutes == minutes):
            ends = [(1 - interval.nominal) / 2, (1 + interval.nominal) / 2]
            losses = [
                metrics.mean_pinball_loss(truth, level_at(s.quantiles[keep, h], round(q, 6)), alpha=q) for q in ends
            ]
            assert interval.pinball == pytest.approx(sum(losses) / 2)


def test_zones_agree_with_an_independent_library() -> None:
    """Error grid zones are those of the package error-grids, but for points on and beside a border."""
    import error_grids

    draw = np.random.default_rng(3)
    truth, forecast = draw.uniform(40, 400, 4000), draw.uniform(40, 400, 4000)
    clarke = [error_grids.clarke_error_zone_detailed(a, b) for a, b in zip(truth, forecast, strict=True)]
    parkes = [error_grids.parkes_error_zone_detailed(a, b, 1) for a, b in zip(truth, forecast, strict=True)]
    letter = np.array([0, 1, 1, 2, 2, 3, 3, 4, 4])
    assert np.mean(letter[clarke] == clarke_zones(truth, forecast)) > 0.995
    assert np.mean(letter[parkes] == parkes_zones(truth, forecast)) > 0.995


def test_ranges_hold_every_pair_once() -> None:
    """The glucose ranges share out all pairs, and 180 is still in range."""
    s = make(500, 2)
    found = evaluate(s)
    assert sum(r.pairs for r in found.ranges if r.horizon_minutes == 30) == found.pooled.at(30).pairs
    exact = Scored(np.full_like(s.truth, 180.0), s.mask, s.forecast, s.last, s.patient, s.site, s.sites)
    inside = next(r for r in evaluate(exact).ranges if r.name == "70 to 180")
    assert inside.pairs == int(s.mask[:, 5].sum())


def test_lag_of_persistence_is_the_horizon_and_of_truth_is_none() -> None:
    """A forecast that repeats the last reading is late by the whole horizon; the truth itself by nothing."""
    t = np.arange(600)[:, None] * 5.0
    ahead = np.array(HORIZON_MINUTES, dtype=float)
    curve = lambda minutes: 150 + 50 * np.sin(minutes / 40)  # noqa: E731
    truth, last, none = curve(t + ahead), curve(t)[:, 0], np.zeros(600, dtype=np.int64)
    every = np.ones(truth.shape, dtype=bool)
    for forecast, late in ((truth, 0.0), (np.repeat(last[:, None], 12, axis=1), 1.0)):
        found = evaluate(Scored(truth, every, forecast, last, none, none, ("a",)))
        assert [lag.lag_minutes for lag in found.lags] == [late * h for h in (15, 30, 45, 60)]


def test_bootstrap_interval_is_over_people() -> None:
    """The interval holds the mean over people, is repeatable, and is a point when all people are alike."""
    s = make(2000, 9)
    mean = evaluate(s).mean_over_people[1]
    assert mean.rmse_low < mean.rmse < mean.rmse_high
    assert evaluate(s).mean_over_people[1] == mean
    alike = Scored(s.last[:, None] + np.zeros(12), s.mask, s.last[:, None] + 10.0 + np.zeros(12), s.last,
                   s.patient, s.site, s.sites)  # fmt: skip
    flat = evaluate(alike).mean_over_people[1]
    assert (flat.rmse_low, flat.rmse_high) == (pytest.approx(10), pytest.approx(10))


def test_sensors_are_told_apart() -> None:
    """People with five-minute and with fifteen-minute sensors are scored as groups of their own."""
    frames = []
    for name, every in (("p", 5), ("q", 15)):
        minutes = np.arange(0, 900, every)
        stamps = pd.Timestamp("2026-01-01", tz="UTC") + pd.to_timedelta(minutes, unit="min")
        frames.append(pd.DataFrame({"patient_id": name, "measured_at": stamps, "glucose_mg_dl": 100.0}))
    windows = cut_windows(Series.from_frame(pd.concat(frames)), WindowSpec())
    scored = score_windows(windows, lambda b: (np.repeat(b.last[:, None], 12, axis=1), None), "here")
    assert [(g.name, g.people) for g in evaluate(scored).sensors] == [("5-minute sensors", 1), ("15-minute sensors", 1)]
