"""The error tree. Every error says what happened and, in its hint, what to do about it.

IsletError                  exit code 2: wrong use or bad input; nothing was changed
├── BadInput                a file, setting or argument that cannot be used as it is
├── NodeBusy                another process holds the node folder
├── StorageFailed           the disk refused a write (full, read-only, I/O error)
└── CheckFailed             exit code 1: a verification ran and found something wrong
    └── Tampered            stored bytes differ from what was signed or hashed (names the file and the offset)

Messages and hints never contain a reading, a name, a birth date or a secret.
"""

from __future__ import annotations


class IsletError(Exception):
    """An error that tells its reader what to do."""

    exit_code = 2

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class BadInput(IsletError):
    """A file, setting or argument cannot be used as it is."""


class NodeBusy(IsletError):
    """Another process holds the node folder."""


class StorageFailed(IsletError):
    """The disk refused a write."""


class CheckFailed(IsletError):
    """A verification ran and found something wrong."""

    exit_code = 1


class Tampered(CheckFailed):
    """Stored bytes differ from what was signed or hashed."""

    def __init__(self, name: str, offset: int, what: str, hint: str = "") -> None:
        super().__init__(f"{name}: {what} at offset {offset}", hint)
        self.name = name
        self.offset = offset
