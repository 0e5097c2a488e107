"""A federation without its network: the demo's six hospitals, private rounds, the server's mean, errors on held-out.

Only what a measurement over many runs needs; rounds, sampling, clip and noise are those of `train_steps`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from data_schemas.layout import load_layout
from data_schemas.plan import TrainingPlan
from hospital_node.cohorts import held_out_windows, training_windows
from hospital_node.folder import NodeFolder
from hospital_node.importing import import_exports
from hospital_node.settings import NodeSettings, Source
from hospital_node.store import Store
from pipeline.accounting import calibrate
from pipeline.demo import EXPORTS, FEDERATION, HELDOUT_FRACTION, SITES
from pipeline.forecaster import Forecaster, ForecasterSpec, flatten, unflatten, window_losses
from pipeline.horizon_curves import projections
from pipeline.noise import NoiseSource, SeededNoise
from pipeline.private_training import LocalPlan, train_steps
from pipeline.windows import Windows

Weights = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Hospital:
    """Windows of one hospital's two groups of people, and the number of training patients it declares."""

    name: str
    declared: int
    training: Windows
    heldout: Windows
    heads: HeadTrainer | None = None


@dataclass(frozen=True, slots=True)
class Recipe:
    """One private training run; epsilon None trains without noise."""

    local: LocalPlan
    rounds: int
    epsilon: float | None
    average_last: int
    delta: float = 1e-5

    def calibrated(self) -> LocalPlan:
        """The local plan with the noise that epsilon needs over all rounds."""
        if self.epsilon is None:
            return replace(self.local, noise_multiplier=0.0)
        steps = self.rounds * self.local.steps
        noise = calibrate(self.epsilon, self.delta, self.local.sample_rate, steps)
        return replace(self.local, noise_multiplier=noise)


@dataclass(frozen=True, slots=True)
class Errors:
    """RMSE in mg/dL on held-out people: mean over hospitals and pooled over windows, at 30 and 60 minutes."""

    mean_30: float
    mean_60: float
    pooled_30: float
    pooled_60: float


def recipe_of(plan: TrainingPlan, epsilon: float | None) -> Recipe:
    """What a training plan says, at another epsilon."""
    return Recipe(LocalPlan.of(plan, 0.0), plan.rounds, epsilon, plan.server.average_last_rounds, plan.privacy.delta)


def demo_hospitals(folder: Path, history_minutes: int, seed: int) -> list[Hospital]:
    """The hospitals of the demo with their sample exports imported; the same seed holds out the same people."""
    return [_hospital(folder / site.name, site.name, site.zone, site.people, history_minutes, seed) for site in SITES]


def _hospital(home: Path, name: str, zone: str, people: int, history_minutes: int, seed: int) -> Hospital:
    heldout = round(people * HELDOUT_FRACTION)
    if not (home / "node.toml").exists():
        settings = NodeSettings(
            name=name,
            federation=FEDERATION,
            aggregator_public_key="0" * 64,
            sources=(Source(path=str(EXPORTS / name), layout=name, zone=zone),),
            declared_training_patients=people - heldout,
            declared_heldout_patients=heldout,
            heldout_fraction=HELDOUT_FRACTION,
            max_epsilon_training=8.0,
            max_epsilon_heldout=8.0,
            seed=seed,
        )
        NodeFolder.create(home, settings)
        with NodeFolder.open(home) as node:
            import_exports(EXPORTS / name, load_layout(name), zone, node.pseudonym_key, Store(node.store))
    with NodeFolder.open(home) as node:
        training = training_windows(node, history_minutes)
        return Hospital(name, people - heldout, training, held_out_windows(node, history_minutes))


