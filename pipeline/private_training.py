"""Private training at one hospital, and its accounting.  The only module that imports Opacus or Lightning.

Statement kept here: for adding or removing ONE PATIENT's whole record, each step releases the sum of per-patient gradients, each
clipped to max_grad_norm, of a Poisson sample of patients, plus Gaussian noise of standard deviation noise_multiplier x
max_grad_norm in every trainable coordinate.  The clip, the sampler, the noise and the event that accounts for them come from
one frozen LocalPlan.  The divisor is sample_rate x declared_patients, which is public and never the drawn count.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import pytorch_lightning as lightning
import torch
from opacus import GradSampleModule
from opacus.accountants import RDPAccountant
from opacus.accountants.analysis.rdp import compute_rdp, get_privacy_spent
from opacus.grad_sample import register_grad_sampler
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from pipeline.forecaster import Forecaster, ForecasterSpec, GateTap, flatten, unflatten, window_losses
from pipeline.windows import Batch, Windows

Weights = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class PrivacyEvent:
    """What is accounted for: `steps` Gaussian mechanisms on Poisson samples; sample_rate 1 is the plain Gaussian mechanism."""

    sample_rate: float
    noise_multiplier: float
    steps: int


@dataclass(frozen=True, slots=True)
class LocalPlan:
    """One hospital's share of a round.  noise_multiplier 0 gives no privacy at all and exists for tests and baselines."""

    steps: int
    learning_rate: float
    sample_rate: float
    noise_multiplier: float
    max_grad_norm: float
    windows_per_patient: int
    trainable: Literal["all", "head"] = "all"
    pinball_weight: float = 1.0

    def __post_init__(self) -> None:
        positive = (self.steps, self.learning_rate, self.sample_rate, self.max_grad_norm, self.windows_per_patient)
        if not all(math.isfinite(v) and v > 0 for v in positive) or not self.sample_rate <= 1:
            raise ValueError("steps, rates, clip and windows must be positive, and sample_rate at most 1")
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier >= 0):
            raise ValueError("noise_multiplier must be finite and not negative")
        if self.trainable not in ("all", "head"):
            raise ValueError("trainable must be 'all' or 'head'")

    @property
    def event(self) -> PrivacyEvent:
        """What running this plan once costs every patient of the cohort."""
        return PrivacyEvent(self.sample_rate, self.noise_multiplier, self.steps)


@dataclass(frozen=True, slots=True)
class LocalResult:
    """delta: float32[D], new weights minus initial ones, zero in frozen parameters; event: what it cost."""

    delta: Weights
    event: PrivacyEvent


class NoiseSource(Protocol):
    """Where a private round takes its randomness from: noise, the Poisson sample, and the windows of each patient."""

    def normal(self, count: int) -> Tensor:
        """Standard Gaussian draws, float64[count]."""
        ...

    def uniform(self, count: int) -> Tensor:
        """Draws from [0, 1), float64[count]."""
        ...


