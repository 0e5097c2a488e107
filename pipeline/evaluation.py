"""Scores of forecasts: point errors, error grids, intervals and events, by site, pooled and over people.

All glucose is in mg/dL. A pair is a forecast and the real reading it is scored on; where there is no real reading
there is no pair. Definitions are in the docstrings of the result types; docs/evaluation.md has them in words.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from data_schemas.units import HORIZON_MINUTES
from pipeline.error_grids import ZONE_NAMES, clarke_zones, parkes_zones
from pipeline.scored import Bool, FloatArray, Int64, Scored, level_at, surely_beyond

_Zones: TypeAlias = dict[int, tuple[Int64, Int64]]
SCORED_MINUTES = (15, 30, 45, 60)
GRID_MINUTES_AHEAD = (30, 60)
EVENT_MINUTES = 30
# (name, threshold in mg/dL, sign): a low is below 70, a high above 180 (consensus on time in range, Battelino et al.
# 2019).
EVENTS = (("low", 70.0, -1.0), ("high", 180.0, 1.0))
INTERVALS = (0.5, 0.8, 0.9)
# Reference ranges of the consensus on time in range; a pair belongs to the range of what really happened.
_PAST_180, _PAST_250 = math.nextafter(180.0, 181.0), math.nextafter(250.0, 251.0)
RANGES = (
    ("below 54", 0.0, 54.0),
    ("54 to 69", 54.0, 70.0),
    ("70 to 180", 70.0, _PAST_180),
    ("181 to 250", _PAST_180, _PAST_250),
    ("above 250", _PAST_250, math.inf),
)
RESAMPLES = 1000


@dataclass(frozen=True, slots=True)
class HorizonScore:
    """Point errors at one horizon over `pairs` pairs; e = forecast - truth.

    rmse = sqrt(mean e^2); mae = mean |e|; mard_percent = 100 mean(|e| / truth); bias = mean e;
    skill = 1 - rmse / persistence_rmse, where persistence forecasts the issue reading. NaN without pairs.
    """

    horizon_minutes: int
    pairs: int
    rmse: float
    mae: float
    mard_percent: float
    bias: float
    persistence_rmse: float
    skill: float


@dataclass(frozen=True, slots=True)
class GridScore:
    """Share of pairs in the zones A..E of both error grids at one horizon; NaN without pairs."""

    horizon_minutes: int
    pairs: int
    clarke: tuple[float, ...]
    parkes: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class IntervalScore:
    """One central interval at one horizon.

    coverage: share of truths within [lower, upper]; width: mean upper - lower in mg/dL; pinball: mean over its two
    ends q of max(q d, (q - 1) d) with d = truth - quantile (Koenker and Bassett 1978). The ends of the 80% interval
    lie between those of the 50% and the 90% one, see `pipeline.scored.level_at`.
    """

    horizon_minutes: int
    nominal: float
    pairs: int
    coverage: float
    width: float
    pinball: float


@dataclass(frozen=True, slots=True)
class EventScore:
    """Lows or highs within 30 minutes, counted over issue points (not over episodes).

    An issue point counts when it has a real reading within 30 minutes. It is an event when any of those readings is
    beyond the threshold, an alert when the forecast is beyond it at any horizon up to 30 minutes. recall = alerted
    events / events; precision = alerted events / alerts; f1 is their harmonic mean. onset_recall and onset_precision
    are the same over issue points whose own reading is not yet beyond the threshold: persistence scores 0 there. NaN
    where nothing is to count.
    """

    name: str
    threshold_mg_dl: float
    points: int
    events: int
    recall: float
    precision: float
    f1: float
    onset_events: int
    onset_recall: float
    onset_precision: float


@dataclass(frozen=True, slots=True)
class GroupScore:
    """Everything about one group of people: one site, or all of them pooled (every pair counts alike)."""

    name: str
    people: int
    issue_points: int
    horizons: tuple[HorizonScore, ...]
    grids: tuple[GridScore, ...]
    intervals: tuple[IntervalScore, ...]
    events: tuple[EventScore, ...]
    events_by_probability: tuple[EventScore, ...]

    def at(self, horizon_minutes: int) -> HorizonScore:
        """Point errors at one of the scored horizons."""
        return next(h for h in self.horizons if h.horizon_minutes == horizon_minutes)


@dataclass(frozen=True, slots=True)
class MeanScore:
    """Unweighted mean over groups (hospitals or people) that have pairs at this horizon.

    rmse_low..rmse_high: 95% interval of that mean by resampling the groups 1000 times (percentile bootstrap, Efron
    1979); repeatable.
    """

    horizon_minutes: int
    groups: int
    rmse: float
    mae: float
    mard_percent: float
    rmse_low: float
    rmse_high: float


@dataclass(frozen=True, slots=True)
class RangeScore:
    """Point errors of the pairs whose real reading lies in one glucose range.

    The range is known only afterwards, so a good forecaster is biased towards the middle in the outer ones.
    """

    name: str
    horizon_minutes: int
    pairs: int
    rmse: float
    mae: float
    mard_percent: float
    bias: float


@dataclass(frozen=True, slots=True)
class LagScore:
    """Minutes by which the forecast at one horizon runs behind: the delay at which it fits the readings best.

    0 is a forecast in time, the horizon itself is persistence. Counted over issue points with a real reading every
    five minutes up to the horizon; NaN without any.
    """

    horizon_minutes: int
    points: int
    lag_minutes: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Scores pooled, by site, by sensor interval, by glucose range, and as means over hospitals and over people."""

    pooled: GroupScore
    sites: tuple[GroupScore, ...]
    sensors: tuple[GroupScore, ...]
    ranges: tuple[RangeScore, ...]
    lags: tuple[LagScore, ...]
    mean_over_sites: tuple[MeanScore, ...]
    mean_over_people: tuple[MeanScore, ...]


