"""Rows of an export: the columns that a layout names, taken from files of any reader, and whose rows they are.

The identity of the source lives in this module's local variables only: what leaves it is a keyed hash.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pandas as pd

from data_schemas.errors import BadInput
from data_schemas.layout import Channel, Layout, Only
from hospital_node.delimited import Wanted
from hospital_node.export_files import ExportFile, text_of
from hospital_node.records import read_table
from hospital_node.stamps import Counter, Stamps, read_stamps

Bool: TypeAlias = npt.NDArray[np.bool_]
Int: TypeAlias = npt.NDArray[np.int64]

# Where a preamble can be, in characters.
_HEAD = 20_000


@dataclass(frozen=True, slots=True)
class Raw:
    """Rows of many files, one under the other; file: int64 number of each row's file.

    table: text columns time, glucose, unit, and identity, counter, counter_of where the layout has them; reading
    (bool: the row is a glucose reading); c0, c1, ... the layout's channels, float64 in their units.
    """

    table: pd.DataFrame
    file: Int
    files: tuple[ExportFile, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """What the files are called in errors."""
        return tuple(file.label for file in self.files)

    def where(self, rows: Bool) -> Raw:
        """Return these rows only."""
        if rows.all():
            return self
        return Raw(self.table[rows].reset_index(drop=True), self.file[rows], self.files)


def read_raw(
    files: tuple[ExportFile, ...],
    layout: Layout,
    channels: tuple[Channel, ...],
    stamp: tuple[str, ...],
    *,
    glucose: bool,
) -> Raw:
    """Return the rows of these files, with glucose or with channels alone, timed by the columns in `stamp`."""
    tables = [_rows_of(file, layout, channels, stamp, with_glucose=glucose) for file in files]
    if not tables:
        raise BadInput("the export holds no file to read", "check the layout's glucose_files")
    numbers = np.repeat(np.arange(len(tables), dtype=np.int64), [len(table) for table in tables])
    return Raw(pd.concat(tables, ignore_index=True), numbers, files)


def _rows_of(
    file: ExportFile, layout: Layout, channels: tuple[Channel, ...], stamp: tuple[str, ...], *, with_glucose: bool
) -> pd.DataFrame:
    """Return one file's rows as Raw.table describes them."""
    glucose, times = layout.glucose, layout.time
    table = read_table(file, layout, _wanted(layout, channels, stamp, with_glucose=with_glucose))
    _refuse_no_identity(file, layout, table)
    value, unit = _glucose_text(table, layout)
    reading = counts(table, glucose.only) & (value.notna().to_numpy() if glucose.filled else True)
    rows: dict[str, Any] = {
        "time": _stamp_text(table, layout, stamp),
        "glucose": value,
        "unit": unit,
        "reading": reading & with_glucose,
        "identity": _first_filled(table, layout.identity.columns),
        "counter": _first_filled(table, (times.counter,) if times.counter else ()),
        "counter_of": _first_filled(table, (times.counter_of,) if times.counter_of else ()),
    }
    rows |= {f"c{at}": _quantity(table, channel, layout) for at, channel in enumerate(channels)}
    return pd.DataFrame(rows, index=table.index)


def _wanted(layout: Layout, channels: tuple[Channel, ...], stamp: tuple[str, ...], *, with_glucose: bool) -> Wanted:
    glucose, times = layout.glucose, layout.time
    quantity = glucose.columns if with_glucose else ()
    events = tuple(name for channel in channels for name in channel.columns)
    filters = [glucose.only if with_glucose else {}, *(channel.only for channel in channels)]
    return Wanted(
        stamp,
        joined=times.joined,
        quantity=quantity + events if layout.reader != "delimited" or layout.preamble else quantity or events,
        other=(
            *layout.identity.columns,
            *(name for only in filters for name in only),
            *(name for name in (glucose.unit_column, times.counter, times.counter_of) if name),
            *events,
        ),
        sparse=not with_glucose,
    )


def _refuse_no_identity(file: ExportFile, layout: Layout, table: pd.DataFrame) -> None:
    if layout.identity.columns and not set(layout.identity.columns) & set(table.columns):
        raise BadInput(
            f"{file.label} has no column {' or '.join(map(repr, layout.identity.columns))}",
            "add the name of the column that tells the patient to the layout's identity.columns",
        )


def people_of(file: ExportFile, layout: Layout) -> frozenset[str]:
    """Return the identities of the people in a glucose file, for comparing files with each other only."""
    if not layout.identity.columns:
        return frozenset({identity_of(file, layout)})
    return frozenset(str(name).strip() for name in identities_of(file, layout).dropna().unique())


def identities_of(file: ExportFile, layout: Layout) -> pd.Series:
    """Return the identity in each row of a file whose layout has columns for it."""
    beside = tuple(channel for channel in layout.channels if channel.files is None)
    wanted = _wanted(layout, beside, layout.time.columns, with_glucose=True)
    table = read_table(file, layout, replace(wanted, only=layout.identity.columns))
    _refuse_no_identity(file, layout, table)
    return _first_filled(table, layout.identity.columns)


def counts(table: pd.DataFrame, only: Only) -> Bool:
    """Return which rows have, in each of these columns, one of the values; a column that is missing has none."""
    mask = np.ones(len(table), dtype=np.bool_)
    for name, wanted in only.items():
        if name not in table.columns:
            return np.zeros(len(table), dtype=np.bool_)
        values = {wanted} if isinstance(wanted, str) else set(wanted)
        text = table[name].astype("category")
        # One code of several that mean the same (FHIR) is enough.
        hits = [not values.isdisjoint({part.strip() for part in str(c).split("|")}) for c in text.cat.categories]
        mask &= np.append(hits, False)[text.cat.codes.to_numpy()].astype(np.bool_)
    return mask


