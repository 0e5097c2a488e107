"""The budget book on disk: budget.db, its seal budget.head, and the check that finds any changed byte of either.

Rows are chained by HMAC-SHA256; the seal names the last row and a hash of every page, so damage is found, with its
place, even where SQLite can no longer read the file.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from data_schemas.canonical import bytes_hash, canonical_bytes
from data_schemas.errors import NodeBusy, StorageFailed, Tampered
from data_schemas.frozen import Frozen
from pipeline.signing import write_durably

DB_NAME = "budget.db"
SEAL_NAME = "budget.head"
PAGE_BYTES = 4096
_SCHEMA = """
CREATE TABLE rows (number INTEGER PRIMARY KEY, body BLOB NOT NULL, mac BLOB NOT NULL);
CREATE TABLE replies (number INTEGER PRIMARY KEY, reply BLOB NOT NULL);
"""
_HINT = (
    "Do not train with this node. Keep the file as evidence; put back a backup of budget.db and budget.head"
    " only if no release was made after it."
)
_BUSY = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})
_DISK = frozenset({sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN})


class Seal(Frozen):
    """Contents of budget.head: number of rows, MAC of the last one, size of budget.db and SHA-256/128 of its pages."""

    rows: int
    head: str
    size: int
    pages: tuple[str, ...]


def genesis(key: bytes) -> bytes:
    """Return what the first row is chained to."""
    return hmac.digest(key, b"islet budget book", "sha256")


def chained(key: bytes, previous: bytes, body: bytes) -> bytes:
    """MAC of a row: HMAC-SHA256 over the previous row's MAC and this row's body."""
    return hmac.digest(key, previous + body, "sha256")


def make_book(path: Path, key: bytes) -> None:
    """Create an empty sealed book at `path`, whole or not at all."""
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    os.close(os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    with connection(new) as db:
        db.executescript(_SCHEMA)
    write_seal(path, key, rows=0, head=genesis(key), data=new.read_bytes())
    write_durably(path, new.read_bytes(), mode=0o600)
    new.unlink()


@contextmanager
def connection(path: Path) -> Iterator[sqlite3.Connection]:
    """Open the database for durable transactions; SQLite's errors come out as ours.

    synchronous=EXTRA is FULL plus a sync of the folder after the rollback journal is removed: without it a power cut
    could bring a committed reservation's journal back and undo it.
    """
    try:
        with closing(sqlite3.connect(path, isolation_level=None, timeout=5.0)) as db:
            db.execute("PRAGMA journal_mode=DELETE")
            db.execute("PRAGMA synchronous=EXTRA")
            yield db
    except sqlite3.Error as error:
        raise _ours(error) from error


def append(path: Path, number: int, body: bytes, mac: bytes, reply: bytes | None) -> None:
    """Write one row, and its reply if it has one, in one transaction."""
    with connection(path) as db:
        db.execute("BEGIN IMMEDIATE")
        if db.execute("SELECT coalesce(max(number), 0) FROM rows").fetchone()[0] != number - 1:
            db.execute("ROLLBACK")
            raise NodeBusy("the budget book changed while it was open", "Run one process per node folder.")
        db.execute("INSERT INTO rows VALUES (?, ?, ?)", (number, body, mac))
        if reply is not None:
            db.execute("INSERT INTO replies VALUES (?, ?)", (number, reply))
        db.execute("COMMIT")


def write_seal(path: Path, key: bytes, *, rows: int, head: bytes, data: bytes) -> None:
    """Replace the seal of the book at `path`, whose bytes are `data`."""
    seal = Seal(rows=rows, head=head.hex(), size=len(data), pages=_page_hashes(data))
    body = canonical_bytes(seal)
    mac = hmac.digest(key, body, "sha256").hex().encode()
    write_durably(path.with_name(SEAL_NAME), body + b"\n" + mac + b"\n", mode=0o600)


def load(path: Path, key: bytes) -> list[tuple[dict[str, Any], bytes]]:
    """Rows (body, MAC) of a book in which every byte is as it was written. Raises Tampered.

    A book that is one or more valid rows ahead of its seal was killed between the two writes; it is sealed again.
    """
    seal = _read_seal(path.with_name(SEAL_NAME), key)
    if not path.exists():
        raise Tampered(DB_NAME, 0, "the file is missing", _HINT)
    stored, replies = _read_rows(path, seal)
    data = path.read_bytes()
    rows = _check_chain(stored, replies, data, key)
    if len(rows) < seal.rows:
        raise Tampered(DB_NAME, _end(data, stored), f"row {len(rows) + 1} is missing", _HINT)
    last_sealed = rows[seal.rows - 1][1] if seal.rows else genesis(key)
    if last_sealed.hex() != seal.head:
        raise Tampered(DB_NAME, _find(data, stored[seal.rows - 1]), f"row {seal.rows} is not the sealed one", _HINT)
    if len(rows) > seal.rows:
        write_seal(path, key, rows=len(rows), head=rows[-1][1], data=data)
    elif (page := _first_changed_page(data, seal)) is not None:
        raise Tampered(DB_NAME, page * PAGE_BYTES, "bytes outside the rows changed", _HINT)
    return rows


def read_reply(path: Path, number: int) -> bytes:
    """Reply stored with a commit row of a loaded book."""
    with connection(path) as db:
        return bytes(db.execute("SELECT reply FROM replies WHERE number = ?", (number,)).fetchone()[0])


_Stored = tuple[int, bytes, bytes]


def _read_rows(path: Path, seal: Seal) -> tuple[list[_Stored], dict[int, bytes]]:
    """All rows and replies; where SQLite cannot read them, Tampered with the first changed page."""
    try:
        with connection(path) as db:
            db.execute("BEGIN IMMEDIATE")  # rolls a half-written transaction back before the bytes are looked at
            db.execute("ROLLBACK")
            rows = db.execute("SELECT number, body, mac FROM rows ORDER BY number").fetchall()
            replies = db.execute("SELECT number, reply FROM replies").fetchall()
    except Tampered as error:
        data = path.read_bytes()
        page = _first_changed_page(data, seal)
        place = error.offset if page is None else page * PAGE_BYTES
        row = _row_at(data, place)
        raise Tampered(DB_NAME, place, f"{row}unreadable", _HINT) from error
    return [(int(n), _bytes(b), _bytes(m)) for n, b, m in rows], {int(n): _bytes(r) for n, r in replies}


def _check_chain(
    stored: list[_Stored], replies: dict[int, bytes], data: bytes, key: bytes
) -> list[tuple[dict[str, Any], bytes]]:
    rows: list[tuple[dict[str, Any], bytes]] = []
    previous = genesis(key)
    for expected, row in enumerate(stored, start=1):
        number, body, mac = row
        if number != expected:
            raise Tampered(DB_NAME, _find(data, row), f"row {expected} is missing", _HINT)
        if not hmac.compare_digest(mac, chained(key, previous, body)):
            raise Tampered(DB_NAME, _find(data, row), f"row {number} was changed", _HINT)
        value: dict[str, Any] = json.loads(body)
        reply = replies.get(number)
        if value.get("reply_hash") != (None if reply is None else bytes_hash(reply)):
            place = _find(data, row) if reply is None else max(data.find(reply[:256]), 0)
            raise Tampered(DB_NAME, place, f"the reply of row {number} was changed", _HINT)
        rows.append((value, mac))
        previous = mac
    return rows


def _read_seal(path: Path, key: bytes) -> Seal:
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise Tampered(SEAL_NAME, 0, "the file is missing", _HINT) from None
    body, _, mac = text.rstrip(b"\n").partition(b"\n")
    if not hmac.compare_digest(mac, hmac.digest(key, body, "sha256").hex().encode()):
        raise Tampered(SEAL_NAME, 0, "the seal was changed", _HINT)
    try:
        return Seal.model_validate_json(body)
    except ValidationError as error:
        raise Tampered(SEAL_NAME, 0, "the seal cannot be read", _HINT) from error


def _page_hashes(data: bytes) -> tuple[str, ...]:
    view = memoryview(data)
    pages = (view[at : at + PAGE_BYTES] for at in range(0, len(data), PAGE_BYTES))
    return tuple(hashlib.sha256(page).hexdigest()[:32] for page in pages)


def _first_changed_page(data: bytes, seal: Seal) -> int | None:
    found = _page_hashes(data)
    for number, (now, sealed) in enumerate(zip(found, seal.pages, strict=False)):
        if now != sealed:
            return number
    return None if len(data) == seal.size else min(len(found), len(seal.pages))


def _find(data: bytes, row: _Stored) -> int:
    """Offset of a row's body in the file: bodies are short, so SQLite keeps them and their MAC in one piece."""
    return max(data.find(row[1] + row[2]), 0)


def _end(data: bytes, stored: list[_Stored]) -> int:
    """Where the first missing row would have been: SQLite fills a page from its end, so right before the last row."""
    return _find(data, stored[-1]) if stored else len(data)


def _row_at(data: bytes, place: int) -> str:
    """Name the row whose body begins on the page at `place`, when one can still be made out."""
    text = data[place : place + PAGE_BYTES]
    start = text.find(b'"number":')
    digits = text[start + 9 : start + 29].split(b"}")[0].split(b",")[0] if start >= 0 else b""
    return f"row {int(digits)} or one near it is " if digits.isdigit() else "the page is "


def _bytes(value: object) -> bytes:
    """SQLite columns are typed by value: anything that is not a blob is damage and fails the MAC."""
    return value if isinstance(value, bytes) else b""


def _ours(error: sqlite3.Error) -> Exception:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code in _BUSY:
        return NodeBusy("another process is writing the budget book", "Run one process per node folder.")
    if code in _DISK:
        return StorageFailed("the budget book cannot be written", "Free some space or check the folder's owner.")
    return Tampered(DB_NAME, 0, "SQLite cannot read the file", _HINT)
