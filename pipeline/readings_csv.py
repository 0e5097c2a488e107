"""A CSV file of readings, read in a stream: any row order, any column order, plain or gzip, larger than memory.

Columns patient_id, time, glucose_mg_dl; others are ignored. Times are ISO 8601; those without an offset are local
times of one zone. What cannot be understood is refused with the number of its data row (1 is the first row under the
header), never with its content.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from data_schemas.errors import BadInput

Int64: TypeAlias = npt.NDArray[np.int64]
Bool: TypeAlias = npt.NDArray[np.bool_]
Rows: TypeAlias = npt.NDArray[np.void]

NEEDED = ("patient_id", "time", "glucose_mg_dl")
ROW = np.dtype([("time_s", "<i8"), ("glucose_mg_dl", "<f4"), ("patient", "<u4")])
NO_VALUE = ("", "nan", "na", "n/a", "null", "none")
# No living person's median is below 35 mg/dL, and hardly any is above 35 mmol/L.
MMOL_MEDIAN = 35.0
_MMOL_READINGS = 24
_BLOCK_BYTES = 1 << 24
_SHAPE = f"a CSV or CSV.gz file with a header and the columns {', '.join(NEEDED)}"
# The end of a time that says its own offset from UTC.
_OFFSET = r"[T ][0-9:.]+ ?([Zz]|[+-][0-9]{2}(:?[0-9]{2})?)$"
_DATE = r"^[0-9]{4}-[0-9]{2}-[0-9]{2}([T ]|$)"


@dataclass(frozen=True, slots=True)
class Spool:
    """Readings as ROW records in a binary file, in order; `patient` indexes patients. Skipped rows are counted."""

    file: Path
    patients: tuple[str, ...]
    counts: Int64
    skipped: dict[str, int]

    @property
    def readings(self) -> int:
        """Number of records in the file."""
        return int(self.counts.sum())


@dataclass(slots=True)
class _Tally:
    """What the stream has seen so far."""

    codes: dict[str, int] = field(default_factory=dict)
    counts: Int64 = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    small: Int64 = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    skipped: dict[str, int] = field(default_factory=dict)
    rows: int = 0

    def skip(self, reason: str, rows: Bool) -> None:
        if found := int(np.count_nonzero(rows)):
            self.skipped[reason] = self.skipped.get(reason, 0) + found

    def count(self, kept: Rows) -> None:
        total = len(self.codes)
        self.counts = _grown(self.counts, total) + np.bincount(kept["patient"], minlength=total)
        low = kept["patient"][kept["glucose_mg_dl"] < MMOL_MEDIAN]
        self.small = _grown(self.small, total) + np.bincount(low, minlength=total)


def spool_readings(path: Path, zone: str, file: Path, tick: Callable[[float], None]) -> Spool:
    """Parse the whole file into `file`; tick gets the share read so far. Raises BadInput, or OSError from writing."""
    header = _header(path)
    localise = _localiser(zone)
    tally = _Tally()
    size = max(path.stat().st_size, 1)
    with file.open("wb") as sink:
        for table, position in _blocks(path, header):
            kept = _parse(table, localise, tally)
            sink.write(kept.tobytes())
            tick(min(position / size, 1.0))
    _refuse_useless(tally)
    return Spool(file, tuple(tally.codes), tally.counts, tally.skipped)


def _header(path: Path) -> dict[str, str]:
    """Column name to its spelling in the file; refuses what is no such file."""
    import pyarrow as pa

    if not path.is_file():
        raise BadInput(f"there is no file {path}", f"give {_SHAPE}")
    try:
        with pa.OSFile(str(path)) as raw, _plain(path, raw) as stream:
            start = stream.read(1 << 16)
    except OSError:
        raise _broken_file() from None
    lines = start.decode("utf-8-sig", errors="replace").lstrip("\r\n").splitlines()
    if not lines:
        raise BadInput("the file is empty", f"give {_SHAPE}")
    names = next(csv.reader(lines[:1]))
    found = {name.strip(): name for name in names}
    if missing := [name for name in NEEDED if name not in found]:
        raise BadInput(
            f"the file has no column {', '.join(missing)}",
            f"give {_SHAPE}, separated by commas; {len(names)} columns were found in the first line",
        )
    if twice := [name for name in NEEDED if sum(n.strip() == name for n in names) > 1]:
        raise BadInput(f"the column {', '.join(twice)} is there more than once", "keep one of them")
    return {name: found[name] for name in NEEDED}


def _plain(path: Path, raw: Any) -> Any:
    """Stream of the decompressed bytes; gzip is known by its first bytes, whatever the file is called."""
    import pyarrow as pa

    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return pa.CompressedInputStream(raw, "gzip") if packed else raw


def _broken_file() -> BadInput:
    return BadInput("the file cannot be read to its end", "it looks cut off or damaged; copy it again")


def _blocks(path: Path, header: dict[str, str]) -> Iterator[tuple[Any, int]]:
    """Tables of the three needed columns as text, and the position in the (compressed) file after each."""
    import pyarrow as pa
    from pyarrow import csv as arrow_csv

    bad: list[tuple[int, int]] = []

    def on_bad_row(row: Any) -> str:
        bad.append((row.expected_columns, row.actual_columns))
        return "error"

    convert = arrow_csv.ConvertOptions(
        include_columns=list(header.values()), column_types=dict.fromkeys(header.values(), pa.string())
    )
    try:
        with pa.OSFile(str(path)) as raw, _plain(path, raw) as stream:
            reader = arrow_csv.open_csv(
                stream,
                read_options=arrow_csv.ReadOptions(block_size=_BLOCK_BYTES),
                parse_options=arrow_csv.ParseOptions(invalid_row_handler=on_bad_row),
                convert_options=convert,
            )
            for batch in reader:
                yield batch.rename_columns(NEEDED), raw.tell()
    except pa.ArrowInvalid:
        if bad:
            raise BadInput(
                f"a row has {bad[0][1]} cells where the header has {bad[0][0]}", "quote cells that contain a comma"
            ) from None
        raise BadInput("the file is not UTF-8 text in CSV form", f"give {_SHAPE}") from None
    except OSError:
        raise _broken_file() from None


def _parse(table: Any, localise: Callable[[Any], Any], tally: _Tally) -> Rows:
    """Keep the usable rows of one block and count the others."""
    import pyarrow.compute as pc

    text = {name: pc.utf8_trim_whitespace(table.column(name)) for name in NEEDED}
    time_s, known = _times(text["time"], localise, tally.rows)
    glucose = _glucose(text["glucose_mg_dl"], tally.rows)
    patient, named = _patients(text["patient_id"], tally.codes)
    tally.rows += len(glucose)
    keep = named.copy()
    tally.skip("no-patient", ~named)
    tally.skip("no-glucose", keep & ~np.isfinite(glucose))
    keep &= np.isfinite(glucose)
    tally.skip("glucose-not-positive", keep & ~(glucose > 0))
    keep &= glucose > 0
    tally.skip("clock-change", keep & ~known)
    keep &= known
    records = np.empty(int(np.count_nonzero(keep)), dtype=ROW)
    records["time_s"], records["glucose_mg_dl"], records["patient"] = time_s[keep], glucose[keep], patient[keep]
    tally.count(records)
    return records


def _patients(text: Any, codes: dict[str, int]) -> tuple[npt.NDArray[np.uint32], Bool]:
    """Code of each row's patient (new names get the next code), and whether there is a name."""
    encoded = text.dictionary_encode()
    names = encoded.dictionary.to_pylist()
    local = np.array([codes.setdefault(n, len(codes)) if n else 0 for n in names], dtype=np.uint32)
    named = np.array([bool(n) for n in names], dtype=np.bool_)
    index = encoded.indices.to_numpy()
    return local[index], named[index]