class SeededNoise:
    """Repeatable randomness for tests and demos: whoever knows the seed can remove the noise, so it protects nobody."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, count: int) -> Tensor:
        """Standard Gaussian draws, float64[count]."""
        return torch.randn(count, dtype=torch.float64, generator=self._generator)

    def uniform(self, count: int) -> Tensor:
        """Draws from [0, 1), float64[count]."""
        return torch.rand(count, dtype=torch.float64, generator=self._generator)


class SecureNoise:
    """Randomness of the operating system's cryptographic generator; nothing repeats and no seed exists.

    A Gaussian is half the sum of four, as in Opacus's secure mode, which hides the gaps of floating point numbers
    (Holohan and Braghin 2021).
    """

    def normal(self, count: int) -> Tensor:
        """Standard Gaussian draws, float64[count], by Box and Muller from 53-bit uniforms."""
        pairs = 2 * count
        draws = self._unit(2 * pairs)
        radius = np.sqrt(-2.0 * np.log(1.0 - draws[:pairs]))
        angle = 2.0 * math.pi * draws[pairs:]
        gaussians = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)]).reshape(4, count)
        return torch.from_numpy(gaussians.sum(axis=0) / 2.0)

    def uniform(self, count: int) -> Tensor:
        """Draws from [0, 1), float64[count]."""
        return torch.from_numpy(self._unit(count))

    @staticmethod
    def _unit(count: int) -> npt.NDArray[np.float64]:
        words = np.frombuffer(os.urandom(8 * count), dtype=np.uint64)
        return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


@register_grad_sampler(GateTap)
def _gate_tap_gradients(layer: GateTap, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """Gradients of each example: x [P,...,T,F], h_prev [P,...,T,H] and backprops [P,...,T,4H] to [P, *parameter shape].

    Everything between the first and the last dimension belongs to one example (a patient) and is summed inside its gradient.
    """
    inputs, hidden = (a.reshape(a.shape[0], -1, a.shape[-1]) for a in activations)
    arriving = backprops.reshape(backprops.shape[0], -1, backprops.shape[-1])
    across = arriving.transpose(1, 2)
    return {
        layer.weight_ih: torch.bmm(across, inputs),
        layer.weight_hh: torch.bmm(across, hidden),
        layer.bias: arriving.sum(dim=1),
    }


class _PatientOptimizer(DPOptimizer):  # type: ignore[misc]
    """Opacus's optimizer with noise from a NoiseSource, added in float64 before rounding.

    A patient whose gradient is not finite (a hostile or broken model) contributes nothing, so the sensitivity bound holds.
    """

    source: NoiseSource

    def clip_and_accumulate(self) -> None:
        """Clip each patient's gradient to max_grad_norm over all parameters together, and sum."""
        finite = torch.stack([g.flatten(1).isfinite().all(dim=1) for g in self.grad_samples]).all(dim=0)
        if not bool(finite.all()):
            for p in self.params:
                p.grad_sample[~finite] = 0.0
        super().clip_and_accumulate()

    def add_noise(self) -> None:
        """Standard deviation noise_multiplier x max_grad_norm in every coordinate."""
        std = self.noise_multiplier * self.max_grad_norm
        for p in self.params:
            noise = self.source.normal(p.numel()).view_as(p) * std
            p.grad = (p.summed_grad.double() + noise).to(p.dtype)


@dataclass(frozen=True)
class _PatientSamples(Iterable[tuple[Tensor, Tensor, Tensor, Tensor]]):
    """One item a step: a Poisson sample of the patients and k windows of each, drawn with replacement.

    Items are x [P,k,T,F], y [P,k,12], mask [P,k,12], last [P,k]; P may be 0.
    """

    windows: Windows
    plan: LocalPlan
    source: NoiseSource

    def __len__(self) -> int:
        return self.plan.steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        first, count = self.windows.offsets[:-1], np.diff(self.windows.offsets)
        k = self.plan.windows_per_patient
        for _ in range(self.plan.steps):
            joins = self.source.uniform(len(count)).numpy() < self.plan.sample_rate
            chosen = np.flatnonzero(joins & (count > 0))
            draws = self.source.uniform(len(chosen) * k).numpy().reshape(len(chosen), k)
            picks = first[chosen][:, None] + (draws * count[chosen][:, None]).astype(np.int64)
            batch = self.windows.gather(self.windows.anchors[picks.ravel()])
            yield (
                torch.from_numpy(batch.x).unflatten(0, (len(chosen), k)),
                torch.from_numpy(batch.y).unflatten(0, (len(chosen), k)),
                torch.from_numpy(batch.mask).unflatten(0, (len(chosen), k)),
                torch.from_numpy(batch.last).unflatten(0, (len(chosen), k)),
            )


