"""How updates become one step: the voted rule, the same at the aggregator and at every node that checks it.

"patient-weighted-mean" is federated averaging (McMahan et al. 2017). "norm-bounded-mean" first scales every update down
to the patient-weighted median of the norms: who holds less than half of the patients moves the model no further than
an ordinary hospital does. It stays linear in the bounded updates, so Shapley coalitions are those of the real step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from data_schemas.plan import AggregationRule, ServerSpec


def norm_factors(updates: NDArray[np.float32], shares: Sequence[float], rule: AggregationRule) -> NDArray[np.float64]:
    """Factor in (0, 1] of each update: updates float32[n, D], shares of patients [n] in the same order."""
    if rule == "patient-weighted-mean":
        return np.ones(len(updates))
    norms = np.array([np.linalg.norm(update.astype(np.float64)) for update in updates])
    order = np.argsort(norms, kind="stable")
    middle = int(np.searchsorted(np.cumsum(np.asarray(shares)[order]), 0.5))
    bound = norms[order[min(middle, len(order) - 1)]]
    return np.where(norms > bound, bound / np.where(norms > 0, norms, 1.0), 1.0)


def mean_of(updates: NDArray[np.float32], shares: Sequence[float], rule: AggregationRule) -> NDArray[np.float64]:
    """Patient-weighted mean float64[D] under a rule, in float64 and in the given order: the same bytes everywhere."""
    total = np.zeros(updates.shape[1], dtype=np.float64)
    for factor, share, update in zip(norm_factors(updates, shares, rule), shares, updates, strict=True):
        total += share * (factor * update.astype(np.float64))
    return total


def stepped(
    weights: NDArray[np.float32], velocity: NDArray[np.float32], mean: NDArray[np.float64], spec: ServerSpec
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """One server step, all [D]: velocity = momentum * velocity + mean; weights = weights + learning_rate * velocity.

    Server momentum is that of Hsu et al. 2019 (FedAvgM). Returns the new weights and the new velocity.
    """
    moved = spec.momentum * velocity.astype(np.float64) + mean
    moved_to = weights.astype(np.float64) + spec.learning_rate * moved
    return moved_to.astype(np.float32), moved.astype(np.float32)
