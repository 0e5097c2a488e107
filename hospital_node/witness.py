"""The hospital as a witness of the ledger: it cosigns a checkpoint only when that extends the last one it cosigned.

C2SP tlog-cosignature, over a tree that the node makes from its own copy of the entries; and nothing is said there in
this hospital's name that it did not sign. Two hospitals that cosigned different histories could be
shown to each other, so an aggregator that wants to rewrite the log needs every witness to agree.
"""

from __future__ import annotations

import json
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from data_schemas.canonical import canonical_bytes
from data_schemas.errors import BadInput, CheckFailed, NodeBusy, StorageFailed, Tampered
from data_schemas.frozen import Frozen
from data_schemas.messages import Cosigned, CosignTask, Refusal, RefusalCode, WitnessState
from hospital_node import champion, ledger_view, statements
from hospital_node.folder import NodeFolder
from hospital_node.identity import identity_of
from pipeline import checkpoint
from pipeline.checkpoint import Checkpoint
from pipeline.signing import write_durably


class _Seen(Frozen):
    """witness.json: the checkpoint last cosigned, and the aggregator's signed note of it, which is evidence."""

    origin: str
    size: int
    root_hex: str
    note: str


def cosign(node: NodeFolder, task: CosignTask, at_unix: int) -> Cosigned | WitnessState | Refusal:  # noqa: PLR0911
    """Cosign a checkpoint at `at_unix` seconds, or say where this witness stands, or refuse a fork.

    What was cosigned is on the disk before the cosignature is returned: a witness that forgot could be led to cosign
    two histories. Raises Tampered when witness.json cannot be read.
    """
    public_key = node.settings.aggregator_public_key
    if task.federation != node.settings.federation or public_key is None:
        return Refusal(code=RefusalCode.UNKNOWN_FEDERATION)
    try:
        new = checkpoint.verify_note(task.checkpoint, public_key)
    except BadInput:
        return Refusal(code=RefusalCode.MALFORMED_TASK)
    except CheckFailed:
        return Refusal(code=RefusalCode.LEDGER_FORK)
    seen = last_seen(node) or checkpoint.empty(new.origin)
    if seen.origin != new.origin:
        return Refusal(code=RefusalCode.LEDGER_FORK)
    stands = ledger_view.size(node)
    if task.old_size != stands:
        return WitnessState(size=stands)
    wrong = ledger_view.extend(node, seen, new, task.old_size, task.entries)
    if wrong is not None:
        return Refusal(code=wrong)
    _remember(node, new, task.checkpoint)
    return _answer(node, task, new, at_unix)


def _answer(node: NodeFolder, task: CosignTask, new: Checkpoint, at_unix: int) -> Cosigned:
    """Follow the decisions, cosign, settle the outbox, and hand over what the hospital has signed since."""
    charter = ledger_view.decided(node)
    key = identity_of(node, charter)
    statements.settle(node, [entry.encode() for entry in task.entries], task.refused)
    if task.attest:
        with suppress(NodeBusy, CheckFailed):  # a round is at work, or this hospital is no member: next time
            statements.attest(node, charter, datetime.fromtimestamp(at_unix, UTC))
    return Cosigned(
        cosignature=checkpoint.cosign(new, key, node.settings.name, at_unix),
        statements=statements.waiting(node),
        champion=champion.follow(node, charter),
    )


def last_seen(node: NodeFolder) -> Checkpoint | None:
    """Return the checkpoint this node last cosigned, or None. Raises Tampered."""
    return last_seen_of(node.path)


def last_seen_of(home: Path) -> Checkpoint | None:
    """Return the checkpoint that the node of this folder last cosigned, or None. Raises Tampered."""
    seen = _seen(home / "witness.json")
    return None if seen is None else Checkpoint(seen.origin, seen.size, seen.root_hex)


def witnessed_note(home: Path) -> str | None:
    """Return the signed note that the node of this folder last cosigned, or None. Raises Tampered."""
    seen = _seen(home / "witness.json")
    return None if seen is None else seen.note


def _seen(path: Path) -> _Seen | None:
    try:
        seen = _Seen.model_validate(json.loads(path.read_bytes()))
        Checkpoint(seen.origin, seen.size, seen.root_hex)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageFailed(f"{path}: cannot be read", "Check its owner and mode.") from error
    except (ValueError, ValidationError, BadInput) as error:
        raise Tampered(
            "witness.json", 0, "not a checkpoint", "Restore it from a backup; do not delete it: a witness remembers."
        ) from error
    return seen


def _remember(node: NodeFolder, new: Checkpoint, note: str) -> None:
    seen = _Seen(origin=new.origin, size=new.size, root_hex=new.root_hex, note=note)
    write_durably(node.witness_json, canonical_bytes(seen) + b"\n", mode=0o600)
