"""Lows and highs as episodes, and how well forecasts announce them.

An episode is glucose beyond a threshold for at least 15 minutes; it ends when glucose is back for at least 15 minutes
or when readings stop (Danne et al., Diabetes Care 2017;40:1631; Battelino et al., Diabetes Care 2019;42:1593).
An alarm is a forecast beyond the threshold, issued while the last reading is not; alarms that follow each other
within 30 minutes are one alarm, because a person hears one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_schemas.units import HORIZON_MINUTES
from pipeline.scored import Bool, FloatArray, Int64, Scored, surely_beyond
from pipeline.windows import Series

# (name, threshold in mg/dL, -1 for below and +1 for above)
EPISODES = (("below 70", 70.0, -1.0), ("below 54", 54.0, -1.0), ("above 180", 180.0, 1.0), ("above 250", 250.0, 1.0))
EPISODE_MINUTES = 15
ALARM_MINUTES = 30
# Two readings 15 minutes apart by a sensor that is 2.5 minutes out still make an episode.
_JITTER_S = 150
_GAP_S = 30 * 60


@dataclass(frozen=True, slots=True)
class Episodes:
    """Start and end of each episode, epoch seconds of its first and last reading beyond; person: int64[E]."""

    person: Int64
    start_s: Int64
    end_s: Int64


@dataclass(frozen=True, slots=True)
class AlarmCounts:
    """What a model's alarms did, per person: int64[P] each but monitored_days float[P]; lead_minutes float[D].

    Counts of several sites are joined with `joined`, and nothing but counts is needed for the scores.
    """

    episodes: Int64
    detected: Int64
    alarms: Int64
    true_alarms: Int64
    monitored_days: FloatArray
    lead_minutes: FloatArray


@dataclass(frozen=True, slots=True)
class EpisodeScore:
    """Episodes announced within the 30 minutes before they begin.

    recall = announced / episodes; precision = alarms followed by an episode within 30 minutes / alarms; false alarms
    are the others, over the days on which forecasts were issued; lead is from the first alarm of those 30 minutes to
    the episode's first reading. Only episodes with an issue point in those 30 minutes count. NaN of nothing.
    """

    name: str
    episodes: int
    recall: float
    precision: float
    f1: float
    false_alarms_per_day: float
    median_lead_minutes: float


def episodes(series: Series, threshold_mg_dl: float, sign: float) -> Episodes:
    """Find the episodes of every person of a series."""
    person = np.repeat(np.arange(len(series.patients), dtype=np.int64), np.diff(series.starts))
    beyond: Bool = (series.glucose_mg_dl - threshold_mg_dl) * sign > 0
    block = _blocks(person, series.time_s, np.ones(len(person), dtype=np.bool_))
    beyond = ~_short_runs_removed(~beyond, block, series.time_s, inside_only=True)
    beyond = _short_runs_removed(beyond, block, series.time_s)
    first, last = _runs(beyond, block)
    return Episodes(person[first], series.time_s[first], series.time_s[last])


def _blocks(person: Int64, time_s: Int64, keep: Bool) -> Int64:
    """int64[N]: number of each stretch of one person without a gap of more than 30 minutes."""
    if not len(person):
        return np.zeros(0, dtype=np.int64)
    cut = (person[1:] != person[:-1]) | (np.diff(time_s) > _GAP_S) | ~keep[1:]
    return np.concatenate([[0], np.cumsum(cut)]).astype(np.int64)


def _runs(flag: Bool, block: Int64) -> tuple[Int64, Int64]:
    """First and last row of each run of set flags within a block."""
    if not len(flag):
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    change = (flag[1:] != flag[:-1]) | (block[1:] != block[:-1])
    first = np.flatnonzero(np.concatenate([[True], change]) & flag)
    last = np.flatnonzero(np.concatenate([change, [True]]) & flag)
    return first.astype(np.int64), last.astype(np.int64)


def _short_runs_removed(flag: Bool, block: Int64, time_s: Int64, *, inside_only: bool = False) -> Bool:
    """Unset runs that last less than 15 minutes; inside_only spares those that a block's edge may have cut short."""
    first, last = _runs(flag, block)
    short = time_s[last] - time_s[first] < EPISODE_MINUTES * 60 - _JITTER_S
    if inside_only and len(flag):
        edge = np.concatenate([[True], np.diff(block) != 0, [True]])
        short &= ~edge[first] & ~edge[last + 1]
    step = np.zeros(len(flag) + 1, dtype=np.int64)
    np.add.at(step, first[short], 1)
    np.add.at(step, last[short] + 1, -1)
    kept: Bool = flag & (np.cumsum(step[:-1]) == 0)
    return kept


