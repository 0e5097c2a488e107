"""The credit ledger: an append-only, signed Merkle log in one SQLite file, with checkpoint.txt beside it.

Lifecycle of an entry, and what is left when the process dies in each state:
  signed       in memory only: nothing is on disk, the caller appends again
  committed    in ledger.db, durable: append_once returns it instead of logging it twice
  checkpointed the signed root over it is in ledger.db; checkpoint.txt follows and is rewritten at the next opening
  cosigned     hospitals hold the root: the operator of this file can no longer change or cut it unseen
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from data_schemas.canonical import canonical_bytes
from data_schemas.errors import BadInput, CheckFailed, StorageFailed, Tampered
from data_schemas.ledger import Entry, LedgerEntry, MemberEntry, Receipt
from pipeline import checkpoint as notes
from pipeline import merkle
from pipeline.charter import Charter, code_of
from pipeline.checkpoint import Checkpoint
from pipeline.inclusion import split_payload
from pipeline.signing import PrivateKey, verify, write_durably

CHECKPOINT_FILE = "checkpoint.txt"
APPLICATION_ID = 0x49534C54  # "ISLT", in the header of the SQLite file
SCHEMA_VERSION = 1
PAGE_BYTES = 4096
# sqlite3 fails to decode its own message when the damage lies in the text of a table's definition.
SQLITE_ERRORS = (sqlite3.Error, UnicodeDecodeError)
UniqueKey = Sequence[str | int]

_TABLES = (
    "CREATE TABLE entries (idx INTEGER PRIMARY KEY, leaf BLOB NOT NULL, payload BLOB NOT NULL) STRICT",
    "CREATE TABLE once (unique_key BLOB PRIMARY KEY, idx INT NOT NULL, mark BLOB NOT NULL) STRICT, WITHOUT ROWID",
    "CREATE TABLE checkpoints (size INTEGER PRIMARY KEY, note BLOB NOT NULL) STRICT",
    "CREATE TABLE cosignatures (size INT, name BLOB, line BLOB, PRIMARY KEY (size, name)) STRICT, WITHOUT ROWID",
)
_TRIGGERS = tuple(
    f"CREATE TRIGGER {table}_{verb} BEFORE {verb} ON {table} BEGIN SELECT RAISE(ABORT, 'append-only'); END"
    for table in ("entries", "once", "checkpoints", "cosignatures")
    for verb in ("UPDATE", "DELETE")
)
SCHEMA = _TABLES + _TRIGGERS


class AgainstTheRules(BadInput):
    """An entry that the federation's rules do not allow now; `code` says why."""

    def __init__(self, kind: str, fault: str) -> None:
        super().__init__(f"the federation's rules refuse this {kind}: {fault}", "see docs/governance.md")
        self.code = code_of(fault)


