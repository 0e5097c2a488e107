"""Proof that one entry is in the ledger, checked with nothing but the log's public key: no ledger, no network.

RFC 6962 section 2.1.1 inclusion path under a C2SP checkpoint that the log has signed. A proof says that the entry is
in the log of that checkpoint; whether others see the same log is what the hospitals' cosignatures under it say.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from data_schemas.canonical import canonical_bytes
from data_schemas.errors import BadInput, CheckFailed
from data_schemas.ledger import EntryProof, LedgerEntry
from data_schemas.messages import SignedRelease, SignedUpdate
from pipeline import checkpoint as notes
from pipeline import merkle
from pipeline.checkpoint import Checkpoint, SignedCheckpoint
from pipeline.signing import verify

# An update or a release inside an entry, as canonical JSON writes it: what was signed, and the signature.
_SIGNED = re.compile(rb'"(?:manifest|release)":(\{[^\n]*?\}),"signature":"([0-9a-f]{128})"')


@dataclass(frozen=True)
class ProvedEntry:
    """What a proof shows: the entry, the checkpoint it is under, and who cosigned that checkpoint.

    claimed_cosigners are names on the note; checked ones are those whose key was given.
    """

    entry: LedgerEntry
    checkpoint: Checkpoint
    claimed_cosigners: tuple[str, ...]
    checked_cosigners: tuple[str, ...]


def parse_proof(text: bytes) -> EntryProof:
    """Read a proof file. Raises BadInput."""
    try:
        return EntryProof.model_validate_json(text)
    except ValidationError as error:
        raise BadInput("this is not a ledger proof", "make one with `islet ledger prove`") from error


def verify_proof(
    proof: EntryProof, public_hex: str, note: str | None = None, cosigner_keys: dict[str, str] | None = None
) -> ProvedEntry:
    """Check an entry against the checkpoint in the proof, or against `note`, one that the reader holds himself.

    Checks the log's signature on the checkpoint and on the entry, the entry's hash, its place and the path to the
    root, and the cosignature of every key given. CheckFailed names what does not hold; BadInput what cannot be read.
    """
    trusted = proof.checkpoint if note is None else note
    head, receipt, payload = notes.verify_note(trusted, public_hex), proof.receipt, proof.entry.encode()
    if receipt.tree_size != head.size:
        raise CheckFailed(
            f"the proof is for {receipt.tree_size} entries, the checkpoint for {head.size}",
            "ask for a proof under this very checkpoint: islet ledger prove --checkpoint",
        )
    leaf = merkle.leaf_hash(payload)
    if leaf.hex() != receipt.leaf_hash:
        raise CheckFailed("the entry is not the one that was logged: its hash differs", "Do not rely on it.")
    if not merkle.verify_inclusion(leaf, receipt.index, head.size, _hashes(receipt.path), head.root):
        raise CheckFailed("the path does not lead from the entry to the checkpoint's root", "Do not rely on it.")
    return ProvedEntry(
        _entry(payload, receipt.index, public_hex), head, *_cosigners(trusted, head, cosigner_keys or {})
    )


def split_payload(payload: bytes) -> tuple[bytes, str]:
    """Return the bytes that the aggregator signed, and its signature (empty when there is none).

    Keys are sorted in canonical JSON and "signature" is the last of an entry, so the signed bytes are the payload
    without it: exactly what was signed, without parsing and writing it anew.
    """
    head, found, tail = payload.rpartition(b',"signature":"')
    return head + b"}", tail.removesuffix(b'"}').decode("ascii", "replace") if found else ""


def said_by(part: SignedUpdate | SignedRelease) -> str:
    """Name of the hospital in whose name an update or a release stands in an entry."""
    return part.manifest.node if isinstance(part, SignedUpdate) else part.release.node


def signed_parts(parts: Sequence[SignedUpdate | SignedRelease], payload: bytes) -> list[bytes]:
    """Bytes that each part's signature covers: cut out of the canonical payload, else written anew.

    A quote inside a JSON string is escaped, so neither pattern can lie in a text. A name that occurs more often than
    there are parts means a key given twice, where the cut and the parsed value could differ.
    """
    found = _SIGNED.findall(payload)
    told = payload.count(b'"manifest":') + payload.count(b'"release":')
    if told == len(found) == len(parts) and all(
        s.decode() == part.signature for (_, s), part in zip(found, parts, strict=True)
    ):
        return [message for message, _ in found]
    return [canonical_bytes(p.manifest if isinstance(p, SignedUpdate) else p.release) for p in parts]


def _entry(payload: bytes, index: int, public_hex: str) -> LedgerEntry:
    try:
        entry = LedgerEntry.model_validate_json(payload)
    except ValidationError as error:
        raise CheckFailed("what was logged is not a ledger entry", "A newer version of islet may read it.") from error
    if entry.index != index:
        raise CheckFailed(f"entry {index} says it is entry {entry.index}", "Do not rely on it.")
    if not verify(public_hex, *split_payload(payload)):
        raise CheckFailed("the aggregator's signature on the entry is wrong", "Do not rely on it.")
    return entry


def _cosigners(note: str, head: Checkpoint, keys: dict[str, str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    lines = {s.name: s.to_text() for s in SignedCheckpoint.from_text(note).signatures if s.name != head.origin}
    for name, key in keys.items():
        if name not in lines:
            raise CheckFailed(f"{name} has not cosigned this checkpoint", "Ask for a proof under a newer one.")
        notes.verify_cosignature(head, lines[name], name, key)
    return tuple(sorted(lines)), tuple(sorted(keys))


def _hashes(path: tuple[str, ...]) -> list[bytes]:
    if not all(re.fullmatch(r"[0-9a-f]{64}", text) for text in path):
        raise BadInput("a hash of the proof's path is not 64 lower-case hex digits")
    return [bytes.fromhex(text) for text in path]
