"""Watching an export folder: a file that has stopped changing is imported, once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import TypeAlias

from data_schemas.errors import BadInput
from data_schemas.layout import Layout
from hospital_node.export_files import find_files

# Size and time of the last change.
State: TypeAlias = tuple[int, int]


def watch(
    folder: Path,
    layout: Layout,
    take: Callable[[Path], None],
    refused: Callable[[BadInput], None],
    stop: Event,
    interval_s: float = 5.0,
) -> None:
    """Give each glucose file that is there or arrives to `take`, one at a time, until `stop` is set.

    A file counts as arrived when two looks, interval_s apart, find it the same; one that changes later is given
    again. One that `take` refuses with BadInput goes to `refused` and is left until it changes; other errors end the
    watch. `stop` is looked at between files, so that an import that has begun is finished.
    """
    seen: dict[Path, State] = {}
    done: dict[Path, State] = {}
    while not stop.is_set():
        now = _states(folder, layout.glucose_files)
        for path, state in now.items():
            if stop.is_set():
                return
            if seen.get(path) == state and done.get(path) != state:
                try:
                    take(path)
                except BadInput as error:
                    refused(error)
                done[path] = state
        seen = now
        stop.wait(interval_s)


def _states(folder: Path, pattern: str) -> dict[Path, State]:
    """Return the matching files and their states; an empty folder is watched too."""
    if not folder.is_dir():
        raise BadInput("the export folder does not exist", "give the folder that holds the export files")
    states: dict[Path, State] = {}
    try:
        paths = find_files(folder, pattern)
    except BadInput:
        return states
    for path in paths:
        try:
            state = path.stat()
        except FileNotFoundError:
            continue
        states[path] = (state.st_size, state.st_mtime_ns)
    return states
