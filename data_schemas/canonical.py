"""Canonical bytes of a JSON value (RFC 8785) and their hash: what is signed, logged and compared."""

from __future__ import annotations

import hashlib
from typing import Any

import rfc8785
from pydantic import BaseModel


def canonical_bytes(value: Any) -> bytes:
    """RFC 8785 bytes of a JSON value or pydantic model; CanonicalizationError on NaN or integers >= 2^53."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    return rfc8785.dumps(value)


def content_hash(value: Any) -> str:
    """SHA-256 of the canonical bytes, as lower-case hex."""
    return hashlib.sha256(canonical_bytes(value)).hexdigest()


def bytes_hash(data: bytes) -> str:
    """SHA-256 of raw bytes, as lower-case hex."""
    return hashlib.sha256(data).hexdigest()
