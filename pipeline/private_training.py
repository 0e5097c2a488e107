"""Private training at one hospital, and its accounting.  The only module that imports Opacus or Lightning.

Statement kept here: for adding or removing ONE PATIENT's whole record, each step releases the sum of
per-patient gradients, each clipped to max_grad_norm, of a Poisson sample of patients, plus Gaussian noise of
standard deviation noise_multiplier x max_grad_norm in every trainable coordinate.  The clip, the sampler,
the noise and the event that accounts for them come from one frozen LocalPlan.  The divisor is sample_rate x
declared_patients, which is public and never the drawn count.

Gradients come from one backward pass by book-keeping (pipeline.book_keeping), a few hundred windows at a time; Opacus's
optimizer gets the clipped sum, exactly the one it would have made itself, and stays in charge of noise and scale.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytorch_lightning as lightning
import torch
from opacus.grad_sample import register_grad_sampler, register_norm_sampler
from opacus.optimizers import DPOptimizerFastGradientClipping
from torch import Tensor, nn

from data_schemas.plan import PrivacyEvent, TrainingPlan
from pipeline.book_keeping import Book, add_clipped_gradients, parts_of, square_norms
from pipeline.fitting import trainer
from pipeline.forecaster import Forecaster, ForecasterSpec, flatten, unflatten, window_losses
from pipeline.gate_tap import GateTap
from pipeline.horizon_curves import HORIZONS, projections
from pipeline.noise import NoiseSource
from pipeline.windows import Windows

Weights = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class LocalPlan:
    """One hospital's share of a round.

    Noise_multiplier 0 gives no privacy at all and exists for tests and baselines. horizon_curves: how many
    cosine curves over the horizons a step may bend forecasts along (pipeline.horizon_curves).
    """

    steps: int
    learning_rate: float
    sample_rate: float
    noise_multiplier: float
    max_grad_norm: float
    windows_per_patient: int
    trainable: Literal["all", "head"] = "all"
    pinball_weight: float = 1.0
    horizon_curves: int = HORIZONS

    def __post_init__(self) -> None:
        positive = (
            self.steps,
            self.learning_rate,
            self.sample_rate,
            self.max_grad_norm,
            self.windows_per_patient,
        )
        if not all(math.isfinite(v) and v > 0 for v in positive) or not self.sample_rate <= 1:
            raise ValueError("steps, rates, clip and windows must be positive, and sample_rate at most 1")
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier >= 0):
            raise ValueError("noise_multiplier must be finite and not negative")
        if self.trainable not in ("all", "head"):
            raise ValueError("trainable must be 'all' or 'head'")
        if not 1 <= self.horizon_curves <= HORIZONS:
            raise ValueError(f"horizon_curves must be 1 to {HORIZONS}")

    @classmethod
    def of(cls, plan: TrainingPlan, noise_multiplier: float) -> LocalPlan:
        """What a training plan asks of one hospital in a round, at this noise."""
        return cls(
            steps=plan.local.steps_per_round,
            learning_rate=plan.local.learning_rate,
            sample_rate=plan.privacy.sample_rate,
            noise_multiplier=noise_multiplier,
            max_grad_norm=plan.privacy.max_grad_norm,
            windows_per_patient=plan.local.windows_per_patient,
            trainable=plan.local.trainable,
            horizon_curves=plan.local.horizon_curves,
        )

    @property
    def event(self) -> PrivacyEvent:
        """What running this plan once costs every patient of the cohort."""
        return PrivacyEvent(sample_rate=self.sample_rate, noise_multiplier=self.noise_multiplier, steps=self.steps)


@dataclass(frozen=True, slots=True)
class LocalResult:
    """delta: float32[D], new weights minus initial ones, zero in frozen parameters; event: what it cost."""

    delta: Weights
    event: PrivacyEvent


@register_grad_sampler(GateTap)  # type: ignore[untyped-decorator]
def _gate_tap_gradients(layer: GateTap, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """Gradients of each example.

    X [P,...,T,F], h_prev [P,...,T,H] and backprops [P,...,T,4H] to [P, *parameter shape].

    Everything between the first and the last dimension belongs to one example (a patient) and is summed
    inside its gradient.
    """
    inputs, hidden = (a.reshape(a.shape[0], -1, a.shape[-1]) for a in activations)
    arriving = backprops.reshape(backprops.shape[0], -1, backprops.shape[-1])
    across = arriving.transpose(1, 2)
    return {
        layer.weight_ih: torch.bmm(across, inputs),
        layer.weight_hh: torch.bmm(across, hidden),
        layer.bias: arriving.sum(dim=1),
    }


@register_norm_sampler(GateTap)  # type: ignore[untyped-decorator]
def _gate_tap_norms(layer: GateTap, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """Gradient norms of each example, [P] for each parameter, without the gradients; shapes as above."""
    inputs, hidden = (a.reshape(a.shape[0], -1, a.shape[-1]).transpose(0, 1) for a in activations)
    arriving = backprops.reshape(backprops.shape[0], -1, backprops.shape[-1]).transpose(0, 1)
    return {
        layer.weight_ih: square_norms(inputs, arriving).sqrt(),
        layer.weight_hh: square_norms(hidden, arriving).sqrt(),
        layer.bias: torch.linalg.vector_norm(arriving.sum(dim=0), dim=1),
    }


class PatientOptimizer(DPOptimizerFastGradientClipping):  # type: ignore[misc]
    """Opacus's optimizer for sums that are clipped already, with noise from a NoiseSource added in float64.

    smooth: projections [rows, rows] of the steps of some parameters, applied after the noise, so they cost nothing.
    """

    source: NoiseSource
    smooth: Mapping[nn.Parameter, Tensor] = MappingProxyType({})

    def add_noise(self) -> None:
        """Add noise of standard deviation noise_multiplier x max_grad_norm in every coordinate."""
        std = self.noise_multiplier * self.max_grad_norm
        for p in self.params:
            noise = self.source.normal(p.numel()).to(p.device).view_as(p) * std
            p.grad = (p.summed_grad.double() + noise).to(p.dtype)
            if p in self.smooth:
                p.grad = self.smooth[p].to(p.device) @ p.grad


@dataclass(frozen=True)
class _PatientSamples(Iterable[tuple[Tensor, Tensor, Tensor, Tensor]]):
    """One item a step: a Poisson sample of the patients and k windows of each, drawn with replacement.

    Items are x [k,P,T,F], y [k,P,12], mask [k,P,12], last [k,P]; P may be 0.
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
            batch = self.windows.gather(self.windows.anchors[picks.T.ravel()])
            yield (
                torch.from_numpy(batch.x.reshape(k, len(chosen), *batch.x.shape[1:])),
                torch.from_numpy(batch.y.reshape(k, len(chosen), *batch.y.shape[1:])),
                torch.from_numpy(batch.mask.reshape(k, len(chosen), *batch.mask.shape[1:])),
                torch.from_numpy(batch.last.reshape(k, len(chosen))),
            )


