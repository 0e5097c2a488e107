"""The bytes of an export: found, fingerprinted, unpacked and split into text columns, or refused.

A file is named in errors by its place in name order and its SHA-256 prefix, never by its name: names carry
identities.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from data_schemas.errors import BadInput

_GZIP_MAGIC = b"\x1f\x8b"
_ZIP_MAGIC = b"PK\x03\x04"
_AGAIN = "export it again from the source and import the whole file"


@dataclass(frozen=True, slots=True)
class ExportFile:
    """One file as it was read: where it lies, what it was, and its bytes (unpacked)."""

    path: Path
    label: str
    size: int
    mtime_ns: int
    sha256: str
    content: bytes


def read_files(folder: Path, pattern: str) -> tuple[ExportFile, ...]:
    """Return every file under `folder` that matches the glob, in name order.

    Raises BadInput when there is none.
    """
    if not folder.is_dir():
        raise BadInput("the export folder does not exist", "give the folder that holds the export files")
    paths = sorted(path for path in folder.glob(pattern) if path.is_file())
    if not paths:
        raise BadInput(
            f"no file matches {pattern!r} in the export folder",
            "check the folder and the layout: the pattern comes from the layout's glucose_files",
        )
    return tuple(_read_file(path, number, len(paths)) for number, path in enumerate(paths, start=1))


def refuse_if_changed(files: tuple[ExportFile, ...]) -> None:
    """Refuse BadInput when a file is not, byte for byte, what was read: somebody is still writing the export."""
    for file in files:
        try:
            state = file.path.stat()
            same = (state.st_size, state.st_mtime_ns) == (file.size, file.mtime_ns) and _sha256(
                file.path.read_bytes()
            ) == file.sha256
        except OSError:
            same = False
        if not same:
            raise BadInput(
                f"{file.label} changed while it was imported", "wait until the export is complete and import it again"
            )


def header_of(file: ExportFile, delimiter: str, encoding: str) -> tuple[str, ...]:
    """Return column names of the first line, stripped. Raises BadInput on an empty or truncated file."""
    lines = _text(file, encoding).splitlines()
    filled = [line for line in (lines[0], lines[-1]) if line.strip()] if lines else []
    if not filled:
        raise BadInput(f"{file.label} is empty", _AGAIN)
    header, last = next(csv.reader([filled[0]], delimiter=delimiter)), _last_row(lines, delimiter)
    if last is None:
        raise BadInput(f"{file.label} has a header and no row", _AGAIN)
    if len(last) < len(header):
        raise BadInput(
            f"{file.label} is cut off: its last line has {len(last)} of {len(header)} fields",
            _AGAIN,
        )
    return tuple(name.strip() for name in header)


def read_columns(file: ExportFile, delimiter: str, encoding: str, positions: dict[str, int]) -> pd.DataFrame:
    """Return text columns at the given 0-based positions, under new names; a missing field is NaN.

    Raises BadInput when the lines do not form one table.
    """
    text = _text(file, encoding)
    _refuse_long_lines(file, text, delimiter)
    by_position = sorted(positions.items(), key=lambda item: item[1])
    try:
        table = pd.read_csv(
            io.StringIO(text),
            sep=delimiter,
            header=0,
            index_col=False,
            usecols=[position for _, position in by_position],
            dtype=str,
            skipinitialspace=True,
        )
    except (pd.errors.ParserError, ValueError):
        # The parser's own message can quote the line, so it is not passed on.
        raise BadInput(
            f"{file.label} is not one table with a fixed number of columns",
            f"check that the layout's delimiter {delimiter!r} is the one of the file",
        ) from None
    table.columns = pd.Index([name for name, _ in by_position])
    return table


def _read_file(path: Path, number: int, total: int) -> ExportFile:
    try:
        raw, state = path.read_bytes(), path.stat()
    except OSError as error:
        raise BadInput(f"file {number} of {total} cannot be read: {error.strerror}", "check its permissions") from None
    sha256 = _sha256(raw)
    label = f"file {number} of {total} in name order (sha256 {sha256[:12]})"
    return ExportFile(path, label, state.st_size, state.st_mtime_ns, sha256, _unpack(raw, label))


def _unpack(raw: bytes, label: str) -> bytes:
    try:
        if raw.startswith(_GZIP_MAGIC):
            return gzip.decompress(raw)
        if raw.startswith(_ZIP_MAGIC):
            return _only_member(raw, label)
    except (EOFError, gzip.BadGzipFile, zlib.error, zipfile.BadZipFile):
        raise BadInput(f"{label} is cut off: it does not unpack", _AGAIN) from None
    return raw


def _only_member(raw: bytes, label: str) -> bytes:
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        if len(names) != 1:
            raise BadInput(f"{label} is a zip with {len(names)} files", "unpack it into the export folder")
        return archive.read(names[0])


def _text(file: ExportFile, encoding: str) -> str:
    try:
        return file.content.decode(encoding)
    except UnicodeDecodeError:
        raise BadInput(
            f"{file.label} is not {encoding} text", "set `encoding` in the layout to the one of the export"
        ) from None


def _refuse_long_lines(file: ExportFile, text: str, delimiter: str) -> None:
    """Refuse lines with more fields than names: read on, a decimal comma would turn 7,5 into 7 without a word."""
    lines = text.splitlines()
    names, widest = lines[0].count(delimiter), max(line.count(delimiter) for line in lines)
    if widest > names and '"' in text:
        fields = [len(row) for row in csv.reader(lines, delimiter=delimiter)]
        names, widest = fields[0], max(fields)
    if widest > names:
        raise BadInput(
            f"{file.label} has lines with more fields than its header has names",
            f"check the layout's delimiter {delimiter!r} and that the export uses a decimal point",
        )


def _last_row(lines: list[str], delimiter: str) -> list[str] | None:
    for line in reversed(lines[1:]):
        if line.strip():
            return next(csv.reader([line], delimiter=delimiter))
    return None


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
