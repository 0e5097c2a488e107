"""Stamps of fixed width, read digit by digit for a whole column: what strptime does, but faster."""

from __future__ import annotations

import re
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pandas as pd

Bytes: TypeAlias = npt.NDArray[np.uint8]
Int: TypeAlias = npt.NDArray[np.int64]
Moments: TypeAlias = npt.NDArray[np.datetime64]

_DIGITS = {"Y": 4, "m": 2, "d": 2, "H": 2, "M": 2, "S": 2}
# Least and greatest value; a leap second is left to strptime.
_BOUNDS = {"Y": (1, 9999), "m": (1, 12), "d": (1, 31), "H": (0, 23), "M": (0, 59), "S": (0, 59)}


def read_fixed(text: pd.Series, form: str) -> Moments:
    """Return datetime64[s] of the stamps that are exactly `form`, every field with all its digits; NaT for the others.

    A form with other directives than those of _DIGITS, or without a date, fits no stamp here.
    """
    found = np.full(len(text), "NaT", dtype="datetime64[s]")
    parts = re.findall(r"%(.)|([^%])", form)
    fields = [letter for letter, _ in parts if letter]
    if not {"Y", "m", "d"} <= set(fields) <= _DIGITS.keys() or len(fields) != len(set(fields)) or not form.isascii():
        return found
    width = sum(_DIGITS.get(letter, 1) for letter, _ in parts)
    rows, marks = _of_width(text, width)
    if not len(rows):
        return found
    valid, values, at = np.ones(len(rows), dtype=np.bool_), dict[str, Int](), 0
    for letter, literal in parts:
        if literal:
            valid &= marks[:, at] == ord(literal)
            at += 1
            continue
        low, high = _BOUNDS[letter]
        value = np.zeros(len(rows), dtype=np.int64)
        for digit in (marks[:, column] - ord("0") for column in range(at, at + _DIGITS[letter])):
            valid &= digit <= 9
            value = value * 10 + digit
        valid &= (value >= low) & (value <= high)
        values[letter] = value
        at += _DIGITS[letter]
    found[rows[valid]] = _moments({letter: value[valid] for letter, value in values.items()})
    return found


def _of_width(text: pd.Series, width: int) -> tuple[Int, Bytes]:
    """Return the rows whose text has this many bytes, and their bytes [rows, width]."""
    import pyarrow as pa
    from pyarrow import compute

    column = pa.array(text, pa.large_string())
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    fits = compute.fill_null(compute.equal(compute.binary_length(column), width), fill_value=False)
    rows = np.flatnonzero(fits.to_numpy(zero_copy_only=False))
    # A filtered copy lies without gaps from its own beginning on.
    data = column.filter(fits).buffers()[2] if len(rows) else None
    marks = np.frombuffer(data or b"", dtype=np.uint8)[: len(rows) * width]
    return rows, marks.reshape(len(rows), width)


def _moments(values: dict[str, Int]) -> Moments:
    """Return the moments of fields within their bounds; NaT for a day that its month does not have."""
    month = ((values["Y"] - 1970) * 12 + values["m"] - 1).astype("datetime64[M]")
    day = month.astype("datetime64[D]") + (values["d"] - 1)
    moment: Moments = day.astype("datetime64[s]")
    for letter, size_s in (("H", 3600), ("M", 60), ("S", 1)):
        if letter in values:
            moment += (values[letter] * size_s).astype("timedelta64[s]")
    moment[day.astype("datetime64[M]") != month] = np.datetime64("NaT")
    return moment
