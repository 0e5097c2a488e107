"""What the same plan would have given at another epsilon: for the picture of error against privacy, on public data.

Rounds, sampling, clip and noise are those of the plan; network, ledger and budget are left out, so this must never
run on patients whose privacy is at stake.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from data_schemas.plan import TrainingPlan
from pipeline.accounting import calibrate
from pipeline.comparison import Cohort
from pipeline.forecaster import ForecasterSpec
from pipeline.noise import SeededNoise
from pipeline.private_training import LocalPlan, train_steps
from pipeline.windows import Float32

# Beside the plan's own epsilon; fewer would be no curve, more would keep the reader waiting.
OTHER_EPSILONS = (1.0, 2.0, 4.0)


def train_at(
    epsilon: float,
    cohorts: Sequence[Cohort],
    declared: Mapping[str, int],
    plan: TrainingPlan,
    start: Float32,
) -> Float32:
    """Released weights float32[D] of the plan at this epsilon, from start weights float32[D]; momentum is left out."""
    steps = plan.rounds * plan.local.steps_per_round
    local = LocalPlan.of(plan, calibrate(epsilon, plan.privacy.delta, plan.privacy.sample_rate, steps))
    spec, everybody = ForecasterSpec(hidden_size=plan.model.hidden_size), sum(declared.values())
    weights, last = start, list[Float32]()
    for number in range(plan.rounds):
        mean = np.zeros(len(start))
        for index, cohort in enumerate(cohorts):
            source = SeededNoise((plan.seed or 0) * 1_000_003 + number * 101 + index)
            result = train_steps(weights, spec, cohort.training, local, declared[cohort.name], source)
            mean += declared[cohort.name] / everybody * result.delta.astype(np.float64)
        weights = (weights + plan.server.learning_rate * mean).astype(np.float32)
        last = [*last, weights][-plan.server.average_last_rounds :]
    return np.asarray(np.mean(last, axis=0, dtype=np.float64), dtype=np.float32)
