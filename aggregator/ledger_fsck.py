"""Proofs out of a ledger file, and its repair: everything derived is rebuilt from the entries' own bytes.

The entries are the ledger; leaf hashes, keys, checkpoints and cosignatures can be made or checked again from them. A
rebuilt file holds the entries up to the first that does not verify, and of the rest what still holds. It is always a
new file: the damaged one stays as evidence.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from aggregator.ledger import APPLICATION_ID, CHECKPOINT_FILE, PAGE_BYTES, SCHEMA, SCHEMA_VERSION, once_mark
from aggregator.ledger_file import open_ledger_file
from data_schemas.canonical import canonical_bytes
from data_schemas.errors import BadInput, CheckFailed, StorageFailed
from data_schemas.ledger import CreditEntry, Entry, EntryProof, LedgerEntry, ModelEntry, PlanEntry, Receipt, RoundEntry
from pipeline import checkpoint as notes
from pipeline import merkle
from pipeline.checkpoint import SignedCheckpoint
from pipeline.inclusion import split_payload
from pipeline.ledger_rules import Replay, fault
from pipeline.signing import verify, write_durably


@dataclass(frozen=True)
class Rebuilt:
    """What a rebuilt ledger holds, and why it ends where it does (empty: nothing was lost)."""

    entries: int
    checkpoints: int
    cosignatures: int
    stopped: str


def prove(path: Path, index: int, note: str | None = None) -> EntryProof:
    """Prove one entry under the published checkpoint, or under `note`. Raises BadInput when it is not under it."""
    trusted = note if note is not None else _published(path)
    head = SignedCheckpoint.from_text(trusted).checkpoint
    with open_ledger_file(path) as file:
        tree = merkle.Tree(bytes(row[0]) for row in file.rows("SELECT leaf FROM entries ORDER BY idx"))
        found = [bytes(row[0]) for row in file.rows(f"SELECT payload FROM entries WHERE idx = {int(index)}")]  # noqa: S608
    if not found:
        raise BadInput(f"the ledger has no entry {index}; it has {tree.size}", "see `islet ledger show`")
    if not index < head.size <= tree.size:
        raise BadInput(
            f"entry {index} is not under this checkpoint of {head.size} entries",
            "the next cosigned checkpoint will cover it: run `islet aggregator run` or give a newer --checkpoint",
        )
    receipt = Receipt(
        index=index,
        tree_size=head.size,
        leaf_hash=tree.leaf(index).hex(),
        path=tuple(h.hex() for h in tree.inclusion_path(index, head.size)),
    )
    return EntryProof(entry=found[0].decode(), receipt=receipt, checkpoint=trusted)


def rebuild(path: Path, key: str, out: Path) -> Rebuilt:
    """Write a sound ledger to the new file `out`, and checkpoint.txt beside it, from what verifies in `path`.

    Nothing is taken over unchecked: entries by signature, order and rules; checkpoints by signature and root;
    cosignatures by the members' keys. Raises BadInput when `out` is there, StorageFailed when it cannot be written.
    """
    if out.exists() or out.with_name(CHECKPOINT_FILE).exists():
        raise BadInput(f"{out.parent} already holds a ledger or a checkpoint", "give a path in a new folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with closing(_readable(path)) as source, closing(sqlite3.connect(out, isolation_level=None)) as target:
            return _copy(source, target, key, out)
    except sqlite3.OperationalError as error:
        raise StorageFailed(f"{out.name}: {error}", "Free space or mend the disk, then repeat.") from error


def _copy(source: sqlite3.Connection, target: sqlite3.Connection, key: str, out: Path) -> Rebuilt:
    pragmas = (f"page_size={PAGE_BYTES}", "synchronous=EXTRA")
    for pragma in (*pragmas, f"application_id={APPLICATION_ID}", f"user_version={SCHEMA_VERSION}"):
        target.execute(f"PRAGMA {pragma}")
    target.execute("BEGIN IMMEDIATE")
    for statement in SCHEMA:
        target.execute(statement)
    tree, replay, stopped = _copy_entries(source, target, key)
    kept = _copy_checkpoints(source, target, key, tree)
    lines = _copy_cosignatures(source, target, kept, replay)
    target.execute("COMMIT")
    if kept:
        newest = max(kept)
        write_durably(
            out.with_name(CHECKPOINT_FILE),
            notes.add_cosignatures(kept[newest], [line for size, line in lines if size == newest]).encode(),
        )
    return Rebuilt(tree.size, len(kept), len(lines), stopped)


def _copy_entries(source: sqlite3.Connection, target: sqlite3.Connection, key: str) -> tuple[merkle.Tree, Replay, str]:
    tree, replay = merkle.Tree(), Replay()
    for index, payload in _rows(source, "SELECT idx, payload FROM entries ORDER BY idx"):
        entry = _sound(index, payload, tree.size, key)
        wrong = "damaged or missing" if entry is None else fault(entry.entry, replay, payload, entry.recorded_at)
        if entry is None or wrong:
            return tree, replay, f"entry {tree.size}: {wrong}"
        leaf = merkle.leaf_hash(payload)
        target.execute("INSERT INTO entries VALUES (?, ?, ?)", (index, leaf, payload))
        tree.append(leaf)
        if (unique := once_key(entry.entry)) is not None:
            encoded = canonical_bytes(list(unique))
            row = (encoded, index, once_mark(encoded, index, leaf))
            target.execute("INSERT INTO once VALUES (?, ?, ?) ON CONFLICT DO NOTHING", row)
    return tree, replay, ""


def once_key(entry: Entry) -> tuple[str | int, ...] | None:
    """Return the key under which the round loop logs an entry once; None for entries that may come again."""
    match entry:
        case PlanEntry():
            return ("plan", entry.run)
        case RoundEntry():
            return ("round", entry.run, entry.round)
        case CreditEntry():
            return ("credit", entry.run, entry.epoch)
        case ModelEntry():
            return ("model", entry.run)
        case _:
            return None


def _sound(index: object, payload: object, expected: int, key: str) -> LedgerEntry | None:
    if index != expected or not isinstance(payload, bytes) or not verify(key, *split_payload(payload)):
        return None
    try:
        entry = LedgerEntry.model_validate_json(payload)
    except ValidationError:
        return None
    return entry if entry.index == index else None


def _copy_checkpoints(
    source: sqlite3.Connection, target: sqlite3.Connection, key: str, tree: merkle.Tree
) -> dict[int, str]:
    kept: dict[int, str] = {}
    for size, note in _rows(source, "SELECT size, note FROM checkpoints ORDER BY size"):
        try:
            head = notes.verify_note(bytes(note).decode(), key)
        except (TypeError, UnicodeDecodeError, BadInput, CheckFailed):
            continue
        if head.size == size <= tree.size and head.root == tree.root(head.size):
            target.execute("INSERT INTO checkpoints VALUES (?, ?)", (size, note))
            kept[head.size] = bytes(note).decode()
    return kept


def _copy_cosignatures(
    source: sqlite3.Connection, target: sqlite3.Connection, kept: dict[int, str], replay: Replay
) -> list[tuple[int, str]]:
    copied: list[tuple[int, str]] = []
    for size, name, line in _rows(source, "SELECT size, name, line FROM cosignatures ORDER BY size, name"):
        try:
            who, text = bytes(name).decode(), bytes(line).decode()
            head = SignedCheckpoint.from_text(kept[size]).checkpoint
            notes.verify_cosignature(head, text, who, replay.members[who].public_key)
        except (KeyError, TypeError, UnicodeDecodeError, BadInput, CheckFailed):
            continue
        target.execute("INSERT INTO cosignatures VALUES (?, ?, ?)", (size, name, line))
        copied.append((size, text))
    return copied


def _readable(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None)
    connection.text_factory = bytes
    return connection


def _rows(source: sqlite3.Connection, sql: str) -> Iterator[tuple[Any, ...]]:
    """Rows as far as the damaged file gives them."""
    try:
        yield from source.execute(sql)
    except sqlite3.Error:
        return


def _published(path: Path) -> str:
    published = path.with_name(CHECKPOINT_FILE)
    if not published.exists():
        raise BadInput("the ledger has no published checkpoint", "run `islet aggregator run`, or give --checkpoint")
    return published.read_text(encoding="utf-8", errors="replace")
