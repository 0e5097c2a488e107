"""A watched folder: files are taken once, when they have stopped changing."""

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from data_schemas.errors import BadInput
from data_schemas.layout import load_layout
from hospital_node.importing import import_exports
from hospital_node.store import Store
from hospital_node.watching import watch

KEY = b"k" * 32
LAYOUT = load_layout("canonical")
HEAD = "patient,time,glucose_mg_dl\n"


class Looks(threading.Event):
    """An event whose waits are the looks of the watch: between two of them a step of a story happens."""

    def __init__(self, *steps: Callable[[], object]) -> None:
        super().__init__()
        self.steps = list(steps)

    def wait(self, timeout: float | None = None) -> bool:
        """Do the next step; stop after the last."""
        del timeout
        if not self.steps:
            self.set()
        else:
            self.steps.pop(0)()
        return self.is_set()


def nothing() -> None:
    """Let a look pass."""


def test_files_are_taken_once_as_they_arrive(tmp_path: Path) -> None:
    """One that is there and one that arrives are imported; none twice, also by a second watch over the same store."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.csv").write_text(HEAD + "p,2024-01-01T00:00:00Z,100\n")
    store = Store(tmp_path / "store")
    accepted: list[int] = []

    def take(file: Path) -> None:
        accepted.append(import_exports(tmp_path / "in", LAYOUT, None, KEY, store, only={file}).accepted)

    def arrive() -> None:
        (tmp_path / "in" / "b.csv").write_text(HEAD + "p,2024-01-01T00:05:00Z,101\n")

    watch(tmp_path / "in", LAYOUT, take, pytest.fail, Looks(nothing, arrive, nothing, nothing, nothing))
    assert accepted == [1, 1]
    watch(tmp_path / "in", LAYOUT, take, pytest.fail, Looks(nothing, nothing))

    assert accepted == [1, 1, 0, 0]
    assert store.counts().readings == 2


def test_a_file_that_still_grows_waits(tmp_path: Path) -> None:
    """It is taken when two looks find it the same."""
    path = tmp_path / "a.csv"
    taken: list[str] = []

    def grow() -> None:
        path.write_text((path.read_text() if path.exists() else HEAD) + "p,2024-01-01T00:00:00Z,100\n")

    steps = (grow, grow, grow, nothing, nothing)
    watch(tmp_path, LAYOUT, lambda file: taken.append(file.read_text()), pytest.fail, Looks(*steps))

    assert [text.count("\n") for text in taken] == [4]


def test_a_refused_file_does_not_stop_the_others_and_is_tried_again_when_it_changes(tmp_path: Path) -> None:
    """The refusal is told once for each state of the file."""
    bad, refusals, taken = tmp_path / "a.csv", [], []
    bad.write_text("x\n")
    (tmp_path / "b.csv").write_text("y\n")

    def take(file: Path) -> None:
        if file.read_text() == "x\n":
            raise BadInput("no", "mend it")
        taken.append(file.name)

    def mend() -> None:
        bad.write_text("mended\n")
        os.utime(bad, ns=(1, 1))

    watch(tmp_path, LAYOUT, take, refusals.append, Looks(nothing, nothing, mend, nothing, nothing))

    assert len(refusals) == 1
    assert taken == ["b.csv", "a.csv"]
