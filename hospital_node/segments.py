"""Segments: immutable Arrow files, named by the SHA-256 of their bytes and mapped into memory when they are read."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from data_schemas.canonical import bytes_hash
from data_schemas.errors import StorageFailed, Tampered
from pipeline.signing import write_durably

# Columns whose few values repeat: stored as a dictionary.
_REPEATING = ("patient", "zone", "source", "rule")
_BLOCK = 1 << 20


class Segments:
    """The segments of one store. What was read is mapped, not copied: the system may drop it again at any time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: dict[str, pa.Table] = {}

    def write(self, content: bytes) -> tuple[str, bool]:
        """Write a segment (arrow_bytes) durably; return its name, and whether it is new. Raises StorageFailed."""
        path = self._folder / f"{bytes_hash(content)}.arrow"
        new = not path.exists()
        write_durably(path, content, 0o600)
        return path.name, new

    def remove(self, name: str) -> None:
        """Remove a segment that nothing names."""
        self._open.pop(name, None)
        (self._folder / name).unlink(missing_ok=True)

    def remove_all_but(self, named: Collection[str]) -> None:
        """Remove what a killed import left behind."""
        for path in list(self._folder.iterdir()):
            if path.name not in named:
                self.remove(path.name)

    def table(self, name: str) -> pa.Table:
        """Return a segment's rows. Raises StorageFailed, and Tampered when the bytes are not those that were stored."""
        if name not in self._open:
            path = self._folder / name
            try:
                if f"{_sha256(path)}.arrow" != name:
                    raise Tampered(
                        f"segment {name[:12]}", 0, "the bytes are not those that were stored", "restore the store"
                    )
                with pa.memory_map(str(path)) as mapped, pa.ipc.open_file(mapped) as reader:
                    self._open[name] = reader.read_all()
            except OSError as error:
                raise StorageFailed(
                    f"segment {name[:12]} cannot be read: {error.strerror}", "restore the store"
                ) from error
        return self._open[name]

    def frame(self, places: Sequence[tuple[str, int, int]], columns: Sequence[str] | None = None) -> pd.DataFrame:
        """Return the rows at these places (segment, first row, rows), one place after the other; there is one at least.

        columns: these alone.
        """
        parts = [self.table(name).slice(first, rows) for name, first, rows in places]
        parts = parts if columns is None else [part.select(list(columns)) for part in parts]
        frame: pd.DataFrame = pa.concat_tables([_plain(part) for part in parts]).to_pandas(types_mapper=_string_type)
        return frame


def rows_of(content: bytes) -> pd.DataFrame:
    """Return the rows of a segment's bytes."""
    with pa.ipc.open_file(pa.BufferReader(content)) as reader:
        return _to_frame(reader.read_all())


def _to_frame(table: pa.Table) -> pd.DataFrame:
    frame: pd.DataFrame = _plain(table).to_pandas(types_mapper=_string_type)
    return frame


def _plain(table: pa.Table) -> pa.Table:
    fields = [field.with_type(pa.string()) if field.name in _REPEATING else field for field in table.schema]
    return table.cast(pa.schema(fields))


def arrow_bytes(frame: pd.DataFrame) -> bytes:
    """Return an Arrow IPC file, uncompressed so that anybody can look for what must not be in it."""
    table = pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata(None)
    for name in _REPEATING:
        if name in frame.columns:
            column = table[name].combine_chunks().dictionary_encode()
            table = table.set_column(table.column_names.index(name), name, column)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue().to_pybytes())


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _string_type(kind: pa.DataType) -> pd.StringDtype | None:
    return pd.StringDtype(na_value=np.nan) if pa.types.is_string(kind) or pa.types.is_large_string(kind) else None