def evaluate(scored: Scored) -> Evaluation:
    """Every score of one model."""
    zones = _zones(scored)
    chances = _by_probability(scored)
    every = np.arange(len(scored.last))
    person = scored.person
    return Evaluation(
        pooled=_group("pooled", scored, every, zones, chances),
        sites=tuple(
            _group(n, scored, np.flatnonzero(scored.site == i), zones, chances) for i, n in enumerate(scored.sites)
        ),
        sensors=tuple(_group(f"{m}-minute sensors", scored, rows, zones, chances) for m, rows in _by_sensor(scored)),
        ranges=tuple(_range(scored, h, *r) for h in GRID_MINUTES_AHEAD for r in RANGES),
        lags=tuple(_lag(scored, h) for h in SCORED_MINUTES),
        mean_over_sites=tuple(_mean_over_groups(scored, scored.site, h) for h in SCORED_MINUTES),
        mean_over_people=tuple(_mean_over_groups(scored, person, h) for h in SCORED_MINUTES),
    )


def _by_site(scored: Scored) -> list[tuple[str, Int64]]:
    return [(name, np.flatnonzero(scored.site == i)) for i, name in enumerate(scored.sites)]


def _by_sensor(scored: Scored) -> list[tuple[int, Int64]]:
    if scored.sensor_minutes is None:
        return []
    return [(int(m), np.flatnonzero(scored.sensor_minutes == m)) for m in np.unique(scored.sensor_minutes)]


def _zones(scored: Scored) -> _Zones:
    """Clarke and Parkes zone of every row at the horizons of the grids, computed once for all groups."""
    columns = {h: HORIZON_MINUTES.index(h) for h in GRID_MINUTES_AHEAD}
    return {
        h: tuple(z(scored.truth[:, c], scored.forecast[:, c]) for z in (clarke_zones, parkes_zones))  # type: ignore[misc]
        for h, c in columns.items()
    }


