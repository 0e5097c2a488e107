"""The forecaster: exact per-patient gradients, quantiles that cannot cross, weights that survive a round trip."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch

from data_schemas.units import SENSOR_MAX_MG_DL, SENSOR_MIN_MG_DL
from pipeline.forecaster import (
    Forecaster,
    ForecasterSpec,
    InferenceForecaster,
    flatten,
    predict,
    unflatten,
    weight_count,
    whiten,
    window_losses,
)

SPEC = ForecasterSpec(hidden_size=6)
STEPS = 9


def inputs(*lead: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(*lead, STEPS, SPEC.features, generator=draw, dtype=dtype)
    target = 20 * torch.randn(*lead, 12, generator=draw, dtype=dtype)
    mask = torch.rand(*lead, 12, generator=draw) < 0.7
    return x, target, mask


def looped_hidden(model: Forecaster, x: torch.Tensor) -> torch.Tensor:
    """Run the textbook LSTM, one step at a time, for autograd to differentiate."""
    tap, size = model.tap, model.spec.hidden_size
    hidden = cell = x.new_zeros(x.shape[0], size)
    for t in range(x.shape[1]):
        i, f, g, o = (x[:, t] @ tap.weight_ih.T + hidden @ tap.weight_hh.T + tap.bias).split(size, dim=1)
        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
        hidden = o.sigmoid() * cell.tanh()
    return hidden


def test_gate_tap_gradients_per_patient_equal_looped_autograd() -> None:
    """In float64, each patient's gradient from one batched pass equals autograd through a looped LSTM to 1e-10."""
    from opacus import GradSampleModule

    import pipeline.private_training  # noqa: F401  (registers the grad sampler)

    model = Forecaster(SPEC, seed=3).double()
    model.tapped = True
    x, target, mask = inputs(4, 3, dtype=torch.float64)
    GradSampleModule(model, batch_first=True, loss_reduction="sum")
    mean, quantiles = model.residuals(x)
    window_losses(mean, quantiles, target, mask).mean(dim=1).sum().backward()
    got = {name: p.grad_sample for name, p in model.named_parameters() if p.requires_grad}

    reference = Forecaster(SPEC, seed=3).double()
    reference._last_hidden = lambda x: looped_hidden(reference, x)  # type: ignore[method-assign]
    for patient in range(4):
        reference.zero_grad()
        mean, quantiles = reference.residuals(x[patient])
        window_losses(mean, quantiles, target[patient], mask[patient]).mean().backward()
        for name, p in reference.named_parameters():
            if p.requires_grad:
                assert p.grad is not None
                assert (got[name][patient] - p.grad).abs().max() < 1e-10, name


def test_tapped_and_native_paths_agree() -> None:
    """The hand-written recurrence and torch's own LSTM give the same values and the same total gradient."""
    x, target, mask = inputs(8)
    gradients = []
    for tapped in (False, True):
        model = Forecaster(SPEC, seed=1).train()
        model.tapped = tapped
        mean, quantiles = model.residuals(x)
        window_losses(mean, quantiles, target, mask).mean().backward()
        gradients.append([mean, *(p.grad for p in model.parameters() if p.requires_grad)])
    for native, tap in zip(*gradients, strict=True):
        assert torch.allclose(native, tap, atol=1e-6, rtol=1e-4)


def test_quantiles_never_cross_and_stay_within_the_sensor() -> None:
    """With wild weights, quantiles still increase and everything lies within 40..400 mg/dL."""
    rng = np.random.default_rng(0)
    model = unflatten(rng.normal(0, 3, weight_count(SPEC)).astype(np.float32), SPEC)
    x, _, _ = inputs(64)
    forecast, quantiles = predict(model, x.numpy(), rng.uniform(40, 400, 64).astype(np.float32), batch_size=10)
    assert (np.diff(quantiles, axis=-1) >= 0).all()
    for values in (forecast, quantiles):
        assert values.min() >= SENSOR_MIN_MG_DL
        assert values.max() <= SENSOR_MAX_MG_DL


def test_flat_weights_round_trip_and_wrong_lengths_are_refused() -> None:
    """Flatten then unflatten is the same model; any other length is an error."""
    model = Forecaster(SPEC, seed=5)
    weights = flatten(model)
    assert weights.dtype == np.float32
    assert weights.shape == (weight_count(SPEC),)
    np.testing.assert_array_equal(flatten(unflatten(weights, SPEC)), weights)
    with pytest.raises(ValueError, match="expected"):
        unflatten(weights[:-1], SPEC)


def test_initial_weights_follow_from_the_seed_alone() -> None:
    """The global random state does not matter; the seed does."""
    torch.manual_seed(1)
    first = flatten(Forecaster(SPEC, seed=7))
    torch.manual_seed(2)
    np.testing.assert_array_equal(first, flatten(Forecaster(SPEC, seed=7)))
    assert not np.array_equal(first, flatten(Forecaster(SPEC, seed=8)))


def test_masked_targets_do_not_matter() -> None:
    """Changing a masked target changes no loss; a window without targets costs nothing."""
    x, target, mask = inputs(5)
    mask[0] = False
    mean, quantiles = Forecaster(SPEC).residuals(x)
    losses = window_losses(mean, quantiles, target, mask)
    other = window_losses(mean, quantiles, torch.where(mask, target, torch.tensor(1e4)), mask)
    assert torch.equal(losses, other)
    assert losses[0] == 0


def test_whitening_changes_the_basis_and_not_the_forecast() -> None:
    """Forecasts stay the same, also when done twice, and the inputs of the heads get unit covariance."""
    model = Forecaster(SPEC, seed=2)
    x, _, _ = inputs(400)
    last = np.full(400, 150.0, dtype=np.float32)
    before = predict(model, x.numpy(), last)
    for _ in range(2):
        whiten(model, x.numpy(), floor=1e-6)
        after = predict(model, x.numpy(), last)
        for old, new in zip(before, after, strict=True):
            np.testing.assert_allclose(old, new, atol=2e-2)
    with torch.no_grad():
        encoded = model.encode(x)
    variances = torch.linalg.eigvalsh(torch.cov(encoded.T))
    assert variances.max() < 1.05


@pytest.mark.filterwarnings("ignore")
def test_onnx_equals_the_model() -> None:
    """The exported graph gives the model's forecast to 1e-4 mg/dL, for batch sizes other than the traced one."""
    import onnxruntime

    model = Forecaster(SPEC, seed=4)
    x, _, _ = inputs(7)
    last = torch.linspace(60, 250, 7)
    graph = io.BytesIO()
    torch.onnx.export(
        InferenceForecaster(model),
        (x[:2], last[:2]),
        graph,
        dynamo=False,
        opset_version=17,
        input_names=["x", "last"],
        output_names=["forecast", "quantiles"],
        dynamic_axes={"x": {0: "batch"}, "last": {0: "batch"}},
    )
    session = onnxruntime.InferenceSession(graph.getvalue())
    got = session.run(None, {"x": x.numpy(), "last": last.numpy()})
    want = predict(model, x.numpy(), last.numpy())
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
