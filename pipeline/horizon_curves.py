"""The first few cosine curves over the horizons: which way a private step may bend a forecast.

A glucose forecast that is wrong at 30 minutes is wrong the same way at 35: what patients' data can teach is smooth over
the horizons, while privacy's noise is independent between them. A step that keeps only the first curves of the discrete
cosine transform (Ahmed, Natarajan and Rao 1974) loses little of the one and most of the other. The curves are fixed
and the projection comes after the noise: it is post-processing and costs no budget.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from data_schemas.units import HORIZON_MINUTES, QUANTILES
from pipeline.forecaster import Forecaster

HORIZONS = len(HORIZON_MINUTES)


def projection(curves: int) -> Tensor:
    """Orthogonal projection on the first `curves` cosine curves, float32[12, 12]; 12 is the identity."""
    if not 1 <= curves <= HORIZONS:
        raise ValueError(f"horizon_curves must be 1 to {HORIZONS}")
    order, place = torch.arange(curves, dtype=torch.float64), torch.arange(HORIZONS, dtype=torch.float64)
    waves = torch.cos(math.pi * (place + 0.5) * order.unsqueeze(1) / HORIZONS)
    waves = waves / waves.norm(dim=1, keepdim=True)
    square: Tensor = waves.T @ waves
    return square.float()


def projections(model: Forecaster, curves: int) -> dict[nn.Parameter, Tensor]:
    """Map each parameter of the heads, whose rows are horizons, to the projection [rows, rows] of its steps."""
    if curves == HORIZONS:
        return {}
    mean = projection(curves)
    # rows of the quantile head: every quantile of one horizon, then the next horizon
    quantile = torch.kron(mean, torch.eye(len(QUANTILES)))
    pairs = ((model.mean_head, mean), (model.quantile_head, quantile))
    return {parameter: matrix for head, matrix in pairs for parameter in head.parameters()}
