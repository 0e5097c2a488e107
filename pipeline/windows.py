"""Causal forecast windows over glucose readings.

A window is anchored at a real reading (the issue reading, time t0).  Its history lies on a grid that counts
back from t0, each step carrying the last reading known at that grid time together with its age, so 5-minute,
15-minute and irregular sensors share one model and nothing after t0 is ever seen.  Targets are real readings
only; where there is none the mask is False.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from data_schemas.units import GRID_MINUTES, HORIZON_MINUTES, SENSOR_MAX_MG_DL, SENSOR_MIN_MG_DL

if TYPE_CHECKING:
    import pandas as pd

Int64: TypeAlias = npt.NDArray[np.int64]
Float32: TypeAlias = npt.NDArray[np.float32]
Bool: TypeAlias = npt.NDArray[np.bool_]
# Shape and type to an array of zeros.
Allocate: TypeAlias = Callable[[Any, Any], npt.NDArray[Any]]

FEATURES = (
    "change_from_last",
    "level",
    "change_from_step_before",
    "age",
    "day_mean",
    "day_spread",
    "day_covered",
)
JUMP_MG_DL = 20.0
JUMP_MG_DL_PER_MIN = 4.0
_CHANGE_SCALE_MG_DL = 40.0
_LEVEL_CENTRE_MG_DL = 140.0
_LEVEL_SCALE_MG_DL = 60.0
_STEP_SCALE_MG_DL = 10.0
_AGE_SCALE_MINUTES = 15.0
SPREAD_SCALE_MG_DL = 40.0
RESIDUAL_SCALE_MG_DL = tuple(8.0 * math.sqrt(h / 5.0) for h in HORIZON_MINUTES)  # typical change after 5..60 minutes
_DAY_SECONDS = 24 * 3600
# A series may be larger than the memory: it is looked at in blocks of patients of about this many readings.
_BLOCK_READINGS = 1 << 15


@dataclass(frozen=True, slots=True)
class WindowSpec:
    """How windows are cut; all durations in minutes.

    jitter_seconds: a reading this little after a grid time still counts for it (never one after t0).
    target_tolerance_seconds: a target is the nearest reading within this distance of t0 + h.
    max_carry_minutes: an older reading is not carried; the step is filled with the last reading and the
    greatest age. max_last_gap_minutes: no forecast is issued when the reading before t0 is further away than
    this. min_history_minutes: no forecast is issued when the patient's first reading in the history is
    nearer than this. max_jumps: no forecast is issued when the history holds more impossible jumps than this
    (two sensors interleaved, say); a jump is a change of more than JUMP_MG_DL + JUMP_MG_DL_PER_MIN x minutes
    between neighbouring readings.
    """

    history_minutes: int = 180
    horizon_minutes: int = 60
    grid_minutes: int = GRID_MINUTES
    jitter_seconds: int = 149
    target_tolerance_seconds: int = 150
    max_carry_minutes: int = 60
    max_last_gap_minutes: int = 30
    min_history_minutes: int = 60
    max_jumps: int = 2

    def __post_init__(self) -> None:
        if (
            self.grid_minutes <= 0
            or self.history_minutes % self.grid_minutes
            or self.horizon_minutes % self.grid_minutes
        ):
            raise ValueError("history_minutes and horizon_minutes must be multiples of grid_minutes")
        if not 0 <= self.jitter_seconds < self.grid_minutes * 30 + 1:
            raise ValueError("jitter_seconds must stay below half a grid step")
        if not self.grid_minutes <= self.min_history_minutes <= self.history_minutes:
            raise ValueError("min_history_minutes must lie between grid_minutes and history_minutes")

    @property
    def steps(self) -> int:
        """T: grid points in the history, t0 included."""
        return self.history_minutes // self.grid_minutes + 1

    @property
    def horizons_minutes(self) -> tuple[int, ...]:
        """The 12 forecast distances 5, 10, ..., 60."""
        return tuple(range(self.grid_minutes, self.horizon_minutes + 1, self.grid_minutes))

    @property
    def features(self) -> int:
        """F: channels of a step."""
        return len(FEATURES)


@dataclass(frozen=True, slots=True)
class Series:
    """Readings of many patients, one after the other.

    starts: int64[P+1], patient p owns rows starts[p]:starts[p+1].  time_s: int64[N], UTC epoch seconds,
    strictly increasing within a patient.  glucose_mg_dl: float32[N].
    """

    patients: tuple[str, ...]
    starts: Int64
    time_s: Int64
    glucose_mg_dl: Float32

    def __post_init__(self) -> None:
        if len(self.starts) != len(self.patients) + 1 or self.starts[0] != 0 or self.starts[-1] != len(self.time_s):
            raise ValueError("starts must hold P+1 offsets from 0 to N")
        if len(self.time_s) != len(self.glucose_mg_dl):
            raise ValueError("time_s and glucose_mg_dl differ in length")
        if np.any(np.diff(self.starts) < 0):
            raise ValueError("starts must not decrease")
        for first, end in _blocks(self.starts):
            rows = slice(self.starts[first], self.starts[end])
            later = np.diff(self.time_s[rows]) > 0
            seams = self.starts[first + 1 : end] - self.starts[first] - 1
            later[seams[(seams >= 0) & (seams < len(later))]] = True
            if not bool(later.all()):
                raise ValueError("times must increase strictly within a patient")
            if not bool(np.isfinite(self.glucose_mg_dl[rows]).all()):
                raise ValueError("glucose_mg_dl must be finite")

    @classmethod
    def from_frame(cls, frame: pd.DataFrame) -> Series:
        """Columns patient_id (or patient), measured_at (tz-aware UTC datetime), glucose_mg_dl; any row order.

        Of readings of one patient in the same second the first stays.  Patients come out sorted by
        identifier.
        """
        name = "patient_id" if "patient_id" in frame.columns else "patient"
        moments: Any = frame["measured_at"]
        if getattr(moments.dt, "tz", None) is None:
            raise ValueError("measured_at must be timezone-aware")
        time_s = moments.dt.tz_convert("UTC").dt.tz_localize(None).to_numpy().astype("datetime64[s]").astype(np.int64)
        named = frame[name].astype(str).to_numpy(dtype=object).astype(str)
        patients, codes = np.unique(named, return_inverse=True)
        glucose = frame["glucose_mg_dl"].to_numpy(dtype=np.float32)
        return cls.from_codes(tuple(str(p) for p in patients), codes, time_s, glucose)

    @classmethod
    def from_codes(cls, patients: tuple[str, ...], codes: Int64, time_s: Int64, glucose_mg_dl: Float32) -> Series:
        """Build from names, sorted, and three columns of equal length in any order.

        codes: position of a reading's patient in `patients`; time_s: UTC epoch seconds. Of readings of one patient in
        the same second the first stays.
        """
        order = np.lexsort((np.arange(len(codes)), time_s, codes))
        codes, time_s, glucose = codes[order], time_s[order], glucose_mg_dl[order]
        first = np.ones(len(codes), dtype=bool)
        first[1:] = (codes[1:] != codes[:-1]) | (time_s[1:] != time_s[:-1])
        codes, time_s, glucose = codes[first], time_s[first], glucose[first]
        starts = np.searchsorted(codes, np.arange(len(patients) + 1)).astype(np.int64)
        return cls(patients, starts, time_s, glucose)

    def select(self, patients: Sequence[str]) -> Series:
        """Keep the readings of these patients only, in the order of this series; unknown names are refused."""
        wanted = set(patients)
        if unknown := wanted - set(self.patients):
            raise KeyError(f"{len(unknown)} of the patients are not in the series")
        keep = [p for p, name in enumerate(self.patients) if name in wanted]
        rows = [np.arange(self.starts[p], self.starts[p + 1]) for p in keep]
        index = np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64)
        starts = np.concatenate([[0], np.cumsum([len(r) for r in rows])]).astype(np.int64)
        return Series(tuple(self.patients[p] for p in keep), starts, self.time_s[index], self.glucose_mg_dl[index])


@dataclass(frozen=True, slots=True)
class Batch:
    """x: float32[B,T,F], oldest step first; y: float32[B,12] in mg/dL; mask: bool[B,12]; last: float32[B] in mg/dL."""

    x: Float32
    y: Float32
    mask: Bool
    last: Float32


@dataclass(frozen=True, slots=True)
class Windows:
    """A view over a series: the readings at which a forecast is issued.

    anchors: int64[M], increasing row numbers of the series.  offsets: int64[P+1], patient p owns anchors
    offsets[p]:offsets[p+1].
    """

    series: Series
    spec: WindowSpec
    anchors: Int64
    offsets: Int64
    _key: Int64 = field(repr=False)
    _glucose: Float32 = field(repr=False)
    _day: Float32 = field(repr=False)

    def __len__(self) -> int:
        return len(self.anchors)

    def by_patient(self) -> list[tuple[int, int]]:
        """For each patient of the series the half-open range of its positions in `anchors` (may be empty)."""
        return [(int(a), int(b)) for a, b in zip(self.offsets[:-1], self.offsets[1:], strict=True)]

    def gather(self, anchors: Int64) -> Batch:
        """Features and targets of windows issued at these rows of the series (values of `anchors`, any order)."""
        rows = np.asarray(anchors, dtype=np.int64)
        owner = np.searchsorted(self.series.starts, rows, side="right") - 1
        value, age_s, last = _carried(self._key, self._glucose, rows, self.series.starts[owner], self.spec)
        y, mask = _targets(self._key, self._glucose, rows, self.spec)
        return Batch(_features(value, age_s, last, self._day[rows]), y, mask, last)


def cut_windows(
    series: Series, spec: WindowSpec, *, need_target: bool = True, allocate: Allocate = np.zeros
) -> Windows:
    """Find every reading at which a forecast may be issued (see WindowSpec).

    With need_target at least one of the 12 targets must be a real reading: right for training and evaluation.
    allocate: gives the arrays as long as the series, from memory or from files; the rest is small.
    """
    count = len(series.time_s)
    key, glucose, day = allocate(count, np.int64), allocate(count, np.float32), allocate((count, 3), np.float32)
    anchors, kept = allocate(count, np.int64), 0
    shift, carried = _shifts(series, spec), np.zeros(2)
    for first, end in _blocks(series.starts):
        begin, stop = int(series.starts[first]), int(series.starts[end])
        rows = slice(begin, stop)
        sizes = np.diff(series.starts[first : end + 1])
        first_row = np.repeat(series.starts[first:end] - begin, sizes)
        key[rows] = series.time_s[rows] + np.repeat(shift[first:end], sizes)
        glucose[rows] = np.clip(series.glucose_mg_dl[rows], SENSOR_MIN_MG_DL, SENSOR_MAX_MG_DL)
        day[rows], carried = _day_before(key[rows], glucose[rows], first_row, carried)
        found = _issued(key[rows], glucose[rows], first_row, spec, need_target=need_target) + begin
        anchors[kept : kept + len(found)] = found
        kept += len(found)
    anchors = anchors[:kept]
    offsets = np.searchsorted(anchors, series.starts).astype(np.int64)
    return Windows(series, spec, anchors, offsets, key, glucose, day)


def _blocks(starts: Int64) -> Iterator[tuple[int, int]]:
    """Half-open ranges of neighbouring patients, each with about _BLOCK_READINGS readings or one patient."""
    first = 0
    while first < len(starts) - 1:
        end = int(np.searchsorted(starts, starts[first] + _BLOCK_READINGS, side="right")) - 1
        end = min(max(end, first + 1), len(starts) - 1)
        yield first, end
        first = end


def _issued(key: Int64, glucose: Float32, first_row: Int64, spec: WindowSpec, *, need_target: bool) -> Int64:
    """Rows of a block of patients at which a forecast may be issued."""
    count = len(key)
    rows = np.arange(count, dtype=np.int64)
    gap = np.full(count, np.iinfo(np.int64).max)
    gap[1:] = np.diff(key)
    good = (rows > first_row) & (gap <= spec.max_last_gap_minutes * 60)
    oldest = np.searchsorted(key, key - spec.history_minutes * 60 - spec.jitter_seconds, side="left")
    oldest = np.maximum(oldest, first_row)
    if count:
        good &= key - key[oldest] >= spec.min_history_minutes * 60 - spec.jitter_seconds
        jumps = np.zeros(count, dtype=np.int64)
        jumps[1:] = np.abs(np.diff(glucose)) > JUMP_MG_DL + JUMP_MG_DL_PER_MIN * np.diff(key) / 60.0
        so_far = np.cumsum(jumps)
        good &= so_far - so_far[oldest] <= spec.max_jumps
    if need_target:
        chosen = rows[good]
        _, mask = _targets(key, glucose, chosen, spec)
        good[chosen] = mask.any(axis=1)
    return rows[good]


def history_features(time_s: Int64, glucose_mg_dl: Float32, spec: WindowSpec) -> tuple[Float32, Float32]:
    """Build for serving: x float32[1,T,F] and last float32[1] for a forecast issued at one patient's newest reading.

    time_s: int64[N], strictly increasing; glucose_mg_dl: float32[N]. Same code, so the same numbers.
    """
    times = np.asarray(time_s, dtype=np.int64)
    if len(times) == 0 or len(times) != len(glucose_mg_dl) or not bool((times[1:] > times[:-1]).all()):
        raise ValueError("need at least one reading, with strictly increasing times")
    glucose = np.asarray(glucose_mg_dl, dtype=np.float32).clip(SENSOR_MIN_MG_DL, SENSOR_MAX_MG_DL)
    row = np.array([len(times) - 1], dtype=np.int64)
    value, age_s, last = _carried(times, glucose, row, np.zeros(1, dtype=np.int64), spec)
    return _features(value, age_s, last, _day_of_last(times, glucose)), last


def _day_of_last(times: Int64, glucose: Float32) -> Float32:
    """float32[1,3]: _day_before of the newest reading alone."""
    oldest = int(times.searchsorted(times[-1] - _DAY_SECONDS, side="right"))
    centred = glucose[oldest:].astype(np.float64) - _LEVEL_CENTRE_MG_DL
    mean = float(centred.sum()) / len(centred)
    variance = max(float(centred @ centred) / len(centred) - mean * mean, 0.0)
    covered = float(times[-1] - times[oldest]) / _DAY_SECONDS
    return np.array([[mean + _LEVEL_CENTRE_MG_DL, math.sqrt(variance), covered]], dtype=np.float32)


def _shifts(series: Series, spec: WindowSpec) -> Int64:
    """int64[P]: added to a patient's times, it makes them increase over all, and no window meets a neighbour."""
    sizes = np.diff(series.starts)
    filled = sizes > 0
    first = np.zeros(len(sizes), dtype=np.int64)
    span = np.zeros(len(sizes), dtype=np.int64)
    first[filled] = series.time_s[series.starts[:-1][filled]]
    span[filled] = series.time_s[series.starts[1:][filled] - 1] - first[filled]
    room = 2 * 60 * (spec.history_minutes + spec.horizon_minutes + spec.grid_minutes)
    return np.asarray(np.concatenate([[0], np.cumsum(span + room)[:-1]]) - first if len(sizes) else first, np.int64)


