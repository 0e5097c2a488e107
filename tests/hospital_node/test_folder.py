"""The node folder: made once, private, and used by one process at a time."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from data_schemas.errors import BadInput, NodeBusy, Tampered
from hospital_node.folder import NodeFolder
from hospital_node.settings import write_settings
from tests.hospital_node.small_node import make_node, settings

OPEN = """
import sys
from pathlib import Path
from data_schemas.errors import IsletError
from hospital_node.folder import NodeFolder
try:
    with NodeFolder.open(Path(sys.argv[1])):
        print("open")
except IsletError as error:
    print(error.message)
    sys.exit(error.exit_code)
"""


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_node_has_private_keys_and_an_empty_book(tmp_path: Path) -> None:
    """Keys are 0600, the folder 0700, the book is empty and verifies."""
    node_path = make_node(tmp_path / "north")

    assert [mode(node_path / f) for f in ("keys/node.ed25519", "keys/pseudonym.key", "budget.db")] == [0o600] * 3
    assert mode(node_path) == 0o700
    with NodeFolder.open(node_path) as node:
        assert node.budget().rows() == ()
        assert len(node.pseudonym_key) == 32


def test_a_seed_repeats_keys_and_no_seed_never_does(tmp_path: Path) -> None:
    """The same seed and name give the same keys, another name others; without a seed keys are new each time."""
    keys = {}
    nodes: dict[str, dict[str, Any]] = {
        "a": {},
        "b": {},
        "other name": {"name": "south"},
        "fresh 1": {"seed": None},
        "fresh 2": {"seed": None},
    }
    for label, changes in nodes.items():
        with NodeFolder.open(make_node(tmp_path / label, **changes)) as node:
            keys[label] = (node.key.public.hex, node.pseudonym_key)

    assert keys["a"] == keys["b"]
    for place in (0, 1):
        assert len({key[place] for key in keys.values()}) == 4


def test_an_existing_node_is_never_made_anew(tmp_path: Path) -> None:
    """Creating over a node, or over a folder with other files, is refused and changes nothing."""
    node_path = make_node(tmp_path / "north")
    before = (node_path / "keys/node.ed25519").read_bytes()
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")

    for path in (node_path, other):
        with pytest.raises(BadInput):
            NodeFolder.create(path, settings(seed=None))

    assert before == (node_path / "keys/node.ed25519").read_bytes()


def test_removing_node_toml_does_not_forget_the_budget(tmp_path: Path) -> None:
    """A node created again over its own keys keeps keys and book."""
    node_path = make_node(tmp_path / "north")
    keys = (node_path / "keys/node.ed25519").read_bytes()
    book = (node_path / "budget.db").read_bytes()
    (node_path / "node.toml").unlink()

    NodeFolder.create(node_path, settings(seed=None))

    assert keys == (node_path / "keys/node.ed25519").read_bytes()
    assert book == (node_path / "budget.db").read_bytes()


def test_removing_the_book_is_noticed(tmp_path: Path) -> None:
    """A node without its budget book is tampered with, not new."""
    node_path = make_node(tmp_path / "north")
    (node_path / "budget.db").unlink()

    with NodeFolder.open(node_path) as node, pytest.raises(Tampered, match="missing"):
        node.budget()


def test_a_second_process_is_told_who_holds_the_node(tmp_path: Path) -> None:
    """While a process uses a node, another one stops with exit code 2 and the holder's pid; afterwards it may."""
    node_path = make_node(tmp_path / "north")
    command = [sys.executable, "-c", OPEN, str(node_path)]

    with NodeFolder.open(node_path):
        refused = subprocess.run(command, capture_output=True, text=True, check=False)
    allowed = subprocess.run(command, capture_output=True, text=True, check=False)

    assert (refused.returncode, f"process {os.getpid()}" in refused.stdout) == (2, True)
    assert (allowed.returncode, allowed.stdout) == (0, "open\n")


def test_threads_exclude_each_other_on_one_node_only(tmp_path: Path) -> None:
    """Two threads of a process may use two nodes, and not the same one."""
    north, south = make_node(tmp_path / "north"), make_node(tmp_path / "south", name="south")
    outcome: dict[str, str] = {}

    def use(path: Path) -> None:
        try:
            with NodeFolder.open(path) as node:
                outcome[path.name] = node.settings.name
        except NodeBusy:
            outcome[path.name] = "busy"

    with NodeFolder.open(north):
        threads = [threading.Thread(target=use, args=(path,)) for path in (north, south)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert outcome == {"north": "busy", "south": "south"}


def test_a_folder_that_is_no_node_is_refused(tmp_path: Path) -> None:
    """Opening any other folder is BadInput, and a damaged pseudonym key is never replaced."""
    with pytest.raises(BadInput, match="not a node"), NodeFolder.open(tmp_path):
        pass
    node_path = make_node(tmp_path / "north")
    (node_path / "keys/pseudonym.key").write_text("short")
    write_settings(node_path / "node.toml", settings(min_patients=3))

    with NodeFolder.open(node_path) as node, pytest.raises(BadInput, match="pseudonym"):
        _ = node.pseudonym_key
