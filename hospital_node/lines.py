"""Whose lines are whose: a file of many people is cut by line, so that a part can be some people of files of any size.

Identities stay in the memory of the processes that import; nothing of this is written.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pandas as pd

from data_schemas.errors import BadInput
from data_schemas.layout import Layout
from hospital_node.export_files import PACKED, ExportFile, Print, labelled
from hospital_node.rows import identities_of

Int: TypeAlias = npt.NDArray[np.int64]

# As much of a file is looked at, or picked from, at a time.
_BLOCK_BYTES = 8 << 20
# Encodings in which the byte of a line's end stands for nothing else.
_PLAIN = {"utf-8", "utf-8-sig", "ascii", "iso8859-1", "iso8859-15", "cp1252", "cp1250"}


@dataclass(frozen=True, slots=True)
class Lines:
    """The lines of a file in runs of one person.

    head: where the header ends.  names: the people.  person: int32[R], who.  ends: int64[R], the byte after a run.
    """

    path: Path
    print: Print
    label: str
    head: int
    names: tuple[str, ...]
    person: npt.NDArray[np.int32]
    ends: Int

    def of(self, chosen: npt.NDArray[np.bool_]) -> Picked:
        """Return the lines of the chosen people, bool[names]."""
        own = np.append(chosen, False)[self.person]
        starts = np.concatenate([[self.head], self.ends[:-1]])
        # Runs that touch are one: `first` and `last` of each stretch.
        first, last = own & ~np.append(False, own[:-1]), own & ~np.append(own[1:], False)
        return Picked(self.path, self.print, self.label, self.head, starts[first], self.ends[last])


@dataclass(frozen=True, slots=True)
class Picked:
    """Stretches of lines of one file: bytes starts[i] to ends[i], int64, in order. head: where the header ends."""

    path: Path
    print: Print
    label: str
    head: int
    starts: Int
    ends: Int

    @property
    def size(self) -> int:
        """Bytes of these lines."""
        return int((self.ends - self.starts).sum())

    def file(self) -> ExportFile:
        """Return the header and these lines as a file. Raises BadInput when the file has another size meanwhile."""
        size, mtime_ns, sha256 = self.print
        with self.path.open("rb", buffering=0) as file:
            content = [os.pread(file.fileno(), self.head, 0), *_stretches(file.fileno(), self.starts, self.ends)]
        whole = b"".join(content)
        if len(whole) != self.head + self.size:
            raise BadInput(f"{self.label} changed while it was imported", "wait until the export is complete")
        return ExportFile(self.path, self.label, size, mtime_ns, sha256, sha256, whole)


def cut_by_line(layout: Layout) -> bool:
    """Whether the layout tells the people by a column, and every line can be read by itself."""
    return (
        layout.reader == "delimited"
        and bool(layout.identity.columns)
        and ".zip/" not in layout.glucose_files
        and not (layout.preamble or layout.names or layout.time.clock_only or layout.interpolation)
        and layout.time.order == "declared"
        and layout.encoding.casefold() in _PLAIN
    )


def lines_of(path: Path, place: str, layout: Layout) -> Lines | None:
    """Return whose lines are whose in a file; None when its lines alone do not tell, as where a field has two lines."""
    names: dict[str, int] = {}
    people, ends, digest, at = list[npt.NDArray[np.int32]](), list[Int](), hashlib.sha256(), 0
    header = b""
    state = path.stat()
    try:
        for block in _blocks(path):
            digest.update(block)
            if not at:
                header = block[: block.find(b"\n") + 1]
            body = block if at else block[len(header) :]
            if not header or (not at and block.startswith(PACKED)):
                return None
            start = at or len(header)
            at = start + len(body)
            told = _people(header, body, layout)
            if told is None:
                return None
            codes = _numbered(told[0], names)
            change = np.flatnonzero(np.append(np.diff(codes) != 0, True)) if len(codes) else np.zeros(0, np.int64)
            people.append(codes[change])
            ends.append(start + told[1][change])
    except OSError as error:
        raise BadInput(f"{place} cannot be read: {error.strerror}", "check its permissions") from None
    if not at:
        return None
    sha256 = digest.hexdigest()
    made = (state.st_size, state.st_mtime_ns, sha256)
    label = labelled(place, sha256)
    return Lines(path, made, label, len(header), tuple(names), np.concatenate(people), np.concatenate(ends))


def _blocks(path: Path) -> Iterator[bytes]:
    """Yield the file in whole lines; the last may lack its end."""
    rest = b""
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            cut = block.rfind(b"\n") + 1
            if cut:
                yield rest + block[:cut]
                rest = block[cut:]
            else:
                rest += block
    if rest:
        yield rest


def _people(header: bytes, body: bytes, layout: Layout) -> tuple[pd.Series, Int] | None:
    """Return whose each line is, and where it ends; None when lines and rows are not the same."""
    if not body:
        return pd.Series([], dtype="str"), np.zeros(0, np.int64)
    ends = np.flatnonzero(np.frombuffer(body, dtype=np.uint8) == ord("\n")) + 1
    ends = ends if body.endswith(b"\n") else np.append(ends, len(body))
    try:
        file = ExportFile(Path(), "", 0, 0, "", "", header + body)
        told = identities_of(file, layout)
    except BadInput:
        return None
    return (told, ends) if len(told) == len(ends) and not told.isna().any() else None


def _numbered(told: pd.Series, names: dict[str, int]) -> npt.NDArray[np.int32]:
    """Return each person's number; new ones are added to `names`."""
    codes, different = pd.factorize(told)
    numbers = [names.setdefault(str(name).strip(), len(names)) for name in different]
    return np.array([*numbers, -1], dtype=np.int32)[codes]


