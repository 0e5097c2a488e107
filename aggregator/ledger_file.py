"""A ledger file read for verification: its bytes, its SQLite structure, and where in the file a value lies."""

from __future__ import annotations

import mmap
import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aggregator.ledger import APPLICATION_ID, PAGE_BYTES, SCHEMA, SCHEMA_VERSION, SQLITE_ERRORS
from data_schemas.errors import StorageFailed, Tampered

# How long to wait while the aggregator commits.
_BUSY_SECONDS = 5.0
HINT = "Restore the ledger from a backup, and compare it with the checkpoints that the hospitals keep."


@dataclass(frozen=True)
class LedgerFile:
    """A ledger file: its bytes, and a connection inside one read transaction."""

    path: Path
    content: mmap.mmap
    connection: sqlite3.Connection

    def rows(self, sql: str) -> Iterator[tuple[Any, ...]]:
        """Rows of a query; Tampered when SQLite stumbles over a damaged page."""
        try:
            yield from self.connection.execute(sql)
        except SQLITE_ERRORS as error:
            raise _unreadable(self.path, error) from error

    def tampered(self, value: bytes, what: str) -> Tampered:
        """Return the error that names where a stored value lies. It is searched only now: something is wrong."""
        return _tampered(self.path, _locate(self.content, value), what)


@contextmanager
def open_ledger_file(path: Path) -> Iterator[LedgerFile]:
    """Open the file's bytes and a connection in one read transaction: a running aggregator does not interfere.

    Raises Tampered when the header is not a ledger's, StorageFailed when the file cannot be read now.
    """
    # A journal left by a killed writer is rolled back by whoever reads next; that needs the right to write.
    mode = "rw" if path.with_name(path.name + "-journal").exists() and os.access(path, os.W_OK) else "ro"
    uri = f"{path.absolute().as_uri()}?mode={mode}"
    try:
        with (
            closing(sqlite3.connect(uri, _BUSY_SECONDS, uri=True, isolation_level=None)) as connection,
            path.open("rb") as handle,
        ):
            connection.text_factory = bytes
            connection.execute("BEGIN")
            broken = _first_error(connection, "SELECT count(*) FROM sqlite_schema")
            if broken is not None and _refused(broken):
                raise _unreadable(path, broken)
            _check_header(path, handle.read(100), path.stat().st_size)
            if broken is not None:
                raise _unreadable(path, broken)
            with mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as content:
                yield LedgerFile(path, content, connection)
    except OSError as error:
        raise StorageFailed(f"{path.name}: {error.strerror}", "Check the disk and the file's rights.") from error


def _first_error(connection: sqlite3.Connection, sql: str) -> Exception | None:
    try:
        connection.execute(sql).fetchall()
    except SQLITE_ERRORS as error:
        return error
    return None


# Primary result codes that speak of the disk and of other processes, not of the content: PERM, BUSY, LOCKED, NOMEM,
# READONLY, IOERR, CANTOPEN.
_REFUSED = {3, 5, 6, 7, 8, 10, 14}


def _refused(error: Exception) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in _REFUSED


def _unreadable(path: Path, error: Exception) -> Tampered | StorageFailed:
    if _refused(error):
        return StorageFailed(f"{path.name}: {error}", "Check the disk, the file's rights, and who else uses it.")
    what = str(error) if isinstance(error, sqlite3.Error) else "its tables are not described in text"
    return _tampered(path, _page_offset(what), f"the database is damaged ({what})")


