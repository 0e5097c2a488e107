"""Parts of an export, such that no two share a person: each can be read, judged and stored by itself.

Where a column tells the person, a part is some people's lines of all files; else it is whole files.
"""

from __future__ import annotations

import functools
from collections.abc import Container, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_schemas.layout import Layout
from hospital_node.crew import Run
from hospital_node.export_files import (
    ExportFile,
    Print,
    changed,
    each_file,
    find_files,
    place_of,
    read_files,
    refuse_if_changed,
)
from hospital_node.lines import Lines, Picked, cut_by_line, lines_of, shares
from hospital_node.rows import people_of, read_raw
from hospital_node.stamps import OrderVote, order_of_all, order_vote

# About this many bytes of an export are read at a time.
PART_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Share:
    """Where a part lies: whole files, or lines of files.

    prints: what each whole file was when it was looked at; empty where nothing was. first_row: the part's rows are
    numbered from here on.
    """

    paths: tuple[Path, ...] = ()
    lines: tuple[Picked, ...] = ()
    prints: dict[Path, Print] = field(default_factory=dict)
    first_row: int = 0

    def read(self, folder: Path, layout: Layout) -> tuple[ExportFile, ...]:
        """Return the files. Raises BadInput when one is not what it was when the parts were made."""
        if self.lines:
            return tuple(lines.file() for lines in self.lines)
        files = read_files(folder, layout.glucose_files, self.paths)
        for file in files:
            if self.prints and self.prints[file.path] != file.print:
                raise changed(file.label)
        return files

    def refuse_if_changed(self, files: tuple[ExportFile, ...]) -> None:
        """Refuse BadInput when a file is not what was read; of several parts, Parts.refuse_if_changed tells."""
        if not self.prints and not self.lines:
            refuse_if_changed(files)


@dataclass(frozen=True, slots=True)
class Parts:
    """shares: the parts, made as they are asked for.  prints: what each file was; empty for one part.

    votes: of each file, which of the layout's time formats fit it, where the export as a whole decides.
    """

    shares: Iterator[Share]
    prints: dict[Path, Print]
    votes: tuple[OrderVote, ...] = ()

    def refuse_if_changed(self) -> None:
        """Refuse BadInput when a file has another size or time than when it was looked at."""
        for number, (path, (size, mtime_ns, sha256)) in enumerate(self.prints.items(), start=1):
            try:
                state = path.stat()
            except OSError:
                state = None
            if state is None or (state.st_size, state.st_mtime_ns) != (size, mtime_ns):
                raise changed(f"file {number} of {len(self.prints)} (sha256 {sha256[:12]})")

    def layout(self, layout: Layout) -> Layout:
        """Return the layout as the whole export settles its order of day and month. Raises BadInput."""
        if not self.votes:
            return layout
        times = order_of_all(self.votes, layout.time)
        return layout.model_copy(update={"time": times})


def split(folder: Path, layout: Layout, only: Container[Path] | None, run: Run) -> Parts:
    """Return the parts of an export, each of about PART_BYTES or one person's.

    An export that is no larger is one part, and is not looked at here. Raises BadInput.
    """
    everything = find_files(folder, layout.glucose_files)
    paths = [path for path in everything if only is None or path in only]
    if sum(path.stat().st_size for path in paths) <= PART_BYTES:
        return Parts(iter([Share(tuple(paths))]), {})
    if cut_by_line(layout):
        places = {path: place_of(number, len(everything)) for number, path in enumerate(everything, start=1)}
        looked = list(run(functools.partial(_lines, layout=layout), [(path, places[path]) for path in paths]))
        lines = [found for found in looked if found is not None]
        if len(lines) == len(looked):
            return Parts(_by_line(lines), {file.path: file.print for file in lines})
    return _whole_files(folder, layout, paths, run)


def _lines(file: tuple[Path, str], layout: Layout) -> Lines | None:
    return lines_of(*file, layout)


def _by_line(lines: list[Lines]) -> Iterator[Share]:
    first_row = 0
    for picked in shares(lines, PART_BYTES):
        yield Share(lines=picked, first_row=first_row)
        # A row takes a byte at least.
        first_row += sum(file.size for file in picked)


@dataclass(frozen=True, slots=True)
class _Look:
    """What a look at a file tells. marks: what it shares with others; size: in bytes, unpacked."""

    path: Path
    print: Print
    size: int
    marks: tuple[Hashable, ...]
    vote: OrderVote | None


def _look(paths: tuple[Path, ...], folder: Path, layout: Layout) -> list[_Look]:
    looks = []
    for file in each_file(folder, layout.glucose_files, paths):
        vote = None
        if layout.time.order == "auto":
            raw = read_raw((file,), layout, (), layout.time.columns, glucose=True)
            vote = order_vote(raw.table["time"][raw.table["reading"]], layout.time)
        # Files that are the same byte for byte are one person's.
        marks = (("bytes", file.sha256), *(("person", name) for name in people_of(file, layout)))
        looks.append(_Look(file.path, file.print, len(file.content), marks, vote))
    return looks


def _whole_files(folder: Path, layout: Layout, paths: list[Path], run: Run) -> Parts:
    """Return parts of whole files: those that share people stay together."""
    sizes = {path: path.stat().st_size for path in paths}
    batches = run(functools.partial(_look, folder=folder, layout=layout), _filled([(p,) for p in paths], sizes))
    looks = [look for batch in batches for look in batch]
    groups, sizes = _Groups(), dict.fromkeys(paths, 0)
    for look in looks:
        groups.join(look.path, *look.marks)
        sizes[look.path] += look.size
    prints = {look.path: look.print for look in looks}
    parts = _numbered(_filled(groups.of(list(prints)), sizes), prints, sizes)
    return Parts(parts, prints, tuple(look.vote for look in looks if look.vote is not None))


def _numbered(parts: Sequence[tuple[Path, ...]], prints: dict[Path, Print], sizes: dict[Path, int]) -> Iterator[Share]:
    first_row = 0
    for paths in parts:
        yield Share(tuple(sorted(paths)), prints={path: prints[path] for path in paths}, first_row=first_row)
        first_row += sum(sizes[path] for path in paths)


def _filled(groups: list[tuple[Path, ...]], sizes: dict[Path, int]) -> list[tuple[Path, ...]]:
    """Return the groups, neighbours put together up to PART_BYTES."""
    parts: list[tuple[Path, ...]] = []
    size = PART_BYTES
    for group in groups:
        more = sum(sizes[path] for path in group)
        if size + more > PART_BYTES:
            parts.append(())
            size = 0
        parts[-1] += group
        size += more
    return parts


class _Groups:
    """Which files belong together: those that share a mark, directly or through others."""

    def __init__(self) -> None:
        self._above: dict[Hashable, Hashable] = {}

    def _top(self, item: Hashable) -> Hashable:
        while (above := self._above.setdefault(item, item)) != item:
            self._above[item] = self._above[above]
            item = above
        return item

    def join(self, path: Path, *marks: Hashable) -> None:
        """Note that a file has these marks."""
        for mark in marks:
            self._above[self._top(mark)] = self._top(path)

    def of(self, paths: list[Path]) -> list[tuple[Path, ...]]:
        """Return the groups, in the order of their first files."""
        groups: dict[Hashable, tuple[Path, ...]] = {}
        for path in paths:
            top = self._top(path)
            groups[top] = (*groups.get(top, ()), path)
        return list(groups.values())
