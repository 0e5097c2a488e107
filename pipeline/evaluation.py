"""Scores of forecasts: point errors, error grids, intervals and events, by site, pooled and over people.

All glucose is in mg/dL. A pair is a forecast and the real reading it is scored on; where there is no real reading
there is no pair. Definitions are in the docstrings of the result types; docs/evaluation.md has them in words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from data_schemas.units import HORIZON_MINUTES, QUANTILES
from pipeline.error_grids import ZONE_NAMES, clarke_zones, parkes_zones
from pipeline.windows import Batch, Windows

FloatArray: TypeAlias = npt.NDArray[np.floating]
Int64: TypeAlias = npt.NDArray[np.int64]
Bool: TypeAlias = npt.NDArray[np.bool_]

SCORED_MINUTES = (15, 30, 45, 60)
GRID_MINUTES_AHEAD = (30, 60)
EVENT_MINUTES = 30
_BATCH = 4096
# (name, threshold in mg/dL, sign): a low is below 70, a high above 180 (consensus on time in range, Battelino et al.
# 2019).
EVENTS = (("low", 70.0, -1.0), ("high", 180.0, 1.0))
# (nominal coverage, index of the lower and of the upper quantile)
INTERVALS = tuple(
    (round(QUANTILES[-1 - i] - QUANTILES[i], 6), i, len(QUANTILES) - 1 - i)
    for i in reversed(range(len(QUANTILES) // 2))
)


@dataclass(frozen=True, slots=True)
class Scored:
    """Forecasts and what really happened, one row per issue point.

    truth, forecast: float[B,12]; mask: bool[B,12], True where truth is a real reading; last: float[B], the issue
    reading; patient: int[B], person within the site; site: int[B], index into sites; quantiles: float[B,12,5] or
    None.
    """

    truth: FloatArray
    mask: Bool
    forecast: FloatArray
    last: FloatArray
    patient: Int64
    site: Int64
    sites: tuple[str, ...]
    quantiles: FloatArray | None = None

    def __post_init__(self) -> None:
        shape = (len(self.last), len(HORIZON_MINUTES))
        if not self.truth.shape == self.mask.shape == self.forecast.shape == shape:
            raise ValueError(f"truth, mask and forecast must have shape {shape}")
        if not len(self.patient) == len(self.site) == shape[0]:
            raise ValueError("patient and site need one value per issue point")
        if self.quantiles is not None and self.quantiles.shape != (*shape, len(QUANTILES)):
            raise ValueError(f"quantiles must have shape {(*shape, len(QUANTILES))}")
        if shape[0] and not 0 <= int(self.site.min()) <= int(self.site.max()) < len(self.sites):
            raise ValueError("site must index sites")


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
    ends q of max(q d, (q - 1) d) with d = truth - quantile (Koenker and Bassett 1978).
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

    def at(self, horizon_minutes: int) -> HorizonScore:
        """Point errors at one of the scored horizons."""
        return next(h for h in self.horizons if h.horizon_minutes == horizon_minutes)


@dataclass(frozen=True, slots=True)
class MeanScore:
    """Unweighted mean over groups (hospitals or people) that have pairs at this horizon."""

    horizon_minutes: int
    groups: int
    rmse: float
    mae: float
    mard_percent: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Scores pooled, by site, and as means over hospitals and over people."""

    pooled: GroupScore
    sites: tuple[GroupScore, ...]
    mean_over_sites: tuple[MeanScore, ...]
    mean_over_people: tuple[MeanScore, ...]


def evaluate(scored: Scored) -> Evaluation:
    """Every score of one model."""
    sites = tuple(_group(name, scored, np.flatnonzero(scored.site == i)) for i, name in enumerate(scored.sites))
    pooled = _group("pooled", scored, None)
    person = _person(scored)
    return Evaluation(
        pooled=pooled,
        sites=sites,
        mean_over_sites=tuple(_mean_over_groups(scored, scored.site, h) for h in SCORED_MINUTES),
        mean_over_people=tuple(_mean_over_groups(scored, person, h) for h in SCORED_MINUTES),
    )


def score_windows(
    windows: Windows, predict: Callable[[Batch], tuple[FloatArray, FloatArray | None]], site: str
) -> Scored:
    """Forecast every window of one site; predict gives float[B,12] and quantiles float[B,12,5] or None."""
    count, wide = len(windows), len(HORIZON_MINUTES)
    truth, forecast = np.empty((count, wide), np.float32), np.empty((count, wide), np.float32)
    mask, last = np.empty((count, wide), np.bool_), np.empty(count, np.float32)
    levels: list[FloatArray] = []
    for at in range(0, count, _BATCH):
        part = slice(at, at + _BATCH)
        batch = windows.gather(windows.anchors[part])
        truth[part], mask[part], last[part] = batch.y, batch.mask, batch.last
        forecast[part], quantiles = predict(batch)
        levels += [] if quantiles is None else [quantiles]
    patient = np.repeat(np.arange(len(windows.offsets) - 1, dtype=np.int64), np.diff(windows.offsets))
    return Scored(
        truth=truth,
        mask=mask,
        forecast=forecast,
        last=last,
        patient=patient,
        site=np.zeros(count, dtype=np.int64),
        sites=(site,),
        quantiles=np.concatenate(levels) if levels else None,
    )