def alarms_by_forecast(scored: Scored, threshold_mg_dl: float, sign: float) -> Bool:
    """bool[B]: the point forecast is beyond the threshold at some horizon up to 30 minutes."""
    near = HORIZON_MINUTES.index(ALARM_MINUTES) + 1
    found: Bool = np.logical_or.reduce((scored.forecast[:, :near] - threshold_mg_dl) * sign > 0, axis=1)
    return found


def alarms_by_probability(scored: Scored, threshold_mg_dl: float, sign: float) -> Bool:
    """bool[B]: the chance to be beyond the threshold reaches ALARM_PROBABILITY at some horizon up to 30 minutes."""
    if scored.quantiles is None:
        raise ValueError("this model has no quantiles")
    near = HORIZON_MINUTES.index(ALARM_MINUTES) + 1
    found: Bool = np.logical_or.reduce(surely_beyond(scored.quantiles[:, :near], threshold_mg_dl, sign), axis=1)
    return found


def count_alarms(series: Series, scored: Scored, alarm: Bool, threshold_mg_dl: float, sign: float) -> AlarmCounts:
    """Match the alarms of one site to its episodes; scored.patient must index the series' patients."""
    if scored.time_s is None:
        raise ValueError("episodes need the times at which forecasts were issued")
    people = len(series.patients)
    order = np.lexsort((scored.time_s, scored.patient))
    person, time_s = scored.patient[order], scored.time_s[order]
    fresh = (scored.last[order] - threshold_mg_dl) * sign <= 0
    heard: Bool = alarm[order] & fresh
    found = episodes(series, threshold_mg_dl, sign)
    key, reach = _keyed(person, time_s), ALARM_MINUTES * 60 + _JITTER_S
    onset = _keyed(found.person, found.start_s)
    counted = np.searchsorted(key, onset, "left") > np.searchsorted(key, onset - reach, "left")
    ringing = key[heard]
    start, stop = (np.searchsorted(ringing, onset - back, "left") for back in (reach, 0))
    detected = counted & (stop > start)
    lead = (onset[detected] - ringing[start[detected]]) / 60.0
    first, last = _alarm_edges(ringing)
    hit = np.searchsorted(onset, last + reach, "right") > np.searchsorted(onset, first, "right")
    owner = person[heard][np.searchsorted(ringing, first)] if len(first) else np.zeros(0, dtype=np.int64)
    return AlarmCounts(
        np.bincount(found.person[counted], minlength=people),
        np.bincount(found.person[detected], minlength=people),
        np.bincount(owner, minlength=people),
        np.bincount(owner[hit], minlength=people),
        _days(person, time_s, people),
        lead,
    )


def _keyed(person: Int64, time_s: Int64) -> Int64:
    """Times that increase over all people and never meet: 2**34 seconds are 544 years."""
    return person * 2**35 + time_s


def _alarm_edges(ringing: Int64) -> tuple[Int64, Int64]:
    """First and last time of each alarm: issue points that ring within 30 minutes of each other are one."""
    if not len(ringing):
        return ringing, ringing
    cut = np.diff(ringing) > _GAP_S
    return ringing[np.concatenate([[True], cut])], ringing[np.concatenate([cut, [True]])]


def _days(person: Int64, time_s: Int64, people: int) -> FloatArray:
    """float[P]: days between issue points, a gap counting for 30 minutes at most."""
    same = person[1:] == person[:-1]
    span = np.minimum(np.diff(time_s), _GAP_S)[same]
    return np.bincount(person[1:][same], weights=span, minlength=people) / 86400.0


def joined(parts: Sequence[AlarmCounts]) -> AlarmCounts:
    """Counts of several sites as one."""
    return AlarmCounts(
        *(
            np.concatenate([getattr(p, name) for p in parts])
            for name in ("episodes", "detected", "alarms", "true_alarms", "monitored_days", "lead_minutes")
        )
    )


def episode_score(name: str, counts: AlarmCounts) -> EpisodeScore:
    """Scores of all people together."""
    total, hits = int(counts.episodes.sum()), int(counts.detected.sum())
    alarms, right = int(counts.alarms.sum()), int(counts.true_alarms.sum())
    recall, precision = _ratio(hits, total), _ratio(right, alarms)
    return EpisodeScore(
        name=name,
        episodes=total,
        recall=recall,
        precision=precision,
        f1=_ratio(2 * recall * precision, recall + precision),
        false_alarms_per_day=_ratio(alarms - right, float(counts.monitored_days.sum())),
        median_lead_minutes=float(np.median(counts.lead_minutes)) if len(counts.lead_minutes) else math.nan,
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
