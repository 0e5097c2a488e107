"""Keeps the programs of a node or an aggregator running, tells about them in JSON lines, and stops them together.

The one module of `pipeline` that starts processes, beside the client that opens connections: both sides need it and
may not import each other. Each program leads a process group of its own, so that what it has started ends with it; and
it is told to end when the supervisor dies, whatever kills that (prctl(2), PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO

from data_schemas.errors import BadInput
from pipeline.log_lines import log_line

# What ran this long had not failed at its start: the next pause is a short one again.
_SETTLED_S, _FIRST_PAUSE_S, _LONGEST_PAUSE_S, _STOP_S = 60.0, 1.0, 30.0, 15.0
_LOOK_S = 0.2
_PR_SET_PDEATHSIG = 1
# As Flower's own logger and uvicorn's under it write them.
_LEVEL = re.compile(r"(DEBUG|INFO|WARNING|WARN|ERROR|CRITICAL)(?:\s*:| \[[\w.]+\])\s*(.*)")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Program:
    """A program to keep running: its name in the log, its command line, and its whole environment."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(repr=False)


def write_line(line: str) -> None:
    """Write a log line to standard output at once; a closed output stops nothing."""
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


def supervise(programs: Sequence[Program], write: Callable[[str], None] = write_line) -> None:
    """Run programs until SIGTERM or SIGINT; one that ends is started again, after 1, 2, 4 ... 30 seconds.

    Call it from the main thread. Returns when all of them, and whatever they had started, have ended.
    """
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    wards = [_Ward(program, write) for program in programs]
    try:
        while not stop.wait(_LOOK_S):
            for ward in wards:
                ward.look()
    finally:
        for ward in reversed(wards):
            ward.stop()
    write(log_line("supervisor", "info", "stopped"))


class _Ward:
    """One program under supervision."""

    def __init__(self, program: Program, write: Callable[[str], None]) -> None:
        self._program, self._write = program, write
        self._process: subprocess.Popen[str] | None = None
        self._started, self._again, self._pause = 0.0, 0.0, _FIRST_PAUSE_S

    def look(self) -> None:
        """Start what does not run, note what has ended."""
        now = time.monotonic()
        if self._process is None:
            if now >= self._again:
                self._start(now)
        elif (code := self._process.poll()) is not None:
            self._pause = _FIRST_PAUSE_S if now - self._started > _SETTLED_S else min(self._pause * 2, _LONGEST_PAUSE_S)
            self._again = now + self._pause
            _end_group(self._process.pid)
            self._process = None
            self._tell("warning", "ended, starts again", exit_code=code, in_seconds=self._pause)

    def stop(self) -> None:
        """Ask the program to end; after 15 seconds, and for whatever it leaves behind, SIGKILL."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        try:
            code = self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            code = None
        _end_group(self._process.pid)
        self._process.wait()
        self._tell("info", "stopped", exit_code=code)

    def _start(self, now: float) -> None:
        try:
            self._process = subprocess.Popen(  # noqa: S603
                self._program.command,
                env=dict(self._program.environment),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
                preexec_fn=_end_with_parent,  # noqa: PLW1509
            )
        except OSError as error:
            raise BadInput(
                f"{self._program.command[0]} cannot be started: {error.strerror}", "install Islet again"
            ) from error
        self._started = now
        self._tell("info", "started", pid=self._process.pid)
        assert self._process.stdout is not None  # noqa: S101
        threading.Thread(target=self._relay, args=(self._process.stdout,), daemon=True).start()

    def _relay(self, output: IO[str]) -> None:
        with output:
            for raw in output:
                line = _COLOUR.sub("", raw).rstrip()
                if line.startswith('{"at":'):
                    self._write(line)
                elif line:
                    self._translate(line)

    def _translate(self, line: str) -> None:
        found = _LEVEL.search(line)
        level, text = (found[1].lower(), found[2]) if found else ("info", line)
        if text:
            self._tell("warning" if level == "warn" else level, text)

    def _tell(self, level: str, message: str, **more: object) -> None:
        self._write(log_line(self._program.name, level, message, **more))


def _end_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def _end_with_parent() -> None:
    """Run in the child before it becomes the program."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