def _glucose(text: Any, rows_before: int) -> npt.NDArray[np.float64]:
    """float64 per row, NaN where the cell has no value; refuses text that is no number."""
    import pyarrow as pa
    import pyarrow.compute as pc

    empty = pc.is_in(pc.utf8_lower(text), value_set=pa.array(NO_VALUE))
    filled = pc.if_else(empty, None, text)
    try:
        return pc.cast(filled, pa.float64()).to_numpy(zero_copy_only=False)  # type: ignore[no-any-return]
    except pa.ArrowInvalid:
        import pandas as pd

        numbers = pd.to_numeric(filled.to_pandas(), errors="coerce")
        values: npt.NDArray[np.float64] = numbers.to_numpy(dtype=np.float64)
        bad = np.isnan(values) & ~empty.to_numpy(zero_copy_only=False)
        if bad.any():
            raise BadInput(
                f"glucose_mg_dl is not a number in data row {rows_before + int(np.argmax(bad)) + 1}",
                "leave the cell empty where the sensor gave no number; write Low as 40 and High as 400",
            ) from None
        return values


def _times(text: Any, localise: Callable[[Any], Any], rows_before: int) -> tuple[Int64, Bool]:
    """UTC epoch seconds per row, and where they are known: a local time may occur twice or never."""
    import pyarrow.compute as pc

    dated = pc.match_substring_regex(text, _DATE).to_numpy(zero_copy_only=False)
    own = pc.match_substring_regex(text, _OFFSET).to_numpy(zero_copy_only=False)
    seconds = np.zeros(len(dated), dtype=np.int64)
    known = np.ones(len(dated), dtype=np.bool_)
    readable = dated.copy()
    for rows, offset in ((np.flatnonzero(dated & own), True), (np.flatnonzero(dated & ~own), False)):
        if len(rows):
            part = text if len(rows) == len(dated) else text.take(rows)
            moments = _moments(part, utc=offset)
            readable[rows] = ~np.isnat(moments)
            if not offset:
                moments = localise(moments)
            known[rows] = ~np.isnat(moments)
            seconds[rows] = moments.astype("datetime64[s]").astype(np.int64)
    if not readable.all():
        raise BadInput(
            f"time cannot be read in data row {rows_before + int(np.argmin(readable)) + 1}",
            "write times as 2026-01-31T08:05:00 (local) or 2026-01-31T08:05:00+00:00",
        )
    return seconds, known


