"""What is registered with Opacus for the LSTM's weights: gradients and norms of each patient, as looped autograd."""

from __future__ import annotations

import torch
from opacus.grad_sample import GradSampleModule
from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleModuleFastGradientClipping

from pipeline.gate_tap import GateTap
from pipeline.noise import SeededNoise
from pipeline.private_training import LocalPlan, _PatientSamples
from tests.privacy.cohort import cohort


def test_registered_gradients_and_norms_are_those_of_autograd() -> None:
    """Three patients of two windows and five steps, in float64, to 1e-10."""
    draw = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=draw)

    tap = GateTap(7, 4).double()
    x, hidden, arriving = random(3, 2, 5, 7), random(3, 2, 5, 4), random(3, 2, 5, 16)

    gradients = GradSampleModule.GRAD_SAMPLERS[GateTap](tap, [x, hidden], arriving)
    norms = GradSampleModuleFastGradientClipping.NORM_SAMPLERS[GateTap](tap, [x, hidden], arriving)

    for patient in range(3):
        expected = torch.autograd.grad((tap(x[patient], hidden[patient]) * arriving[patient]).sum(), tap.parameters())
        for parameter, gradient in zip(tap.parameters(), expected, strict=True):
            torch.testing.assert_close(gradients[parameter][patient], gradient, rtol=0, atol=1e-10)
            torch.testing.assert_close(norms[parameter][patient], gradient.norm(), rtol=0, atol=1e-10)


def test_a_round_has_as_many_samples_as_steps() -> None:
    """Every step has its own Poisson sample, empty ones too, and there are no more than were accounted for."""
    plan = LocalPlan(
        steps=4,
        learning_rate=0.1,
        sample_rate=1e-9,
        noise_multiplier=1.0,
        max_grad_norm=0.1,
        windows_per_patient=2,
    )

    samples = list(_PatientSamples(cohort(2), plan, SeededNoise(0)))

    assert [x.shape[1] for x, *_ in samples] == [0] * plan.steps