def _carried(
    key: Int64, glucose: Float32, rows: Int64, first_row: Int64, spec: WindowSpec
) -> tuple[Float32, Float32, Float32]:
    """Last reading known at each grid time: value [B,T] mg/dL, age [B,T] seconds, and the issue reading [B]."""
    back = np.arange(spec.steps - 1, -1, -1, dtype=np.int64) * (spec.grid_minutes * 60)
    grid = key[rows][:, None] - back[None, :]
    asked = grid + np.where(back > 0, spec.jitter_seconds, 0)[None, :]
    index = np.searchsorted(key, asked.ravel(), side="right").reshape(asked.shape) - 1
    last = glucose[rows]
    known = index >= first_row[:, None]
    index = np.maximum(index, first_row[:, None])
    age = np.maximum(grid - key[index], 0)
    cap = spec.max_carry_minutes * 60
    known &= age <= cap
    value = np.where(known, glucose[index], last[:, None])
    return value.astype(np.float32), np.where(known, age, cap).astype(np.float32), last


def _day_before(
    key: Int64, glucose: Float32, first_row: Int64, carried: npt.NDArray[np.float64]
) -> tuple[Float32, npt.NDArray[np.float64]]:
    """float32[N,3] for each reading of a block, and the sums to carry to the next: any blocks give the same bits.

    Mean and standard deviation (mg/dL) of the readings of the 24 hours up to and including it, and the share
    of those 24 hours that they span. It tells what kind of person this is.
    """
    if not len(key):
        return np.zeros((0, 3), dtype=np.float32), carried
    rows = np.arange(len(key))
    oldest = np.maximum(np.searchsorted(key, key - _DAY_SECONDS, side="right"), first_row)
    centred = glucose.astype(np.float64) - _LEVEL_CENTRE_MG_DL
    total = np.cumsum(np.concatenate([carried[:1], centred]))
    square = np.cumsum(np.concatenate([carried[1:], centred * centred]))
    count = rows + 1 - oldest
    mean = (total[rows + 1] - total[oldest]) / count
    variance = np.maximum((square[rows + 1] - square[oldest]) / count - mean * mean, 0.0)
    covered = (key - key[oldest]) / _DAY_SECONDS
    day = np.stack([mean + _LEVEL_CENTRE_MG_DL, np.sqrt(variance), covered], axis=1).astype(np.float32)
    return day, np.array([total[-1], square[-1]])


