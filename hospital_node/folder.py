"""The node folder: everything a node keeps, and the lock that lets one process at a time use it.

node.toml            settings (hospital_node.settings)
keys/node.ed25519    identity; signs every update and release          0600
keys/next.ed25519    the identity that the members are asked to accept (hospital_node.identity)
keys/book.ed25519    the first identity, once there is another: the budget book stays under it
keys/pseudonym.key   keys the pseudonyms and the training/held-out split  0600
store/               readings
budget.db, budget.head   the privacy budget book (hospital_node.budget)
masks/               secrets of rounds under secure aggregation (hospital_node.masks)  0600
scores.db            per-patient Shapley sums; never leaves
witness.json         the ledger checkpoint last cosigned
ledger.jsonl, ledger.state  the node's copy of the ledger and what it says (hospital_node.ledger_copy)
outbox/              what the hospital has signed for the ledger (hospital_node.statements)
models/, model       champions by hash, and a link to the one that is served (hospital_node.champion)
reports/             quality reports and node.log
link/                how it reaches the federation (hospital_node.link)
lock                 held while a process uses the folder; contains its pid
sitting.lock         held while the ledger is shown: that goes on during a round or an import
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from data_schemas.canonical import canonical_bytes
from data_schemas.errors import BadInput, NodeBusy, StorageFailed
from hospital_node.settings import NodeSettings, read_settings, write_settings
from pipeline.signing import PrivateKey, write_durably

if TYPE_CHECKING:
    from hospital_node.budget import BudgetBook

# A sitting's part is held for moments only; two that meet wait for each other.
_SITTING_SECONDS = 10.0
_OWN_NAMES = frozenset(
    {"keys", "store", "reports", "lock", "budget.db", "budget.head", "budget.db-journal", "lost+found"}
)


@dataclass(frozen=True)
class NodeFolder:
    """An open node folder. Get one from `NodeFolder.open`; it is valid inside that `with` block only.

    sitting: only what a sitting of the members needs is locked: ledger copy, witness, outbox, models.
    """

    path: Path
    settings: NodeSettings
    sitting: bool = False

    @property
    def node_key_file(self) -> Path:
        """Ed25519 identity."""
        return self.path / "keys" / "node.ed25519"

    @property
    def pseudonym_key_file(self) -> Path:
        """Key of the pseudonyms and of the training/held-out split."""
        return self.path / "keys" / "pseudonym.key"

    @property
    def store(self) -> Path:
        """Folder of the readings."""
        return self.path / "store"

    @property
    def budget_db(self) -> Path:
        """The privacy budget book."""
        return self.path / "budget.db"

    @property
    def scores_db(self) -> Path:
        """Per-patient Shapley sums."""
        return self.path / "scores.db"

    @property
    def witness_json(self) -> Path:
        """The ledger checkpoint last cosigned."""
        return self.path / "witness.json"

    @property
    def reports(self) -> Path:
        """Quality reports and the node's log."""
        return self.path / "reports"

    @property
    def last_round_json(self) -> Path:
        """How long the last training round took."""
        return self.reports / "last_round.json"

    @property
    def log(self) -> Path:
        """The node's own log: never sent."""
        return self.reports / "node.log"

    @cached_property
    def key(self) -> PrivateKey:
        """The node's identity. Raises BadInput when the key file is missing or damaged."""
        return PrivateKey.load(self.node_key_file)

    @property
    def book_identity(self) -> PrivateKey:
        """The identity that the budget book's key follows from: the node's first. Raises BadInput as `key` does."""
        first = self.path / "keys" / "book.ed25519"
        return PrivateKey.load(first) if first.exists() else self.key

    @cached_property
    def pseudonym_key(self) -> bytes:
        """The 32-byte key of the pseudonyms."""
        try:
            key = bytes.fromhex(self.pseudonym_key_file.read_text(encoding="ascii").strip())
        except (OSError, ValueError) as error:
            raise BadInput(
                f"{self.pseudonym_key_file}: cannot be used",
                "Restore it from your backup: with another key every pseudonym would change.",
            ) from error
        if len(key) != 32:
            raise BadInput(f"{self.pseudonym_key_file}: must hold 64 hex digits", "Restore it from your backup.")
        return key

    @contextlib.contextmanager
    def whole(self) -> Iterator[NodeFolder]:
        """Return this folder with all of it locked. Raises NodeBusy during a round or an import of another process."""
        if not self.sitting:
            yield self
            return
        with NodeFolder.open(self.path) as node:
            yield node

    def budget(self) -> BudgetBook:
        """Open the budget book, verified, under the whole folder's lock. Raises Tampered."""
        from hospital_node.budget import BudgetBook, book_key

        return BudgetBook(self.budget_db, book_key(self.book_identity))

    @staticmethod
    def create(path: Path, settings: NodeSettings) -> None:
        """Make a node folder with fresh keys (from settings.seed when given) and an empty budget book.

        node.toml is written last, so a creation that was cut short is simply run again: it keeps
        keys and a budget book already there, also when somebody removed node.toml.
        Raises BadInput when the folder already is a node or holds other files, StorageFailed when the disk refuses.
        """
        from hospital_node.budget import BudgetBook, book_key

        node = NodeFolder(path, settings)
        if (path / "node.toml").exists():
            raise BadInput(f"{path} already is a node folder", "Use it as it is, or give another path.")
        if path.exists() and {entry.name for entry in path.iterdir() if entry.name[0] != "."} - _OWN_NAMES:
            raise BadInput(f"{path} holds other files", "Give an empty or new folder.")
        try:
            for folder in (path, path / "keys", node.store, node.reports):
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise StorageFailed(f"{path}: cannot be made: {error.strerror}", "Check the disk and its mode.") from error
        _create_keys(node)
        BudgetBook.create(node.budget_db, book_key(node.key))
        write_settings(path / "node.toml", settings)

    @staticmethod
    @contextlib.contextmanager
    def open(path: Path, *, sitting: bool = False) -> Iterator[NodeFolder]:
        """Open a node folder under its lock, or under the one for sittings.

        Raises NodeBusy, with the holder's pid, when it is in use, and BadInput when it is not a node folder. The lock
        belongs to the open file, so two threads of one process exclude each other too; different nodes do not meet.
        """
        if not (path / "node.toml").exists():
            raise BadInput(f"{path} is not a node folder", "Make one with `islet node init`.")
        descriptor = os.open(path / ("sitting.lock" if sitting else "lock"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            _take_lock(descriptor, path, _SITTING_SECONDS if sitting else 0.0)
            yield NodeFolder(path, read_settings(path / "node.toml"), sitting)
        finally:
            os.close(descriptor)


def _create_keys(node: NodeFolder) -> None:
    seed = node.settings.seed
    if not node.node_key_file.exists():
        key = PrivateKey.generate() if seed is None else PrivateKey.from_seed(_seeded(node, "identity"))
        key.save(node.node_key_file)
    if not node.pseudonym_key_file.exists():
        raw = secrets.token_bytes(32) if seed is None else _seeded(node, "pseudonym")
        write_durably(node.pseudonym_key_file, raw.hex().encode() + b"\n", mode=0o600)


def _seeded(node: NodeFolder, purpose: str) -> bytes:
    """32 bytes that follow from the node's seed, name and a purpose: for tests and the demo only."""
    value = {"purpose": purpose, "seed": node.settings.seed, "node": node.settings.name}
    return hashlib.sha256(canonical_bytes(value)).digest()


def _take_lock(descriptor: int, path: Path, patience_s: float) -> None:
    end = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError as error:
            if time.monotonic() < end:
                time.sleep(0.05)
                continue
            holder = _holder(descriptor)
            raise NodeBusy(
                f"{path} is in use by process {holder}", "Wait for it to finish, or stop that process."
            ) from error
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)


def _holder(descriptor: int) -> str:
    """Pid in the lock file; the holder writes it right after it got the lock, so an empty file is read again."""
    for _ in range(20):
        if pid := os.pread(descriptor, 32, 0).decode("ascii", "replace").strip():
            return pid
        time.sleep(0.01)
    return "unknown"
