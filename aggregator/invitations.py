"""Invitations: made for one hospital, redeemed once, at the desk.

invitations/NAME.json    hash of the token, end of validity, and, once used, who used it
"""

from __future__ import annotations

import hmac
import re
import secrets
from datetime import datetime, timedelta
from pathlib import Path

from pydantic import ValidationError

from aggregator.governance import admit_member, found_federation, founding_of
from aggregator.settings import AggregatorFolder
from aggregator.superlink import register
from data_schemas.canonical import bytes_hash, canonical_bytes
from data_schemas.errors import BadInput, CheckFailed
from data_schemas.frozen import Frozen
from data_schemas.governance import PrivacyPolicy
from data_schemas.invitation import Invitation, JoinAnswer, JoinRequest, SignedJoin
from data_schemas.ledger import MemberEntry
from pipeline.bundle import bundle_hash
from pipeline.certificates import is_transport_key
from pipeline.signing import verify, write_durably

DAYS = 14.0


class _Issued(Frozen):
    """What the aggregator keeps of an invitation; of the token only its hash."""

    node: str
    token_hash: str
    expires_at: str
    public_key: str | None = None
    transport_key: str | None = None


def invite(folder: AggregatorFolder, node: str, now: datetime, days: float = DAYS) -> Invitation:
    """Make an invitation for one hospital; one made before under this name is void. now: UTC.

    Raises BadInput when the name cannot be a hospital's or its invitation has been used.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,62}", node):
        raise BadInput(f"{node!r} cannot be a hospital's name", "use a-z, 0-9 and -, at most 63 of them")
    issued = _read(folder, node)
    if issued is not None and issued.public_key is not None:
        raise BadInput(f"{node} has joined already", "a hospital that lost its key joins under a new name")
    plan, policy = folder.load_plan(), _policy(folder)
    invitation = Invitation(
        federation=folder.settings.federation,
        node=node,
        fleet_address=folder.settings.fleet_address,
        desk_url=f"https://{folder.settings.desk_address}",
        root_certificate=_authority(folder),
        aggregator_public_key=folder.key().public.hex,
        bundle_hash=bundle_hash(),
        max_epsilon_training=plan.privacy.epsilon if policy is None else policy.max_epsilon_training,
        max_epsilon_heldout=plan.credit.epsilon if policy is None else policy.max_epsilon_heldout,
        token=secrets.token_hex(32),
        expires_at=(now + timedelta(days=days)).isoformat(timespec="seconds"),
    )
    _write(folder, _Issued(node=node, token_hash=_hash(invitation.token), expires_at=invitation.expires_at))
    return invitation


def redeem(folder: AggregatorFolder, signed: SignedJoin, now: datetime) -> JoinAnswer:
    """Register a hospital's connection and enter it into the ledger; asked again with the same keys, say the same.

    Before the first plan a hospital becomes a member; afterwards it is registered and the members vote.
    Raises CheckFailed when the invitation does not allow it (the text names no other hospital), BadInput when the
    ledger refuses the name or the key.
    """
    request = signed.request
    issued = _allowed(folder, signed, now)
    register(folder, request.node, request.transport_key)
    member = MemberEntry(
        node=request.node,
        public_key=request.public_key,
        declared_training_patients=request.declared_training_patients,
        declared_heldout_patients=request.declared_heldout_patients,
    )
    standing = JoinAnswer(node=request.node, standing="member" if _admit(folder, member, now) else "registered")
    _write(
        folder,
        issued.model_copy(update={"public_key": request.public_key, "transport_key": request.transport_key}),
    )
    return standing


def _allowed(folder: AggregatorFolder, signed: SignedJoin, now: datetime) -> _Issued:
    request = signed.request
    issued = _read(folder, request.node)
    refused = CheckFailed("this invitation is not valid", "ask the aggregator for a new one")
    if issued is None or not hmac.compare_digest(issued.token_hash, _hash(request.token)):
        raise refused
    if request.federation != folder.settings.federation or not verify(
        request.public_key, canonical_bytes(request), signed.signature
    ):
        raise refused
    if not is_transport_key(request.transport_key):
        raise CheckFailed("the transport key is not a P-384 key", "join with `islet node join`")
    if issued.public_key is None and now > datetime.fromisoformat(issued.expires_at):
        raise CheckFailed("this invitation has expired", "ask the aggregator for a new one")
    if issued.public_key is not None and not _same(issued, request):
        raise CheckFailed("this invitation was used already", "ask the aggregator who used it")
    return issued


def _same(issued: _Issued, request: JoinRequest) -> bool:
    return (issued.public_key, issued.transport_key) == (request.public_key, request.transport_key)


def _admit(folder: AggregatorFolder, member: MemberEntry, now: datetime) -> bool:
    """Whether the hospital is a member now."""
    ledger, at = folder.open_ledger(), now.isoformat(timespec="seconds")
    try:
        charter = ledger.charter()
        if charter.plans or charter.decided:
            return charter.members.get(member.node) == member
        found_federation(ledger, founding_of(folder.settings.federation, folder.load_plan()), at)
        admit_member(ledger, member, at)
        return True
    finally:
        ledger.close()


def _policy(folder: AggregatorFolder) -> PrivacyPolicy | None:
    ledger = folder.open_ledger()
    try:
        return ledger.charter().privacy
    finally:
        ledger.close()


def _authority(folder: AggregatorFolder) -> str:
    try:
        return (folder.path / "tls" / "ca.crt").read_text(encoding="ascii")
    except OSError as error:
        raise BadInput("tls/ca.crt is not there", "make it with `islet aggregator init`") from error


def _file(folder: AggregatorFolder, node: str) -> Path:
    return folder.path / "invitations" / f"{node}.json"


def _read(folder: AggregatorFolder, node: str) -> _Issued | None:
    path = _file(folder, node)
    if not path.exists():
        return None
    try:
        return _Issued.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise BadInput(f"invitations/{node}.json is damaged", "remove it and invite the hospital again") from error


def _write(folder: AggregatorFolder, issued: _Issued) -> None:
    path = _file(folder, issued.node)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    write_durably(path, canonical_bytes(issued) + b"\n", mode=0o600)


def _hash(token: str) -> str:
    return bytes_hash(token.encode())