class HeadTrainer:
    """`train_steps` for trainable="head", faster: the LSTM is frozen, so its windows are encoded once and for all.

    Same draws in the same order, same clip, same noise; tests/privacy holds the two against each other.
    """

    def __init__(self, training: Windows, start: Weights, spec: ForecasterSpec) -> None:
        model = unflatten(start, spec).eval()
        batch = training.gather(training.anchors)
        self.spec, self._offsets = spec, training.offsets
        self._encoded = encode(model, batch.x)
        self._change = torch.from_numpy(batch.y - batch.last[:, None])
        self._mask = torch.from_numpy(batch.mask)

    def train(self, initial: Weights, plan: LocalPlan, declared: int, source: NoiseSource) -> Weights:
        """Delta float32[D] of one local round from initial weights float32[D]."""
        model = unflatten(initial, self.spec)
        heads = (model.mean_head, model.quantile_head)
        smooth = projections(model, plan.horizon_curves)
        first, count, k = self._offsets[:-1], np.diff(self._offsets), plan.windows_per_patient
        for _ in range(plan.steps):
            joins = source.uniform(len(count)).numpy() < plan.sample_rate
            chosen = np.flatnonzero(joins & (count > 0))
            draws = source.uniform(len(chosen) * k).numpy().reshape(len(chosen), k)
            picks = torch.from_numpy(first[chosen][:, None] + (draws * count[chosen][:, None]).astype(np.int64))
            gradients = self._gradients(model, picks, plan)
            with torch.no_grad():
                norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0)
                factor = (plan.max_grad_norm / (norms + 1e-6)).clamp(max=1.0)
                for p, g in zip((p for head in heads for p in head.parameters()), gradients, strict=True):
                    noise = source.normal(p.numel()).view_as(p) * (plan.noise_multiplier * plan.max_grad_norm)
                    total = (torch.tensordot(factor, g, dims=1).double() + noise).to(p.dtype)
                    total = smooth[p] @ total if p in smooth else total
                    p.sub_(plan.learning_rate * total / (plan.sample_rate * declared))
        return flatten(model) - initial

    def _gradients(self, model: Forecaster, picks: torch.Tensor, plan: LocalPlan) -> list[torch.Tensor]:
        """Gradient of each patient, [P, *shape], for weight and bias of the mean head and of the quantile head."""
        encoded = self._encoded[picks]
        taps: list[torch.Tensor] = []

        def keep(_module: object, _inputs: object, output: torch.Tensor) -> None:
            output.retain_grad()
            taps.append(output)

        handles = [head.register_forward_hook(keep) for head in (model.mean_head, model.quantile_head)]
        mean, quantiles = model.read_out(encoded)
        for handle in handles:
            handle.remove()
        losses = window_losses(
            mean, quantiles, self._change[picks], self._mask[picks], pinball_weight=plan.pinball_weight
        )
        model.zero_grad()
        losses.mean(dim=1).sum().backward()
        arriving = [tap.grad if tap.grad is not None else torch.zeros_like(tap) for tap in taps]
        return [g for a in arriving for g in (torch.bmm(a.transpose(1, 2), encoded), a.sum(dim=1))]


def federate(hospitals: Sequence[Hospital], start: Weights, spec: ForecasterSpec, recipe: Recipe, seed: int) -> Weights:
    """Train all rounds and return the average of the last models, float32[D]."""
    plan, declared = recipe.calibrated(), sum(h.declared for h in hospitals)
    weights, last = start, []
    for number in range(recipe.rounds):
        total = np.zeros(len(start))
        for index, hospital in enumerate(hospitals):
            source = SeededNoise(seed * 1_000_003 + number * 101 + index)
            if plan.trainable == "head" and hospital.heads is not None:
                delta = hospital.heads.train(weights, plan, hospital.declared, source)
            else:
                delta = train_steps(weights, spec, hospital.training, plan, hospital.declared, source).delta
            total += hospital.declared / declared * delta.astype(np.float64)
        weights = (weights + total).astype(np.float32)
        last = [*last, weights][-recipe.average_last :]
    average: Weights = np.mean(last, axis=0, dtype=np.float64).astype(np.float32)
    return average


def encode(model: Forecaster, x: npt.NDArray[np.float32]) -> torch.Tensor:
    """Inputs of the heads, float32[B, 2H+1], of histories x float32[B, T, F]."""
    with torch.inference_mode():
        parts = [model.encode(torch.from_numpy(x[at : at + 8192])) for at in range(0, len(x), 8192)]
    return torch.cat(parts).clone()


class Scorer:
    """Held-out windows of every hospital, encoded once for models that share their LSTM with `start`."""

    def __init__(self, hospitals: Sequence[Hospital], start: Weights, spec: ForecasterSpec) -> None:
        self.spec, self.start = spec, start
        self._model = unflatten(start, spec).eval()
        tap, mix = self._model.tap, self._model.mix
        self._frozen = sum(p.numel() for p in (*tap.parameters(), *mix.parameters()))
        self._batches = [h.heldout.gather(h.heldout.anchors) for h in hospitals]
        self._encoded = [encode(self._model, b.x) for b in self._batches]

    def errors(self, weights: Weights) -> Errors:
        """RMSE of a model float32[D] on all held-out windows."""
        model = unflatten(weights, self.spec).eval()
        same = np.array_equal(weights[: self._frozen], self.start[: self._frozen])
        squares: dict[int, list[npt.NDArray[np.float64]]] = {5: [], 11: []}
        for batch, ready in zip(self._batches, self._encoded, strict=True):
            with torch.inference_mode():
                mean, _ = model.read_out(ready if same else encode(model, batch.x))
            forecast = np.clip(batch.last[:, None] + mean.numpy(), 40.0, 400.0)
            for column, found in squares.items():
                seen = batch.mask[:, column]
                found.append((forecast[seen, column].astype(np.float64) - batch.y[seen, column]) ** 2)
        means = {c: float(np.mean([np.sqrt(s.mean()) for s in found])) for c, found in squares.items()}
        pooled = {c: float(np.sqrt(np.concatenate(found).mean())) for c, found in squares.items()}
        return Errors(means[5], means[11], pooled[5], pooled[11])
