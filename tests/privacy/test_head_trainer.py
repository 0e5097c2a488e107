"""The fast path of the measurements trains what the real path trains."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.federation import HeadTrainer
from pipeline.forecaster import Forecaster, ForecasterSpec, flatten
from pipeline.noise import SeededNoise
from pipeline.private_training import LocalPlan, train_steps
from tests.privacy.cohort import cohort

PLAN = LocalPlan(
    steps=3,
    learning_rate=0.5,
    sample_rate=0.5,
    noise_multiplier=1.0,
    max_grad_norm=0.2,
    windows_per_patient=8,
    trainable="head",
)


@pytest.mark.parametrize(("clip", "curves"), [(0.02, 12), (100.0, 12), (0.02, 2)])
def test_the_measuring_path_equals_the_real_one(clip: float, curves: int) -> None:
    """Same weights, plan and seed: deltas agree to float32 rounding, clipped or not."""
    spec = ForecasterSpec(hidden_size=4)
    start, windows, plan = (
        flatten(Forecaster(spec, seed=1)),
        cohort(6),
        replace(PLAN, max_grad_norm=clip, horizon_curves=curves),
    )

    fast = HeadTrainer(windows, start, spec).train(start, plan, 6, SeededNoise(3))

    np.testing.assert_allclose(train_steps(start, spec, windows, plan, 6, SeededNoise(3)).delta, fast, atol=2e-5 * clip)
