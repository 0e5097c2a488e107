"""What a hospital signs at home for the ledger: proposals, votes, attestations. They wait in the outbox.

    outbox/<kind>-<hash>.json     canonical bytes of a signed statement that is not in the ledger yet
    outbox/<kind>-<hash>.<code>   one that the aggregator refused, and why

A statement is checked against the node's own copy of the ledger before it is signed. It leaves with the next
cosignature (hospital_node.witness), or as a file by any other way: the signature is what counts. It is removed when the
node sees it in the ledger, so nothing is lost when a message is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from data_schemas.canonical import canonical_bytes, content_hash
from data_schemas.errors import BadInput, CheckFailed, StorageFailed
from data_schemas.governance import (
    Attestation,
    AttestationEntry,
    Proposal,
    ProposalEntry,
    Statement,
    StatementCode,
    Vote,
    VoteEntry,
)
from hospital_node.folder import NodeFolder
from pipeline.charter import Charter
from pipeline.signing import write_durably

_MOST = 100  # in one reply
_STATEMENT: TypeAdapter[Statement] = TypeAdapter(Statement)


def propose(node: NodeFolder, charter: Charter, action: Mapping[str, Any], days: float, now: datetime) -> Path:
    """Sign a proposal that expires in so many days. action: its name under `action`, and its values.

    Raises BadInput when the values do not fit, CheckFailed when the federation's rules do not allow it now.
    """
    try:
        proposal = Proposal.model_validate(
            {
                "federation": node.settings.federation,
                "action": action,
                "proposed_by": node.settings.name,
                "member_set": charter.member_set,
                "expires_at": (now + timedelta(days=days)).isoformat(timespec="seconds"),
            }
        )
    except (ValidationError, OverflowError) as error:
        raise BadInput(
            f"{action.get('action')} needs other values", "docs/governance.md has an example of each"
        ) from error
    return _sign(node, charter, ProposalEntry(proposal=proposal, signature=node.key.sign(proposal)), now)


def vote(node: NodeFolder, charter: Charter, proposal: str, now: datetime, *, approve: bool) -> Path:
    """Sign a vote on the open proposal whose hash begins so. Raises BadInput, CheckFailed."""
    found = [name for name in charter.open if name.startswith(proposal)]
    if len(found) != 1:
        raise BadInput(f"{len(found)} open proposals begin with {proposal}", "see `islet federation status`")
    said = Vote(
        federation=node.settings.federation,
        proposal_hash=found[0],
        node=node.settings.name,
        member_set=charter.member_set,
        approve=approve,
    )
    return _sign(node, charter, VoteEntry(vote=said, signature=node.key.sign(said)), now)


def attest(node: NodeFolder, charter: Charter, now: datetime) -> Path | None:
    """Sign what the budget book holds; None when the ledger holds that already. Raises CheckFailed, NodeBusy."""
    with node.whole() as whole:
        book = whole.budget()
        said = Attestation(
            federation=node.settings.federation,
            node=node.settings.name,
            releases=len(book.rows()),
            budget_head=book.head(),
            epsilon_training=book.spent("training"),
            epsilon_heldout=book.spent("heldout"),
        )
    before = charter.attested.get(said.node)
    if before is not None and before.releases == said.releases:
        return None
    return _sign(node, charter, AttestationEntry(attestation=said, signature=node.key.sign(said)), now)


def waiting(node: NodeFolder) -> tuple[Statement, ...]:
    """Return what waits in the outbox, oldest first; a file that holds no statement is left alone."""
    found = []
    for path in sorted(_outbox(node).glob("*.json"), key=lambda path: path.stat().st_mtime_ns)[:_MOST]:
        try:
            found.append(_STATEMENT.validate_json(path.read_bytes()))
        except (OSError, ValidationError):
            continue
    return tuple(found)


def refused(node: NodeFolder) -> tuple[tuple[str, str], ...]:
    """Name and code of every refused statement that is still in the outbox."""
    codes = {code.value for code in StatementCode}
    paths = sorted(_outbox(node).glob("*.*"))
    return tuple((path.stem, path.suffix[1:]) for path in paths if path.suffix[1:] in codes)


def settle(node: NodeFolder, logged: Sequence[bytes], told: Mapping[str, StatementCode]) -> None:
    """Take what is in these new entries of the ledger out of the outbox, and mark what was refused."""
    for path in sorted(_outbox(node).glob("*.json")):
        try:
            said = path.read_bytes()
            if any(said in payload for payload in logged):
                path.unlink()
            elif (code := told.get(content_hash(_STATEMENT.validate_json(said)))) is not None:
                path.rename(path.with_suffix(f".{code.value}"))
        except ValidationError:
            continue
        except OSError as error:
            raise StorageFailed(f"outbox: {error.strerror}", "Check the disk and the folder's mode.") from error


def _outbox(node: NodeFolder) -> Path:
    return node.path / "outbox"


def _sign(node: NodeFolder, charter: Charter, statement: Statement, now: datetime) -> Path:
    """Put a statement into the outbox if it could enter the ledger as the node knows it."""
    trial = charter.copy()
    for earlier in waiting(node):
        trial.take_entry(earlier, now.isoformat(timespec="seconds"))
    if wrong := trial.take_entry(statement, now.isoformat(timespec="seconds")):
        raise CheckFailed(f"the federation's rules refuse this {statement.kind}: {wrong}", "see docs/governance.md")
    path = _outbox(node) / f"{statement.kind}-{content_hash(statement)[:16]}.json"
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise StorageFailed(f"outbox: {error.strerror}", "Check the disk and the folder's mode.") from error
    write_durably(path, canonical_bytes(statement), mode=0o600)
    return path


def utc_now() -> datetime:
    """Return the present moment, UTC."""
    return datetime.now(UTC)
