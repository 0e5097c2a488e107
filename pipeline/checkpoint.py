"""Checkpoints of the ledger and their signatures, in the formats of transparency logs.

C2SP tlog-checkpoint (origin, size, root), C2SP signed-note (Ed25519) and C2SP tlog-cosignature (cosignature/v1).
BadInput: the text is not of the format. CheckFailed: it is, and a signature is missing or wrong.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from data_schemas.errors import BadInput, CheckFailed
from pipeline import merkle
from pipeline.signing import PrivateKey, verify

_ED25519 = b"\x01"
_COSIGNATURE = b"\x04"
_DASH = "— "
_KEY_ID_BYTES = 4
_SIGNATURE_BYTES = 64
# signed-note asks verifiers to bound the number of signatures and to accept at least 16; a federation may be larger.
MAX_SIGNATURES = 4096


@dataclass(frozen=True)
class Checkpoint:
    """What a log commits to: its name, number of entries and Merkle root (64 hex digits)."""

    origin: str
    size: int
    root_hex: str

    def __post_init__(self) -> None:
        _check_key_name(self.origin, "origin")
        if not 0 <= self.size < 2**63:
            raise BadInput(f"checkpoint size {self.size} is not between 0 and 2^63 - 1")
        if not re.fullmatch(r"[0-9a-f]{64}", self.root_hex):
            raise BadInput("checkpoint root is not 64 lower-case hex digits")

    @property
    def root(self) -> bytes:
        """The 32 bytes of the root."""
        return bytes.fromhex(self.root_hex)

    def to_text(self) -> str:
        """Return the note text: three lines, each ended by a newline."""
        return f"{self.origin}\n{self.size}\n{base64.b64encode(self.root).decode()}\n"

    @classmethod
    def from_text(cls, text: str) -> Checkpoint:
        """Parse the three lines; BadInput names what is malformed."""
        lines = text.split("\n")
        if lines[-1]:
            raise BadInput("checkpoint does not end with a newline")
        if len(lines) < 4:
            raise BadInput(f"checkpoint has {len(lines) - 1} lines; origin, size and root are needed")
        if len(lines) > 4:
            raise BadInput("checkpoint has extension lines, which this log does not use")
        origin, size, root = lines[:3]
        if not re.fullmatch(r"0|[1-9][0-9]{0,18}", size):
            raise BadInput("checkpoint size is not a decimal number without leading zeros")
        return cls(origin, int(size), _base64(root, 32, "checkpoint root").hex())


@dataclass(frozen=True)
class NoteSignature:
    """One signature line of a note."""

    name: str
    key_id: bytes
    signature: bytes

    def to_text(self) -> str:
        """Return the line without its newline."""
        return f"{_DASH}{self.name} {base64.b64encode(self.key_id + self.signature).decode()}"

    @classmethod
    def from_text(cls, line: str) -> NoteSignature:
        """Parse one line; BadInput names what is malformed."""
        if not line.startswith(_DASH):
            raise BadInput("signature line does not start with an em dash and a space")
        name, space, encoded = line.removeprefix(_DASH).partition(" ")
        if not space:
            raise BadInput("signature line has no signature after the key name")
        _check_key_name(name, "key name")
        blob = _base64(encoded, None, "note signature")
        if len(blob) <= _KEY_ID_BYTES:
            raise BadInput("note signature is shorter than its key id")
        return cls(name, blob[:_KEY_ID_BYTES], blob[_KEY_ID_BYTES:])


@dataclass(frozen=True)
class SignedCheckpoint:
    """A checkpoint and the signature lines under it: the log's own, then cosignatures."""

    checkpoint: Checkpoint
    signatures: tuple[NoteSignature, ...]

    def to_text(self) -> str:
        """Return the signed note."""
        return self.checkpoint.to_text() + "\n" + "".join(s.to_text() + "\n" for s in self.signatures)

    @classmethod
    def from_text(cls, note: str) -> SignedCheckpoint:
        """Parse a signed note; BadInput names what is malformed."""
        if any(ord(c) < 0x20 and c != "\n" for c in note):
            raise BadInput("note contains control characters")
        text, blank, tail = note.rpartition("\n\n")
        if not blank:
            raise BadInput("note has no blank line before its signatures")
        if not tail.endswith("\n"):
            raise BadInput("note does not end with a newline after its last signature")
        lines = tail[:-1].split("\n")
        if len(lines) > MAX_SIGNATURES:
            raise BadInput(f"note has more than {MAX_SIGNATURES} signatures")
        return cls(Checkpoint.from_text(text + "\n"), tuple(NoteSignature.from_text(line) for line in lines))


def empty(origin: str) -> Checkpoint:
    """Return the checkpoint of a log without entries: where a witness starts."""
    return Checkpoint(origin, 0, merkle.EMPTY_ROOT.hex())


def key_id(name: str, public_key: bytes, kind: bytes = _ED25519) -> bytes:
    """First 4 bytes of SHA-256(name, newline, signature type, public key)."""
    return hashlib.sha256(name.encode() + b"\n" + kind + public_key).digest()[:_KEY_ID_BYTES]


