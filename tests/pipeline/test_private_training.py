"""Private training: one patient's influence is bounded, noise has its size, the accountant composes."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from data_schemas.plan import PrivacyEvent
from pipeline.accounting import ORDERS, calibrate, epsilon_of
from pipeline.fitting import FitPlan, fit
from pipeline.forecaster import Forecaster, ForecasterSpec, flatten, unflatten
from pipeline.noise import SecureNoise, SeededNoise
from pipeline.private_training import LocalPlan, train_steps
from pipeline.windows import Series, Windows, WindowSpec, cut_windows

SPEC = ForecasterSpec(hidden_size=4)
PLAN = LocalPlan(
    steps=1,
    learning_rate=0.5,
    sample_rate=1.0,
    noise_multiplier=0.0,
    max_grad_norm=0.01,
    windows_per_patient=8,
)
WEIGHTS = flatten(Forecaster(SPEC, seed=1))


def cohort(patients: int, *, wild: bool = False) -> Windows:
    rng = np.random.default_rng(0)
    times = np.arange(0, 12 * 3600, 300, dtype=np.int64)
    glucose = [120 + 30 * np.sin(times / 2400 + rng.uniform(0, 6)) for _ in range(patients)]
    if wild:
        glucose[-1] = np.where(np.arange(len(times)) % 24 < 12, 40.0, 400.0)
    series = Series(
        tuple(f"p{i}" for i in range(patients)),
        np.arange(patients + 1, dtype=np.int64) * len(times),
        np.tile(times, patients),
        np.concatenate([*glucose, []]).astype(np.float32),
    )
    return cut_windows(series, WindowSpec(history_minutes=60, max_jumps=1000))


def run(windows: Windows, plan: LocalPlan, declared: int, seed: int = 0) -> np.ndarray:
    return train_steps(WEIGHTS, SPEC, windows, plan, declared, SeededNoise(seed)).delta


class SamePicks:
    """Everybody joins and everybody's windows are the first ones.

    So that runs with and without a patient are comparable.
    """

    def normal(self, count: int) -> torch.Tensor:
        """No noise."""
        return torch.zeros(count, dtype=torch.float64)

    def uniform(self, count: int) -> torch.Tensor:
        """Pick the first."""
        return torch.zeros(count, dtype=torch.float64)


@pytest.mark.parametrize("trainable", ["all", "head"])
def test_clipping_bounds_one_patient(trainable: str) -> None:
    """Adding a patient with absurd readings moves a step by at most learning_rate x max_grad_norm / expected batch."""
    plan = replace(PLAN, trainable=trainable)
    both = cohort(5, wild=True)
    without = cut_windows(both.series.select([f"p{i}" for i in range(4)]), both.spec)
    moved = [train_steps(WEIGHTS, SPEC, w, plan, 5, SamePicks()).delta for w in (both, without)]
    bound = plan.learning_rate * plan.max_grad_norm / 5
    influence = float(np.linalg.norm(moved[0].astype(np.float64) - moved[1]))
    assert 0.5 * bound < influence <= bound * (1 + 1e-3)


def test_a_patient_whose_gradient_is_not_finite_contributes_nothing() -> None:
    """Base weights that overflow give a step of noise alone, never NaN."""
    broken = WEIGHTS.copy()
    broken[-1] = np.inf
    plan = replace(PLAN, trainable="head", noise_multiplier=1.0)
    with np.errstate(invalid="ignore"):
        delta = train_steps(broken, SPEC, cohort(2), plan, 2, SeededNoise(0)).delta
    assert np.isfinite(delta[:-1]).all()


def test_one_unclipped_patient_without_noise_is_plain_sgd() -> None:
    """With a huge clip the step is minus learning_rate times the patient's mean gradient over its windows."""
    plan = replace(PLAN, max_grad_norm=1e6)
    got = train_steps(WEIGHTS, SPEC, cohort(1), plan, 1, SamePicks()).delta
    from pipeline.forecaster import window_losses

    windows = cohort(1)
    model = unflatten(WEIGHTS, SPEC).train()
    batch = windows.gather(np.repeat(windows.anchors[:1], plan.windows_per_patient))
    mean, quantiles = model.residuals(torch.from_numpy(batch.x))
    window_losses(
        mean, quantiles, torch.from_numpy(batch.y - batch.last[:, None]), torch.from_numpy(batch.mask)
    ).mean().backward()
    gradient = np.concatenate(
        [(torch.zeros_like(p) if p.grad is None else p.grad).numpy().ravel() for p in model.parameters()]
    )
    np.testing.assert_allclose(got, -plan.learning_rate * gradient, atol=1e-6)