def concat(parts: Sequence[Scored]) -> Scored:
    """One Scored of several, each with its own sites; quantiles stay only where every part has them."""
    names = tuple(dict.fromkeys(name for part in parts for name in part.sites))
    site = [np.array([names.index(n) for n in p.sites], dtype=np.int64)[p.site] for p in parts]
    levels = [p.quantiles for p in parts if p.quantiles is not None]
    return Scored(
        truth=np.concatenate([p.truth for p in parts]),
        mask=np.concatenate([p.mask for p in parts]),
        forecast=np.concatenate([p.forecast for p in parts]),
        last=np.concatenate([p.last for p in parts]),
        patient=np.concatenate([p.patient for p in parts]),
        site=np.concatenate(site),
        sites=names,
        quantiles=np.concatenate(levels) if len(levels) == len(parts) else None,
    )


def coverage_curve(scored: Scored, horizon_minutes: int) -> tuple[tuple[float, float], ...]:
    """(nominal level, observed share of truths at or below that quantile) for each of the five quantiles."""
    if scored.quantiles is None:
        raise ValueError("this model has no quantiles")
    column = HORIZON_MINUTES.index(horizon_minutes)
    keep = scored.mask[:, column]
    below = scored.truth[keep, column, None] <= scored.quantiles[keep, column]
    return tuple((q, _mean(below[:, k])) for k, q in enumerate(QUANTILES))


def _person(scored: Scored) -> Int64:
    """int64[B]: one number per person of any site."""
    width = int(scored.patient.max()) + 1 if len(scored.patient) else 1
    return scored.site * width + scored.patient


def _group(name: str, scored: Scored, rows: Int64 | None) -> GroupScore:
    part = scored if rows is None else _take(scored, rows)
    return GroupScore(
        name=name,
        people=len(np.unique(_person(part))),
        issue_points=len(part.last),
        horizons=tuple(_horizon(part, h) for h in SCORED_MINUTES),
        grids=tuple(_grid(part, h) for h in GRID_MINUTES_AHEAD),
        intervals=tuple(
            _interval(part, h, *i) for h in SCORED_MINUTES for i in INTERVALS if part.quantiles is not None
        ),
        events=tuple(_event(part, *event) for event in EVENTS),
    )


def _take(scored: Scored, rows: Int64) -> Scored:
    return Scored(
        truth=scored.truth[rows],
        mask=scored.mask[rows],
        forecast=scored.forecast[rows],
        last=scored.last[rows],
        patient=scored.patient[rows],
        site=scored.site[rows],
        sites=scored.sites,
        quantiles=None if scored.quantiles is None else scored.quantiles[rows],
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


def _grid(scored: Scored, horizon_minutes: int) -> GridScore:
    column = HORIZON_MINUTES.index(horizon_minutes)
    keep = scored.mask[:, column]
    truth, forecast = scored.truth[keep, column], scored.forecast[keep, column]
    shares = [
        tuple(_ratio(int(n), len(truth)) for n in np.bincount(zones(truth, forecast), minlength=len(ZONE_NAMES)))
        for zones in (clarke_zones, parkes_zones)
    ]
    return GridScore(horizon_minutes, len(truth), *shares)


def _interval(scored: Scored, horizon_minutes: int, nominal: float, low: int, high: int) -> IntervalScore:
    assert scored.quantiles is not None  # noqa: S101 - the caller asks only where there are quantiles
    column = HORIZON_MINUTES.index(horizon_minutes)
    keep = scored.mask[:, column]
    truth = scored.truth[keep, column].astype(np.float64)
    lower, upper = scored.quantiles[keep, column, low], scored.quantiles[keep, column, high]
    losses = [_mean(np.maximum(q * (d := truth - end), (q - 1) * d)) for q, end in _ends(low, lower, high, upper)]
    return IntervalScore(
        horizon_minutes=horizon_minutes,
        nominal=nominal,
        pairs=len(truth),
        coverage=_mean((truth >= lower) & (truth <= upper)),
        width=_mean(upper - lower),
        pinball=sum(losses) / 2,
    )


def _ends(low: int, lower: FloatArray, high: int, upper: FloatArray) -> tuple[tuple[float, FloatArray], ...]:
    return ((QUANTILES[low], lower), (QUANTILES[high], upper))


def _event(scored: Scored, name: str, threshold: float, sign: float) -> EventScore:
    near = HORIZON_MINUTES.index(EVENT_MINUTES) + 1
    counts = _any(scored.mask[:, :near])
    beyond: Bool = ((scored.truth[:, :near] - threshold) * sign > 0) & scored.mask[:, :near]
    event = _any(beyond[counts])
    alert = _any((scored.forecast[counts, :near] - threshold) * sign > 0)
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

    return MeanScore(
        horizon_minutes=horizon_minutes,
        groups=len(pairs),
        rmse=_mean(np.sqrt(over(error * error))),
        mae=_mean(over(np.abs(error))),
        mard_percent=100 * _mean(over(np.abs(error) / truth)),
    )


def _mean(values: npt.NDArray[np.floating] | Bool) -> float:
    """Mean in double precision; NaN of nothing, without a warning."""
    return float(values.mean(dtype=np.float64)) if values.size else math.nan


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
