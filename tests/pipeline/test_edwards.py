"""The group of edwards25519 against RFC 8032 as the cryptography library computes it."""

from __future__ import annotations

import hashlib

import pytest

from data_schemas.errors import BadInput
from pipeline import edwards
from pipeline.edwards import ORDER, ZERO
from pipeline.signing import PrivateKey

BASE = edwards.decode("58" + "66" * 31)


@pytest.mark.parametrize("seed", [bytes(32), bytes(range(32)), b"\xff" * 32])
def test_multiples_of_the_base_point_are_ed25519_public_keys(seed: bytes) -> None:
    """Scalar multiplication and encoding agree with an independent implementation."""
    scalar = int.from_bytes(hashlib.sha512(seed).digest()[:32], "little")
    scalar = scalar & (2**254 - 8) | 2**254

    assert edwards.encode(edwards.multiple(scalar, BASE)) == PrivateKey(seed).public.hex


def test_the_group_has_its_order_and_its_inverses() -> None:
    """ORDER times any hashed point is zero, a point and its negative cancel, and encoding is undone by decoding."""
    point = edwards.hashed("a test")

    assert edwards.same(edwards.multiple(ORDER, point), ZERO)
    assert not edwards.same(point, ZERO)
    assert edwards.same(edwards.add(point, edwards.negative(point)), ZERO)
    assert edwards.same(edwards.decode(edwards.encode(point)), point)
    assert not edwards.same(edwards.hashed("a test"), edwards.hashed("another"))


def test_a_weighted_sum_is_the_sum_of_multiples() -> None:
    """Buckets give what one multiple per point gives, for small, large, negative and zero scalars."""
    scalars = [0, 1, -1, 7, -300, 2**40 + 5, -(2**61), 12345]
    points = [edwards.hashed(f"point {number}") for number in range(len(scalars))]
    expected = edwards.summed(edwards.multiple(s, p) for s, p in zip(scalars, points, strict=True))

    assert edwards.same(edwards.weighted_sum(scalars, points), expected)
    assert edwards.same(edwards.weighted_sum([], []), ZERO)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "58",
        "G" * 64,
        "58" + "66" * 32,
        "02" + "00" * 31,
        "ed" + "ff" * 30 + "7f",
        "01" + "00" * 30 + "80",
        "5A" * 32,
    ],
)
def test_what_is_no_point_is_refused(text: str) -> None:
    """Wrong length, capitals, a y without a point, a y beyond the prime and a sign of zero are refused."""
    with pytest.raises(BadInput):
        edwards.decode(text)
