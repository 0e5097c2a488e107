"""Ed25519 keys (RFC 8032): the only door to the cryptography library; and how a small file is written durably."""

from __future__ import annotations

import os
import re
import secrets
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_schemas.canonical import canonical_bytes
from data_schemas.errors import BadInput, StorageFailed

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

SEED_BYTES = 32
# bytes.fromhex also takes blanks and capitals: two spellings of one signature would be two ledger entries.
_HEX32 = re.compile(r"[0-9a-f]{64}")
_HEX64 = re.compile(r"[0-9a-f]{128}")


@dataclass(frozen=True)
class PublicKey:
    """A verifying key: 32 bytes as 64 lower-case hex digits. Raises BadInput when they are not."""

    hex: str

    def __post_init__(self) -> None:
        if not _HEX32.fullmatch(self.hex):
            raise BadInput("a public key is 64 lower-case hex digits", "Copy the key that `islet node` prints.")

    @property
    def raw(self) -> bytes:
        """The 32 bytes of the key."""
        return bytes.fromhex(self.hex)

    def verify(self, message: bytes, signature_hex: str) -> bool:
        """Whether the signature over these bytes was made by this key."""
        return verify(self.hex, message, signature_hex)


@dataclass(frozen=True)
class PrivateKey:
    """A signing key. Its seed never shows in a repr, an error or a log."""

    seed: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.seed) != SEED_BYTES:
            raise BadInput(f"a key seed has {SEED_BYTES} bytes, not {len(self.seed)}")

    @classmethod
    def generate(cls) -> PrivateKey:
        """Make a new key from the operating system's entropy."""
        return cls(secrets.token_bytes(SEED_BYTES))

    @classmethod
    def from_seed(cls, seed: bytes) -> PrivateKey:
        """Return the key of a 32-byte seed; the same seed gives the same key and signatures."""
        return cls(seed)

    @classmethod
    def load(cls, path: Path) -> PrivateKey:
        """Read a seed file; BadInput when it is missing, malformed, or readable by other users."""
        try:
            mode = path.stat().st_mode
            text = path.read_text(encoding="ascii").removesuffix("\n")
        except FileNotFoundError as error:
            raise BadInput(f"{path}: no such key file", "Create the key first, or correct the path.") from error
        except UnicodeDecodeError as error:
            raise BadInput(f"{path}: not a key file", "Restore it from the backup.") from error
        except OSError as error:
            raise BadInput(f"{path}: cannot be read ({error.strerror})", "Check owner and mode.") from error
        if mode & 0o077:
            raise BadInput(f"{path}: other users may read this key", f"Run: chmod 600 {path}")
        if not _HEX32.fullmatch(text):
            raise BadInput(f"{path}: not a key file (64 hex digits expected)", "Restore it from the backup.")
        return cls(bytes.fromhex(text))

    def save(self, path: Path) -> None:
        """Write the seed file, mode 0600. An existing key is never overwritten: it could not be brought back."""
        if path.exists():
            raise BadInput(f"{path}: a key is already there", "Move it away if you really want a new identity.")
        write_durably(path, self.seed.hex().encode() + b"\n", mode=0o600)

    @property
    def public(self) -> PublicKey:
        """The verifying key."""
        return PublicKey(_private(self.seed).public_key().public_bytes_raw().hex())

    def sign(self, value: Any) -> str:
        """Signature over the RFC 8785 bytes of a JSON value or pydantic model: 128 hex digits."""
        return self.sign_bytes(canonical_bytes(value))

    def sign_bytes(self, message: bytes) -> str:
        """Signature over raw bytes: 128 hex digits. Deterministic (RFC 8032 section 5.1.6)."""
        return _private(self.seed).sign(message).hex()


def verify(public_hex: str, message: bytes, signature_hex: str) -> bool:
    """Whether the signature is the key's over these bytes. A malformed key or signature is False, never an error."""
    from cryptography.exceptions import InvalidSignature

    if not (_HEX32.fullmatch(public_hex) and _HEX64.fullmatch(signature_hex)):
        return False
    try:
        _public(public_hex).verify(bytes.fromhex(signature_hex), message)
    except (InvalidSignature, ValueError):
        return False
    return True


def write_durably(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Replace a file so that a crash leaves the old or the new content. StorageFailed: the old content is still there.

    Raw descriptors: a buffered file whose write failed with "no space" writes its buffer again on close.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.new")
    try:
        try:
            _write_all(temporary, data, mode)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(path.parent)
    except OSError as error:
        raise StorageFailed(
            f"{path}: not written ({error.strerror})", "Free space or mend the disk, then repeat."
        ) from error


def _write_all(path: Path, data: bytes, mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        written = 0
        while written < len(data):
            written += os.write(descriptor, data[written:])
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _private(seed: bytes) -> Ed25519PrivateKey:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return Ed25519PrivateKey.from_private_bytes(seed)


@lru_cache(maxsize=1024)
def _public(public_hex: str) -> Ed25519PublicKey:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    return Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_hex))