def _first_filled(table: pd.DataFrame, names: tuple[str, ...]) -> pd.Series:
    """Return, row by row, the first of the columns that is there and filled."""
    present = [name for name in names if name in table.columns]
    if not present:
        return pd.Series(np.nan, index=table.index, dtype="str")
    value = table[present[0]]
    for name in present[1:]:
        value = value.fillna(table[name])
    return value


def _stamp_text(table: pd.DataFrame, layout: Layout, names: tuple[str, ...]) -> pd.Series:
    if not layout.time.joined:
        return _first_filled(table, names)
    text = table[names[0]].str.strip()
    for name in names[1:]:
        text = text + " " + table[name].str.strip()
    return text


def _glucose_text(table: pd.DataFrame, layout: Layout) -> tuple[pd.Series, pd.Series | str]:
    """Return the glucose field of every row and its unit."""
    rule = layout.glucose
    present = [name for name in rule.columns if name in table.columns]
    names = tuple(present if rule.combine else present[:1])
    value = _first_filled(table, names)
    if rule.unit == "column":
        return value, _first_filled(table, (rule.unit_column or "",))
    if rule.unit != "header":
        return value, rule.unit
    unit = pd.Series(rule.header_units[names[0]] if names else "mg/dL", index=table.index, dtype="str")
    for before, name in enumerate(names[1:], start=1):
        own = _first_filled(table, names[:before]).isna() & table[name].notna()
        unit = unit.mask(own, rule.header_units[name])
    return value, unit


def number(text: pd.Series, layout: Layout) -> npt.NDArray[np.float64]:
    """Return the numbers in a text column, nan where there is none; a decimal comma where the layout allows it."""
    codes, different = pd.factorize(text)
    words = pd.Series(different, dtype="str")
    if layout.decimal != ".":
        words = words.str.replace(",", ".", regex=False)
    values = pd.to_numeric(words, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    return np.append(values, np.nan)[codes]


def repeated(words: Sequence[str], codes: Int) -> pd.Series:
    """Return a text column that holds, in each row, the word of this number."""
    return pd.Series(pd.array(list(words), dtype="str").take(codes))


def stamps_of(raw: Raw, layout: Layout, zone: str | None) -> Stamps:
    """Return the UTC times of the rows."""
    times, table = layout.time, raw.table
    counter = Counter(number(table["counter"], layout), table["counter_of"]) if times.counter else None
    whose = raw.file
    if layout.identity.columns:
        person, names = pd.factorize(table["identity"])
        whose = raw.file * (len(names) + 1) + person
    return read_stamps(table["time"], raw.file, raw.labels, times, zone, counter, whose)


def pseudonym(identity: str, key: bytes) -> str:
    """Return the keyed hash of a source's identity: HMAC-SHA256 (RFC 2104), first 16 hex digits.

    Without the key it cannot be redone.
    """
    return hmac.new(key, identity.encode(), hashlib.sha256).hexdigest()[:16]


def pseudonyms(raw: Raw, layout: Layout, key: bytes) -> pd.Series:
    """Return the keyed hash of each row's patient. Raises BadInput when a row or file does not tell it."""
    if layout.identity.columns:
        identity = raw.table["identity"].str.strip()
        if identity.isna().any():
            row = int(np.argmax(identity.isna().to_numpy()))
            raise BadInput(
                f"{raw.labels[raw.file[row]]} has a row without a patient", "every row needs its patient's identity"
            )
        codes, names = pd.factorize(identity)
        return repeated([pseudonym(str(name), key) for name in names], codes.astype(np.int64))
    # Files that are the same byte for byte are one person's, whatever their names say: counted twice, that person would
    # have twice the influence that the privacy statement allows for one.
    first = {file.sha256: identity_of(file, layout) for file in reversed(raw.files)}
    return repeated([pseudonym(first[file.sha256], key) for file in raw.files], raw.file)


def identity_of(file: ExportFile, layout: Layout) -> str:
    """Return what the file's first lines, or else its name, say about whose it is. Raises BadInput."""
    head = text_of(file, layout.encoding)[:_HEAD] if layout.identity.text_patterns else ""
    found = [match["patient"].strip(' \t;,"') for p in layout.identity.text_patterns if (match := re.search(p, head))]
    if any(found):
        return "\x1f".join(found)
    pattern = layout.identity.file_pattern
    named = re.search(pattern, file.path.name) if pattern is not None else None
    if named is None or not named["patient"]:
        raise BadInput(
            f"neither the first lines nor the name of {file.label} tell the patient"
            if layout.identity.text_patterns
            else f"the name of {file.label} does not tell the patient",
            f"keep the source's file names: the layout expects {pattern}" if pattern else "export it with a name",
        )
    return str(named["patient"])


def _quantity(table: pd.DataFrame, channel: Channel, layout: Layout) -> npt.NDArray[np.float64]:
    """Return the channel's values in its unit; nan where absent, unreadable or negative (a dose is never negative)."""
    text = _first_filled(table, channel.columns)
    if channel.pattern is not None:
        text = text.str.extract(channel.pattern, expand=True)["value"]
    value = number(text, layout)
    return np.where((value >= 0) & np.isfinite(value) & counts(table, channel.only), value * channel.factor, np.nan)
