"""What the log says of this hospital's own updates, against its own budget book.

A round that leaves out an update this hospital made, without a reason, skips it. A round with an update under its name
that its book does not know was signed with a stolen key, or the book is an old copy and has forgotten what was spent.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    made = _made(node.budget(), rounds)
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


def _made(book: BudgetBook, rounds: Sequence[RoundEntry]) -> list[UpdateManifest]:
    """Manifests of what this hospital answered in these runs, in any order.

    The book's order is no order of rounds: an aggregator whose checkpoint is lost asks for an earlier round again.
    """
    runs = {entry.run for entry in rounds}
    answers = (book.stored_reply(row.task_id) for row in book.rows() if row.run in runs and row.cohort == "training")
    return [replies.unpack(SignedUpdate, answer)[0].manifest for answer in answers if answer is not None]
