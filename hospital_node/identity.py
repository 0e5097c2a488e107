"""A node's new key: made here, accepted by the members' vote, in use from the entry that decides it.

The old key stays in keys/book.ed25519, because the key of the budget book follows from it: spent budget stays spent.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from hospital_node import statements
from hospital_node.folder import NodeFolder
from pipeline.charter import Charter
from pipeline.signing import PrivateKey, write_durably

NEXT, BOOK = "next.ed25519", "book.ed25519"


def propose_new_key(node: NodeFolder, charter: Charter, days: float, now: datetime) -> Path:
    """Make the next key unless there is one, and sign the proposal to accept it. Raises CheckFailed."""
    following = node.path / "keys" / NEXT
    if not following.exists():
        PrivateKey.generate().save(following)
    public = PrivateKey.load(following).public.hex
    action = {"action": "rotate-key", "node": node.settings.name, "public_key": public}
    return statements.propose(node, charter, action, days, now)


def identity_of(node: NodeFolder, charter: Charter) -> PrivateKey:
    """Return the key that this node signs with now, after taking the next one into use if the members accepted it."""
    following, current = node.path / "keys" / NEXT, node.node_key_file
    own = charter.members.get(node.settings.name)
    if own is not None and following.exists() and PrivateKey.load(following).public.hex == own.public_key:
        kept = node.path / "keys" / BOOK
        if not kept.exists():
            write_durably(kept, current.read_bytes(), mode=0o600)
        following.replace(current)
    return PrivateKey.load(current)
