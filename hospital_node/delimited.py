"""Delimited text as a table of text columns: preambles, sections with headers of their own, rows of unequal length."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from data_schemas.errors import BadInput
from data_schemas.layout import LAYOUTS, Layout, known_layouts, load_layout
from hospital_node.export_files import ExportFile, text_of

_AGAIN = "export it again from the source and import the whole file"
# How sources begin the line that announces another table of the same file.
_ANNOUNCES = ("-------", '"-------', "#")
_DELIMITERS = (",", ";", "\t", "|")
# What sources write where there is nothing.
_ABSENT = ("", "NA", "N/A", "n/a", "#N/A", "#NA", "<NA>", "NULL", "null", "None", "NaN", "nan", "-NaN", "-nan")


@dataclass(frozen=True, slots=True)
class Wanted:
    """Columns to read. Of `stamp` all must be there (`joined`) or one; of `quantity` at least one; `other` may be.

    sparse: records without any of them are no error (a quantity that nobody had).
    only: read these columns alone; the others just tell the header.
    """

    stamp: tuple[str, ...]
    joined: bool
    quantity: tuple[str, ...]
    other: tuple[str, ...]
    sparse: bool = False
    only: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All of them, each once."""
        return tuple(dict.fromkeys((*self.stamp, *self.quantity, *self.other)))

    @property
    def taken(self) -> tuple[str, ...]:
        """The columns to read."""
        return self.only or self.names

    def heads(self, header: Iterable[str]) -> bool:
        """Whether a line with these names is a header."""
        names = set(header)
        stamped = names.issuperset(self.stamp) if self.joined else not names.isdisjoint(self.stamp)
        return stamped and not names.isdisjoint(self.quantity)


def read_delimited(file: ExportFile, layout: Layout, wanted: Wanted) -> pd.DataFrame:
    """Return the wanted columns that the file has, as text under their names in the layout; a missing field is NaN.

    Raises BadInput for an empty or truncated file, for one without the columns, and for lines with more fields than
    the header has names.
    """
    text = text_of(file, layout.encoding)
    if not text.strip():
        raise BadInput(f"{file.label} is empty", _AGAIN)
    called = {name: known for known, names in layout.aliases.items() for name in names}
    if layout.names:
        sections = [_Section(layout.names, 0, 0, len(text))]
        delimiter = _one_delimiter(layout)
    elif layout.preamble:
        delimiter, sections = _sections(file, text, layout, wanted, called)
    else:
        delimiter = _one_delimiter(layout)
        sections = [_first_line(file, text, delimiter, called, wanted)]
    tables = [_read_section(file, text, section, delimiter, layout, wanted) for section in sections]
    return tables[0] if len(tables) == 1 else pd.concat(tables, ignore_index=True)


@dataclass(frozen=True, slots=True)
class _Section:
    """One table of the file: its names, and where in the text its header starts, its rows start and end."""

    names: tuple[str, ...]
    head: int
    start: int
    end: int


def _one_delimiter(layout: Layout) -> str:
    if layout.delimiter == "auto":
        raise BadInput(
            f"layout {layout.name}: delimiter = 'auto' needs a header", "give preamble = true, or a delimiter"
        )
    return layout.delimiter


def header_names(line: str, delimiter: str, called: dict[str, str]) -> tuple[str, ...]:
    """Return the names in a header line, stripped, aliases replaced by the layout's own names."""
    try:
        fields = next(csv.reader([line.lstrip("\ufeff")], delimiter=delimiter), [])
    except csv.Error:
        fields = []
    return tuple(called.get(name.strip(), name.strip()) for name in fields)


def _first_line(file: ExportFile, text: str, delimiter: str, called: dict[str, str], wanted: Wanted) -> _Section:
    end = text.find("\n") + 1 or len(text)
    names = header_names(text[:end].strip("\r\n"), delimiter, called)
    missing = _missing(names, wanted)
    if missing:
        raise _no_column(file, missing, names)
    return _Section(names, 0, end, len(text))


