"""Who asked for what: one JSON line per authenticated or refused request, at the node, without any reading.

reports/access.jsonl (0600): at, who (key or token, never its secret), operation, patient (pseudonym), outcome. It is
turned over at 8 MiB and four old files are kept.
"""

from __future__ import annotations

import json
import os
import threading
from datetime import UTC, datetime
from pathlib import Path

from data_schemas.frozen import Frozen

MOST_BYTES = 8 * 1024 * 1024
KEPT_FILES = 4
# A failed login or a scan names paths and people that we did not define; nothing longer is kept of them.
_MOST_CHARACTERS = 128


class Access(Frozen):
    """One request: epoch seconds, caller, method and route template, pseudonym it was about, and how it ended."""

    at: float
    who: str
    operation: str
    patient: str | None = None
    outcome: str

    @property
    def moment(self) -> datetime:
        """The same as a UTC time."""
        return datetime.fromtimestamp(self.at, tz=UTC)


class AuditLog:
    """Append-only log of one node. A line that the disk refuses is counted in `lost`; the request goes on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lost = 0
        self._lock = threading.Lock()
        self._handle: int | None = None
        self._size = 0

    def write(self, access: Access) -> None:
        """Append one line."""
        line = json.dumps({name: _short(value) for name, value in access if value is not None}) + "\n"
        data = line.encode()
        with self._lock:
            try:
                if self._handle is not None and self._size + len(data) > MOST_BYTES:
                    self._turn_over()
                if self._handle is None:
                    self._handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
                    self._size = os.fstat(self._handle).st_size
                self._size += os.write(self._handle, data)
            except OSError:
                self.lost += 1

    def close(self) -> None:
        """Close the file; another line opens it again."""
        with self._lock:
            if self._handle is not None:
                os.close(self._handle)
                self._handle = None

    def newest(self, count: int) -> tuple[Access, ...]:
        """Return the newest lines of the present file, newest first; a torn last line is left out."""
        try:
            with self.path.open("rb") as file:
                file.seek(max(0, self.path.stat().st_size - count * 512))
                lines = file.read().splitlines()[-count:]
        except OSError:
            return ()
        found = []
        for line in reversed(lines):
            try:
                found.append(Access.model_validate_json(line))
            except ValueError:
                continue
        return tuple(found)

    def _turn_over(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
        for number in range(KEPT_FILES - 1, 0, -1):
            older = self.path.with_name(f"{self.path.name}.{number}")
            if older.exists():
                older.replace(self.path.with_name(f"{self.path.name}.{number + 1}"))
        self.path.replace(self.path.with_name(f"{self.path.name}.1"))


def _short(value: object) -> object:
    return value[:_MOST_CHARACTERS] if isinstance(value, str) else value
