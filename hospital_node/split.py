"""Who is held out: fixed by a keyed hash of the pseudonym, so a person is in training or held out for ever."""

from __future__ import annotations

import hashlib
import hmac


def heldout(patient: str, key: bytes, fraction: float = 0.2) -> bool:
    """Return whether this person is held out.

    HMAC-SHA256 (RFC 2104) of the pseudonym, read as a number in [0, 1), lies below `fraction`. Depends on this
    person alone: no other person's coming or going moves anybody across.
    """
    digest = hmac.new(key, b"held-out:" + patient.encode(), hashlib.sha256).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64
