"""Training on a GPU gives what training on the CPU gives. Needs an NVIDIA GPU; skipped elsewhere."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch

from pipeline import fitting
from pipeline.fitting import FitPlan, fit
from pipeline.forecaster import Forecaster, ForecasterSpec, flatten
from pipeline.noise import SeededNoise
from pipeline.private_training import LocalPlan, train_steps
from tests.pipeline.test_private_training import cohort

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

SPEC = ForecasterSpec(hidden_size=16)
WEIGHTS = flatten(Forecaster(SPEC, seed=1))


def apart(here: np.ndarray, there: np.ndarray) -> float:
    """Size of the difference, as a share; cuDNN multiplies in TF32, with a mantissa of ten bits."""
    return float(np.linalg.norm(here - there) / np.linalg.norm(there))


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(fitting, "training_device", lambda: torch.device("cpu"))
    return monkeypatch


@pytest.mark.parametrize("trainable", ["all", "head"])
@pytest.mark.parametrize("noise_multiplier", [0.0, 1.0])
def test_a_private_round_is_the_cpus(
    on_the_cpu: pytest.MonkeyPatch, trainable: Literal["all", "head"], noise_multiplier: float
) -> None:
    plan = LocalPlan(
        steps=5,
        learning_rate=0.5,
        sample_rate=0.5,
        noise_multiplier=noise_multiplier,
        max_grad_norm=0.1,
        windows_per_patient=8,
        trainable=trainable,
        horizon_curves=4,
    )

    def delta() -> np.ndarray:
        torch.cuda.reset_peak_memory_stats()
        return train_steps(WEIGHTS, SPEC, cohort(12), plan, 12, SeededNoise(0)).delta

    used = torch.cuda.memory_allocated()
    there = delta()
    assert torch.cuda.max_memory_allocated() == used
    on_the_cpu.undo()
    here = delta()
    assert torch.cuda.max_memory_allocated() > used
    assert apart(here, there) < 1e-3


def test_fitting_is_the_cpus(on_the_cpu: pytest.MonkeyPatch) -> None:
    plan = FitPlan(steps=5, batch_size=32)
    there = fit(WEIGHTS, SPEC, [cohort(3)], plan)
    on_the_cpu.undo()
    here = fit(WEIGHTS, SPEC, [cohort(3)], plan)
    # Adam divides by the gradient's size, so what rounding does to one that is almost zero shows in full
    assert apart(here - WEIGHTS, there - WEIGHTS) < 0.1
