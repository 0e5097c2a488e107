"""The structured log: one JSON object a line with at (UTC), level, program and message, wherever it is written.

Messages are ours: counts, codes, names of hospitals and files. Texts of other libraries' errors do not come here.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from pathlib import Path

# A log that has grown to this is put aside once, in place of the one put aside before.
MAX_BYTES = 8 * 1024 * 1024


def log_line(program: str, level: str, message: str, **more: object) -> str:
    """One line of the structured log, without its end."""
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return json.dumps({"at": at, "level": level, "program": program, "message": message, **more}, ensure_ascii=False)


def append(path: Path, line: str) -> None:
    """Add a line to a log file that only its owner reads. A log that cannot be written stops nothing."""
    with contextlib.suppress(OSError):
        if path.exists() and path.stat().st_size > MAX_BYTES:
            path.replace(path.with_name(path.name + ".1"))
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(descriptor, line.encode() + b"\n")
        finally:
            os.close(descriptor)


class JsonLines(logging.Handler):
    """Writes records of our own loggers as lines of the structured log: to a file, or to standard error."""

    def __init__(self, program: str, path: Path | None = None) -> None:
        super().__init__()
        self._program, self._path = program, path

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record; of an exception that hangs on it only the kind."""
        kind = record.exc_info[0].__name__ if record.exc_info and record.exc_info[0] else None
        more = {} if kind is None else {"error": kind}
        line = log_line(self._program, record.levelname.lower(), record.getMessage(), **more)
        if self._path is not None:
            append(self._path, line)
        else:
            os.write(2, line.encode() + b"\n")
