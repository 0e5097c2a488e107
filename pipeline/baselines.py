"""Baselines that every forecaster must beat: persistence, a line, autoregression, ridge and gradient-boosted trees.

All are causal by construction: they see a window's history features and its issue reading, as the forecaster
does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from data_schemas.errors import BadInput
from data_schemas.units import GRID_MINUTES, HORIZON_MINUTES, SENSOR_MAX_MG_DL, SENSOR_MIN_MG_DL
from pipeline.windows import _CHANGE_SCALE_MG_DL, FEATURES, Batch, Float32, Windows

LAGS = 24
LINE_MINUTES = 30
RIDGE_ALPHA = 1.0
AR_ORDER = 12
# Trees for these horizons; the others lie on straight lines between them, from the issue reading on.
TREE_MINUTES = (15, 30, 45, 60)
_BATCH = 8192
_CHANGE = FEATURES.index("change_from_last")
_LEVEL = FEATURES.index("level")


@dataclass(frozen=True, slots=True)
class RidgeModel:
    """Twelve ridge regressions, one per horizon, of the change from the issue reading on the last 24 grid values.

    coefficients: float64[12,L] on L inputs (see `_lags`), intercept: float64[12]; windows: how many it was fitted on.
    """

    coefficients: npt.NDArray[np.float64]
    intercept: npt.NDArray[np.float64]
    windows: int


@dataclass(frozen=True, slots=True)
class ArModel:
    """Autoregression of the five-minute change on the newest changes and the level; weights: float64[12]."""

    weights: npt.NDArray[np.float64]
    intercept: float


@dataclass(frozen=True, slots=True)
class TreesModel:
    """Gradient-boosted trees of the change from the issue reading on the inputs of ridge, one ensemble a horizon."""

    ensembles: tuple[Any, ...]
    windows: int


def persistence(batch: Batch) -> Float32:
    """Forecast the issue reading at every horizon: float32[B,12] in mg/dL."""
    return np.repeat(batch.last[:, None], len(HORIZON_MINUTES), axis=1).astype(np.float32)


def linear(batch: Batch) -> Float32:
    """Least-squares line over the last 30 minutes of the grid, through the issue reading: float32[B,12] in mg/dL.

    Grid steps carry the last known reading; without an older reading the line is flat.
    """
    steps = min(LINE_MINUTES // GRID_MINUTES + 1, batch.x.shape[1])
    back = -np.arange(steps - 1, -1, -1, dtype=np.float64) * GRID_MINUTES
    change = batch.x[:, -steps:, _CHANGE].astype(np.float64) * _CHANGE_SCALE_MG_DL
    slope = change @ back / max(float(back @ back), 1.0)
    return _clip(batch.last[:, None] + slope[:, None] * np.asarray(HORIZON_MINUTES, dtype=np.float64))


def ridge(model: RidgeModel, batch: Batch) -> Float32:
    """Forecast of a fitted ridge model: float32[B,12] in mg/dL, clipped to what a sensor reports."""
    lags = _lags(batch)
    if lags.shape[1] != model.coefficients.shape[1]:
        raise ValueError(f"fitted on {model.coefficients.shape[1]} lags, got {lags.shape[1]}")
    return _clip(batch.last[:, None] + lags @ model.coefficients.T + model.intercept)


def fit_ridge(windows_list: Sequence[Windows], *, max_windows: int = 200_000) -> RidgeModel:
    """Fit on the windows of all these cohorts together.

    At most max_windows are used: every n-th of each cohort, n the smallest stride that fits. Each horizon is fitted
    on the windows that have a real reading there; where nobody has one (5 minutes ahead of a 15-minute sensor), it lies
    on the line between its neighbours. No randomness: equal input gives an equal model. Raises BadInput without a
    reading 60 minutes ahead.
    """
    from sklearn.linear_model import Ridge

    stride = max(1, -(-sum(len(w) for w in windows_list) // max_windows))
    batches = [b for w in windows_list for b in _batches(w, stride)]
    count = sum(len(b.last) for b in batches)
    hint = "give more people or a longer record to fit on"
    if not count:
        raise BadInput("there is no window to fit the ridge baseline on", hint)
    lags = np.concatenate([_lags(b) for b in batches])
    change = np.concatenate([b.y.astype(np.float64) - b.last[:, None] for b in batches])
    mask = np.concatenate([b.mask for b in batches])
    if not mask[:, -1].any():
        raise BadInput("a forecast horizon has no real reading to fit the ridge baseline on", hint)
    seen = np.flatnonzero(mask.any(axis=0))
    fits: list[Any] = [
        Ridge(alpha=RIDGE_ALPHA, solver="cholesky").fit(lags[mask[:, h]], change[mask[:, h], h]) for h in seen
    ]
    weights = np.stack([np.append(f.coef_, f.intercept_) for f in fits])
    knots = np.concatenate([np.zeros((1, weights.shape[1])), weights])
    at, steps = np.concatenate([[-1], seen]), np.arange(mask.shape[1])
    full = np.stack([np.interp(steps, at, column) for column in knots.T], axis=1)
    return RidgeModel(full[:, :-1], full[:, -1], count)


def fit_ar(windows_list: Sequence[Windows], *, max_windows: int = 200_000) -> ArModel:
    """Fit one step ahead on the last step of each window's history: five minutes of the grid. Raises BadInput."""
    from sklearn.linear_model import Ridge

    stride = max(1, -(-sum(len(w) for w in windows_list) // max_windows))
    changes = [_changes(b)[:, -AR_ORDER:] for w in windows_list for b in _batches(w, stride)]
    levels = [_level(b) for w in windows_list for b in _batches(w, stride)]
    if not changes:
        raise BadInput("there is no window to fit the autoregression on", "give more people or a longer record")
    moves, level = np.concatenate(changes), np.concatenate(levels)
    inputs = np.concatenate([moves[:, :-1], (level - moves[:, -1])[:, None]], axis=1)
    fit: Any = Ridge(alpha=RIDGE_ALPHA, solver="cholesky").fit(inputs, moves[:, -1])
    return ArModel(np.asarray(fit.coef_, dtype=np.float64), float(fit.intercept_))


def autoregression(model: ArModel, batch: Batch) -> Float32:
    """Iterate the one-step model to 60 minutes: float32[B,12] in mg/dL."""
    moves, level = _changes(batch)[:, 1 - AR_ORDER :], _level(batch)
    path = np.empty((len(level), len(HORIZON_MINUTES)))
    for step in range(len(HORIZON_MINUTES)):
        move = np.concatenate([moves, level[:, None]], axis=1) @ model.weights + model.intercept
        level = np.clip(level + move, SENSOR_MIN_MG_DL, SENSOR_MAX_MG_DL)
        moves = np.concatenate([moves[:, 1:], move[:, None]], axis=1)
        path[:, step] = level
    return _clip(path)


def fit_trees(windows_list: Sequence[Windows], *, max_windows: int = 60_000) -> TreesModel:
    """Fit scikit-learn's histogram gradient boosting on every n-th window of all cohorts. Raises BadInput."""
    from sklearn.ensemble import HistGradientBoostingRegressor
    from threadpoolctl import threadpool_limits

    stride = max(1, -(-sum(len(w) for w in windows_list) // max_windows))
    batches = [b for w in windows_list for b in _batches(w, stride)]
    columns = [HORIZON_MINUTES.index(m) for m in TREE_MINUTES]
    if not batches or not np.concatenate([b.mask for b in batches])[:, columns].any(axis=0).all():
        raise BadInput("there are too few readings to fit the trees on", "give more people or a longer record")
    lags = np.concatenate([_lags(b) for b in batches])
    change = np.concatenate([b.y.astype(np.float64) - b.last[:, None] for b in batches])
    mask = np.concatenate([b.mask for b in batches])
    # One thread: on a shared machine waiting OpenMP threads cost more than they bring.
    with threadpool_limits(1, user_api="openmp"):
        ensembles = tuple(
            HistGradientBoostingRegressor(random_state=0).fit(lags[mask[:, c]], change[mask[:, c], c]) for c in columns
        )
    return TreesModel(ensembles, len(lags))


def trees(model: TreesModel, batch: Batch) -> Float32:
    """Forecast of fitted trees: float32[B,12] in mg/dL."""
    lags = _lags(batch)
    knots = np.stack([np.zeros(len(lags)), *(e.predict(lags) for e in model.ensembles)], axis=1)
    at = np.array([0, *TREE_MINUTES])
    right = np.searchsorted(at, HORIZON_MINUTES)
    share = (np.array(HORIZON_MINUTES) - at[right - 1]) / (at[right] - at[right - 1])
    return _clip(batch.last[:, None] + knots[:, right - 1] * (1 - share) + knots[:, right] * share)


def _changes(batch: Batch) -> npt.NDArray[np.float64]:
    """float64[B,T-1]: change of the grid's value over each step, mg/dL."""
    return np.diff(batch.x[..., _CHANGE].astype(np.float64) * _CHANGE_SCALE_MG_DL, axis=1)


def _level(batch: Batch) -> npt.NDArray[np.float64]:
    return batch.last.astype(np.float64)


def _batches(windows: Windows, stride: int) -> Iterator[Batch]:
    anchors = windows.anchors[::stride]
    for at in range(0, len(anchors), _BATCH):
        yield windows.gather(anchors[at : at + _BATCH])


def _lags(batch: Batch) -> npt.NDArray[np.float64]:
    """float64[B,L], L = min(24, T): change from the issue reading at the older lags, then the issue reading's level.

    The same space as 24 raw values, but a small penalty then pulls towards persistence instead of towards zero
    glucose.
    """
    change = batch.x[:, -LAGS:-1, _CHANGE]
    return np.concatenate([change, batch.x[:, -1:, _LEVEL]], axis=1).astype(np.float64)


def _clip(forecast: npt.NDArray[np.float64]) -> Float32:
    return np.clip(forecast, SENSOR_MIN_MG_DL, SENSOR_MAX_MG_DL).astype(np.float32)
