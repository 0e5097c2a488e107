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


def from_record(record: RecordDict) -> tuple[bytes, dict[str, np.ndarray]]:
    """JSON bytes and arrays of a record; KeyError or TypeError when it is not one of ours."""
    body = record.config_records["body"]["json"]
    if not isinstance(body, bytes):
        raise TypeError("body is not bytes")
    # numpy reads the header of an array with `ast`, which CPython 3.11 cannot do in two threads at once.
    with _DECODING:
        return body, {name: array.numpy() for name, array in record.array_records["arrays"].items()}