class _PrivateRound(lightning.LightningModule):
    """Plain SGD on clipped, noised sums of per-patient gradients."""

    def __init__(self, model: Forecaster, plan: LocalPlan, declared_patients: int, source: NoiseSource) -> None:
        super().__init__()
        self.automatic_optimization = False
        model.tapped = plan.trainable == "all"
        model.tap.requires_grad_(plan.trainable == "all")
        model.train()
        self.plan, self.network = plan, model
        self.hooks = GradSampleModule(model, batch_first=True, loss_reduction="sum")
        sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=plan.learning_rate)
        self.private = _PatientOptimizer(
            sgd,
            noise_multiplier=plan.noise_multiplier,
            max_grad_norm=plan.max_grad_norm,
            expected_batch_size=plan.sample_rate * declared_patients,
        )
        self.private.source = source

    def configure_optimizers(self) -> Any:
        """The optimizer that clips and adds noise."""
        return self.private

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor, Tensor], _index: int) -> None:
        """One step; an empty sample is a valid step of noise alone."""
        x, y, mask, last = batch
        self.private.zero_grad()
        if len(x):
            mean, quantiles = self.network.residuals(x)
            losses = window_losses(mean, quantiles, y - last.unsqueeze(-1), mask, pinball_weight=self.plan.pinball_weight)
            self.manual_backward(losses.mean(dim=1).sum())
        else:
            for p in self.private.params:
                p.grad_sample = p.new_zeros(0, *p.shape)
        self.optimizers().step()  # type: ignore[union-attr]


def train_steps(
    initial: Weights, spec: ForecasterSpec, windows: Windows, plan: LocalPlan, declared_patients: int, source: NoiseSource
) -> LocalResult:
    """One local round at one hospital from initial weights float32[D], on the windows of its training patients.

    Guarantee: (the result, for anyone who sees it) is as private as `plan.event` says, per patient.  Patients without
    windows count as sampled with a gradient of zero.
    """
    if declared_patients < 1:
        raise ValueError("declared_patients must be at least 1")
    model = unflatten(initial, spec)
    with _quiet():
        _trainer().fit(_PrivateRound(model, plan, declared_patients, source), _PatientSamples(windows, plan, source))
    return LocalResult(flatten(model) - initial, plan.event)


@lru_cache(maxsize=1024)
def _renyi_step(sample_rate: float, noise_multiplier: float) -> npt.NDArray[np.float64]:
    """Renyi divergence of one step at each of the accountant's orders; slow, so remembered."""
    orders = RDPAccountant.DEFAULT_ALPHAS
    return np.asarray(compute_rdp(q=sample_rate, noise_multiplier=noise_multiplier, steps=1, orders=orders))


def epsilon_of(events: Iterable[PrivacyEvent], delta: float) -> float:
    """Total epsilon of events that touched the same cohort: Renyi composition, the numbers of Opacus's RDPAccountant."""
    known = list(events)
    if not known:
        return 0.0
    if any(e.noise_multiplier <= 0 for e in known):
        return math.inf
    total = sum(_renyi_step(e.sample_rate, e.noise_multiplier) * e.steps for e in known)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(get_privacy_spent(orders=RDPAccountant.DEFAULT_ALPHAS, rdp=total, delta=delta)[0])


def calibrate(epsilon: float, delta: float, sample_rate: float, steps: int) -> float:
    """The smallest noise multiplier (to 0.1%) whose `steps` steps at this sample rate stay within epsilon."""
    if not (epsilon > 0 and 0 < delta < 1 and 0 < sample_rate <= 1 and steps >= 1):
        raise ValueError("epsilon, delta, sample_rate and steps out of range")

    def excess(noise: float) -> float:
        return math.log(epsilon_of([PrivacyEvent(sample_rate, noise, steps)], delta) / epsilon)

    high = 4.0
    while (above := excess(high)) > 0:
        high *= 2
        if high > 1e6:
            raise ValueError("no noise multiplier below 1e6 reaches this epsilon")
    low = high / 2
    while (below := excess(low)) <= 0:
        high, above, low = low, below, low / 2
    while high > 1.001 * low:
        # Nearly a straight line in log-log: aim a little to either side of the root, so that both ends close in.
        root = math.log(low) + (math.log(high) - math.log(low)) * below / (below - above)
        for aim in (math.exp(root - 4e-4), math.exp(root + 4e-4)):
            if low < aim < high:
                value = excess(aim)
                low, below, high, above = (aim, value, high, above) if value > 0 else (low, below, aim, value)
    return high


