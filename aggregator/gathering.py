"""What a round's hospitals gave, in either way of adding up: their updates one by one, or the sum of them alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from aggregator.aggregation import cosine, mean_update
from aggregator.collecting import Collected
from aggregator.secure_round import Summed
from data_schemas.ledger import RejectedUpdate, SecureSum
from data_schemas.messages import SignedUpdate
from data_schemas.plan import AggregationRule


@dataclass(frozen=True)
class Gathered:
    """mean float64[D]: the step before momentum; updates float32[n, D], total int64[D]: one of them is empty.

    norms, cosines: L2 norm of each update and its cosine to the mean, by hospital; nobody knows them of a sum.
    """

    signed: tuple[SignedUpdate, ...]
    rejected: tuple[RejectedUpdate, ...]
    mean: NDArray[np.float64]
    updates: NDArray[np.float32]
    total: NDArray[np.int64]
    told: SecureSum | None = None
    norms: Mapping[str, float] = field(default_factory=dict)
    cosines: Mapping[str, float] = field(default_factory=dict)

    @property
    def epsilon(self) -> dict[str, float]:
        """What each hospital told of its training cohort's total."""
        return {update.manifest.node: update.manifest.spend.epsilon_after for update in self.signed}


def in_plain(collected: Collected, rule: AggregationRule) -> Gathered:
    """Updates that the aggregator has seen."""
    admitted, mean = collected.admitted, mean_update(collected.admitted, rule)
    return Gathered(
        signed=tuple(update.signed for update in admitted),
        rejected=collected.rejected,
        mean=mean,
        updates=np.stack([update.delta for update in admitted]),
        total=np.zeros(0, dtype=np.int64),
        norms={update.node: float(np.linalg.norm(update.delta.astype(np.float64))) for update in admitted},
        cosines={update.node: cosine(update.delta, mean) for update in admitted},
    )


def as_sum(summed: Summed) -> Gathered:
    """A sum, of which the aggregator has seen nothing else."""
    none = np.zeros((0, len(summed.total)), dtype=np.float32)
    return Gathered(summed.signed, summed.rejected, summed.mean, none, summed.total, summed.told)
