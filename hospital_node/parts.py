"""Parts of an export: groups of files that share nobody, so that each part can be read, judged and stored by itself."""

from __future__ import annotations

from collections.abc import Container, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from data_schemas.layout import Layout
from hospital_node.export_files import ExportFile, changed, each_file, find_files, read_files
from hospital_node.rows import people_of, read_raw
from hospital_node.stamps import OrderVote, order_of_all, order_vote

# Size, time of the last change and SHA-256.
Print: TypeAlias = tuple[int, int, str]

# Files of about this many bytes are read at a time.
PART_BYTES = 24 << 20


@dataclass(frozen=True, slots=True)
class Parts:
    """paths: the files of each part, in name order.  prints: what each file was when looked at; empty for one part.

    votes: of each file, which of the layout's time formats fit it, where the export as a whole decides.
    """

    paths: tuple[tuple[Path, ...], ...]
    prints: dict[Path, Print]
    votes: tuple[OrderVote, ...]

    def read(self, folder: Path, layout: Layout, number: int) -> tuple[ExportFile, ...]:
        """Return the files of a part. Raises BadInput when one is not what it was when the parts were made."""
        files = read_files(folder, layout.glucose_files, self.paths[number])
        for file in files:
            if self.prints and self.prints[file.path] != _print(file):
                raise changed(file.label)
        return files

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


def split(folder: Path, layout: Layout, only: Container[Path] | None = None) -> Parts:
    """Return the parts of an export, each of about PART_BYTES or one group of files that share people.

    An export that is no larger is one part, and is not looked at here. Raises BadInput.
    """
    paths = [p for p in find_files(folder, layout.glucose_files) if only is None or p in only]
    if sum(path.stat().st_size for path in paths) <= PART_BYTES or len(paths) < 2:
        return Parts((tuple(paths),), {}, ())
    prints: dict[Path, Print] = {}
    votes: list[OrderVote] = []
    groups = _Groups()
    for file in each_file(folder, layout.glucose_files, only):
        prints[file.path] = _print(file)
        # Files that are the same byte for byte are one person's.
        groups.join(file.path, ("bytes", file.sha256), *(("person", name) for name in people_of(file, layout)))
        if layout.time.order == "auto":
            raw = read_raw((file,), layout, (), layout.time.columns, glucose=True)
            votes.append(order_vote(raw.table["time"][raw.table["reading"]], layout.time))
    return Parts(_filled(groups.of(paths)), prints, tuple(votes))


def _filled(groups: list[tuple[Path, ...]]) -> tuple[tuple[Path, ...], ...]:
    """Return the groups, neighbours put together up to PART_BYTES."""
    parts: list[tuple[Path, ...]] = []
    size = PART_BYTES
    for group in groups:
        more = sum(path.stat().st_size for path in group)
        if size + more > PART_BYTES:
            parts.append(())
            size = 0
        parts[-1] += group
        size += more
    return tuple(tuple(sorted(part)) for part in parts)


def _print(file: ExportFile) -> Print:
    return (file.size, file.mtime_ns, file.raw_sha256)


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
