"""What private releases cost: epsilon of composed events, and the noise an epsilon needs (Renyi accounting).

Only whole orders are used. There the divergence of a sampled Gaussian is a finite sum, on which Opacus and Google's
dp-accounting agree to the last digits (`make recompute`); at fractional orders theirs is an upper bound that is up to a
third higher. Up to epsilon 8 that costs less than 1% of epsilon, at epsilon 2 less than 0.1%.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from opacus.accountants.analysis.rdp import compute_rdp, get_privacy_spent

from data_schemas.plan import PrivacyEvent

# Up to where Opacus's own list ends, and two far beyond for very small epsilons.
ORDERS: tuple[int, ...] = (*range(2, 64), 128, 256)


@lru_cache(maxsize=1024)
def _renyi_step(sample_rate: float, noise_multiplier: float) -> npt.NDArray[np.float64]:
    """Renyi divergence of one step at each of the accountant's orders; slow, so remembered."""
    return np.asarray(compute_rdp(q=sample_rate, noise_multiplier=noise_multiplier, steps=1, orders=ORDERS))


def epsilon_of(events: Iterable[PrivacyEvent], delta: float) -> float:
    """Total epsilon of events that touched the same cohort.

    Renyi composition by Opacus's functions.
    """
    known = list(events)
    if not known:
        return 0.0
    if any(e.noise_multiplier <= 0 for e in known):
        return math.inf
    total = sum(_renyi_step(e.sample_rate, e.noise_multiplier) * e.steps for e in known)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(get_privacy_spent(orders=ORDERS, rdp=total, delta=delta)[0])


def calibrate(epsilon: float, delta: float, sample_rate: float, steps: int) -> float:
    """Find the smallest noise multiplier (to 0.1%) whose `steps` steps at this sample rate stay within epsilon."""
    if not (epsilon > 0 and 0 < delta < 1 and 0 < sample_rate <= 1 and steps >= 1):
        raise ValueError("epsilon, delta, sample_rate and steps out of range")

    def excess(noise: float) -> float:
        return math.log(
            epsilon_of([PrivacyEvent(sample_rate=sample_rate, noise_multiplier=noise, steps=steps)], delta) / epsilon
        )

    high = 4.0
    while (above := excess(high)) > 0:
        high *= 2
        if high > 1e6:
            raise ValueError("no noise multiplier below 1e6 reaches this epsilon")
    low = high / 2
    while (below := excess(low)) <= 0:
        high, above, low = low, below, low / 2
    while high > 1.001 * low:
        # Nearly a straight line in log-log: aim a little to either side of the root, so that both ends close
        # in.
        root = math.log(low) + (math.log(high) - math.log(low)) * below / (below - above)
        for aim in (math.exp(root - 4e-4), math.exp(root + 4e-4)):
            if low < aim < high:
                value = excess(aim)
                low, below, high, above = (aim, value, high, above) if value > 0 else (low, below, aim, value)
    return high