def _missing(names: tuple[str, ...], wanted: Wanted) -> tuple[str, ...]:
    lacking = tuple(name for name in wanted.stamp if name not in names)
    if lacking and (wanted.joined or len(lacking) == len(wanted.stamp)):
        return lacking
    return wanted.quantity if set(names).isdisjoint(wanted.quantity) else ()


def _no_column(file: ExportFile, missing: tuple[str, ...], names: tuple[str, ...]) -> BadInput:
    """Name of what was found only what a layout knows: a first line can hold a person's name instead of columns."""
    vocabulary = _vocabulary()
    known = [repr(name) for name in dict.fromkeys(names) if name in vocabulary]
    return BadInput(
        f"{file.label} has no column {' or '.join(repr(name) for name in missing)}; its first line has {len(names)} "
        f"fields, of which Islet knows {', '.join(known) or 'none'}",
        "choose the layout of this export, or add the column's name to the layout's aliases; "
        "`islet node layout propose` drafts a layout from a file",
    )


def _vocabulary() -> frozenset[str]:
    """Return every column name that a layout of Islet knows."""
    layouts = [load_layout(name) for name in known_layouts()] if LAYOUTS.exists() else []
    names = {name for layout in layouts for name in (*layout.time.columns, *layout.glucose.columns)}
    names |= {name for layout in layouts for name in layout.identity.columns}
    return frozenset(names | {name for layout in layouts for channel in layout.channels for name in channel.columns})


def _sections(
    file: ExportFile, text: str, layout: Layout, wanted: Wanted, called: dict[str, str]
) -> tuple[str, list[_Section]]:
    """Return the delimiter under which there are headers, and the tables below them."""
    delimiters = _DELIMITERS if layout.delimiter == "auto" else (layout.delimiter,)
    names = {name for name in wanted.stamp[:1] if wanted.joined} or set(wanted.stamp)
    spoken = names | {alias for alias, known in called.items() if known in names}
    for delimiter in delimiters:
        heads: list[tuple[tuple[str, ...], int, int]] = []
        for start, end in _lines_with(text, spoken):
            header = header_names(text[start:end].strip("\r\n"), delimiter, called)
            if wanted.heads(header):
                heads.append((header, start, end))
        if heads:
            ends = [_last_row_end(text, start) for _, start, _ in heads[1:]] + [len(text)]
            return delimiter, [_Section(h, s, e, stop) for (h, s, e), stop in zip(heads, ends, strict=True)]
    raise _no_column(file, wanted.stamp + wanted.quantity, ())


def _last_row_end(text: str, head: int) -> int:
    """Return where the rows before a header end: the lines that announce its table are none of them."""
    while head > 0:
        start = text.rfind("\n", 0, head - 1) + 1
        line = text[start:head].strip()
        if line and not line.startswith(_ANNOUNCES):
            break
        head = start
    return head


