"""What passes between the aggregator and a hospital that joins: an invitation, a signed request, an answer.

An invitation holds one secret, its own one-time token; whoever has the file can join under that one name until the
hospital has. It holds nothing of other hospitals.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationError

from data_schemas.errors import BadInput
from data_schemas.frozen import Frozen

NodeName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
Hex32 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Address = Annotated[str, Field(pattern=r"^(\[[0-9a-fA-F:]+\]|[A-Za-z0-9.-]+):[0-9]{1,5}$")]


def _moment(text: str) -> str:
    if datetime.fromisoformat(text).utcoffset() is None:
        raise ValueError("no time zone")
    return text


class Invitation(Frozen):
    """One hospital's way in.

    fleet_address: where its SuperNode connects; desk_url: where it joins; root_certificate: PEM of the federation's
    authority; bundle_hash: SHA-256 of the Flower bundle that the aggregator runs. max_epsilon_*: what the policy or
    the plan may cost a patient. token: 64 hex digits, used once.
    """

    kind: Literal["islet-invitation"] = "islet-invitation"
    version: Literal[1] = 1
    federation: str = Field(min_length=1, max_length=200)
    node: NodeName
    fleet_address: Address
    desk_url: str = Field(pattern=r"^https://")
    root_certificate: str = Field(max_length=10_000)
    aggregator_public_key: Hex32
    bundle_hash: Hex32
    max_epsilon_training: float = Field(gt=0)
    max_epsilon_heldout: float = Field(gt=0)
    token: Hex32 = Field(repr=False)
    expires_at: Annotated[str, AfterValidator(_moment)]


class JoinRequest(Frozen):
    """What a hospital says when it joins. transport_key: its P-384 public key as one OpenSSH line."""

    federation: str
    node: NodeName
    public_key: Hex32
    transport_key: str = Field(max_length=400)
    declared_training_patients: int = Field(ge=1)
    declared_heldout_patients: int = Field(ge=0)
    token: Hex32 = Field(repr=False)


class SignedJoin(Frozen):
    """A request, signed with the node's identity: whoever joins holds the key that it names."""

    request: JoinRequest
    signature: str = Field(pattern=r"^[0-9a-f]{128}$")


class JoinAnswer(Frozen):
    """member: the hospital is in the ledger; registered: it may connect, and the members vote whether it joins."""

    node: NodeName
    standing: Literal["member", "registered"]


def parse_invitation(text: str) -> Invitation:
    """Read an invitation file's text. Raises BadInput naming what is wrong, never the token."""
    try:
        return Invitation.model_validate_json(text)
    except ValidationError as error:
        places = ", ".join(".".join(map(str, e["loc"])) or "the whole file" for e in error.errors(include_input=False))
        raise BadInput(f"this is no invitation: {places}", "ask the aggregator for a new one") from None