def _moments(text: Any, *, utc: bool) -> npt.NDArray[np.datetime64]:
    """datetime64[us] of ISO 8601 texts, in UTC or as written; NaT where unreadable."""
    import pandas as pd
    import pyarrow as pa
    import pyarrow.compute as pc

    try:
        cast = pc.cast(text, pa.timestamp("us", tz="UTC" if utc else None))
        return cast.to_numpy(zero_copy_only=False).astype("datetime64[us]")  # type: ignore[no-any-return]
    except pa.ArrowInvalid:
        parsed = pd.to_datetime(pd.Series(text.to_pylist()), format="ISO8601", utc=True, errors="coerce")
        return parsed.dt.tz_localize(None).to_numpy().astype("datetime64[us]")


def _localiser(zone: str) -> Callable[[npt.NDArray[np.datetime64]], npt.NDArray[np.datetime64]]:
    """Local wall times of this zone to UTC; NaT for those that a clock change makes ambiguous or skips."""
    from zoneinfo import ZoneInfo

    import pandas as pd

    try:
        place = ZoneInfo(zone)
    except (OSError, ValueError, KeyError):
        raise BadInput(
            f"{zone!r} is not a time zone", "give an IANA name such as Europe/Madrid, America/New_York or UTC"
        ) from None

    def localise(moments: npt.NDArray[np.datetime64]) -> npt.NDArray[np.datetime64]:
        if zone == "UTC":
            return moments
        index = pd.DatetimeIndex(moments).tz_localize(place, ambiguous="NaT", nonexistent="NaT")
        return index.tz_convert("UTC").tz_localize(None).to_numpy()

    return localise


def _refuse_useless(tally: _Tally) -> None:
    """Refuse a file without a usable row, and glucose that must be in mmol/L."""
    if not tally.rows:
        raise BadInput("the file has a header and no row", f"give {_SHAPE}")
    total = int(tally.counts.sum())
    if not total:
        raise BadInput("no row has a patient and a positive glucose value", f"give {_SHAPE}")
    suspects = (2 * tally.small > tally.counts) & (tally.counts >= _MMOL_READINGS)
    if suspects.any() or 2 * int(tally.small.sum()) > total:
        raise BadInput(
            f"glucose looks like mmol/L for {max(int(suspects.sum()), 1)} of {len(tally.counts)} patients: "
            f"their median is below {MMOL_MEDIAN:g}",
            "convert to mg/dL (1 mmol/L is 18.0156 mg/dL)",
        )


def _grown(counts: Int64, size: int) -> Int64:
    return np.pad(counts, (0, size - len(counts)))
