"""Ordinary training without privacy: the public warm start, and the local-only and pooled models to compare with."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytorch_lightning as lightning
import torch
from torch import Tensor, nn

from pipeline.forecaster import Forecaster, ForecasterSpec, flatten, unflatten, window_losses
from pipeline.windows import Batch, Windows

Weights = npt.NDArray[np.float32]


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


class _OpenFit(lightning.LightningModule):  # type: ignore[misc]
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
        loss = window_losses(
            mean, quantiles, y - last.unsqueeze(-1), mask, pinball_weight=self.plan.pinball_weight
        ).mean()
        adam: Any = self.optimizers()
        adam.zero_grad()
        self.manual_backward(loss)
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        adam.step()
        self.schedule.step()


def fit(
    initial: Weights,
    spec: ForecasterSpec,
    sources: Sequence[Windows],
    plan: FitPlan,
    augment: Augment | None = None,
) -> Weights:
    """Train WITHOUT privacy (public warm start, local-only and pooled baselines).

    Weights float32[D] to weights float32[D].
    """
    if not sources or not any(len(w) for w in sources):
        raise ValueError("there are no windows to fit")
    model = unflatten(initial, spec)
    trainer().fit(_OpenFit(model, plan), _WindowSamples(sources, plan, augment))
    return flatten(model)


def training_device() -> torch.device:
    """Where models are trained: on the first GPU where there is one, else on the CPU. The one place that decides."""
    return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


def trainer() -> lightning.Trainer:
    """Lightning's loop and nothing around it: one device, one pass, no logger, checkpoint or progress bar.

    Its announcements are turned off for good, not for the moment: several rounds may run in threads of one process.
    """
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    accelerator = {"cuda": "gpu"}.get(training_device().type, "cpu")
    return lightning.Trainer(accelerator=accelerator, devices=1, max_epochs=1, barebones=True)
