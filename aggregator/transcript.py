"""A round under secure aggregation once its masked sum is complete: kept until its checkpoint may be forgotten.

Hospitals agree to one list of survivors in a round, ever. So who is in it, and the sum of what they sent, are on the
disk before they are asked to agree: an aggregator that was killed goes on with this very sum.
"""

from __future__ import annotations

import io
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from aggregator.state import StateFolder
from data_schemas.canonical import bytes_hash, canonical_bytes
from data_schemas.frozen import Frozen
from data_schemas.ledger import RejectedUpdate
from data_schemas.messages import Hex32, SignedUpdate
from data_schemas.secure import Advertised, ConfirmTask, Sealed, Session
from pipeline.masking import Masked
from pipeline.signing import write_durably

_KEEP = 3
_log = logging.getLogger("islet.aggregator")


class Transcript(Frozen):
    """Who took part: roster, sealed shares by sender and receiver, the survivors' signed commitments, and the rest."""

    session: Session
    roster: tuple[Advertised, ...]
    sealed: dict[str, dict[str, Sealed]]
    survivors: tuple[SignedUpdate, ...]
    rejected: tuple[RejectedUpdate, ...]
    masked_blinder: Hex32

    @property
    def confirm(self) -> ConfirmTask:
        """What survivors are asked to agree to."""
        named = {update.manifest.node: update.manifest.update_hash for update in self.survivors}
        return ConfirmTask(session=self.session, survivors=named)


@dataclass(frozen=True)
class MaskedSum:
    """A transcript, and the sum of the survivors' masked updates."""

    transcript: Transcript
    masked: Masked


def save(state: StateFolder, run: str, number: int, told: MaskedSum) -> None:
    """Write a round's masked sum durably. Raises StorageFailed."""
    body, vector, buffer = canonical_bytes(told.transcript), told.masked.vector, io.BytesIO()
    check = bytes.fromhex(bytes_hash(body + vector.tobytes()))
    arrays = {"body": np.frombuffer(body, np.uint8), "vector": vector, "check": np.frombuffer(check, np.uint8)}
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    path = _path(state, run, number)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, buffer.getvalue())
    for old in sorted(path.parent.glob("sum-*.npz"))[:-_KEEP]:
        old.unlink()


def load(state: StateFolder, run: str, number: int) -> MaskedSum | None:
    """Return the masked sum of a round that got so far, or None; a damaged one is none, with a warning."""
    try:
        with np.load(_path(state, run, number), allow_pickle=False) as arrays:
            body, vector, check = arrays["body"].tobytes(), arrays["vector"], arrays["check"].tobytes()
        transcript = Transcript.model_validate_json(body)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, ValidationError):
        body, vector, check = b"", np.zeros(0, dtype=np.uint64), b""
    if bytes_hash(body + vector.tobytes()) != check.hex():
        _log.warning("the masked sum of round %d is damaged", number)
        return None
    return MaskedSum(transcript, Masked(vector, int(transcript.masked_blinder, 16)))


def _path(state: StateFolder, run: str, number: int) -> Path:
    return state.path / run / f"sum-{number:05d}.npz"
