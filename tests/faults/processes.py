"""The processes of a drill: one for the aggregator, one for each hospital, and what befalls them.

A doomed process dies by SIGKILL, or finds its disk full, at a stage drawn from the seed: a stage is the moment before
or after a file is synced, a file is replaced, a row is written or an entry is logged, and the coming and going of a
message.
"""

from __future__ import annotations

import errno
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, RecordDict
from flwr.common.constant import ErrorCode
from flwr.supercore.task_identity import TaskIdentity

from aggregator import embedded_grid, ledger, server_app, settings
from aggregator.embedded_grid import EmbeddedGrid
from data_schemas.errors import IsletError

# Loaded here once: the processes of a drill are forked from one that has loaded them.
from hospital_node import book_file, client_app, local_round, release, scoring, witness  # noqa: F401
from pipeline import accounting, private_training, windows  # noqa: F401
from tests.faults.house import NAMES

FINISHED, STOPPED = 0, 3
FATES = ("dropped", "reply lost", "duplicated", "late")


@dataclass(frozen=True)
class Doom:
    """At which stage a process meets what; 0 is never."""

    stage: int = 0
    full_disk: bool = False


def seeded(seed: str) -> random.Random:
    """Randomness of a drill, which is to be repeatable."""
    return random.Random(seed)  # noqa: S311


def socket_of(path: Path, name: str) -> str:
    return str(path / f"{name}.socket")


def note(path: Path, what: str) -> None:
    """Append a line to the drill's diary; a kill may follow at once."""
    descriptor = os.open(path / "diary", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(descriptor, f"{what}\n".encode())
    os.close(descriptor)


def stages(path: Path, who: str, doom: Doom) -> Callable[[str], None]:
    """Count this process's stages from now on and bring about its doom."""
    lock, count = threading.Lock(), 0

    def stage(what: str) -> None:
        nonlocal count
        with lock:
            count += 1
            if count != doom.stage:
                return
            note(path, f"{who}: {'disk full' if doom.full_disk and 'file' in what else 'killed'} {what}")
        if doom.full_disk and "file" in what:
            raise OSError(errno.ENOSPC, "No space left on device")
        os.kill(os.getpid(), signal.SIGKILL)

    def around(owner: Any, name: str, what: str) -> None:
        function = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            stage(f"before {what}")
            result = function(*args, **kwargs)
            if "file" not in what:
                stage(f"after {what}")
            return result

        setattr(owner, name, wrapped)

    around(os, "fsync", "a file is synced")
    around(os, "replace", "a file is replaced")
    around(book_file, "append", "a row of the book")
    around(ledger.Ledger, "append_once", "an entry of the ledger")
    return stage


def quiet(path: Path, who: str) -> None:
    """Send what a process prints to its log."""
    log = os.open(path / f"{who}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)


def hospital(path: Path, name: str, doom: Doom) -> None:
    """Answer messages with the real ClientApp until the end, one at a time."""
    quiet(path, name)
    torch.set_num_threads(1)
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
    stage = stages(path, name, doom)
    Path(socket_of(path, name)).unlink(missing_ok=True)
    with Listener(socket_of(path, name), "AF_UNIX") as listener:
        while True:
            with listener.accept() as connection:
                serve(connection, path / name, stage)


def serve(connection: Connection, home: Path, stage: Callable[[str], None]) -> None:
    try:
        wire = connection.recv_bytes()
        stage("a message has come")
        context = Context(1, 2, {"home": str(home)}, RecordDict(), {})
        reply = embedded_grid._wire(client_app.app(embedded_grid._parse(wire), context))
        stage("the answer is ready")
        connection.send_bytes(reply)
        stage("the answer has gone")
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the aggregator died while we worked


class FaultyGrid(EmbeddedGrid):
    """Carries messages to the hospitals' processes; some are dropped, lost on the way back, duplicated or late.

    As from a SuperLink, a message without an answer ends as expired, one whose hospital died as node unavailable.
    """

    def __init__(self, path: Path, draw: str, faults: float, stage: Callable[[str], None]) -> None:
        super().__init__(client_app.app, {name: path / name for name in NAMES}, workers=len(NAMES))
        self._path, self._draw, self._faults, self._stage = path, draw, faults, stage
        self._late: dict[str, list[bytes]] = {name: [] for name in NAMES}

    def _answer(self, letter: embedded_grid._Letter) -> bytes:
        name, random_ = self._homes[letter.node_id].name, seeded(f"{self._draw} {letter.message_id}")
        fate = random_.choice(FATES) if random_.random() < self._faults else ""
        if fate:
            note(self._path, f"message {fate}")
        self._stage("a message goes out")
        while self._late[name]:
            self._exchange(name, self._late[name].pop(0), letter.expires_unix)
        if fate == "late":
            self._late[name].append(letter.wire)
        if fate in {"dropped", "late"}:
            return embedded_grid._wire(embedded_grid._error_reply(letter, ErrorCode.MESSAGE_UNAVAILABLE))
        reply = self._exchange(name, letter.wire, letter.expires_unix)
        if fate == "duplicated":
            reply = self._exchange(name, letter.wire, letter.expires_unix) or reply
        self._stage("a reply has come")
        if fate == "reply lost":
            return embedded_grid._wire(embedded_grid._error_reply(letter, ErrorCode.REPLY_MESSAGE_UNAVAILABLE))
        return reply or embedded_grid._wire(embedded_grid._error_reply(letter, ErrorCode.NODE_UNAVAILABLE))

    def _exchange(self, name: str, wire: bytes, expires_unix: float) -> bytes | None:
        """Deliver once, as soon as the hospital's process is there; None when it dies over it."""
        while time.time() < expires_unix:
            try:
                connection = Client(socket_of(self._path, name), "AF_UNIX")
            except (FileNotFoundError, ConnectionRefusedError):
                time.sleep(0.05)
                continue
            try:
                with connection:
                    connection.send_bytes(wire)
                    return connection.recv_bytes()
            except (EOFError, ConnectionError):
                return None
        return None


class Silent:
    """An observer that has nothing to show."""

    def round_closed(self, _summary: Any) -> None:
        """Keep silent."""

    def epoch_closed(self, _credit: Any) -> None:
        """Keep silent."""


def aggregator(path: Path, draw: str, faults: float, doom: Doom) -> None:
    """Run, or resume, the federation; the exit status says whether it finished, or stopped with a reason."""
    quiet(path, "aggregator")
    torch.set_num_threads(1)
    stage = stages(path, "aggregator", doom)
    try:
        grid = FaultyGrid(path, draw, faults, stage)
        server_app.run_folder(grid, settings.open_folder(path / "aggregator"), Silent())
    except IsletError as error:
        note(path, f"aggregator: stopped: {error.message}")
        sys.exit(STOPPED)
    os._exit(FINISHED)
