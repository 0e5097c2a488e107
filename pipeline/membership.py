"""Membership inference against a released model: whether its errors tell who was trained on.

The attacker holds a person's readings, the released weights and the public start. It scores the person by how much the
model improved on the start, log(start's loss / model's loss), which cancels how hard the person is to forecast (Watson
et al. 2022, "On the Importance of Difficulty Calibration in Membership Inference Attacks"; loss attack of Yeom et al.
2018). AUC 0.5 is a coin; the interval is a percentile bootstrap over people, members and others apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from pipeline.forecaster import Forecaster, ForecasterSpec, unflatten, window_losses
from pipeline.windows import Float32, Windows

Scores = npt.NDArray[np.float64]
_TINY = 1e-12


@dataclass(frozen=True, slots=True)
class Membership:
    """How well the attack told members from others: area under its ROC curve with a 95% interval."""

    auc: float
    low: float
    high: float
    members: int
    others: int


def attack(
    weights: Float32,
    reference: Float32,
    spec: ForecasterSpec,
    members: Sequence[Windows],
    others: Sequence[Windows],
    *,
    windows_per_patient: int = 60,
    resamples: int = 1000,
    seed: int = 0,
) -> Membership:
    """Attack a model float32[D] whose training began at `reference` float32[D].

    members and others: windows of the people it was, and was not, trained on. People without windows are left out;
    raises ValueError when either side is empty.
    """
    released, start = unflatten(weights, spec).eval(), unflatten(reference, spec).eval()
    inside = _scores(released, start, members, windows_per_patient)
    outside = _scores(released, start, others, windows_per_patient)
    if not len(inside) or not len(outside):
        raise ValueError("the attack needs people on both sides")
    draw = np.random.default_rng(seed)
    again = [auc(draw.choice(inside, len(inside)), draw.choice(outside, len(outside))) for _ in range(resamples)]
    low, high = np.quantile(again, (0.025, 0.975))
    return Membership(auc(inside, outside), float(low), float(high), len(inside), len(outside))


def auc(inside: Scores, outside: Scores) -> float:
    """Chance that a member's score float64[m] is above another person's float64[n]; ties count one half."""
    ordered = np.sort(outside)
    below = np.searchsorted(ordered, inside, side="left")
    up_to = np.searchsorted(ordered, inside, side="right")
    return float((below + up_to).mean() / (2 * len(outside)))


def _scores(released: Forecaster, start: Forecaster, cohorts: Sequence[Windows], most: int) -> Scores:
    """One score a person with windows: an even pick of at most `most` of them."""
    found = []
    for windows in cohorts:
        picks = [windows.anchors[a:b][:: -(-(b - a) // most)] for a, b in windows.by_patient() if b > a]
        if picks:
            batch = windows.gather(np.concatenate(picks))
            owner = np.repeat(np.arange(len(picks)), [len(p) for p in picks])
            arrays = (batch.x, batch.y - batch.last[:, None], batch.mask)
            x, change, mask = (torch.from_numpy(a) for a in arrays)
            before, after = (_per_patient(m, x, change, mask, owner) for m in (start, released))
            found.append(np.log(before + _TINY) - np.log(after + _TINY))
    return np.concatenate([*found, np.zeros(0)])


def _per_patient(
    model: Forecaster, x: torch.Tensor, change: torch.Tensor, mask: torch.Tensor, owner: npt.NDArray[np.int64]
) -> Scores:
    with torch.inference_mode():
        losses = window_losses(*model.residuals(x), change, mask).double().numpy()
    return np.bincount(owner, weights=losses) / np.bincount(owner)
