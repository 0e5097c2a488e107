"""Masks that cancel in a sum: the arithmetic of secure aggregation, the same at nodes and aggregator.

After Bonawitz et al. 2017 (Practical Secure Aggregation for Privacy-Preserving Machine Learning, CCS), section 4. A
masked vector is x + PRG(b) + sum over peers of +-PRG(s), where b is the node's own and s is agreed with each peer: the
s cancel in the sum, the b are told afterwards. Vectors are whole numbers modulo 2^64; beside each travels its
commitment's blinder, masked alike modulo the order of the group. Every key is made by HKDF for one use.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_schemas.errors import BadInput
from pipeline import shamir
from pipeline.edwards import ORDER

KEY_BYTES = 32
_WIDE = 64  # bytes that are reduced modulo ORDER without a bias that anybody could see
# Fixed point: a weighted update is rounded to 2^-30; sums of 256 members stay below 2^61.
SCALE_BITS = 30
_LIMIT = 2.0**53
MOST_MEMBERS = 256
LEAST_MEMBERS = 3


@dataclass(frozen=True)
class Masked:
    """A vector uint64[D] modulo 2^64 and a blinder modulo ORDER: masks, masked values and their sums."""

    vector: NDArray[np.uint64]
    blinder: int

    def plus(self, other: Masked) -> Masked:
        """Sum."""
        return Masked(self.vector + other.vector, (self.blinder + other.blinder) % ORDER)

    def minus(self, other: Masked) -> Masked:
        """Difference."""
        return Masked(self.vector - other.vector, (self.blinder - other.blinder) % ORDER)


def threshold(members: int) -> int:
    """How many of the members that began must finish: more than two thirds, at least three.

    With it, an aggregator that tells different members different things needs a third of them as accomplices
    (Bonawitz et al. 2017, section 6.2).
    """
    return max(LEAST_MEMBERS, 2 * members // 3 + 1)


def quantised(update: NDArray[np.float32], patients: int) -> NDArray[np.int64]:
    """Whole numbers int64[D]: an update float32[D] times its weight, in units of 2^-30. Raises BadInput beyond 2^53."""
    wide = np.rint(update.astype(np.float64) * (patients * 2.0**SCALE_BITS))
    if not (np.isfinite(wide).all() and float(np.abs(wide).max(initial=0.0)) <= _LIMIT):
        raise BadInput("an update is too large to be added up as whole numbers", "lower the plan's learning rate")
    return wide.astype(np.int64)


def mean_of(total: NDArray[np.int64], patients: int) -> NDArray[np.float64]:
    """Patient-weighted mean float64[D] of the quantised updates whose sum is total int64[D]."""
    return total.astype(np.float64) / (patients * 2.0**SCALE_BITS)


def plain(vector: NDArray[np.int64], blinder: int) -> Masked:
    """Values without a mask: int64[D] as residues modulo 2^64."""
    return Masked(vector.astype(np.uint64), blinder % ORDER)


def signed(masked: Masked) -> NDArray[np.int64]:
    """Residues as whole numbers between -2^63 and 2^63: int64[D]."""
    return masked.vector.astype(np.int64)


def expand(key: bytes, dimension: int) -> Masked:
    """Mask of a key: ChaCha20's keystream (RFC 8439), the blinder's part first. The key must have no other use."""
    stream = _keystream(key, _WIDE + 8 * dimension)
    vector = np.frombuffer(stream, dtype="<u8", offset=_WIDE).astype(np.uint64)
    return Masked(vector, int.from_bytes(stream[:_WIDE], "little") % ORDER)


def derived(secret: bytes, purpose: str, length: int = KEY_BYTES) -> bytes:
    """Key of a secret for one purpose: HKDF-SHA512 (RFC 5869)."""
    from cryptography.hazmat.primitives.hashes import SHA512
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return HKDF(algorithm=SHA512(), length=length, salt=None, info=f"islet {purpose}".encode()).derive(secret)


def scalar(secret: bytes, purpose: str) -> int:
    """Uniform number modulo ORDER of a secret for one purpose."""
    return int.from_bytes(derived(secret, purpose, _WIDE), "little") % ORDER


def coefficients(secret: bytes, purpose: str, count: int) -> list[int]:
    """Uniform coefficients of a polynomial for shamir.split."""
    stream = _keystream(derived(secret, purpose), count * shamir.SHARE_BYTES)
    parts = (stream[at : at + shamir.SHARE_BYTES] for at in range(0, len(stream), shamir.SHARE_BYTES))
    return [int.from_bytes(part, "little") % shamir.PRIME for part in parts]


def public_of(private: bytes) -> str:
    """X25519 public key (RFC 7748) of 32 private bytes: 64 hex digits."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw().hex()


def agreed(private: bytes, public_hex: str, purpose: str) -> bytes:
    """Key that two agree on for one purpose: X25519, then HKDF. Raises BadInput for a key that agrees on nothing."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

    try:
        other = X25519PublicKey.from_public_bytes(bytes.fromhex(public_hex))
        return derived(X25519PrivateKey.from_private_bytes(private).exchange(other), purpose)
    except ValueError as error:
        raise BadInput("this is no X25519 key to agree with", "the member must begin again") from error


def sealed(key: bytes, message: bytes) -> str:
    """Encrypt the only message that a key is ever used for: ChaCha20-Poly1305 (RFC 8439), hex."""
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    return ChaCha20Poly1305(key).encrypt(bytes(12), message, None).hex()


def unsealed(key: bytes, text: str) -> bytes:
    """Decrypt. Raises BadInput when the message was not sealed with this key."""
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    try:
        return ChaCha20Poly1305(key).decrypt(bytes(12), bytes.fromhex(text), None)
    except (InvalidTag, ValueError) as error:
        raise BadInput("a sealed share is not the one that was sent", "the member must begin again") from error


def pairwise(own: str, private: bytes, publics: Iterable[tuple[str, str]], session: str, dimension: int) -> Masked:
    """Sum of the masks that `own` shares with each peer (name, X25519 key); the peer's has the other sign.

    Whoever of two has the smaller name adds; `session` makes the keys this round's.
    """
    total = plain(np.zeros(dimension, dtype=np.int64), 0)
    for name, public in publics:
        first, second = sorted((own, name))
        mask = expand(agreed(private, public, f"mask {session} {first} {second}"), dimension)
        total = total.plus(mask) if own == first else total.minus(mask)
    return total


def _keystream(key: bytes, length: int) -> bytes:
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

    return Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor().update(bytes(length))