def _lines_with(text: str, names: set[str]) -> Iterator[tuple[int, int]]:
    """Yield start and end of every line that holds one of the names."""
    last = -1
    for found in re.finditer("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)), text):
        start = text.rfind("\n", 0, found.start()) + 1
        if start > last:
            end = text.find("\n", found.end()) + 1 or len(text)
            last = start
            yield start, end


def _read_section(
    file: ExportFile, text: str, section: _Section, delimiter: str, layout: Layout, wanted: Wanted
) -> pd.DataFrame:
    names = section.names
    body = text if section == _Section(names, 0, 0, len(text)) else text[section.start : section.end]
    if not body.strip():
        if layout.preamble:
            return pd.DataFrame(columns=[name for name in wanted.taken if name in names], dtype="str")
        raise BadInput(f"{file.label} has a header and no row", _AGAIN)
    at = sorted((names.index(name), name) for name in wanted.taken if name in names)
    table = _plain_table(body, delimiter, len(names), [position for position, _ in at])
    if table is None:
        _refuse_odd_lines(file, body, delimiter, len(names), ragged=layout.ragged)
        table = _any_table(file, body, delimiter, len(names), [position for position, _ in at])
    table.columns = pd.Index([name for _, name in at])
    return table


def _plain_table(body: str, delimiter: str, names: int, positions: list[int]) -> pd.DataFrame | None:
    """Return these fields of every line, or None when it takes more than to split lines at the delimiter.

    Plain: no quotes, no spaces after delimiters, lines that end alike, and as many fields as names in every line. The
    fields and what counts as absent are then those of _any_table, several times as fast.
    """
    if "\r" in body:
        body = body.replace("\r\n", "\n")
    odd = ('"', "\r", "\0", f"{delimiter} ", "\n ")
    if names < 2 or not delimiter.isascii() or body[0] in {" ", "\n"} or any(mark in body for mark in odd):
        return None
    content = body.encode() if body[-1] == "\n" else body.encode() + b"\n"
    marks = np.frombuffer(content, dtype=np.uint8)
    ends, delimiters = np.flatnonzero(marks == ord("\n")), np.flatnonzero(marks == ord(delimiter))
    if len(delimiters) != len(ends) * (names - 1):
        return None
    in_line = np.searchsorted(ends, delimiters.reshape(len(ends), names - 1)[:, [0, -1]])
    if (in_line != np.arange(len(ends))[:, None]).any():
        return None
    import pyarrow as pa
    from pyarrow import csv as arrow_csv

    columns = [str(number) for number in range(names)]
    wanted = [columns[position] for position in positions]
    table = arrow_csv.read_csv(
        pa.BufferReader(content),
        arrow_csv.ReadOptions(column_names=columns, use_threads=False, block_size=len(content) + 1),
        arrow_csv.ParseOptions(delimiter=delimiter, quote_char=False),
        arrow_csv.ConvertOptions(
            column_types=dict.fromkeys(wanted, pa.large_string()),
            include_columns=wanted,
            null_values=list(_ABSENT),
            strings_can_be_null=True,
        ),
    )
    frame: pd.DataFrame = table.to_pandas(types_mapper=lambda _: pd.StringDtype(na_value=np.nan))
    return frame


def _any_table(file: ExportFile, body: str, delimiter: str, names: int, positions: list[int]) -> pd.DataFrame:
    """Return these fields of every line, quoted or not."""
    try:
        return pd.read_csv(
            io.StringIO(body),
            sep=delimiter,
            header=None,
            names=list(range(names)),
            index_col=False,
            usecols=positions,
            dtype="str",
            skipinitialspace=True,
            keep_default_na=False,
            na_values=list(_ABSENT),
        )
    except (pd.errors.ParserError, pd.errors.EmptyDataError, ValueError):
        # The parser's own message can quote the line, so it is not passed on.
        raise BadInput(
            f"{file.label} is not one table with a fixed number of columns",
            f"check that the layout's delimiter {delimiter!r} is the one of the file",
        ) from None


def _refuse_odd_lines(file: ExportFile, body: str, delimiter: str, names: int, *, ragged: bool) -> None:
    """Refuse a last line that is cut off, and lines with more fields than names.

    Read on, a decimal comma between commas would turn 7,5 into 7 without a word.
    """
    lines = [line for line in body.splitlines() if line]
    counts = [line.count(delimiter) + 1 for line in lines]
    if '"' in body and (max(counts) > names or counts[-1] < names):
        try:
            rows = [row for row in csv.reader(io.StringIO(body), delimiter=delimiter) if any(row)]
        except csv.Error:
            raise BadInput(f"{file.label} is not delimited text", _AGAIN) from None
        counts = [len(row) - (0 if row[-1] else 1) if len(row) == names + 1 else len(row) for row in rows] or [0]
    if max(counts) > names:
        raise BadInput(
            f"{file.label} has lines with more fields than its header has names",
            f"check the layout's delimiter {delimiter!r} and that the export uses a decimal point",
        )
    if counts[-1] < (min([names, *counts[:-1]]) if ragged else names):
        raise BadInput(f"{file.label} is cut off: its last line has {counts[-1]} of {names} fields", _AGAIN)
