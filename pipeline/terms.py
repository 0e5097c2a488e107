"""What the members let compete, and what is remembered of a closed round."""

from __future__ import annotations

import json
from collections.abc import Sequence

from data_schemas.canonical import bytes_hash
from data_schemas.frozen import Frozen
from data_schemas.ledger import RoundEntry


class Challenger(Frozen):
    """A recipe that the members let compete: the member who entered it, and the code that runs it."""

    node: str
    code_hash: str


class Terms(Frozen):
    """What held when a round closed: the champion, who had entered the round's plan, and who is owed for a recipe.

    author: the member who entered the champion's recipe, if that won its contest; permille: its part of the pot.
    """

    champion: str | None
    entrant: str | None
    author: str | None
    permille: int


class ClosedRound(Frozen):
    """What decisions after a round need of it, and none of the updates that it admitted.

    updates_hash: of the admitted updates (`hash_of_updates`). patients: what each hospital declared, under secure
    aggregation, where credit follows from it.
    """

    plan_hash: str
    base_model_hash: str
    new_model_hash: str
    velocity_hash: str | None
    updates_hash: str
    patients: dict[str, int]

    @classmethod
    def of(cls, entry: RoundEntry) -> ClosedRound:
        """What is remembered of an entry."""
        told = [signed.manifest for signed in entry.admitted]
        return cls(
            plan_hash=entry.plan_hash,
            base_model_hash=entry.base_model_hash,
            new_model_hash=entry.new_model_hash,
            velocity_hash=entry.velocity_hash,
            updates_hash=hash_of_updates([m.node for m in told], [m.update_hash for m in told]),
            patients={} if entry.sum is None else entry.patients(),
        )


def hash_of_updates(nodes: Sequence[str], hashes: Sequence[str]) -> str:
    """Hash of whose updates they are, and of their hashes, in their order."""
    return bytes_hash(json.dumps([[*nodes], [*hashes]]).encode())  # compared with its own only: canonical JSON is slow
