"""Imports that are killed, each in a process of its own, before every call by which they change a file.

python -m tests.hospital_node.killed_import FOLDER     prints one line of JSON for each kill, for test_killed.py
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_schemas.layout import load_layout
from hospital_node import importing, parts
from hospital_node.checked import CheckedPart
from hospital_node.importing import Export
from hospital_node.store import Store
from hospital_node.suites import load_suite

KEY = b"k" * 32
HEAD = "patient,time,glucose_mg_dl\n"
# Calls that change files or make the change last.
CALLS = ("open", "write", "fsync", "rename", "replace", "unlink")


def export(folder: Path) -> Export:
    """Three people in files of their own, one row of each beyond the range: three parts of readings and quarantine."""
    folder.mkdir(exist_ok=True)
    for number, name in enumerate("abc"):
        rows = [f"{name},2024-01-13T00:{5 * at:02d}:00Z,{100 + at + number}\n" for at in range(6)]
        (folder / f"{name}.csv").write_text(HEAD + "".join(rows) + f"{name},2024-01-13T01:00:00Z,700\n")
    return Export(folder, load_layout("canonical"), None, KEY)


def checked(exports: Export) -> list[CheckedPart]:
    """What an import stores: validation changes no file, so it is done once for all of them."""
    return list(importing._checked(exports, load_suite()))


def store_all(checked_parts: list[CheckedPart], store: Path) -> None:
    """Store an import as take_in does."""
    with Store(store).importing() as incoming:
        for part in checked_parts:
            incoming.add(part)
        incoming.finish({})


def state(store: Path) -> tuple[int, int, int, int]:
    """Readings, quarantined rows, files and imports of a store; everything is read and checked."""
    held = Store(store)
    counts = held.counts()
    readings = sum(len(held.readings(patient)) for patient in held.patients())
    assert (readings, len(held.quarantined())) == (counts.readings, counts.quarantined)
    return readings, counts.quarantined, counts.files, held.past().people


class Countdown:
    """Kills the process before the n-th change of a file."""

    def __init__(self, calls: int) -> None:
        self.left = calls

    def tick(self) -> None:
        """Count one change."""
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def before(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return the call with the tick before it."""

        def counted(*arguments: Any, **more: Any) -> Any:
            self.tick()
            return call(*arguments, **more)

        return counted


def in_child(work: Callable[[], None]) -> int:
    """Do it in a forked process and return how that ended."""
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    return os.waitpid(child, 0)[1]


def killed(checked_parts: list[CheckedPart], store: Path, calls: int) -> Callable[[], None]:
    """One import that is killed before its n-th change."""

    def work() -> None:
        count = Countdown(calls)
        for name in CALLS:
            setattr(os, name, count.before(getattr(os, name)))
        connect = sqlite3.connect

        def watched(*arguments: Any, **more: Any) -> sqlite3.Connection:
            db = connect(*arguments, **more)
            # Before every statement that changes something, the commit among them.
            db.set_trace_callback(lambda statement: None if statement.startswith("SELECT") else count.tick())
            return db

        sqlite3.connect = watched  # type: ignore[assignment]
        store_all(checked_parts, store)

    return work


def main(home: Path) -> None:
    """Kill imports ever later until one ends by itself."""
    parts.PART_BYTES = 10
    exports, before = export(home / "in"), home / "before"
    first = Export(home / "first", exports.layout, None, KEY)
    first.folder.mkdir()
    (first.folder / "old.csv").write_text(HEAD + "old,2024-01-12T00:00:00Z,99\n")
    store_all(checked(first), before)
    found = checked(exports)
    for calls in range(1, 1000):
        store = home / f"store-{calls}"
        shutil.copytree(before, store)
        ended = in_child(killed(found, store, calls))
        after = state(store)
        mended = in_child(functools.partial(store_all, found, store))
        left = len(list((store / "segments").iterdir()))
        told = {"killed": os.WIFSIGNALED(ended), "after": after, "ok": mended == 0, "mended": state(store)}
        sys.stdout.write(json.dumps({**told, "segments": left}) + "\n")
        shutil.rmtree(store)
        if not os.WIFSIGNALED(ended):
            return


if __name__ == "__main__":
    main(Path(sys.argv[1]))