class Ledger:
    """A ledger file, opened to append. Raises Tampered when its tail, checkpoints and size do not fit together."""

    def __init__(self, path: Path, key: PrivateKey, origin: str) -> None:
        """Open or create. `origin` names the log in its checkpoints, `key` signs entries and checkpoints."""
        notes.empty(origin)  # refuses a malformed origin before anything is written
        self.path, self._key, self._origin = path, key, origin
        self._tree = merkle.Tree()
        self._charter, self._replayed = Charter(), 0
        with _disk(path):
            # EXTRA is FULL plus a sync of the folder after the rollback journal is removed: without it a power cut
            # could bring the journal back and undo an entry whose receipt was given.
            self._connection = sqlite3.connect(path, isolation_level=None)
            for pragma in (f"page_size={PAGE_BYTES}", "synchronous=EXTRA", "recursive_triggers=ON"):
                self._connection.execute(f"PRAGMA {pragma}")
            if not self._connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]:
                self._create()
            found = [sql for (sql,) in self._connection.execute("SELECT sql FROM sqlite_schema WHERE sql NOT NULL")]
        if found != list(SCHEMA):
            raise _tampered(path, "tables or append-only triggers are not those of a ledger")
        self._catch_up()
        self._check_tail()
        self._check_published()

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    @property
    def size(self) -> int:
        """Number of entries."""
        return self._tree.size

    def append(self, entry: Entry, recorded_at: str, *, by_rules: bool = False) -> Receipt:
        """Sign and log one entry; it is durable when this returns.

        recorded_at is UTC, ISO 8601. StorageFailed when the disk refuses: the ledger is as it was before. With
        `by_rules`, AgainstTheRules when pipeline.charter refuses the entry after all that anybody has logged by then.
        """
        return self._append(None, entry, recorded_at, by_rules=by_rules)

    def append_once(self, unique_key: UniqueKey, entry: Entry, recorded_at: str) -> Receipt:
        """Log an entry under a key such as ("round", run, round), once: a repeat returns the receipt of the first.

        CheckFailed when the key is taken by an entry with other content.
        """
        return self._append(canonical_bytes(list(unique_key)), entry, recorded_at)

    def find(self, unique_key: UniqueKey) -> LedgerEntry | None:
        """Return the entry that append_once logged under this key."""
        index = self._index_of(canonical_bytes(list(unique_key)))
        return None if index is None else self.entry(index)

    def entry(self, index: int) -> LedgerEntry:
        """Return one entry."""
        row = self._query("SELECT payload FROM entries WHERE idx = ?", index)
        if not row:
            raise BadInput(f"the ledger has no entry {index}; it has {self.size}")
        return _parse(self.path, row[0][0])

    def entries(self, start: int = 0) -> Iterator[LedgerEntry]:
        """Go through the entries from `start` on, in order."""
        rows = self._query("SELECT payload FROM entries WHERE idx >= ? ORDER BY idx", start)
        return (_parse(self.path, payload) for (payload,) in rows)

    def members(self) -> dict[str, MemberEntry]:
        """Return the members as the log's entries and decisions make them, by name."""
        return self.charter().members

    def charter(self) -> Charter:
        """Return what the federation has decided so far."""
        while self._replayed < self.size:
            (row,) = self._query("SELECT payload FROM entries WHERE idx = ?", self._replayed)
            self._charter.take(_parse(self.path, row[0]))
            self._replayed += 1
        return self._charter

    def payloads(self, start: int) -> tuple[str, ...]:
        """Return the canonical text of the entries from `start` on, for nodes that keep a copy."""
        rows = self._query("SELECT payload FROM entries WHERE idx >= ? ORDER BY idx", start)
        return tuple(bytes(row[0]).decode() for row in rows)

    def receipt(self, index: int) -> Receipt:
        """Prove that an entry is in the tree of the present size."""
        path = tuple(h.hex() for h in self._tree.inclusion_path(index))
        return Receipt(index=index, tree_size=self.size, leaf_hash=self._tree.leaf(index).hex(), path=path)

    def consistency_proof(self, old_size: int) -> tuple[str, ...]:
        """Prove to a witness at `old_size` that the present tree extends the one it saw (hex hashes)."""
        return tuple(h.hex() for h in self._tree.consistency_proof(old_size))

    def checkpoint(self) -> str:
        """Sign the present size and root, store and publish them; return the note with the cosignatures it has."""
        self._catch_up()
        present = Checkpoint(self._origin, self.size, self._tree.root().hex())
        with _disk(self.path), self._transaction():
            self._connection.execute(
                "INSERT INTO checkpoints VALUES (?, ?) ON CONFLICT DO NOTHING",
                (self.size, notes.sign(present, self._key).encode()),
            )
        return self.publish()

    def add_cosignature(self, line: str) -> None:
        """Store a member's cosignature of the newest checkpoint, which publish() then shows.

        CheckFailed when the line is not that member's cosignature of that checkpoint.
        """
        size, note = self._newest_checkpoint()
        name = notes.NoteSignature.from_text(line).name
        member = self.members().get(name)
        if member is None:
            raise CheckFailed(f"cosignature by {name}, who is not a member", "Admit the hospital first.")
        notes.verify_cosignature(notes.verify_note(note, self._key.public.hex), line, name, member.public_key)
        with _disk(self.path), self._transaction():
            self._connection.execute(
                "INSERT INTO cosignatures VALUES (?, ?, ?) ON CONFLICT DO NOTHING", (size, name.encode(), line.encode())
            )

    def publish(self) -> str:
        """Write checkpoint.txt, the newest checkpoint with its cosignatures by the witnesses' names; return it."""
        size, note = self._newest_checkpoint()
        rows = self._query("SELECT line FROM cosignatures WHERE size = ? ORDER BY name", size)
        note = notes.add_cosignatures(note, [bytes(line).decode() for (line,) in rows])
        write_durably(self.path.with_name(CHECKPOINT_FILE), note.encode())
        return note

    def _append(self, key: bytes | None, entry: Entry, recorded_at: str, *, by_rules: bool = False) -> Receipt:
        _check_time(recorded_at)
        with _disk(self.path), self._transaction():
            self._catch_up()
            taken = None if key is None else self._index_of(key)
            if taken is None:
                self._check_membership(entry)
                if by_rules and (wrong := self.charter().copy().take_entry(entry, recorded_at)):
                    raise AgainstTheRules(entry.kind, wrong)
                index = self.size
                payload = signed_payload(index, recorded_at, entry, self._key)
                leaf = merkle.leaf_hash(payload)
                self._connection.execute("INSERT INTO entries VALUES (?, ?, ?)", (index, leaf, payload))
                if key is not None:
                    mark = once_mark(key, index, leaf)
                    self._connection.execute("INSERT INTO once VALUES (?, ?, ?)", (key, index, mark))
        if taken is None:
            self._tree.append(leaf)  # after the commit: a refused write leaves the tree as it was
            return self.receipt(index)
        if canonical_bytes(self.entry(taken).entry) != canonical_bytes(entry):
            raise CheckFailed(
                f"entry {taken} was logged under this key with other content",
                "Resume from what the ledger holds, or start a new run.",
            )
        return self.receipt(taken)

    def _check_membership(self, entry: Entry) -> None:
        if not isinstance(entry, MemberEntry):
            return  # what governs the other kinds is checked by aggregator.governance before they come here
        known = self.members().get(entry.node)
        if known is not None and known.public_key != entry.public_key:
            raise BadInput(
                f"{entry.node} is a member with another key",
                "A hospital that lost its key joins under a new name.",
            )

    def _index_of(self, key: bytes) -> int | None:
        rows = self._query("SELECT idx FROM once WHERE unique_key = ?", key)
        return int(rows[0][0]) if rows else None

    def _newest_checkpoint(self) -> tuple[int, str]:
        rows = self._query("SELECT size, note FROM checkpoints ORDER BY size DESC LIMIT 1")
        if not rows:
            raise BadInput("the ledger has no checkpoint yet", "Make one with checkpoint().")
        return int(rows[0][0]), bytes(rows[0][1]).decode()

    def _query(self, sql: str, *values: object) -> list[tuple[Any, ...]]:
        with _disk(self.path):
            return self._connection.execute(sql, values).fetchall()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    def _create(self) -> None:
        with self._transaction():
            self._connection.execute(f"PRAGMA application_id={APPLICATION_ID}")
            self._connection.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
            for statement in SCHEMA:
                self._connection.execute(statement)

    def _catch_up(self) -> None:
        """Take in the leaves on disk that the tree does not have: all of them at opening, others' ones later."""
        rows = self._query("SELECT idx, leaf FROM entries WHERE idx >= ? ORDER BY idx", self.size)
        for index, leaf in rows:
            if index != self.size or not isinstance(leaf, bytes):
                raise _tampered(self.path, f"entry {self.size} is missing")
            self._tree.append(leaf)

    def _check_tail(self) -> None:
        """Compare the last entry and the newest checkpoint with the tree that the leaves make."""
        if self.size:
            payload = self._query("SELECT payload FROM entries WHERE idx = ?", self.size - 1)[0][0]
            if not isinstance(payload, bytes) or merkle.leaf_hash(payload) != self._tree.leaf(self.size - 1):
                raise _tampered(self.path, f"entry {self.size - 1}: leaf hash differs")
            signed, signature = split_payload(payload)
            if not verify(self._key.public.hex, signed, signature):
                raise CheckFailed(f"{self.path.name} is signed by another key", "Give the key of this ledger.")
        if self._query("SELECT 1 FROM checkpoints LIMIT 1"):
            self._check_head(self._newest_checkpoint()[1], self.path)

    def _check_published(self) -> None:
        """Compare checkpoint.txt with the tree, then bring it up to date: a crash may have left it one step behind."""
        published = self.path.with_name(CHECKPOINT_FILE)
        if published.exists():
            self._check_head(published.read_text(encoding="utf-8", errors="replace"), published)
        if self._query("SELECT 1 FROM checkpoints LIMIT 1"):
            self.publish()

    def _check_head(self, note: str, source: Path) -> None:
        try:
            head = notes.verify_note(note, self._key.public.hex)
        except (BadInput, CheckFailed) as error:
            raise _tampered(source, error.message) from error
        if head.origin != self._origin:
            raise BadInput(f"{source.name} belongs to the log {head.origin}", "Give the origin of this ledger.")
        if head.size > self.size:
            raise _tampered(self.path, f"{self.size} entries, but {source.name} was signed over {head.size}")
        if head.root != self._tree.root(head.size):
            raise _tampered(self.path, f"the first {head.size} entries are not those of {source.name}")


