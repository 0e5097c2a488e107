"""Replies as the budget book stores them: canonical JSON, a newline (canonical JSON contains none), the array."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from data_schemas.canonical import canonical_bytes
from data_schemas.frozen import Frozen

Reply = TypeVar("Reply", bound=Frozen)
_NONE = np.zeros(0, dtype=np.float32)


def pack(body: Frozen, array: NDArray[np.float32] = _NONE) -> bytes:
    """Bytes of a reply and its array float32[D], little endian."""
    return canonical_bytes(body) + b"\n" + np.ascontiguousarray(array, dtype="<f4").tobytes()


def unpack(kind: type[Reply], stored: bytes) -> tuple[Reply, NDArray[np.float32]]:
    """Reply of this kind and its array float32[D]."""
    body, _, array = stored.partition(b"\n")
    return kind.model_validate_json(body), np.frombuffer(array, dtype="<f4").astype(np.float32)