def _check_header(path: Path, header: bytes, file_bytes: int) -> None:
    """Compare the SQLite header (file format, section 1.3) with the one that the ledger writes."""
    fixed = {
        0: b"SQLite format 3\x00",
        16: PAGE_BYTES.to_bytes(2, "big") + b"\x01\x01\x00\x40\x20\x20",
        24: header[92:96],  # change counter and version-valid-for are written together
        28: (file_bytes // PAGE_BYTES).to_bytes(4, "big"),
        40: len(SCHEMA).to_bytes(4, "big"),
        44: b"\x00\x00\x00\x04" + bytes(8) + b"\x00\x00\x00\x01",
        60: SCHEMA_VERSION.to_bytes(4, "big") + bytes(4) + APPLICATION_ID.to_bytes(4, "big") + bytes(20),
    }
    for start, expected in fixed.items():
        found = header[start : start + len(expected)]
        if found != expected:
            differing = (i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b)
            offset = start + next(differing, len(found))
            raise _tampered(path, offset, "the header is not that of a ledger of this length")
    if file_bytes % PAGE_BYTES:
        raise _tampered(path, file_bytes - file_bytes % PAGE_BYTES, "the file ends inside a page")


def check_structure(file: LedgerFile) -> None:
    """Run SQLite's own check of every page, then compare tables and triggers with those of a ledger."""
    what = _damage(file.connection, "PRAGMA integrity_check")
    if what:
        offset = _page_offset(what) or _table_offset(file.connection)
        raise _tampered(file.path, offset, f"the database is damaged ({what})")
    found = list(file.rows("SELECT type, name, tbl_name, sql FROM sqlite_schema WHERE sql NOT NULL"))
    expected = [(*_names(statement), statement.encode()) for statement in SCHEMA]
    if found != expected:
        wrong = next((row[3] for row in found if row not in expected), b"CREATE")
        raise file.tampered(bytes(wrong), "tables or append-only triggers are not those of a ledger")


def _damage(connection: sqlite3.Connection, check: str) -> str:
    """Return the most telling line of an integrity check, one that names a page if there is one; empty when sound."""
    try:
        findings = [bytes(row[0]).decode("utf-8", "replace") for row in connection.execute(check)]
    except SQLITE_ERRORS as error:
        return str(error) if isinstance(error, sqlite3.Error) else "a table's definition is not text"
    lines = "\n".join(findings).splitlines()
    return "" if lines == ["ok"] else next((line for line in lines if _PAGE.search(line)), lines[0])


def _table_offset(connection: sqlite3.Connection) -> int:
    """Offset of the first page of the damaged table, where SQLite does not name the page itself."""
    if _first_error(connection, "SELECT name, rootpage FROM sqlite_schema WHERE type = 'table'"):
        return 0
    tables = connection.execute("SELECT name, rootpage FROM sqlite_schema WHERE type = 'table'").fetchall()
    for name, page in tables:
        if _damage(connection, f"PRAGMA integrity_check({bytes(name).decode('ascii', 'replace')})"):
            return (int(page) - 1) * PAGE_BYTES
    return 0


_PAGE = re.compile(r"page (\d+)", re.IGNORECASE)


def _page_offset(message: str) -> int:
    """Offset of the last page that SQLite's message names (the first is the tree's root), 0 when it names none."""
    pages = [int(page) for page in _PAGE.findall(message) if int(page)]
    return (pages[-1] - 1) * PAGE_BYTES if pages else 0


def _names(statement: str) -> tuple[bytes, bytes, bytes]:
    """Type, name and table of a CREATE statement of the schema."""
    words = statement.split()
    table = words[words.index("ON") + 1] if words[1] == "TRIGGER" else words[2]
    return words[1].lower().encode(), words[2].encode(), table.encode()


def _locate(content: mmap.mmap, value: bytes) -> int:
    """Offset of a stored value. A long one continues on overflow pages: its first bytes lie together, find those."""
    for length in (len(value), *_LOCAL_BYTES):
        offset = content.find(value[:length])
        if offset >= 0:
            return offset
    return 0


# The first part of a value that overflows is between 489 and 4061 bytes less its row's header and other columns
# (SQLite file format, section 1.6).
_LOCAL_BYTES = (*range(3900, 400, -250), 400)


def _tampered(path: Path, offset: int, what: str) -> Tampered:
    return Tampered(path.name, offset, what, HINT)
