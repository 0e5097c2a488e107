"""The adapters that are measured train what they say."""

from __future__ import annotations

import torch

from benchmarks.adapters import Adapted, _round
from benchmarks.federation import Hospital
from pipeline.forecaster import Forecaster, ForecasterSpec, flatten, unflatten, window_losses
from pipeline.noise import SeededNoise
from pipeline.private_training import LocalPlan, _PatientSamples
from tests.privacy.cohort import cohort

SPEC = ForecasterSpec(hidden_size=4)
START = flatten(Forecaster(SPEC, seed=1))
PLAN = LocalPlan(
    steps=1,
    learning_rate=1.0,
    sample_rate=1.0,
    noise_multiplier=0.0,
    max_grad_norm=1e6,
    windows_per_patient=3,
    trainable="head",
)


def test_a_step_on_adapters_is_that_of_autograd() -> None:
    """Without clip and noise a round moves adapter and heads by minus the mean patient gradient."""
    people = cohort(4)
    model = Adapted(START, SPEC, rank=2)
    state = [p.detach().clone() + 0.1 for p in model.trained()]

    moved = _round(model, state, PLAN, Hospital("north", 4, people, people), SeededNoise(2))

    with torch.no_grad():
        for parameter, value in zip(model.trained(), state, strict=True):
            parameter.copy_(value)
    model.fold()
    plain = unflatten(flatten(model)[: len(START)], SPEC)
    x, y, mask, last = next(iter(_PatientSamples(people, PLAN, SeededNoise(2))))
    mean, quantiles = plain.residuals(x)
    window_losses(mean, quantiles, y - last.unsqueeze(-1), mask).mean().backward()
    tap = torch.cat([plain.tap.weight_ih.grad, plain.tap.bias.grad.unsqueeze(1), plain.tap.weight_hh.grad], dim=1)
    expected = [tap @ model.directions.T, plain.tap.bias.grad]
    expected += [p.grad for head in (plain.mean_head, plain.quantile_head) for p in head.parameters()]
    for got, gradient in zip(moved, expected, strict=True):
        torch.testing.assert_close(got, -gradient, rtol=1e-3, atol=1e-5)
