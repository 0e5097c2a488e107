"""The scorecard: a forecaster beside every baseline, on the same people, as tables, JSON, pictures and a page.

Baselines that learn are fitted on people who are not scored: the training people of nodes, or, for files of readings,
the other people of the files (five folds by a hash of the name).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data_schemas.errors import BadInput
from pipeline.baselines import autoregression, fit_ar, fit_ridge, fit_trees, linear, persistence, ridge, trees
from pipeline.evaluation import Evaluation, evaluate
from pipeline.events import (
    EPISODES,
    EpisodeScore,
    alarms_by_forecast,
    alarms_by_probability,
    count_alarms,
    episode_score,
    joined,
)
from pipeline.readings_csv import ROW, spool_readings
from pipeline.scored import Bool, Predict, Scored, concat, score_personally, score_windows
from pipeline.windows import Batch, Float32, Series, Windows

FOLDS = 5


@dataclass(frozen=True, slots=True)
class Fold:
    """Windows to fit baselines on, and windows to score them on with the name of their site."""

    training: Sequence[Windows]
    scored: Sequence[tuple[str, Windows]]


@dataclass(frozen=True, slots=True)
class Card:
    """One model's scores; alarms by point forecast, and by probability where the model has quantiles."""

    evaluation: Evaluation
    alarms_by_forecast: tuple[EpisodeScore, ...]
    alarms_by_probability: tuple[EpisodeScore, ...]


@dataclass(frozen=True, slots=True)
class Scorecard:
    """Cards by model label, in the order of the tables, and the forecasts behind them."""

    cards: dict[str, Card]
    scored: dict[str, Scored]
    series: tuple[tuple[str, Series], ...]


def read_series(path: Path, zone: str, scratch: Path) -> Series:
    """Readings of one CSV, sorted; of several in the same second the lowest stays. Raises BadInput."""
    spool = spool_readings(path, zone, scratch / "spool", lambda _: None)
    rows = np.fromfile(spool.file, dtype=ROW)
    names = sorted(spool.patients)
    rank = np.array([names.index(p) for p in spool.patients], dtype=np.int64)[rows["patient"]]
    order = np.lexsort((rows["glucose_mg_dl"], rows["time_s"], rank))
    rank, rows = rank[order], rows[order]
    first = np.concatenate([[True], (np.diff(rank) != 0) | (np.diff(rows["time_s"]) != 0)])
    rank, rows = rank[first], rows[first]
    starts = np.searchsorted(rank, np.arange(len(names) + 1)).astype(np.int64)
    return Series(tuple(names), starts, rows["time_s"].astype(np.int64), rows["glucose_mg_dl"].astype(np.float32))


def merged(first: Series, second: Series) -> Series:
    """One series of two groups of people."""
    return Series(
        (*first.patients, *second.patients),
        np.concatenate([first.starts, second.starts[1:] + first.starts[-1]]),
        np.concatenate([first.time_s, second.time_s]),
        np.concatenate([first.glucose_mg_dl, second.glucose_mg_dl]),
    )


def restricted(windows: Windows, keep: Bool) -> Windows:
    """Only the windows of these people; people keep their numbers. keep: bool[P]."""
    counts = np.diff(windows.offsets)
    offsets = np.concatenate([[0], np.cumsum(np.where(keep, counts, 0))]).astype(np.int64)
    return replace(windows, anchors=windows.anchors[np.repeat(keep, counts)], offsets=offsets)


def folds_by_person(sites: Mapping[str, Windows], count: int = FOLDS) -> list[Fold]:
    """Cut people into folds inside each site; each fold is scored by what is fitted on all the others.

    A hash of the name decides the order of people, so equal files give equal folds.
    """
    member = {name: _fold_of(w.series.patients, count) for name, w in sites.items()}
    people = min(max(len(m) for m in member.values()), count)
    if people < 2:
        raise BadInput("there is one person only", "give more people: baselines are fitted on people not scored")
    return [
        Fold(
            [restricted(w, member[name] != k) for name, w in sites.items()],
            [(name, restricted(w, member[name] == k)) for name, w in sites.items()],
        )
        for k in range(people)
    ]


def _fold_of(patients: Sequence[str], count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """int64[P]: fold of each person, folds as equal as can be."""
    digests = [hashlib.sha256(p.encode()).digest() for p in patients]
    order = sorted(range(len(patients)), key=digests.__getitem__)
    fold = np.empty(len(patients), dtype=np.int64)
    fold[order] = np.arange(len(patients)) % count
    return fold


def baselines(training: Sequence[Windows]) -> dict[str, Predict]:
    """Every baseline by label, the learning ones fitted on these windows."""
    ar, regression, boosted = fit_ar(training), fit_ridge(training), fit_trees(training)
    forecasts: dict[str, Callable[[Batch], Float32]] = {
        "persistence": persistence,
        "linear": linear,
        "AR": lambda batch: autoregression(ar, batch),
        "ridge": lambda batch: ridge(regression, batch),
        "trees": lambda batch: trees(boosted, batch),
    }
    return {label: plain(forecast) for label, forecast in forecasts.items()}


def plain(forecast: Callable[[Batch], Float32]) -> Predict:
    """A predictor without quantiles."""
    return lambda batch: (forecast(batch), None)


def alike(models: Mapping[str, Predict], fold: Fold) -> dict[str, Sequence[Predict]]:
    """Models that forecast every scored site of a fold."""
    return {label: [predict] * len(fold.scored) for label, predict in models.items()}


def score(
    folds: Sequence[Fold], fitted: Callable[[Fold], Mapping[str, Sequence[Predict]]], personal: tuple[str, str]
) -> Scorecard:
    """Score on the same windows what `fitted` makes of each fold: for each label a predictor of each scored site.

    personal: the label that is also scored as corrected from each person's own past, and the label of that.
    """
    plainly, corrected = personal
    parts: dict[str, list[Scored]] = {}
    for fold in folds:
        for label, predictors in fitted(fold).items():
            for predict, (site, windows) in zip(predictors, fold.scored, strict=True):
                if label == plainly:
                    found, adapted = score_personally(windows, predict, site)
                    parts.setdefault(label, []).append(found)
                    parts.setdefault(corrected, []).append(adapted)
                else:
                    parts.setdefault(label, []).append(score_windows(windows, predict, site))
    if not sum(len(p.last) for p in next(iter(parts.values()))):
        raise BadInput("no forecast can be scored", "a person needs an hour of readings, and readings after that")
    scored = {label: concat(found) for label, found in parts.items()}
    series = {site: w.series for fold in folds for site, w in fold.scored}
    return Scorecard({k: _card(s, series) for k, s in scored.items()}, scored, tuple(series.items()))


def _card(scored: Scored, series: Mapping[str, Series]) -> Card:
    by_chance = _alarms(scored, series, alarms_by_probability) if scored.quantiles is not None else ()
    return Card(evaluate(scored), _alarms(scored, series, alarms_by_forecast), by_chance)


def _alarms(
    scored: Scored, series: Mapping[str, Series], rule: Callable[[Scored, float, float], Bool]
) -> tuple[EpisodeScore, ...]:
    """Episode scores of one rule, all sites together."""
    sites = [(series[name], scored.take(np.flatnonzero(scored.site == i))) for i, name in enumerate(scored.sites)]
    return tuple(
        episode_score(
            name,
            joined([count_alarms(s, part, rule(part, threshold, sign), threshold, sign) for s, part in sites]),
        )
        for name, threshold, sign in EPISODES
    )
