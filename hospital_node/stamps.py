"""Time stamps of an export: text to local wall clock to UTC, by declaration and never by guess."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import TypeAlias
from zoneinfo import ZoneInfo

import numpy as np
import numpy.typing as npt
import pandas as pd

from data_schemas.errors import BadInput
from data_schemas.layout import Times
from hospital_node.fixed_stamps import read_fixed

Bool: TypeAlias = npt.NDArray[np.bool_]
Int: TypeAlias = npt.NDArray[np.int64]

_DAY_S = 86_400
_EPOCH_S = {"epoch_ms": 1e-3, "epoch_s": 1.0}
# The end of the year 9999.
_LAST_S = 253_402_300_799
_SHARE_REFUSED = 0.5
_AMBIGUOUS = "the date order is ambiguous: no stamp has a day above 12"
_ORDER_HINT = "name the order: in the layout, give `formats` as day first (%d/%m/%Y) or month first (%m/%d/%Y)"


@dataclass(frozen=True, slots=True)
class Stamps:
    """Per row: UTC time (NaT: none), local wall clock (NaT: unreadable, or had an offset), clock-change mark."""

    measured_at: pd.Series
    local: pd.Series
    clock_change: Bool


@dataclass(frozen=True, slots=True)
class Counter:
    """Per row: seconds that no clock change touches (nan: none), and the device that counts them."""

    second: npt.NDArray[np.float64]
    device: pd.Series


def zone_of(name: str | None) -> ZoneInfo:
    """Return the IANA zone. Raises BadInput when there is none or it is unknown: a zone is never guessed."""
    hint = "set the node's zone to an IANA name such as Europe/London"
    if not name:
        raise BadInput("the time zone of the export is not known", hint)
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        raise BadInput(f"{name!r} is not a time zone", hint) from None


def read_stamps(
    text: pd.Series,
    files: Int,
    labels: tuple[str, ...],
    times: Times,
    zone: str | None,
    counter: Counter | None = None,
    whose: Int | None = None,
) -> Stamps:
    """Return UTC times of the stamps in `text`.

    files: each row's file number; labels: what the files are called in errors; whose: a number for each person of
    each file (None: a file is one person's). Raises BadInput when the date order is
    ambiguous or contradicted by the data, when most of a file's stamps do not fit the formats, and when a zone is
    needed and none is given. A stamp that does not parse is NaT, and so is one that a clock change skipped or
    repeated (marked).
    """
    text = text.str.strip()
    if times.clock_only:
        local, absolute = _count_days(text, files, labels, times), _nothing(text)
    else:
        local, absolute = _parse(text, files, labels, times)
    _refuse_unreadable((local.isna() & absolute.isna()).to_numpy(), files, labels, times)
    if not local.notna().any():
        return Stamps(absolute, local, np.zeros(len(text), dtype=np.bool_))
    measured_at, clock_change = to_utc(local, files if whose is None else whose, zone_of(zone), counter)
    return Stamps(measured_at.where(absolute.isna(), absolute), local, clock_change)


def to_utc(local: pd.Series, whose: Int, zone: ZoneInfo, counter: Counter | None = None) -> tuple[pd.Series, Bool]:
    """Return UTC times of local wall-clock times and the mask of those that a clock change leaves without one.

    whose: a number for each person of each file. A time that did not exist has none. A repeated hour is settled by
    order where that is exact: within one person's rows of a file the clock goes back once, by 30 minutes or more,
    inside the hour; rows before are summer time, rows after standard time. In a file that runs backwards the first rows
    are standard time. A device's counter settles what order does not.
    """
    settled = local.dt.tz_localize(zone, ambiguous="NaT", nonexistent="NaT")
    exists = local.dt.tz_localize(zone, ambiguous=np.ones(len(local), dtype=np.bool_), nonexistent="NaT")
    repeated = (settled.isna() & exists.notna()).to_numpy()
    if repeated.any():
        summer, known = _by_order(local, whose, repeated)
        if counter is not None:
            told, summer_told = _by_counter(local, settled, repeated, counter)
            summer, known = np.where(told, summer_told, summer), known | told
        chosen = local.dt.tz_localize(zone, ambiguous=summer, nonexistent="NaT")
        settled = settled.where(~(repeated & known), chosen)
    clock_change = (settled.isna() & local.notna()).to_numpy()
    return settled.dt.tz_convert("UTC").astype("datetime64[s, UTC]"), clock_change


def _by_order(local: pd.Series, whose: Int, repeated: Bool) -> tuple[Bool, Bool]:
    """Return, for repeated wall-clock times, whether each is summer time, and whether its person's order tells."""
    summer, known = np.zeros(len(local), dtype=np.bool_), np.zeros(len(local), dtype=np.bool_)
    rows = np.flatnonzero(repeated)
    seconds = _epoch_s(local)[rows]
    nights = pd.DataFrame({"whose": whose[rows], "day": seconds // _DAY_S, "at": np.arange(len(rows))})
    for _, night in nights.groupby(["whose", "day"], sort=False):
        at = night["at"].to_numpy()
        sign = _direction(local, whose, night["whose"].iloc[0])
        back = np.flatnonzero(sign * np.diff(seconds[at]) < 0)
        if len(back) == 1 and abs(seconds[at[back[0]]] - seconds[at[back[0] + 1]]) >= 1800:
            known[rows[at]] = True
            summer[rows[at[: back[0] + 1] if sign > 0 else at[back[0] + 1 :]]] = True
    return summer, known


def _direction(local: pd.Series, whose: Int, number: int) -> int:
    """Return 1 when most of a person's steps go forwards in time, else -1: a file that has its newest row first."""
    steps = np.diff(_epoch_s(local[(whose == number) & local.notna().to_numpy()]))
    return 1 if (steps > 0).sum() >= (steps < 0).sum() else -1


def _by_counter(local: pd.Series, settled: pd.Series, repeated: Bool, counter: Counter) -> tuple[Bool, Bool]:
    """Return, for repeated wall-clock times, whether the device's counter tells, and whether it is summer time.

    Compared with the device's nearest settled row by counter, at most a day away: the two hours that a time may mean
    lie 3600 s apart, so one within 600 s of the counter's is meant.
    """
    told, summer = np.zeros(len(local), dtype=np.bool_), np.zeros(len(local), dtype=np.bool_)
    usable = ~np.isnan(counter.second) & counter.device.notna().to_numpy()
    utc = _epoch_s(settled.dt.tz_convert("UTC").dt.tz_localize(None))
    fixed = usable & settled.notna().to_numpy()
    zone = settled.dt.tz
    for device in set(counter.device[repeated & usable]):
        mine = (counter.device == device).to_numpy()
        known, open_rows = np.flatnonzero(mine & fixed), np.flatnonzero(mine & repeated & usable)
        if not len(known):
            continue
        known = known[np.argsort(counter.second[known], kind="stable")]
        ticks = counter.second[known]
        after = np.clip(np.searchsorted(ticks, counter.second[open_rows]), 1 if len(known) > 1 else 0, len(known) - 1)
        before = np.maximum(after - 1, 0)
        gap = counter.second[open_rows]
        near = np.where(np.abs(ticks[before] - gap) <= np.abs(ticks[after] - gap), before, after)
        expected = utc[known[near]] + (gap - ticks[near])
        chosen = local.iloc[open_rows].dt.tz_localize(zone, ambiguous=np.ones(len(open_rows), dtype=np.bool_))
        first = _epoch_s(chosen.dt.tz_convert("UTC").dt.tz_localize(None))
        close = np.abs(ticks[near] - gap) <= _DAY_S
        is_summer, is_standard = np.abs(expected - first) <= 600, np.abs(expected - first - 3600) <= 600
        told[open_rows] = close & (is_summer != is_standard)
        summer[open_rows] = is_summer
    return told, summer


def _nothing(text: pd.Series) -> pd.Series:
    return pd.Series(pd.NaT, index=text.index, dtype="datetime64[s, UTC]")


def _strptime(text: pd.Series, form: str) -> pd.Series:
    if form in _EPOCH_S:
        second = pd.to_numeric(text, errors="coerce") * _EPOCH_S[form]
        return pd.to_datetime(second.where(second.between(0, _LAST_S)), unit="s").astype("datetime64[s]")
    read = pd.Series(read_fixed(text, form), index=text.index)
    odd = (read.isna() & text.notna()).to_numpy()
    if odd.any():
        read[odd] = pd.to_datetime(text[odd], format=form, errors="coerce").astype("datetime64[s]")
    return read


def _moments(text: pd.Series, form: str) -> pd.Series:
    """Return UTC times of stamps with an offset, by a form that ends in %z."""
    read: pd.Series = pd.Series(read_fixed(text, form.removesuffix("%z") + "Z"), index=text.index).dt.tz_localize("UTC")
    plain = ~np.isnat(read_fixed(text, form.removesuffix("%z")))
    odd = (read.isna() & text.notna()).to_numpy() & ~plain
    if odd.any():
        moments = pd.to_datetime(text[odd], format=form, errors="coerce", utc=True)
        read[odd] = moments.astype("datetime64[s, UTC]")
    return read


def _parse(text: pd.Series, files: Int, labels: tuple[str, ...], times: Times) -> tuple[pd.Series, pd.Series]:
    """Return local times and, for stamps with an offset, UTC times; NaT where neither."""
    local, absolute = pd.Series(pd.NaT, index=text.index, dtype="datetime64[s]"), _nothing(text)
    if times.order != "declared":
        return _settled(text, files, labels, times), absolute
    for form in times.formats:
        left = (local.isna() & absolute.isna() & text.notna()).to_numpy()
        if not left.any():
            break
        if form.endswith("%z"):
            absolute[left] = _moments(text[left], form)
        elif form in _EPOCH_S:
            absolute[left] = _strptime(text[left], form).dt.tz_localize("UTC")
        else:
            local[left] = _strptime(text[left], form)
            _refuse_other_order(text[left], local[left], files[left], labels, form)
    return local, absolute


def _settled(text: pd.Series, files: Int, labels: tuple[str, ...], times: Times) -> pd.Series:
    """Return local times by the one format that fits the export, or else by the one that fits each file."""
    forms = times.formats
    whole = list(_fitting(text, forms).values()) if times.order == "auto" else []
    if whole:
        return _only_reading(whole, _AMBIGUOUS)
    local = pd.Series(pd.NaT, index=text.index, dtype="datetime64[s]")
    for number in np.unique(files):
        mine = files == number
        readings = list(_fitting(text[mine], forms).values())
        if not readings:
            raise BadInput(
                f"{labels[number]}: no format of the layout fits every time stamp (tried {', '.join(forms)})",
                _ORDER_HINT,
            )
        local[mine] = _only_reading(readings, f"{labels[number]}: {_AMBIGUOUS}")
    return local


@dataclass(frozen=True, slots=True)
class OrderVote:
    """Of one file: the formats that fit all its stamps, and the pairs of them that read some stamp differently."""

    formats: frozenset[str]
    disagree: frozenset[tuple[str, str]]


def order_vote(text: pd.Series, times: Times) -> OrderVote:
    """Return what the stamps of one file say about the order of day and month."""
    found = _fitting(text.str.strip(), times.formats)
    pairs = [(one, other) for one in found for other in found if one < other]
    return OrderVote(frozenset(found), frozenset(pair for pair in pairs if not found[pair[0]].equals(found[pair[1]])))


def order_of_all(votes: Sequence[OrderVote], times: Times) -> Times:
    """Return the times with the one format that fits the export, or else with each file to be settled by itself.

    Raises BadInput when several formats fit the export and disagree.
    """
    fitting = frozenset.intersection(*(vote.formats for vote in votes))
    if any(fitting.issuperset(pair) for vote in votes for pair in vote.disagree):
        raise BadInput(_AMBIGUOUS, _ORDER_HINT)
    if fitting:
        return times.model_copy(update={"formats": (next(form for form in times.formats if form in fitting),)})
    return times.model_copy(update={"order": "file"})


def _fitting(text: pd.Series, forms: tuple[str, ...]) -> dict[str, pd.Series]:
    """Return the stamps as each format reads them that fits them all; missing stamps fit any."""
    missing = text.isna()
    probe = text.dropna().iloc[:1]
    likely = [form for form in forms if _strptime(probe, form).notna().all()]
    return {form: read for form in likely if ((read := _strptime(text, form)).notna() | missing).all()}


def _only_reading(readings: list[pd.Series], ambiguous: str) -> pd.Series:
    """Return what several formats agree on; a format under which the days scatter is none."""
    if any(not other.equals(readings[0]) for other in readings[1:]):
        raise BadInput(ambiguous, _ORDER_HINT)
    return readings[0]


def _refuse_other_order(text: pd.Series, local: pd.Series, files: Int, labels: tuple[str, ...], form: str) -> None:
    """Refuse a file whose stamps make sense only with day and month the other way round."""
    if not form.startswith(("%d", "%m")):
        return
    swapped = _strptime(text, form.translate(str.maketrans("dm", "md")))
    for number in np.unique(files):
        mine = files == number
        declared, other = local[mine], swapped[mine]
        lost, lost_other = declared.isna().mean(), other.isna().mean()
        jumps = _widest_step_days(declared) >= 20 and _widest_step_days(other) < 2
        if (lost > 0.05 and lost_other < 0.05) or (lost == lost_other == 0 and jumps):
            raise BadInput(f"{labels[number]}: its dates do not fit the declared order {form}", _ORDER_HINT)


def _refuse_unreadable(lost: Bool, files: Int, labels: tuple[str, ...], times: Times) -> None:
    share = np.bincount(files, weights=lost, minlength=len(labels)) / np.maximum(
        np.bincount(files, minlength=len(labels)), 1
    )
    worst = int(np.argmax(share))
    if share[worst] > _SHARE_REFUSED:
        raise BadInput(
            f"{labels[worst]}: {share[worst]:.0%} of its time stamps fit none of {', '.join(times.formats)}",
            "check that the layout is the one of this export, and its time formats",
        )


def _count_days(text: pd.Series, files: Int, labels: tuple[str, ...], times: Times) -> pd.Series:
    """Return local times of clock-only stamps: each time the clock goes back within a file, a day has passed."""
    clock = pd.Series(pd.NaT, index=text.index, dtype="datetime64[s]")
    for form in times.formats:
        clock = clock.fillna(_strptime(text, form))
    second = pd.Series(_epoch_s(clock) % _DAY_S, index=text.index).where(clock.notna())
    back = second.ffill().groupby(files).diff().fillna(0.0)
    doubtful = (back < 0) & (back > -_DAY_S / 2)
    if doubtful.any():
        raise BadInput(
            f"{labels[files[int(np.argmax(doubtful.to_numpy()))]]}: the clock goes back by less than half a day",
            "a layout without dates needs rows in time order; export the file with dates if you can",
        )
    days = (back < 0).groupby(files).cumsum()
    origin = pd.Timestamp(times.origin_date or date(1970, 1, 1))
    return (origin + pd.to_timedelta(days * _DAY_S + second, unit="s")).astype("datetime64[s]")


def _widest_step_days(local: pd.Series) -> float:
    seconds = np.sort(_epoch_s(local.dropna()))
    return float(np.diff(seconds).max() / _DAY_S) if len(seconds) > 1 else 0.0


def _epoch_s(local: pd.Series) -> Int:
    return local.to_numpy().astype("datetime64[s]").astype(np.int64)
