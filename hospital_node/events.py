"""Doses, rates and heart rate beside glucose: in its rows, in rows of their own, or in files of their own."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from data_schemas.layout import Channel, Layout
from hospital_node.export_files import outer, read_files, refuse_if_changed
from hospital_node.rows import Raw, pseudonyms, read_raw, stamps_of

# An event without a reading in the half hour after it belongs to a time the sensor did not see.
_REACH = pd.Timedelta(minutes=30)
_SUMMED = ("carbs_g", "bolus_u")


@dataclass(frozen=True)
class Elsewhere:
    """Where files of channels lie and how to read them; what was read stays for the other parts of the import."""

    folder: Path
    layout: Layout
    zone: str | None
    key: bytes

    @cached_property
    def events(self) -> dict[int, pd.DataFrame]:
        """Events of the channels with files of their own, by the channel's number. Raises BadInput."""
        return {n: _read_events(c, self) for n, c in enumerate(self.layout.channels) if c.files is not None}


def add_channels(frame: pd.DataFrame, readings: Raw, others: Raw, elsewhere: Elsewhere) -> None:
    """Fill the channel columns of `frame` (rows as in `readings`).

    others: rows of the same files that are no readings.
    """
    layout = elsewhere.layout
    inside = [channel for channel in layout.channels if channel.files is None]
    timed = _timed(others, elsewhere) if inside and len(others.file) else None
    for number, channel in enumerate(inside):
        _put(frame, channel, readings.table[f"c{number}"])
        if timed is not None:
            _put(frame, channel, _attach(frame, _events(timed, others.table[f"c{number}"], channel), channel.name))
    people = set(frame["patient"].unique())
    for number, events in elsewhere.events.items():
        channel = layout.channels[number]
        _put(frame, channel, _attach(frame, events[events["patient"].isin(people)], channel.name))


def _put(frame: pd.DataFrame, channel: Channel, value: pd.Series) -> None:
    """Add to what the column has: doses add up, a rate stands unless the new one has a value."""
    old = frame[channel.name]
    frame[channel.name] = old.add(value, fill_value=0) if channel.name in _SUMMED else value.fillna(old)


def _timed(raw: Raw, elsewhere: Elsewhere) -> pd.DataFrame:
    """Return patient and UTC time of rows that carry a channel; the others need neither to be readable."""
    quantity = [name for name in raw.table.columns if name[0] == "c" and name[1:].isdigit()]
    filled = raw.table[quantity].notna().any(axis=1).to_numpy()
    timed = pd.DataFrame({"patient": pd.Series(np.nan, index=raw.table.index, dtype="str")})
    timed["measured_at"] = pd.Series(pd.NaT, index=raw.table.index, dtype="datetime64[s, UTC]")
    if filled.any():
        carrying = raw.where(filled)
        at = stamps_of(carrying, elsewhere.layout, elsewhere.zone).measured_at
        timed.loc[filled, "patient"] = pseudonyms(carrying, elsewhere.layout, elsewhere.key).to_numpy()
        timed.loc[filled, "measured_at"] = at.set_axis(timed.index[filled])
    return timed


def _events(timed: pd.DataFrame, value: pd.Series, channel: Channel) -> pd.DataFrame:
    events = timed.assign(value=value).dropna()
    return events.drop_duplicates() if channel.distinct else events


def _read_events(channel: Channel, elsewhere: Elsewhere) -> pd.DataFrame:
    """Return patient, measured_at and value of the events in the channel's own files; without files there are none."""
    pattern = channel.files or ""
    there = any(elsewhere.folder.glob(outer(pattern)))
    files = read_files(elsewhere.folder, pattern) if there else ()
    if not files:
        return pd.DataFrame({"patient": [], "measured_at": [], "value": []})
    own = channel.model_copy(update={"files": None, "time_columns": ()})
    raw = read_raw(files, elsewhere.layout, (own,), channel.time_columns, glucose=False)
    events = _events(_timed(raw, elsewhere), raw.table["c0"], channel)
    refuse_if_changed(files)
    return events


def _attach(frame: pd.DataFrame, events: pd.DataFrame, name: str) -> pd.Series:
    """Return per reading the events since the one before it, summed (doses) or the last (rates); none after it."""
    absent = pd.Series(np.nan, index=frame.index)
    if events.empty:
        return absent
    timed = frame[["patient", "measured_at", "row"]].dropna().sort_values(["measured_at", "row"])
    order = events.sort_values("measured_at", kind="stable").astype({"patient": timed["patient"].dtype})
    met = pd.merge_asof(order, timed, on="measured_at", by="patient", direction="forward", tolerance=_REACH).dropna(
        subset="row"
    )
    grouped = met.groupby(met["row"].astype(np.int64))["value"]
    values = grouped.sum() if name in _SUMMED else grouped.last()
    return absent.fillna(values)
