"""What a hospital signs when it leaves a federation."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from data_schemas.frozen import Frozen
from data_schemas.messages import Hex32


class Leaving(Frozen):
    """From `at` (UTC, ISO 8601) on this hospital takes no part: it trains, scores and releases nothing.

    ledger_size and ledger_root say which ledger it had cosigned last: what it earned up to there stays its own.
    """

    kind: Literal["leaving"] = "leaving"
    federation: str
    node: str
    public_key: Hex32
    at: str
    ledger_size: int = Field(ge=0)
    ledger_root: Hex32


class SignedLeaving(Frozen):
    """The statement and its Ed25519 signature over the statement's canonical bytes (RFC 8785), hex."""

    leaving: Leaving
    signature: str