@dataclass(frozen=True, slots=True)
class FitPlan:
    """Ordinary training without privacy: `steps` batches, Adam on a one-cycle schedule, gradient norm capped at 1.

    weights: how often windows of each given source are drawn; None draws every window equally often.
    """

    steps: int
    batch_size: int = 256
    learning_rate: float = 3e-3
    pinball_weight: float = 1.0
    seed: int = 0
    weights: tuple[float, ...] | None = None


Augment = Callable[[np.random.Generator, Batch], Batch]


@dataclass(frozen=True)
class _WindowSamples(Iterable[tuple[Tensor, Tensor, Tensor, Tensor]]):
    """One item a step: windows drawn from several sources, x [B,T,F], y [B,12], mask [B,12], last [B]."""

    sources: Sequence[Windows]
    plan: FitPlan
    augment: Augment | None

    def __len__(self) -> int:
        return self.plan.steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        rng = np.random.default_rng(self.plan.seed)
        share = np.array(self.plan.weights or [len(w) for w in self.sources], dtype=np.float64)
        for _ in range(self.plan.steps):
            counts = rng.multinomial(self.plan.batch_size, share / share.sum())
            parts = [w.gather(rng.choice(w.anchors, c)) for w, c in zip(self.sources, counts, strict=True) if c]
            batch = Batch(
                np.concatenate([p.x for p in parts]),
                np.concatenate([p.y for p in parts]),
                np.concatenate([p.mask for p in parts]),
                np.concatenate([p.last for p in parts]),
            )
            if self.augment is not None:
                batch = self.augment(rng, batch)
            yield (
                torch.from_numpy(batch.x),
                torch.from_numpy(batch.y),
                torch.from_numpy(batch.mask),
                torch.from_numpy(batch.last),
            )


class _OpenFit(lightning.LightningModule):
    """Adam on the mean loss of a batch of windows."""

    def __init__(self, model: Forecaster, plan: FitPlan) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.network, self.plan = model.train(), plan

    def configure_optimizers(self) -> Any:
        """Adam, one cycle."""
        adam = torch.optim.Adam(self.network.parameters(), lr=self.plan.learning_rate)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            adam, self.plan.learning_rate, total_steps=self.plan.steps + 1, pct_start=0.15
        )
        return adam

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor, Tensor], _index: int) -> None:
        """One step."""
        x, y, mask, last = batch
        mean, quantiles = self.network.residuals(x)
        loss = window_losses(mean, quantiles, y - last.unsqueeze(-1), mask, pinball_weight=self.plan.pinball_weight).mean()
        adam: Any = self.optimizers()
        adam.zero_grad()
        self.manual_backward(loss)
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        adam.step()
        self.schedule.step()


def fit(
    initial: Weights, spec: ForecasterSpec, sources: Sequence[Windows], plan: FitPlan, augment: Augment | None = None
) -> Weights:
    """Train WITHOUT privacy (public warm start, local-only and pooled baselines): weights float32[D] to weights float32[D]."""
    if not sources or not any(len(w) for w in sources):
        raise ValueError("there are no windows to fit")
    model = unflatten(initial, spec)
    with _quiet():
        _trainer().fit(_OpenFit(model, plan), _WindowSamples(sources, plan, augment))
    return flatten(model)


def _trainer() -> lightning.Trainer:
    """Lightning's loop and nothing around it: CPU, one pass, no logger, checkpoint or progress bar."""
    return lightning.Trainer(accelerator="cpu", devices=1, max_epochs=1, barebones=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back Lightning's announcements and Opacus's hook warnings for the duration of one round."""
    logger = logging.getLogger("pytorch_lightning")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)