def _features(value: Float32, age_s: Float32, last: Float32, day: Float32) -> Float32:
    """float32[B,T,F] from carried values, ages and the day before; see FEATURES."""
    x = np.empty((*value.shape, len(FEATURES)), dtype=np.float32)
    x[..., 0] = (value - last[:, None]) / _CHANGE_SCALE_MG_DL
    x[..., 1] = (value - _LEVEL_CENTRE_MG_DL) / _LEVEL_SCALE_MG_DL
    x[:, 0, 2] = 0.0
    x[:, 1:, 2] = np.diff(value, axis=1) / _STEP_SCALE_MG_DL
    x[..., 3] = age_s / (60.0 * _AGE_SCALE_MINUTES)
    x[..., 4] = ((day[:, 0] - _LEVEL_CENTRE_MG_DL) / _LEVEL_SCALE_MG_DL)[:, None]
    x[..., 5] = (day[:, 1] / SPREAD_SCALE_MG_DL)[:, None]
    x[..., 6] = day[:, 2][:, None]
    return x


def shifted_levels(x: Float32, factor: Float32, shift_mg_dl: Float32, noise_mg_dl: Float32) -> tuple[Float32, Float32]:
    """Move windows to another glucose range: every v becomes factor x v + shift, plus noise, within the sensor's range.

    x: float32[B,T,F]; factor and shift_mg_dl: float32[B]; noise_mg_dl: float32[B,T]. Returns new x and new
    last readings [B].
    """
    by, move = factor[:, None], shift_mg_dl[:, None]
    level = x[..., 1] * _LEVEL_SCALE_MG_DL + _LEVEL_CENTRE_MG_DL
    value = np.clip(level * by + move + noise_mg_dl, SENSOR_MIN_MG_DL, SENSOR_MAX_MG_DL).astype(np.float32)
    last = value[:, -1].copy()
    day_mean = (x[:, 0, 4] * _LEVEL_SCALE_MG_DL + _LEVEL_CENTRE_MG_DL) * factor + shift_mg_dl
    day = np.stack([day_mean, x[:, 0, 5] * SPREAD_SCALE_MG_DL * factor, x[:, 0, 6]], axis=1)
    return _features(value, x[..., 3] * (60.0 * _AGE_SCALE_MINUTES), last, day), last


def _targets(key: Int64, glucose: Float32, rows: Int64, spec: WindowSpec) -> tuple[Float32, Bool]:
    """Nearest real reading within the tolerance of each t0 + h: y float32[B,12] (0 where absent), mask bool[B,12].

    Only readings after the issue reading count; those of other patients are further than any horizon.
    """
    ahead = np.asarray(spec.horizons_minutes, dtype=np.int64) * 60
    asked = key[rows][:, None] + ahead[None, :]
    after = np.searchsorted(key, asked.ravel(), side="left").reshape(asked.shape)
    before = np.maximum(after - 1, 0)
    after = np.minimum(after, max(len(key) - 1, 0))
    nearer = np.abs(key[after] - asked) < np.abs(asked - key[before])
    index = np.where(nearer, after, before)
    mask = (np.abs(key[index] - asked) <= spec.target_tolerance_seconds) & (index > rows[:, None])
    return np.where(mask, glucose[index], np.float32(0.0)).astype(np.float32), mask
