"""Secret sharing (Shamir 1979): any `threshold` of the shares give the secret, fewer say nothing about it.

The field is that of 2^521 - 1, a prime in which every 32-byte secret has a place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

PRIME = 2**521 - 1
SHARE_BYTES = 66


def split(secret: int, coefficients: Sequence[int], count: int) -> tuple[int, ...]:
    """Shares at 1, 2, ..., count of the polynomial secret + c_1 x + c_2 x^2 + ..., whose threshold is len(c) + 1.

    Coefficients must be uniform in the field and secret; Horner's rule.
    """
    shares = []
    for place in range(1, count + 1):
        value = 0
        for coefficient in (*reversed(coefficients), secret):
            value = (value * place + coefficient) % PRIME
        shares.append(value)
    return tuple(shares)


def weights(places: Sequence[int]) -> tuple[int, ...]:
    """Lagrange's weights at 0 of distinct places: the secret is the sum of weight times share."""
    found = []
    for own in places:
        above = below = 1
        for other in places:
            if other != own:
                above, below = above * other % PRIME, below * (other - own) % PRIME
        found.append(above * pow(below, -1, PRIME) % PRIME)
    return tuple(found)


def secret_of(shares: Mapping[int, int]) -> int:
    """Return the secret of as many shares, by place, as the threshold says; of fewer the result means nothing."""
    places = sorted(shares)
    return sum(w * shares[place] for w, place in zip(weights(places), places, strict=True)) % PRIME