def test_only_the_heads_move_when_only_the_heads_are_trained() -> None:
    """With trainable='head' the delta is zero in the LSTM; the change of basis never moves."""
    plan = replace(PLAN, noise_multiplier=1.0, steps=2)
    tap = sum(p.numel() for p in Forecaster(SPEC).tap.parameters())
    mix = sum(p.numel() for p in Forecaster(SPEC).mix.parameters())
    head, everything = (run(cohort(3), replace(plan, trainable=t), 3) for t in ("head", "all"))
    assert not head[: tap + mix].any()
    assert head[tap + mix :].all()
    assert everything[:tap].all()
    assert not everything[tap : tap + mix].any()
    assert everything[tap + mix :].all()


@pytest.mark.parametrize("patients", [0, 3])
def test_an_empty_sample_is_a_step_of_noise(patients: int) -> None:
    """Nobody sampled, or nobody there: the step is noise of std learning_rate x noise x clip / expected batch."""
    plan = replace(PLAN, sample_rate=1e-9, noise_multiplier=2.0, trainable="all")
    delta = run(cohort(patients), plan, 10)
    moved = delta[delta != 0]
    expected = plan.learning_rate * plan.noise_multiplier * plan.max_grad_norm / (plan.sample_rate * 10)
    assert len(moved) > 500
    assert moved.std() == pytest.approx(expected, rel=0.1)


def test_the_divisor_is_declared_and_not_drawn() -> None:
    """Twice the declared patients gives half the step, whoever was drawn."""
    np.testing.assert_allclose(run(cohort(3), PLAN, 3), 2 * run(cohort(3), PLAN, 6), atol=1e-6)


def test_a_seeded_round_repeats() -> None:
    """Same seed, same delta, whatever the global random state; another seed, another delta."""
    plan = replace(PLAN, noise_multiplier=1.0, sample_rate=0.5, steps=3)
    torch.manual_seed(1)
    first = run(cohort(4), plan, 4, seed=5)
    torch.manual_seed(2)
    np.testing.assert_array_equal(first, run(cohort(4), plan, 4, seed=5))
    assert not np.array_equal(first, run(cohort(4), plan, 4, seed=6))


def test_secure_noise_is_standard_gaussian_and_never_repeats() -> None:
    """Mean 0, standard deviation 1, Gaussian tails, uniform uniforms, float64, and two draws differ."""
    draws = SecureNoise().normal(200_000)
    assert draws.dtype == torch.float64
    assert abs(float(draws.mean())) < 0.02
    assert float(draws.std()) == pytest.approx(1.0, abs=0.01)
    assert float((draws.abs() > 1.959964).double().mean()) == pytest.approx(0.05, abs=0.004)
    assert not torch.equal(draws[:100], SecureNoise().normal(100))
    uniform = SecureNoise().uniform(100_000)
    assert float(uniform.min()) >= 0
    assert float(uniform.max()) < 1
    assert float(uniform.mean()) == pytest.approx(0.5, abs=0.01)


