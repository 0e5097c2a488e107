"""Messages as Flower records: one JSON body and named float32 arrays, nothing else."""

from __future__ import annotations

import threading

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from data_schemas.canonical import canonical_bytes
from data_schemas.frozen import Frozen

_DECODING = threading.Lock()


def to_record(body: Frozen, arrays: dict[str, np.ndarray] | None = None) -> RecordDict:
    """Flower record of a body and its arrays."""
    records = RecordDict({"body": ConfigRecord({"json": canonical_bytes(body)})})
    records["arrays"] = ArrayRecord({name: Array(np.ascontiguousarray(a)) for name, a in (arrays or {}).items()})
    return records


class TooLarge(ValueError):
    """A message holds more bytes than its reader takes."""


def from_record(record: RecordDict, most_bytes: int | None = None) -> tuple[bytes, dict[str, np.ndarray]]:
    """JSON bytes and arrays of a record.

    Raises TooLarge before anything is decoded, and KeyError, TypeError or ValueError when it is not one of ours.
    """
    body, arrays = record.config_records["body"]["json"], record.array_records["arrays"]
    if not isinstance(body, bytes):
        raise TypeError("body is not bytes")
    if most_bytes is not None and len(body) + sum(len(array.data) for array in arrays.values()) > most_bytes:
        raise TooLarge("the message is larger than its reader takes")
    # numpy reads the header of an array with `ast`, which CPython 3.11 cannot do in two threads at once.
    with _DECODING:
        return body, {name: _plain(array) for name, array in arrays.items()}


def _plain(array: Array) -> np.ndarray:
    """Decode an array; numpy would open a zip archive in its place without a complaint."""
    decoded = array.numpy()
    if not isinstance(decoded, np.ndarray):
        raise TypeError("an array is not one")
    return decoded