def sign(checkpoint: Checkpoint, key: PrivateKey) -> str:
    """Return the signed note of a checkpoint; the log's key carries the log's origin as its name."""
    signature = bytes.fromhex(key.sign_bytes(checkpoint.to_text().encode()))
    line = NoteSignature(checkpoint.origin, key_id(checkpoint.origin, key.public.raw), signature)
    return SignedCheckpoint(checkpoint, (line,)).to_text()


def verify_note(note: str, public_hex: str) -> Checkpoint:
    """Return the checkpoint of a note; CheckFailed when the log's signature is missing or wrong."""
    signed = SignedCheckpoint.from_text(note)
    checkpoint = signed.checkpoint
    expected = key_id(checkpoint.origin, _raw_key(public_hex))
    mine = [s for s in signed.signatures if (s.name, s.key_id) == (checkpoint.origin, expected)]
    if not mine:
        raise CheckFailed("the checkpoint is not signed by the log's key", "Ask for the log's public key.")
    message = checkpoint.to_text().encode()
    if not all(verify(public_hex, message, s.signature.hex()) for s in mine):
        raise CheckFailed("the log's signature on the checkpoint is wrong", "Do not trust this checkpoint.")
    return checkpoint


def cosign(checkpoint: Checkpoint, key: PrivateKey, name: str, unix_time: int) -> str:
    """Return one cosignature/v1 line. Sign only what extends(last seen, checkpoint, proof)."""
    if not 0 < unix_time < 2**63:
        raise BadInput("a cosignature's time is in seconds since 1970, above 0 and below 2^63")
    _check_key_name(name, "key name")
    signature = bytes.fromhex(key.sign_bytes(_cosigned_message(checkpoint, unix_time)))
    identity = key_id(name, key.public.raw, _COSIGNATURE)
    return NoteSignature(name, identity, unix_time.to_bytes(8, "big") + signature).to_text()


def verify_cosignature(checkpoint: Checkpoint, line: str, name: str, public_hex: str) -> int:
    """Return the time (seconds since 1970) at which this witness cosigned; CheckFailed when it did not."""
    found = NoteSignature.from_text(line)
    if (found.name, found.key_id) != (name, key_id(name, _raw_key(public_hex), _COSIGNATURE)):
        raise CheckFailed(f"the cosignature is not from the key of {name}", "Ask the witness for its key.")
    if len(found.signature) != 8 + _SIGNATURE_BYTES:
        raise CheckFailed(f"the cosignature of {name} has the wrong length", "Ask the witness to cosign again.")
    unix_time = int.from_bytes(found.signature[:8], "big")
    if not verify(public_hex, _cosigned_message(checkpoint, unix_time), found.signature[8:].hex()):
        raise CheckFailed(f"the cosignature of {name} is wrong", "Ask the witness to cosign again.")
    return unix_time


def add_cosignatures(note: str, lines: Sequence[str]) -> str:
    """Return the note with these signature lines below those it has."""
    signed = SignedCheckpoint.from_text(note)
    added = tuple(NoteSignature.from_text(line) for line in lines)
    return SignedCheckpoint(signed.checkpoint, signed.signatures + added).to_text()


def extends(old: Checkpoint, new: Checkpoint, proof: Sequence[str]) -> bool:
    """Whether the new checkpoint is the same log, grown: no entry seen before was changed, moved or removed.

    `proof` is the RFC 6962 section 2.1.2 consistency proof, hex. A witness that holds `old` cosigns nothing else.
    """
    if old.origin != new.origin or not all(re.fullmatch(r"[0-9a-f]{64}", h) for h in proof):
        return False
    hashes = [bytes.fromhex(h) for h in proof]
    return merkle.verify_consistency(old.size, new.size, old.root, new.root, hashes)


def _cosigned_message(checkpoint: Checkpoint, unix_time: int) -> bytes:
    return f"cosignature/v1\ntime {unix_time}\n{checkpoint.to_text()}".encode()


def _raw_key(public_hex: str) -> bytes:
    if not re.fullmatch(r"[0-9a-f]{64}", public_hex):
        raise BadInput("a public key is 64 lower-case hex digits")
    return bytes.fromhex(public_hex)


def _check_key_name(name: str, what: str) -> None:
    if not name:
        raise BadInput(f"{what} is empty")
    if "+" in name or any(c.isspace() or ord(c) < 0x20 for c in name):
        raise BadInput(f"{what} contains a space, a plus sign or a control character")


def _base64(text: str, length: int | None, what: str) -> bytes:
    """Bytes of standard base64 in its one canonical spelling."""
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadInput(f"{what} is not base64") from error
    if base64.b64encode(data).decode() != text:
        raise BadInput(f"{what} is not canonical base64")
    if length is not None and len(data) != length:
        raise BadInput(f"{what} has {len(data)} bytes, not {length}")
    return data