def _stretches(descriptor: int, starts: Int, ends: Int) -> Iterator[bytes]:
    """Yield the bytes of the stretches, read in blocks that hold many of them or one."""
    first = 0
    while first < len(starts):
        last = int(np.searchsorted(ends, starts[first] + _BLOCK_BYTES, side="right"))
        last = max(last, first + 1)
        block = os.pread(descriptor, int(ends[last - 1] - starts[first]), int(starts[first]))
        yield _picked(block, starts[first:last] - starts[first], ends[first:last] - starts[first])
        first = last


def _picked(block: bytes, starts: Int, ends: Int) -> bytes:
    if len(starts) == 1:
        return block
    import pyarrow as pa

    # Wanted and unwanted stretches in turn, of which every other one is taken.
    edges = np.column_stack([starts, ends]).reshape(-1)
    both = pa.Array.from_buffers(
        pa.large_binary(), len(edges) - 1, [None, pa.py_buffer(edges.astype(np.int64)), pa.py_buffer(block)]
    )
    data = both.take(pa.array(np.arange(0, len(edges) - 1, 2))).buffers()[2]
    return bytes(memoryview(data)[: int((ends - starts).sum())])


def shares(lines: Sequence[Lines], size_bytes: int) -> Iterator[tuple[Picked, ...]]:
    """Yield the lines of all files in shares of about this size that hold different people.

    People are put together in the order in which they come up.
    """
    weight: dict[str, int] = {}
    for file in lines:
        length = np.diff(file.ends, prepend=file.head)
        size = np.bincount(file.person, weights=length, minlength=len(file.names))
        for name, own in zip(file.names, size.tolist(), strict=True):
            weight[name] = weight.get(name, 0) + int(own)
    share_of, filled, number = dict[str, int](), 0, 0
    for name, own in weight.items():
        if filled and filled + own > size_bytes:
            number, filled = number + 1, 0
        share_of[name] = number
        filled += own
    of_person = [np.array([share_of[name] for name in file.names], dtype=np.int64) for file in lines]
    for part in range(number + 1):
        chosen = [(file, share == part) for file, share in zip(lines, of_person, strict=True)]
        yield tuple(file.of(own) for file, own in chosen if own.any())
