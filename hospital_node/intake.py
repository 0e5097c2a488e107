"""Intake: the files of one export become one table of canonical readings, or a refusal that changes nothing.

The identity of the source lives in this module's local variables only: what leaves it is a keyed hash.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pandas as pd

from data_schemas.errors import BadInput
from data_schemas.layout import Channel, GlucoseColumn, Interpolation, Layout
from data_schemas.reading import COLUMNS, Flag, Readings
from data_schemas.units import MG_DL_PER_MMOL_L, SENSOR_MAX_MG_DL, SENSOR_MIN_MG_DL
from hospital_node.export_files import ExportFile, header_of, read_columns, read_files, refuse_if_changed
from hospital_node.stamps import Stamps, read_stamps, zone_of

Bool: TypeAlias = npt.NDArray[np.bool_]
Int: TypeAlias = npt.NDArray[np.int64]

KEY_BYTES = 32
# The median of anybody's day lies far above 35 mg/dL and far below 35 mmol/L.
_UNIT_BORDER = 35.0
# An event without a reading in the half hour after it belongs to a time the sensor did not see.
_EVENT_REACH = pd.Timedelta(minutes=30)
_SUMMED = ("carbs_g", "bolus_u")


@dataclass(frozen=True, slots=True)
class _Raw:
    """Text columns of many files, one under the other; file: int64 number of each row's file."""

    table: pd.DataFrame
    file: Int
    files: tuple[ExportFile, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(file.label for file in self.files)


def read_exports(folder: Path, layout: Layout, zone: str | None, pseudonym_key: bytes) -> Readings:
    """Return every reading of the export in `folder`, in canonical columns (COLUMNS), in file and line order.

    zone: IANA name from the node's settings; None takes the layout's. pseudonym_key: 32 secret bytes of this node.
    Values that do not parse stay as rows without a value (Flag.UNREADABLE) or without a time; validation
    quarantines them. Raises BadInput for a missing column, an empty or truncated file, an ambiguous or
    contradicted date order or unit, an unknown zone, and a file that changed meanwhile.
    """
    if len(pseudonym_key) < KEY_BYTES:
        raise BadInput("the pseudonym key is too short", f"give {KEY_BYTES} random bytes, kept at this node for ever")
    zone_name = zone or layout.zone
    if zone_name is not None:
        zone_of(zone_name)
    raw = _read_glucose_tables(folder, layout)
    stamps = read_stamps(raw.table["time"], raw.file, raw.labels, layout.time, zone_name)
    glucose, flags = _glucose(raw, layout.glucose)
    if layout.interpolation is not None:
        made = _interpolated(raw.table["glucose"], stamps.local, raw.file, layout.interpolation)
        flags = flags | np.where(made, int(Flag.INTERPOLATED), 0)
    flags = flags | np.where(stamps.clock_change, int(Flag.CLOCK_CHANGE), 0)
    frame = _frame(raw, stamps, glucose, flags, zone_name or "UTC")
    frame["patient"] = _pseudonyms(raw, layout, pseudonym_key)
    read = raw.files
    for channel in layout.channels:
        if channel.files is None:
            frame[channel.name] = _quantity(raw.table, channel)
        else:
            events = _read_events(folder, layout, channel, zone_name, pseudonym_key)
            frame[channel.name] = _attach(frame, events, channel.name)
            read += events.files
    refuse_if_changed(read)
    return Readings(frame[list(COLUMNS)].astype(COLUMNS), len(frame))


def pseudonym(identity: str, key: bytes) -> str:
    """Return the keyed hash of a source's identity: HMAC-SHA256 (RFC 2104), first 16 hex digits.

    Without the key it cannot be redone.
    """
    return hmac.new(key, identity.encode(), hashlib.sha256).hexdigest()[:16]


def _read_glucose_tables(folder: Path, layout: Layout) -> _Raw:
    files = read_files(folder, layout.glucose_files)
    tables = []
    for file in files:
        header = header_of(file, layout.delimiter, layout.encoding)
        at = {"time": _find(file, header, layout.time.columns), "glucose": _find(file, header, layout.glucose.columns)}
        if layout.identity.columns:
            at["identity"] = _find(file, header, layout.identity.columns)
        for channel in layout.channels:
            present = [name for name in channel.columns if name in header]
            if channel.files is None and present:
                at[channel.name] = header.index(present[0])
        table = read_columns(file, layout.delimiter, layout.encoding, at)
        unit = layout.glucose.header_units.get(header[at["glucose"]], layout.glucose.unit)
        table["unit"] = unit
        tables.append(table)
    return _stack(files, tables)


def _stack(files: tuple[ExportFile, ...], tables: list[pd.DataFrame]) -> _Raw:
    numbers = np.repeat(np.arange(len(tables), dtype=np.int64), [len(table) for table in tables])
    return _Raw(pd.concat(tables, ignore_index=True), numbers, files)


def _find(file: ExportFile, header: tuple[str, ...], names: tuple[str, ...]) -> int:
    for name in names:
        if name in header:
            return header.index(name)
    raise BadInput(
        f"{file.label} has no column {' or '.join(repr(name) for name in names)}; "
        f"its columns are {', '.join(repr(name) for name in header[:20])}",
        "choose the layout of this export, or add the column's name to the layout's aliases",
    )


def _glucose(raw: _Raw, column: GlucoseColumn) -> tuple[npt.NDArray[np.float64], Int]:
    """mg/dL (nan: none) and flags of every row. Raises BadInput when a file's values contradict its unit."""
    text = raw.table["glucose"].str.strip()
    value = pd.to_numeric(text, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    mmol = (raw.table["unit"] == "mmol/L").to_numpy()
    _refuse_wrong_unit(value, mmol, raw)
    value = np.where(mmol, value * MG_DL_PER_MMOL_L, value)
    folded = text.str.casefold()
    low = folded.isin([word.casefold() for word in column.low_words]).to_numpy()
    high = folded.isin([word.casefold() for word in column.high_words]).to_numpy()
    value = np.select([low, high], [SENSOR_MIN_MG_DL, SENSOR_MAX_MG_DL], value)
    unreadable = np.isnan(value) & text.notna().to_numpy()
    flags = np.select([low, high, unreadable], [Flag.CENSORED_LOW, Flag.CENSORED_HIGH, Flag.UNREADABLE], 0)
    return value, flags.astype(np.int64)


def _refuse_wrong_unit(value: npt.NDArray[np.float64], mmol: Bool, raw: _Raw) -> None:
    median = pd.Series(value).groupby(raw.file).median()
    declared = pd.Series(mmol).groupby(raw.file).first()
    for wrong, unit, other in (
        (~declared & (median < _UNIT_BORDER), "mg/dL", "mmol/L"),
        (declared & (median > _UNIT_BORDER), "mmol/L", "mg/dL"),
    ):
        if wrong.any():
            raise BadInput(
                f"{raw.labels[int(np.argmax(wrong.to_numpy()))]}: declared as {unit}, but its values look like {other}",
                f"set the unit in the layout to {other}, or check the export's own unit setting",
            )


def _interpolated(text: pd.Series, local: pd.Series, file: Int, rule: Interpolation) -> Bool:
    """Return which rows the source's authors made (see data_schemas.layout.Interpolation)."""
    value = pd.to_numeric(text, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    second = local.to_numpy().astype("datetime64[s]").astype(np.int64)
    whole = np.abs(value - np.round(value)) < 1e-6
    between = second % (rule.sensor_minutes * 60) != 0
    dense = pd.Series(whole & between).groupby(file).sum() > rule.dense_share * pd.Series(between).groupby(file).sum()
    own = whole & (~between | dense.to_numpy()[file])
    return np.asarray(~own | _filled_line(value, second, file, rule.straight_minutes * 60), dtype=np.bool_)


def _filled_line(value: npt.NDArray[np.float64], second: Int, file: Int, shortest_s: int) -> Bool:
    """Return the rows strictly inside an exact straight line over evenly spaced rows that lasts shortest_s or more.

    A line at an end of the sensor's range is not a filled gap: there a sensor repeats itself.
    """
    step = np.diff(second)
    straight = np.zeros(len(value), dtype=np.bool_)
    even = (step[1:] == step[:-1]) & (file[2:] == file[:-2])
    straight[1:-1] = even & (np.abs(value[2:] - 2 * value[1:-1] + value[:-2]) < 1e-6)
    straight &= (value > SENSOR_MIN_MG_DL) & (value < SENSOR_MAX_MG_DL)
    run = np.cumsum(~straight)
    rows_inside = np.bincount(run[straight], minlength=len(value) + 1)[run]
    step_s = np.append(step, 0)
    return np.asarray(straight & ((rows_inside + 1) * step_s >= shortest_s), dtype=np.bool_)


def _frame(raw: _Raw, stamps: Stamps, glucose: npt.NDArray[np.float64], flags: Int, zone: str) -> pd.DataFrame:
    hashes = np.array([file.sha256 for file in raw.files], dtype=object)
    frame = pd.DataFrame(
        {
            "row": np.arange(len(raw.table), dtype=np.int64),
            "measured_at": stamps.measured_at,
            "zone": zone,
            "glucose_mg_dl": glucose,
            "flags": flags,
            "source": hashes[raw.file],
        }
    )
    for name in ("carbs_g", "bolus_u", "basal_u_per_h", "heart_rate"):
        frame[name] = np.nan
    return frame


def _pseudonyms(raw: _Raw, layout: Layout, key: bytes) -> npt.NDArray[np.object_]:
    if layout.identity.columns:
        identity = raw.table["identity"].str.strip()
        if identity.isna().any():
            row = int(np.argmax(identity.isna().to_numpy()))
            raise BadInput(
                f"{raw.labels[raw.file[row]]} has a row without a patient", "every row needs its patient's identity"
            )
        codes, names = pd.factorize(identity)
        return np.array([pseudonym(str(name), key) for name in names], dtype=object)[codes]
    # Files that are the same byte for byte are one person's, whatever their names say: counted twice, that person would
    # have twice the influence that the privacy statement allows for one.
    first = {file.sha256: _named(file, layout) for file in reversed(raw.files)}
    return np.array([pseudonym(first[file.sha256], key) for file in raw.files], dtype=object)[raw.file]


def _named(file: ExportFile, layout: Layout) -> str:
    pattern = layout.identity.file_pattern or ""
    found = re.search(pattern, file.path.name)
    if found is None:
        raise BadInput(
            f"the name of {file.label} does not tell the patient",
            f"keep the source's file names: the layout expects {pattern}",
        )
    return found["patient"]


def _quantity(table: pd.DataFrame, channel: Channel) -> npt.NDArray[np.float64]:
    """Return the channel's values in its unit; nan where absent, unreadable or negative (a dose is never negative)."""
    if channel.name not in table.columns:
        return np.full(len(table), np.nan)
    value = pd.to_numeric(table[channel.name], errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    return np.where(value >= 0, value * channel.factor, np.nan)


@dataclass(frozen=True, slots=True)
class _Events:
    """Events of one channel: patient, measured_at (UTC), value; without rows that have none of them."""

    frame: pd.DataFrame
    files: tuple[ExportFile, ...]


def _read_events(folder: Path, layout: Layout, channel: Channel, zone: str | None, key: bytes) -> _Events:
    if not any(folder.glob(channel.files or "")):
        return _Events(pd.DataFrame({"patient": [], "measured_at": [], "value": []}), ())
    files = read_files(folder, channel.files or "")
    tables = []
    for file in files:
        header = header_of(file, layout.delimiter, layout.encoding)
        at = {"time": _find(file, header, channel.time_columns), channel.name: _find(file, header, channel.columns)}
        at |= {f"only:{name}": _find(file, header, (name,)) for name in channel.only}
        tables.append(read_columns(file, layout.delimiter, layout.encoding, at))
    raw = _stack(files, tables)
    stamps = read_stamps(raw.table["time"], raw.file, raw.labels, layout.time, zone)
    frame = pd.DataFrame(
        {
            "patient": _pseudonyms(raw, layout, key),
            "measured_at": stamps.measured_at,
            "value": _quantity(raw.table, channel),
        }
    )
    counts = np.ones(len(frame), dtype=np.bool_)
    for name, wanted in channel.only.items():
        counts &= (raw.table[f"only:{name}"].str.strip() == wanted).to_numpy()
    return _Events(frame[counts].dropna(), files)


def _attach(frame: pd.DataFrame, events: _Events, name: str) -> pd.Series:
    """Return per reading the events since the one before it, summed (doses) or the last (rates); none after it."""
    absent = pd.Series(np.nan, index=frame.index)
    if events.frame.empty:
        return absent
    timed = frame[["patient", "measured_at", "row"]].dropna().sort_values(["measured_at", "row"])
    order = events.frame.sort_values("measured_at", kind="stable").astype({"patient": timed["patient"].dtype})
    met = pd.merge_asof(
        order, timed, on="measured_at", by="patient", direction="forward", tolerance=_EVENT_REACH
    ).dropna(subset="row")
    grouped = met.groupby(met["row"].astype(np.int64))["value"]
    values = grouped.sum() if name in _SUMMED else grouped.last()
    return absent.fillna(values)
