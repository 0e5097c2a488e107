"""The group of edwards25519 (RFC 8032 section 5.1) in whole numbers: what Pedersen commitments are made of.

Points are extended coordinates (X, Y, Z, T) with x = X/Z, y = Y/Z, xy = T/Z. Time depends on the scalars, which here
are updates that are already private, and a blinder: whoever can time a hospital's processor that finely is inside.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import cache, reduce

from data_schemas.errors import BadInput

Point = tuple[int, int, int, int]
P = 2**255 - 19
ORDER = 2**252 + 27742317777372353535851937790883648493
COFACTOR = 8
_D = -121665 * pow(121666, -1, P) % P
_ROOT_OF_MINUS_1 = pow(2, (P - 1) // 4, P)
ZERO: Point = (0, 1, 1, 0)


def add(a: Point, b: Point) -> Point:
    """Sum of two points; the formula is complete (RFC 8032 section 5.1.4)."""
    low = (a[1] - a[0]) * (b[1] - b[0]) % P
    high = (a[1] + a[0]) * (b[1] + b[0]) % P
    c, d = 2 * a[3] * b[3] * _D % P, 2 * a[2] * b[2] % P
    e, f, g, h = high - low, d - c, d + c, high + low
    return e * f % P, g * h % P, f * g % P, e * h % P


def negative(a: Point) -> Point:
    """Inverse of a point."""
    return -a[0] % P, a[1], a[2], -a[3] % P


def multiple(scalar: int, point: Point) -> Point:
    """Scalar times point, for any whole number."""
    base, total = (point if scalar >= 0 else negative(point)), ZERO
    for bit in f"{abs(scalar):b}":
        total = add(total, total) if total is not ZERO else ZERO
        total = add(total, base) if bit == "1" else total
    return total


def same(a: Point, b: Point) -> bool:
    """Whether two points are one, up to the eight points of small order: all that a commitment depends on."""
    a, b = multiple(COFACTOR, a), multiple(COFACTOR, b)
    return (a[0] * b[2] - b[0] * a[2]) % P == 0 and (a[1] * b[2] - b[1] * a[2]) % P == 0


def encode(a: Point) -> str:
    """32 bytes as 64 hex digits: y, and the lowest bit of x on top (RFC 8032 section 5.1.2)."""
    z = pow(a[2], -1, P)
    x, y = a[0] * z % P, a[1] * z % P
    return (y | (x & 1) << 255).to_bytes(32, "little").hex()


def decode(text: str) -> Point:
    """Point of 64 lower-case hex digits (RFC 8032 section 5.1.3). Raises BadInput when there is none."""
    point = _lifted(int.from_bytes(bytes.fromhex(text), "little")) if _is_hex32(text) else None
    if point is None:
        raise BadInput("this is no point of edwards25519", "a commitment is 64 hex digits that encode one")
    return point


def weighted_sum(scalars: Sequence[int], points: Sequence[Point]) -> Point:
    """Sum of scalar times point, signed scalars, by buckets (Pippenger 1976): far below one multiple per point."""
    digits = max((abs(s) for s in scalars), default=0).bit_length()
    width = max(1, len(scalars).bit_length() - 3)
    total = ZERO
    for place in reversed(range(0, digits, width)):
        total = multiple(1 << width, total)
        total = add(total, _window(scalars, points, place, (1 << width) - 1))
    return total


def _window(scalars: Sequence[int], points: Sequence[Point], place: int, mask: int) -> Point:
    """Sum of (digit of the scalar at a place) times point: points of one digit first, then digits by running sums."""
    buckets: dict[int, Point] = {}
    for scalar, point in zip(scalars, points, strict=True):
        if digit := (abs(scalar) >> place) & mask:
            signed = point if scalar > 0 else negative(point)
            buckets[digit] = add(buckets[digit], signed) if digit in buckets else signed
    running = total = ZERO
    for digit in range(max(buckets, default=0), 0, -1):
        if digit in buckets:
            running = add(running, buckets[digit])
        total = add(total, running)
    return total


@cache
def hashed(label: str) -> Point:
    """Point of the prime-order group that nobody knows a logarithm of: the first y of a hash chain that has one."""
    for attempt in range(256):
        point = _lifted(int.from_bytes(hashlib.sha256(f"islet {label} {attempt}".encode()).digest(), "little"))
        if point is not None and (cleared := multiple(COFACTOR, point))[0] % P:
            return cleared
    raise AssertionError("half of all y have a point")


def summed(points: Iterable[Point]) -> Point:
    """Sum of points."""
    return reduce(add, points, ZERO)


def _lifted(encoded: int) -> Point | None:
    """Point with this encoded y and sign of x, or None where the curve has none, or y is not the smallest spelling."""
    sign, y = encoded >> 255, encoded & (2**255 - 1)
    if y >= P:
        return None
    u, v = (y * y - 1) % P, (_D * y * y + 1) % P
    v3 = v * v * v % P
    x = u * v3 * pow(u * v3 * v3 * v % P, (P - 5) // 8, P) % P
    if (v * x * x + u) % P == 0:
        x = x * _ROOT_OF_MINUS_1 % P
    if (v * x * x - u) % P or (x == 0 and sign):
        return None
    x = x if x & 1 == sign else P - x
    return x, y, 1, x * y % P


def _is_hex32(text: str) -> bool:
    return len(text) == 64 and set(text) <= set("0123456789abcdef")