def _group(
    name: str, scored: Scored, rows: Int64, zones: dict[int, tuple[Int64, Int64]], chances: list[Bool]
) -> GroupScore:
    part = scored if len(rows) == len(scored.last) else scored.take(rows)
    return GroupScore(
        name=name,
        people=len(np.unique(part.person)),
        issue_points=len(part.last),
        horizons=tuple(_horizon(part, h) for h in SCORED_MINUTES),
        grids=tuple(_grid(part, h, tuple(z[rows] for z in zones[h])) for h in GRID_MINUTES_AHEAD),
        intervals=tuple(i for h in SCORED_MINUTES for i in _intervals(part, h)),
        events=tuple(_event(part, _by_forecast(part, *e[1:]), *e) for e in EVENTS),
        events_by_probability=tuple(_event(part, c[rows], *e) for c, e in zip(chances, EVENTS, strict=False)),
    )


def _horizon(scored: Scored, horizon_minutes: int) -> HorizonScore:
    column = HORIZON_MINUTES.index(horizon_minutes)
    keep = scored.mask[:, column]
    truth = scored.truth[keep, column].astype(np.float64)
    error = scored.forecast[keep, column] - truth
    rmse = math.sqrt(_mean(error * error))
    persistence = math.sqrt(_mean((scored.last[keep] - truth) ** 2))
    return HorizonScore(
        horizon_minutes=horizon_minutes,
        pairs=len(truth),
        rmse=rmse,
        mae=_mean(np.abs(error)),
        mard_percent=100 * _mean(np.abs(error) / truth),
        bias=_mean(error),
        persistence_rmse=persistence,
        skill=1 - _ratio(rmse, persistence),
    )


def _grid(scored: Scored, horizon_minutes: int, zones: tuple[Int64, ...]) -> GridScore:
    keep = scored.mask[:, HORIZON_MINUTES.index(horizon_minutes)]
    pairs = int(keep.sum())
    shares = [tuple(_ratio(int(n), pairs) for n in np.bincount(z[keep], minlength=len(ZONE_NAMES))) for z in zones]
    return GridScore(horizon_minutes, pairs, *shares)


def _intervals(scored: Scored, horizon_minutes: int) -> list[IntervalScore]:
    if scored.quantiles is None:
        return []
    column = HORIZON_MINUTES.index(horizon_minutes)
    keep = scored.mask[:, column]
    truth, levels = scored.truth[keep, column], np.ascontiguousarray(scored.quantiles[keep, column].T).T
    return [_interval(truth, levels, horizon_minutes, nominal) for nominal in INTERVALS]


def _interval(truth: FloatArray, levels: FloatArray, horizon_minutes: int, nominal: float) -> IntervalScore:
    ends = [(q, level_at(levels, q)) for q in (round((1 - nominal) / 2, 6), round((1 + nominal) / 2, 6))]
    (_, lower), (_, upper) = ends
    losses = [_mean(np.maximum(q * (d := truth - end), (q - 1) * d)) for q, end in ends]
    return IntervalScore(
        horizon_minutes=horizon_minutes,
        nominal=nominal,
        pairs=len(truth),
        coverage=_mean((truth >= lower) & (truth <= upper)),
        width=_mean(upper - lower),
        pinball=sum(losses) / 2,
    )


def _range(scored: Scored, horizon_minutes: int, name: str, lowest: float, end: float) -> RangeScore:
    column = HORIZON_MINUTES.index(horizon_minutes)
    truth = scored.truth[:, column]
    keep = scored.mask[:, column] & (truth >= lowest) & (truth < end)
    truth = truth[keep].astype(np.float64)
    error = scored.forecast[keep, column] - truth
    return RangeScore(
        name=name,
        horizon_minutes=horizon_minutes,
        pairs=len(truth),
        rmse=math.sqrt(_mean(error * error)),
        mae=_mean(np.abs(error)),
        mard_percent=100 * _mean(np.abs(error) / truth),
        bias=_mean(error),
    )


