"""What the log says of this hospital's own updates, against its own budget book.

A round that leaves out an update this hospital made, without a reason, skips it. A round with an update under its name
that its book does not know was signed with a stolen key, or the book is an old copy and has forgotten what was spent.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from data_schemas.ledger import RoundEntry
from data_schemas.messages import SignedUpdate, UpdateManifest
from hospital_node import replies
from hospital_node.budget import BudgetBook
from hospital_node.folder import NodeFolder

SKIPPED = "it leaves out the update that this hospital made, and says no reason"
FOREIGN = "it has an update under this hospital's name that its budget book does not know: a stolen key, or an old book"


def fault(node: NodeFolder, rounds: Sequence[RoundEntry]) -> tuple[RoundEntry, str] | None:
    """Find the first round of the log that is wrong about this hospital, and say what is wrong with it."""
    if not rounds:
        return None
    made = [signed.manifest for signed, _ in updates(node.budget(), {entry.run for entry in rounds})]
    for entry in rounds:
        if wrong := _wrong(node.settings.name, entry, made):
            return entry, wrong
    return None


def _wrong(own: str, entry: RoundEntry, made: list[UpdateManifest]) -> str:
    here = [m for m in made if (m.run, m.round, m.base_model_hash) == (entry.run, entry.round, entry.base_model_hash)]
    logged = [signed.manifest for signed in entry.admitted if signed.manifest.node == own]
    if logged:
        return "" if all(manifest in here for manifest in logged) else FOREIGN
    return SKIPPED if here and own not in {update.node for update in entry.rejected} else ""


def updates(
    book: BudgetBook, runs: Collection[str] | None = None
) -> Iterator[tuple[SignedUpdate, NDArray[np.float32]]]:
    """Go through what this hospital answered, in clear: manifest and update float32[D]; of these runs, or of all.

    The book's order is no order of rounds: an aggregator whose checkpoint is lost asks for an earlier round again.
    """
    for row in book.rows():
        if row.cohort == "training" and (runs is None or row.run in runs):
            answer = book.stored_reply(row.task_id)
            if answer is not None:
                yield replies.unpack(SignedUpdate, answer)
