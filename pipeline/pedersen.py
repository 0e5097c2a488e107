"""Pedersen commitments to vectors of whole numbers, and the sum that everybody can check with them.

C = sum over j of x_j G_j + r H (Pedersen 1991; the vector form as in Bootle et al. 2016, section 2). It hides x
perfectly under a uniform blinder r, it opens in one way only for whoever cannot compute logarithms on edwards25519,
and commitments add up: their sum is the commitment to the sum, under the sum of blinders.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import numpy as np
from numpy.typing import NDArray

from pipeline import edwards
from pipeline.edwards import ORDER, Point

Whole = NDArray[np.int64]


def commit(values: Whole, blinder: int) -> Point:
    """Commitment to values int64[D] under a blinder in [0, ORDER). Coordinates at 0 cost nothing."""
    places = np.flatnonzero(values).tolist()
    body = edwards.weighted_sum(values[places].tolist(), [_generator(place) for place in places])
    return edwards.add(body, edwards.multiple(blinder % ORDER, _blinding()))


def opens(commitments: Iterable[str], total: Whole, blinder: int) -> bool:
    """Whether total int64[D] and blinder are sums of what is behind the commitments. Raises BadInput for no point."""
    return edwards.same(edwards.summed(map(edwards.decode, commitments)), commit(total, blinder))


def _generator(place: int) -> Point:
    return edwards.hashed(f"pedersen coordinate {place}")


@cache
def _blinding() -> Point:
    return edwards.hashed("pedersen blinder")
