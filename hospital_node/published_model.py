"""Where the node's copy of the ledger publishes the model that answers, so that an app can have it proven.

An entry counts when the aggregator that this node knows signed it. A node that follows no ledger, and a model that the
ledger does not publish, have no place; the endpoint answers all the same and says so by leaving it out.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from data_schemas.forecast import LedgerPlace
from data_schemas.ledger import LedgerEntry, ModelEntry
from hospital_node.ledger_copy import COPY
from hospital_node.settings import read_settings
from pipeline.inclusion import split_payload
from pipeline.merkle import leaf_hash
from pipeline.signing import verify

_Version = tuple[int, int, int]


class PublishedModels:
    """Models of one node's copy of the ledger by hash; read again whenever the copy changes."""

    def __init__(self, node_home: Path) -> None:
        self._settings, self._copy = node_home / "node.toml", node_home / COPY
        self._seen: tuple[_Version | None, dict[str, LedgerPlace]] = (None, {})

    def place(self, model_hash: str) -> LedgerPlace | None:
        """Return the newest entry that publishes this model, or None."""
        version = self._version()
        if version is None:
            return None
        if version != self._seen[0]:
            self._seen = version, self._read()
        return self._seen[1].get(model_hash)

    def _read(self) -> dict[str, LedgerPlace]:
        key = read_settings(self._settings).aggregator_public_key
        found: dict[str, LedgerPlace] = {}
        if key is None:
            return found
        for payload in self._copy.read_bytes().split(b"\n")[:-1]:
            if b'"kind":"model"' in payload and (place := _published(payload, key)) is not None:
                found.update([place])
        return found

    def _version(self) -> _Version | None:
        try:
            status = self._copy.stat()
        except FileNotFoundError:
            return None
        return status.st_ino, status.st_mtime_ns, status.st_size


def _published(payload: bytes, key: str) -> tuple[str, LedgerPlace] | None:
    """Hash and place of the model that an entry publishes; None for another entry, or one signed by somebody else."""
    try:
        line = LedgerEntry.model_validate_json(payload)
    except ValidationError:
        return None
    if not isinstance(line.entry, ModelEntry) or not verify(key, *split_payload(payload)):
        return None
    return line.entry.model_hash, LedgerPlace(entry=line.index, leaf_hash=leaf_hash(payload).hex())
