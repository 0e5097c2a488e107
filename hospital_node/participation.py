"""The hospital's own switch: take part, pause, or leave the federation. Nobody else can turn it.

participation.json says which. It is written whole or not at all and looked at before each task, without the node's
lock: a round that has begun is finished, the next one finds the switch turned. While it is off the node trains, scores
and releases nothing and answers with a code; it stays a witness of the ledger, which holds what it has earned.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from data_schemas.canonical import canonical_bytes
from data_schemas.errors import BadInput, Tampered
from data_schemas.frozen import Frozen
from data_schemas.messages import RefusalCode
from data_schemas.participation import Leaving, SignedLeaving
from hospital_node.ceilings import Declined
from hospital_node.settings import read_settings
from hospital_node.witness import last_seen_of
from pipeline import checkpoint
from pipeline.signing import PrivateKey, write_durably

FILE, STATEMENT = "participation.json", "leaving.json"
State = Literal["taking part", "paused", "left"]
_CODES = {"paused": RefusalCode.NODE_PAUSED, "left": RefusalCode.NODE_LEFT}


class Participation(Frozen):
    """What the switch says, since when (UTC, ISO 8601) and who turned it."""

    state: State = "taking part"
    since: str | None = None
    by: str | None = None


def participation(home: Path) -> Participation:
    """Read the switch of a node folder; it takes part until somebody turns it. Raises Tampered when it is damaged."""
    try:
        return Participation.model_validate(json.loads((home / FILE).read_bytes()))
    except FileNotFoundError:
        return Participation()
    except (OSError, ValueError, ValidationError) as error:
        raise Tampered(FILE, 0, "cannot be read", "Turn the switch again: `islet node pause`.") from error


def check(home: Path) -> None:
    """Raise Declined unless the hospital takes part."""
    if (code := _CODES.get(participation(home).state)) is not None:
        raise Declined(code)


def pause(home: Path, now_s: float, by: str) -> Participation:
    """Answer tasks with `node-paused` from the next one on. Raises BadInput for a node that has left."""
    return _turn(home, "paused", now_s, by)


def resume(home: Path, now_s: float, by: str) -> Participation:
    """Take part again. Raises BadInput for a node that has left: its word was final."""
    return _turn(home, "taking part", now_s, by)


def leave(home: Path, now_s: float, by: str) -> SignedLeaving:
    """Leave for good: sign the statement, keep it in leaving.json, and answer tasks with `node-left`.

    Called again it returns the statement that was signed the first time.
    """
    if (signed := left_with(home)) is None:
        settings, key = read_settings(home / "node.toml"), PrivateKey.load(home / "keys" / "node.ed25519")
        seen = last_seen_of(home) or checkpoint.empty(settings.federation)
        leaving = Leaving(
            federation=settings.federation,
            node=settings.name,
            public_key=key.public.hex,
            at=_utc(now_s),
            ledger_size=seen.size,
            ledger_root=seen.root_hex,
        )
        signed = SignedLeaving(leaving=leaving, signature=key.sign(leaving))
        write_durably(home / STATEMENT, canonical_bytes(signed) + b"\n", mode=0o600)
    if participation(home).state != "left":
        _write(home, Participation(state="left", since=signed.leaving.at, by=by))
    return signed


def left_with(home: Path) -> SignedLeaving | None:
    """Return the statement that this node has signed, or None. Raises Tampered."""
    try:
        return SignedLeaving.model_validate(json.loads((home / STATEMENT).read_bytes()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, ValidationError) as error:
        raise Tampered(STATEMENT, 0, "cannot be read", "Restore it from a backup.") from error


def _turn(home: Path, state: State, now_s: float, by: str) -> Participation:
    if left_with(home) is not None:
        raise BadInput(
            "this hospital has left the federation", "to take part again the members admit a new node: docs/serving.md"
        )
    return _write(home, Participation(state=state, since=_utc(now_s), by=by))


def _write(home: Path, turned: Participation) -> Participation:
    write_durably(home / FILE, canonical_bytes(turned) + b"\n", mode=0o600)
    return turned


def _utc(now_s: float) -> str:
    return datetime.fromtimestamp(now_s, UTC).isoformat(timespec="seconds")
