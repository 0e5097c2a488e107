"""Drafting a layout from one file: names of columns, formats of times and units as the file shows them.

Only names of columns, never a value or a preamble, go into the draft. What the file leaves open stays open in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from data_schemas.errors import BadInput
from data_schemas.layout import Layout, known_layouts, load_layout
from hospital_node.delimited import header_names
from hospital_node.export_files import ExportFile, read_files, text_of
from hospital_node.rows import read_raw

_DAYS = "%Y-%m-%d %Y/%m/%d %d/%m/%Y %m/%d/%Y %d-%m-%Y %m-%d-%Y %d.%m.%Y %d/%m/%y %m/%d/%y"
_FORMATS = tuple(
    f"{day}{gap}{clock}"
    for day in (
        "%Y-%m-%d",
        "%Y/%m/%d",
        "%d/%m/%Y",
        "%m/%d/%Y",
        "%d-%m-%Y",
        "%m-%d-%Y",
        "%d.%m.%Y",
        "%d/%m/%y",
        "%m/%d/%y",
    )
    for gap in (" ", "T")
    for clock in ("%H:%M:%S", "%H:%M", "%I:%M %p", "%I:%M:%S %p", "%H:%M:%S%z", "%H:%M:%S.%f%z", "%H:%M:%S.%f")
)
_GLUCOSE = re.compile(r"gl[uy]c|glu[kc]o|\bsgv\b|\bcgm\b|\bbg\b|sensor", re.IGNORECASE)
_PERSON = re.compile(r"^(patient|paciente|subject|person|participant|pat)([ _.-]?(id|no|nr))?$", re.IGNORECASE)
_CHANNELS = {
    "carbs_g": re.compile(r"carb|kohlenhydrat|hidratos|glucides", re.IGNORECASE),
    "bolus_u": re.compile(r"bolus|rapid.*insulin", re.IGNORECASE),
    "basal_u_per_h": re.compile(r"basal.*(rate|u/h)|tasa.*basal", re.IGNORECASE),
    "heart_rate": re.compile(r"heart.?rate|^hr$|frecuencia card", re.IGNORECASE),
}
_WHERE = "see docs/layouts.md for how to write one by hand"


@dataclass(frozen=True, slots=True)
class _Table:
    delimiter: str
    header: tuple[str, ...]
    skipped: int
    body: pd.DataFrame


def fitting_layouts(path: Path) -> tuple[str, ...]:
    """Return the names of Islet's own layouts that find their columns in this file."""
    return tuple(name for name in known_layouts() if _fits(path, load_layout(name)))


def _fits(path: Path, layout: Layout) -> bool:
    archive = ".zip/" in layout.glucose_files
    try:
        files = read_files(
            path.parent, f"*.zip/{layout.glucose_files.partition('.zip/')[2]}" if archive else "*", {path}
        )
        beside = tuple(channel for channel in layout.channels if channel.files is None)
        raw = read_raw(files, layout, beside, layout.time.columns, glucose=True)
    except BadInput:
        return False
    return bool(raw.table["reading"].any() and raw.table["time"].notna().any())


def propose(path: Path) -> str:
    """Return a draft, in TOML, of a layout for a delimited file. Raises BadInput when no table is found in it."""
    file = read_files(path.parent, path.name.replace("[", "[[]"), {path})[0]
    table = _table(file)
    stamps = {name: forms for name in table.header if (forms := _formats(table.body[name]))}
    glucose = _glucose(table, stamps)
    if not stamps or glucose is None:
        lacking = "a column of dates and times" if not stamps else "a column with glucose"
        raise BadInput(f"{file.label} shows no table with {lacking}", _WHERE)
    stamp = next(iter(stamps))
    return "\n".join(_draft(table, stamp, stamps[stamp], glucose)) + "\n"


def _table(file: ExportFile) -> _Table:
    text = text_of(file, "utf-8-sig")
    best: _Table | None = None
    for delimiter in (",", ";", "\t", "|"):
        lines = [header_names(line, delimiter, {}) for line in text.splitlines()[:400]]
        wide = max((len(line) for line in lines), default=0)
        full = [at for at, line in enumerate(lines) if len(line) == wide and all(line) and len(set(line)) == wide]
        if wide > 1 and full and (best is None or wide > len(best.header)):
            head = full[0]
            rows = [line for line in lines[head + 1 :] if len(line) == wide]
            best = _Table(delimiter, lines[head], head, pd.DataFrame(rows, columns=list(lines[head]), dtype="str"))
    if best is None or best.body.empty:
        raise BadInput(f"{file.label} shows no table of columns", _WHERE)
    return best


def _formats(text: pd.Series) -> tuple[str, ...]:
    """Return every format that reads all of the column's stamps."""
    filled = text[text.str.strip() != ""].str.strip()
    if filled.empty:
        return ()
    return tuple(
        form for form in _FORMATS if pd.to_datetime(filled, format=form, errors="coerce", utc=True).notna().all()
    )


def _glucose(table: _Table, stamps: dict[str, tuple[str, ...]]) -> str | None:
    named = [name for name in table.header if name not in stamps and _GLUCOSE.search(name)]
    return next((name for name in named if np.isfinite(_numbers(table.body[name])).mean() > 0.3), None)


def _numbers(text: pd.Series) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    plain = text.str.replace(",", ".", regex=False)
    return pd.to_numeric(plain, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)


def _draft(table: _Table, stamp: str, forms: tuple[str, ...], glucose: str) -> Iterator[str]:
    values = _numbers(table.body[glucose])
    unit = "mmol/L" if np.nanmedian(values) < 35 else "mg/dL"
    person = next((name for name in table.header if _PERSON.search(name)), None)
    yield 'name = "ours"'
    yield 'title = "What this export is"'
    yield 'glucose_files = "*.csv"'
    yield f"delimiter = {_toml(table.delimiter)}"
    if table.body[glucose].str.contains(",").any():
        yield 'decimal = ","'
    if table.skipped:
        yield "preamble = true                  # the header is not the first line"
        yield "ragged = true"
    yield '# zone = "Europe/Madrid"         # IANA name; or in the node\'s settings'
    yield "\n[identity]"
    yield (
        f"columns = [{_toml(person)}]"
        if person
        else r"file_pattern = '^(?P<patient>.+)\.csv'   # check: one file, one person"
    )
    yield "\n[time]"
    yield f"columns = [{_toml(stamp)}]"
    yield f"formats = [{', '.join(map(_toml, forms))}]"
    if len(forms) > 1:
        yield "# open: every format above reads this file. Keep the right one, or let a day above 12 decide:"
        yield 'order = "auto"'
    yield "\n[glucose]"
    yield f"columns = [{_toml(glucose)}]"
    yield f'unit = "{unit}"                   # by the size of the values: check'
    for channel, pattern in _CHANNELS.items():
        name = next((name for name in table.header if pattern.search(name) and name not in {glucose, stamp}), None)
        if name is not None:
            yield f'\n[[channels]]\nname = "{channel}"\ncolumns = [{_toml(name)}]   # check the unit, or give a factor'


def _toml(text: str) -> str:
    """Return a TOML basic string."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\t", "\\t")
    return f'"{escaped}"'
