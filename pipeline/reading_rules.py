"""What readings must be for a forecast to be built on them, and what makes acceptable ones less than good.

The rules refuse old data (12 minutes and 5 minutes ahead are oref0's limits), a sensor that sticks, shakes or jumps, a
wrong unit, too little history. What is enough history is training's own rule.
"""

from __future__ import annotations

import statistics
from bisect import bisect_left
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from data_schemas.forecast import NoForecast, Quality
from data_schemas.units import SENSOR_MAX_MG_DL, SENSOR_MIN_MG_DL
from pipeline.windows import JUMP_MG_DL, JUMP_MG_DL_PER_MIN, WindowSpec

Int64: TypeAlias = npt.NDArray[np.int64]
Float32: TypeAlias = npt.NDArray[np.float32]

MAX_AGE_SECONDS = 12 * 60
MAX_AHEAD_SECONDS = 5 * 60
FLAT_SECONDS = 45 * 60
# A person's glucose moves by up to about 5 mg/dL a minute; a change beyond this allowance is the sensor's.
JUMP_ALLOWANCE_MG_DL = 30.0
JUMP_MG_DL_PER_MINUTE = 6.0
RECENT_SECONDS = 60 * 60
# Glucose does not turn round four times in an hour by this much each way; a sensor that loses contact does.
NOISE_MG_DL, NOISE_TURNS = 12.0, 4
LOWEST_MG_DL, HIGHEST_MG_DL = 10.0, 600.0
# A median below 35 mg/dL is mmol/L read as mg/dL; one above 600 is mg/dL read as mmol/L.
UNIT_SUSPECT_MEDIAN_MG_DL = 35.0
AGEING_SECONDS = 7 * 60
GAP_SECONDS = 20 * 60
# Of the 24 hours before the newest reading; a reading either end may be missing.
DAY_SECONDS, DAY_SLACK_SECONDS = 24 * 3600, 30 * 60


@dataclass(frozen=True, slots=True)
class Fit:
    """Readings that a forecast may be built on: how many of them the model looks at, and their flags."""

    readings_used: int
    quality: tuple[Quality, ...]


def judge(time_s: Int64, glucose_mg_dl: Float32, now_s: float, windows: WindowSpec) -> Fit | NoForecast:
    """Return the first reason against a forecast, or what is known of the readings. Sorted by time, one per second.

    They should reach back a day where there is one; the rules look at the model's history, the flags at the day too.
    """
    if not len(time_s):
        return NoForecast.TOO_LITTLE_HISTORY
    start = int(time_s.searchsorted(time_s[-1] - windows.history_minutes * 60 - windows.jitter_seconds))
    # A few dozen numbers: plain loops are quicker than array calls.
    times, glucose = time_s[start:].tolist(), glucose_mg_dl[start:].tolist()
    inside = glucose_mg_dl[start:].clip(SENSOR_MIN_MG_DL, SENSOR_MAX_MG_DL).tolist()
    age_s, unlikely = now_s - times[-1], _unlikely_changes(times, inside)
    if reason := age_reason(age_s) or _value_reason(times, glucose, unlikely, windows):
        return reason
    worse = {
        Quality.AGEING: age_s > AGEING_SECONDS,
        Quality.GAPS: any(after - before > GAP_SECONDS for before, after in pairwise(times)),
        Quality.SHORT_HISTORY: times[-1] - times[0] < (windows.history_minutes - windows.grid_minutes) * 60,
        Quality.SHORT_DAY: times[-1] - int(time_s[0]) < DAY_SECONDS - DAY_SLACK_SECONDS,
        Quality.AT_SENSOR_LIMIT: min(glucose) <= SENSOR_MIN_MG_DL or max(glucose) >= SENSOR_MAX_MG_DL,
        Quality.JUMPS: unlikely > 0,
    }
    return Fit(len(times), tuple(flag for flag, there in worse.items() if there))


def age_reason(age_s: float) -> NoForecast | None:
    """What the age of the newest reading, in seconds, says against a forecast."""
    if age_s < -MAX_AHEAD_SECONDS:
        return NoForecast.FUTURE
    return NoForecast.STALE if age_s > MAX_AGE_SECONDS else None


def _value_reason(times: list[int], glucose: list[float], unlikely: int, windows: WindowSpec) -> NoForecast | None:
    if not UNIT_SUSPECT_MEDIAN_MG_DL <= statistics.median(glucose) <= HIGHEST_MG_DL:
        return NoForecast.UNIT_SUSPECT
    if not LOWEST_MG_DL <= min(glucose) <= max(glucose) <= HIGHEST_MG_DL:
        return NoForecast.OUT_OF_RANGE
    if unlikely > windows.max_jumps or not _enough_history(times, windows):
        return NoForecast.TOO_LITTLE_HISTORY
    if _flat_seconds(times, glucose) >= FLAT_SECONDS:
        return NoForecast.FLAT
    start = bisect_left(times, times[-1] - RECENT_SECONDS)
    recent, values = times[start:], glucose[start:]
    if _jumps(recent, values):
        return NoForecast.JUMP
    return NoForecast.NOISY if _turns(values) >= NOISE_TURNS else None


def _enough_history(times: list[int], windows: WindowSpec) -> bool:
    """Whether training would have cut a window at the newest reading: the rules of windows.cut_windows, for one."""
    if len(times) < 2 or times[-1] - times[-2] > windows.max_last_gap_minutes * 60:
        return False
    return times[-1] - times[0] >= windows.min_history_minutes * 60 - windows.jitter_seconds


def _unlikely_changes(times: list[int], inside: list[float]) -> int:
    """How many neighbours, within the sensor's range, differ by more than training takes for one person's glucose."""
    return sum(
        abs(new - old) > JUMP_MG_DL + JUMP_MG_DL_PER_MIN * (after - before) / 60.0
        for old, new, before, after in zip(inside, inside[1:], times, times[1:], strict=False)
    )


def _flat_seconds(times: list[int], glucose: list[float]) -> int:
    """For how long the newest reading has not changed at all."""
    start = len(glucose) - 1
    while start > 0 and glucose[start - 1] == glucose[-1]:
        start -= 1
    return times[-1] - times[start]


def _jumps(times: list[int], glucose: list[float]) -> bool:
    """Whether two neighbours lie further apart than a person's glucose can move."""
    return any(
        abs(new - old) > JUMP_ALLOWANCE_MG_DL + JUMP_MG_DL_PER_MINUTE * (after - before) / 60.0
        for old, new, before, after in zip(glucose, glucose[1:], times, times[1:], strict=False)
    )


def _turns(glucose: list[float]) -> int:
    """How often the values turn round with more than NOISE_MG_DL on both sides of the turn."""
    steps = [new - old for old, new in pairwise(glucose)]
    return sum(one * other < 0 and min(abs(one), abs(other)) > NOISE_MG_DL for one, other in pairwise(steps))
