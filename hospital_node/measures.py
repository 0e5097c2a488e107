"""What the rules of the suite look at, measured from canonical rows."""

from __future__ import annotations

from datetime import datetime
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pandas as pd

from data_schemas.reading import Flag
from data_schemas.units import SENSOR_MAX_MG_DL, SENSOR_MIN_MG_DL

Int: TypeAlias = npt.NDArray[np.int64]
Float: TypeAlias = npt.NDArray[np.float64]

# Two readings closer than a grid step are compared as if a step apart: rounding alone would look like a jump.
_JUMP_FLOOR_MIN = 5.0
# Half a grid step: two readings so close are one moment's.
NEAR_S = 150


def measure_reading(frame: pd.DataFrame, now: datetime) -> pd.DataFrame:
    """Return the rows with what the rules on single rows look at."""
    ahead = (frame["measured_at"] - pd.Timestamp(now)).dt.total_seconds() / 60
    return frame.assign(
        clock_change=_bit(frame, Flag.CLOCK_CHANGE),
        unreadable=_bit(frame, Flag.UNREADABLE),
        # The past is 0, so that few different values are left to look at.
        minutes_ahead_of_now=ahead.clip(lower=0),
        year=frame["measured_at"].dt.year,
    )


def measure_stamp(frame: pd.DataFrame) -> pd.DataFrame:
    """Return, per row, what else the same person has at their second and right beside it."""
    person, second, glucose = _columns(frame)
    order = np.lexsort((frame["row"].to_numpy(), glucose, second, person))
    person, second, glucose = person[order], second[order], glucose[order]
    same_person = _same(person)
    same_stamp = same_person & _same(second)
    same_value = same_stamp & _same(glucose)
    stamp = np.cumsum(~same_stamp) - 1
    values = np.bincount(stamp[~same_value], minlength=int(stamp[-1]) + 1 if len(stamp) else 0)
    first = np.flatnonzero(~same_value)
    copy = np.arange(len(order)) - np.repeat(first, np.diff(np.append(first, len(order))))
    difference = np.abs(np.diff(glucose, prepend=np.nan))
    near = same_person & (np.diff(second, prepend=0) <= NEAR_S)
    before = np.where(near, difference, np.nan)
    measured = pd.DataFrame(
        {
            "values_at_stamp": values[stamp],
            "copy": copy,
            "difference_within_150_s_mg_dl": np.fmax(before, np.append(before[1:], np.nan)),
        },
        index=frame.index[order],
    )
    return measured.reindex(frame.index)


def measure_series(frame: pd.DataFrame) -> pd.DataFrame:
    """Return accepted rows, sorted by person and time, with their distance to the sensor's own reading before.

    Interpolated rows have none.
    """
    made = (frame["flags"].to_numpy() & int(Flag.INTERPOLATED)) != 0
    own = frame[~made]
    person, second, glucose = _columns(own)
    same = _same(person)
    minutes = np.where(same, np.diff(second, prepend=0) / 60, np.nan)
    step = np.where(same, np.abs(np.diff(glucose, prepend=np.nan)), np.nan)
    flat = same & (step == 0) & (glucose > SENSOR_MIN_MG_DL) & (glucose < SENSOR_MAX_MG_DL)
    steady = np.cumsum(np.where(flat, minutes, 0.0))
    began = np.maximum.accumulate(np.where(flat, 0, np.arange(len(own)))) if len(own) else np.zeros(0, np.int64)
    measured = pd.DataFrame(
        {
            "minutes_since_last": minutes,
            "step_mg_dl_per_min": step / np.maximum(minutes, _JUMP_FLOOR_MIN),
            "flat_minutes": np.where(flat, steady - steady[began], 0.0).round(6),
        },
        index=own.index,
    ).reindex(frame.index)
    censored = int(Flag.CENSORED_LOW | Flag.CENSORED_HIGH)
    return measured.assign(interpolated=made.astype(np.int64), censored=(frame["flags"] & censored != 0).astype(int))


def measure_people(frame: pd.DataFrame) -> pd.DataFrame:
    """Return one row for each person: days from first to last reading, readings, and what is missing between.

    The sensor's interval is the person's median step, and `expected` the readings that it promises between the first
    and the last; a step is missing what it is longer than that.
    """
    person, second, _ = _columns(frame)
    _, names = pd.factorize(frame["patient"])
    step = pd.Series(np.where(_same(person), np.diff(second, prepend=0), np.nan)).groupby(person)
    span, usual = step.sum(), step.median()
    expected = (span / usual.where(usual > 0)).fillna(0.0)
    count = step.size()
    missing = (1 - (count - 1) / expected.where(expected > 0)).clip(lower=0).fillna(0.0)
    return pd.DataFrame(
        {
            "patient": pd.Series(names, dtype="str"),
            "days": span / 86_400,
            "share_missing": missing,
            "readings": count,
            "expected": np.maximum(expected + 1, count),
        }
    )


def seconds_of(frame: pd.DataFrame) -> Int:
    """Return int64[N], UTC epoch seconds; the smallest number where there is no time."""
    second: Int = frame["measured_at"].dt.tz_localize(None).to_numpy().astype("datetime64[s]").astype(np.int64)
    return second


def _columns(frame: pd.DataFrame) -> tuple[Int, Int, Float]:
    person = pd.factorize(frame["patient"])[0].astype(np.int64)
    return person, seconds_of(frame), frame["glucose_mg_dl"].to_numpy(np.float64)


def _same(values: Int | Float) -> npt.NDArray[np.bool_]:
    """Return whether each value equals the one before it; the first does not."""
    same = np.zeros(len(values), dtype=np.bool_)
    same[1:] = values[1:] == values[:-1]
    return same


def _bit(frame: pd.DataFrame, flag: Flag) -> pd.Series:
    return ((frame["flags"] & int(flag)) != 0).astype("int64")