class _PrivateRound(lightning.LightningModule):  # type: ignore[misc]
    """Plain SGD on clipped, noised sums of per-patient gradients."""

    def __init__(self, model: Forecaster, plan: LocalPlan, declared_patients: int, source: NoiseSource) -> None:
        super().__init__()
        self.automatic_optimization = False
        model.tapped = plan.trainable == "all"
        model.tap.requires_grad_(plan.trainable == "all")
        model.train()
        self.plan, self.network = plan, model
        model.book = self.book = Book()
        self.book.watch(model.mean_head)
        self.book.watch(model.quantile_head)
        sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=plan.learning_rate)
        self.private = PatientOptimizer(
            sgd,
            noise_multiplier=plan.noise_multiplier,
            max_grad_norm=plan.max_grad_norm,
            expected_batch_size=plan.sample_rate * declared_patients,
        )
        self.private.source = source
        self.private.smooth = projections(model, plan.horizon_curves)

    def configure_optimizers(self) -> Any:
        """Return the optimizer that clips and adds noise."""
        return self.private

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor, Tensor], _index: int) -> None:
        """One step; an empty sample is a valid step of noise alone."""
        x, y, mask, last = batch
        self.private.zero_grad()
        for p in self.private.params:
            p.grad = torch.zeros_like(p)
        for patients in parts_of(x, self.network.spec.hidden_size):
            part = (slice(None), patients)
            mean, quantiles = self.network.residuals(x[part])
            target = y[part] - last[part].unsqueeze(-1)
            losses = window_losses(mean, quantiles, target, mask[part], pinball_weight=self.plan.pinball_weight)
            add_clipped_gradients(self.book.take(), losses.mean(dim=0).sum(), self.plan.max_grad_norm)
        self.optimizers().step()


def train_steps(
    initial: Weights,
    spec: ForecasterSpec,
    windows: Windows,
    plan: LocalPlan,
    declared_patients: int,
    source: NoiseSource,
) -> LocalResult:
    """One local round at one hospital from initial weights float32[D], on the windows of its training patients.

    Guarantee: (the result, for anyone who sees it) is as private as `plan.event` says, per patient. Patients
    without windows count as sampled with a gradient of zero.
    """
    if declared_patients < 1:
        raise ValueError("declared_patients must be at least 1")
    model = unflatten(initial, spec)
    trainer().fit(_PrivateRound(model, plan, declared_patients, source), _PatientSamples(windows, plan, source))
    return LocalResult(flatten(model) - initial, plan.event)
