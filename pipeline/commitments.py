"""A securely aggregated round as commitments: what the log must say of it, and what its sum must be."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from data_schemas.canonical import bytes_hash
from data_schemas.errors import BadInput
from data_schemas.ledger import RoundEntry, SecureSum
from data_schemas.messages import SignedUpdate
from pipeline import edwards, pedersen
from pipeline.masking import threshold


def commitment_hash(commitment: str) -> str:
    """Name of an update that is known by its commitment, 64 hex digits. Raises ValueError."""
    return bytes_hash(bytes.fromhex(commitment))


def total_hash(total: NDArray[np.int64]) -> str:
    """SHA-256 of a sum int64[D], little endian."""
    return bytes_hash(np.ascontiguousarray(total, dtype="<i8").tobytes())


def is_committed(signed: SignedUpdate) -> bool:
    """Whether an update names a commitment, which is a point, and is named after it."""
    told = signed.manifest.commitment
    with suppress(BadInput):
        return told is not None and bool(edwards.decode(told)) and commitment_hash(told) == signed.manifest.update_hash
    return False


def sum_fault(entry: RoundEntry, *, secure: bool) -> str:
    """Say why a round's updates and sum do not fit how its run is aggregated; empty when they do."""
    if secure != (entry.sum is not None):
        return "it is not aggregated as its run is"
    if entry.sum is None:
        open_handed = all(update.manifest.commitment is None for update in entry.admitted)
        return "" if open_handed else "an update is a commitment, and the run is not aggregated securely"
    if not threshold(entry.sum.roster) <= len(entry.admitted) <= entry.sum.roster:
        return f"its sum is of {len(entry.admitted)} updates, of {entry.sum.roster} that began"
    without = [update.manifest.node for update in entry.admitted if not is_committed(update)]
    return f"update of {without[0]}: it has no commitment" if without else ""


def adds_up(admitted: Sequence[SignedUpdate], total: NDArray[np.int64], told: SecureSum) -> bool:
    """Whether total int64[D] is the sum of what the admitted updates commit to. Costs D point additions or so."""
    commitments = [str(update.manifest.commitment) for update in admitted]
    return total_hash(total) == told.total_hash and pedersen.opens(commitments, total, int(told.blinder, 16))