def _lag(scored: Scored, horizon_minutes: int) -> LagScore:
    column = HORIZON_MINUTES.index(horizon_minutes)
    keep = np.logical_and.reduce(scored.mask[:, : column + 1], axis=1)
    if not keep.any():
        return LagScore(horizon_minutes, 0, math.nan)
    earlier = [scored.truth[keep, c] for c in range(column, -1, -1)] + [scored.last[keep]]
    misfit = [_mean((scored.forecast[keep, column] - e) ** 2) for e in earlier]
    step = HORIZON_MINUTES[1] - HORIZON_MINUTES[0]
    return LagScore(horizon_minutes, int(keep.sum()), float(step * int(np.argmin(misfit))))


def _by_forecast(scored: Scored, threshold: float, sign: float) -> Bool:
    """bool[B]: the point forecast is beyond the threshold at some horizon up to 30 minutes."""
    near = HORIZON_MINUTES.index(EVENT_MINUTES) + 1
    return _any((scored.forecast[:, :near] - threshold) * sign > 0)


def _by_probability(scored: Scored) -> list[Bool]:
    """bool[B] for each of EVENTS: its probability reaches ALARM_PROBABILITY within 30 min; none without quantiles."""
    near = HORIZON_MINUTES.index(EVENT_MINUTES) + 1
    quantiles = scored.quantiles
    return [] if quantiles is None else [_any(surely_beyond(quantiles[:, :near], t, g)) for _, t, g in EVENTS]


def _event(scored: Scored, alerted: Bool, name: str, threshold: float, sign: float) -> EventScore:
    near = HORIZON_MINUTES.index(EVENT_MINUTES) + 1
    counts = _any(scored.mask[:, :near])
    beyond: Bool = ((scored.truth[:, :near] - threshold) * sign > 0) & scored.mask[:, :near]
    event = _any(beyond[counts])
    alert = alerted[counts]
    fresh: Bool = (scored.last[counts] - threshold) * sign <= 0
    hits, events, alerts = int((event & alert).sum()), int(event.sum()), int(alert.sum())
    onsets, onset_hits = int((event & fresh).sum()), int((event & alert & fresh).sum())
    return EventScore(
        name=name,
        threshold_mg_dl=threshold,
        points=int(counts.sum()),
        events=events,
        recall=_ratio(hits, events),
        precision=_ratio(hits, alerts),
        f1=_ratio(2 * hits, events + alerts),
        onset_events=onsets,
        onset_recall=_ratio(onset_hits, onsets),
        onset_precision=_ratio(onset_hits, int((alert & fresh).sum())),
    )


def _any(values: Bool) -> Bool:
    """bool[B]: whether any of a row is set."""
    found: Bool = np.logical_or.reduce(values, axis=1)
    return found


def _mean_over_groups(scored: Scored, group: Int64, horizon_minutes: int) -> MeanScore:
    column = HORIZON_MINUTES.index(horizon_minutes)
    keep = scored.mask[:, column]
    _, codes = np.unique(group[keep], return_inverse=True)
    truth = scored.truth[keep, column].astype(np.float64)
    error = scored.forecast[keep, column] - truth
    pairs = np.bincount(codes)

    def over(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return np.bincount(codes, weights=values) / pairs

    rmse = np.sqrt(over(error * error))
    low, high = _bootstrap(rmse)
    return MeanScore(
        horizon_minutes=horizon_minutes,
        groups=len(pairs),
        rmse=_mean(rmse),
        mae=_mean(over(np.abs(error))),
        mard_percent=100 * _mean(over(np.abs(error) / truth)),
        rmse_low=low,
        rmse_high=high,
    )


def _bootstrap(values: npt.NDArray[np.float64]) -> tuple[float, float]:
    """95% interval of the mean when groups are drawn anew with replacement; the same draw at every call."""
    if not len(values):
        return math.nan, math.nan
    draws = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.quantile(values[draws].mean(axis=1), (0.025, 0.975))
    return float(low), float(high)


def _mean(values: npt.NDArray[np.floating] | Bool) -> float:
    """Mean in double precision; NaN of nothing, without a warning."""
    return float(values.mean(dtype=np.float64)) if values.size else math.nan


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