def read_entries(path: Path) -> tuple[LedgerEntry, ...]:
    """Return all entries of a ledger file, unverified. Tampered when one cannot be read."""
    with _disk(path):
        connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
        try:
            rows = connection.execute("SELECT payload FROM entries ORDER BY idx").fetchall()
        finally:
            connection.close()
    return tuple(_parse(path, row[0]) for row in rows)


def _parse(path: Path, payload: bytes) -> LedgerEntry:
    try:
        return LedgerEntry.model_validate_json(payload)
    except ValidationError as error:
        raise _tampered(path, "an entry cannot be read") from error


def once_mark(unique_key: bytes, index: int, leaf: bytes) -> bytes:
    """Bind a unique key to its entry, so that a damaged row is noticed (it does not hinder a forger: the tree does)."""
    return hashlib.sha256(b"once\n" + unique_key + b"\n" + str(index).encode() + b"\n" + leaf).digest()


def signed_payload(index: int, recorded_at: str, entry: Entry, key: PrivateKey) -> bytes:
    """Canonical bytes of an entry in its place, signed by the aggregator's key."""
    content = {"index": index, "recorded_at": recorded_at, "entry": entry.model_dump(mode="json")}
    return canonical_bytes({**content, "signature": key.sign(content)})


def _check_time(recorded_at: str) -> None:
    try:
        utc = datetime.fromisoformat(recorded_at).utcoffset() == timedelta(0)
    except ValueError:
        utc = False
    if not utc:
        raise BadInput("recorded_at is not a UTC time in ISO 8601", "For example 2026-01-31T12:00:00+00:00.")


def _tampered(path: Path, what: str) -> Tampered:
    return Tampered(path.name, 0, what, "Run `islet ledger verify` to find the place, and restore a backup.")


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    """Turn what SQLite reports into our errors: a refused write, or a file that is no ledger any more."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise StorageFailed(
            f"{path.name}: {error}", "Free space or mend the disk or its rights, then repeat."
        ) from error
    except SQLITE_ERRORS as error:
        raise _tampered(path, "not readable as a ledger") from error