def test_secure_rounds_differ() -> None:
    """Two rounds with secure noise from the same state give different deltas."""
    plan = replace(PLAN, noise_multiplier=1.0)
    first, second = (train_steps(WEIGHTS, SPEC, cohort(2), plan, 2, SecureNoise()).delta for _ in range(2))
    assert not np.array_equal(first, second)


def test_accounting_composes_different_events() -> None:
    """As Opacus's accountant at whole orders.

    Grows with every event, indifferent to how steps are split, and a plain Gaussian is known.
    """
    from opacus.accountants import RDPAccountant

    train = PrivacyEvent(sample_rate=0.3, noise_multiplier=2.0, steps=50)
    assert epsilon_of([], 1e-5) == 0
    assert epsilon_of([train, train], 1e-5) == pytest.approx(
        epsilon_of([train.model_copy(update={"steps": 100})], 1e-5)
    )
    release = PrivacyEvent(sample_rate=1.0, noise_multiplier=5.0, steps=1)
    both = epsilon_of([train, release], 1e-5)
    accountant = RDPAccountant()
    accountant.history = [(2.0, 0.3, 50), (5.0, 1.0, 1)]
    assert both == pytest.approx(accountant.get_epsilon(1e-5, alphas=list(ORDERS)), rel=1e-9)
    assert max(epsilon_of([train], 1e-5), epsilon_of([release], 1e-5)) < both
    assert epsilon_of([train.model_copy(update={"noise_multiplier": 0.0})], 1e-5) == math.inf
    assert 0.5 < epsilon_of([release], 1e-5) < math.sqrt(2 * math.log(1.25 / 1e-5)) / 5.0


@pytest.mark.parametrize(("epsilon", "sample_rate", "steps"), [(8.0, 0.2, 50), (2.0, 0.5, 100), (1.0, 1.0, 1)])
def test_calibrated_noise_meets_its_epsilon_narrowly(epsilon: float, sample_rate: float, steps: int) -> None:
    """The noise found stays within epsilon and one percent less noise does not."""
    noise = calibrate(epsilon, 1e-5, sample_rate, steps)
    assert epsilon_of([PrivacyEvent(sample_rate=sample_rate, noise_multiplier=noise, steps=steps)], 1e-5) <= epsilon
    assert (
        epsilon_of([PrivacyEvent(sample_rate=sample_rate, noise_multiplier=0.99 * noise, steps=steps)], 1e-5) > epsilon
    )


def test_the_event_is_the_plan() -> None:
    """The result carries exactly what the plan will be accounted for."""
    plan = replace(PLAN, noise_multiplier=1.5, steps=2, sample_rate=0.5)
    result = train_steps(WEIGHTS, SPEC, cohort(2), plan, 2, SeededNoise(0))
    assert result.event == plan.event == PrivacyEvent(sample_rate=0.5, noise_multiplier=1.5, steps=2)


def test_nonsense_plans_are_refused() -> None:
    """Zero steps, sample rates above 1 and negative noise cannot be expressed."""
    for change in (
        {"steps": 0},
        {"sample_rate": 1.5},
        {"noise_multiplier": -1.0},
        {"max_grad_norm": math.nan},
    ):
        with pytest.raises(ValueError, match="must be"):
            replace(PLAN, **change)


def test_fit_learns() -> None:
    """Ordinary training beats its starting point and repeats for the same seed."""
    from pipeline.forecaster import predict

    windows = cohort(4)
    batch = windows.gather(windows.anchors)
    plan = FitPlan(steps=60, batch_size=64, learning_rate=1e-2)
    trained = fit(WEIGHTS, SPEC, [windows], plan)
    np.testing.assert_array_equal(trained, fit(WEIGHTS, SPEC, [windows], plan))

    def rmse(weights: np.ndarray) -> float:
        forecast, _ = predict(unflatten(weights, SPEC), batch.x, batch.last)
        return float(np.sqrt(np.mean((forecast - batch.y)[batch.mask] ** 2)))

    assert rmse(trained) < 0.8 * rmse(WEIGHTS)
