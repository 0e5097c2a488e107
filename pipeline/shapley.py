"""Exact Shapley values of a game given as a table of coalition utilities (Shapley 1953; FedSV, Wang et al. 2020)."""

from __future__ import annotations

from functools import lru_cache
from math import factorial

import numpy as np
import numpy.typing as npt

from data_schemas.errors import BadInput

# 2^10 coalition models are a minute of scoring on one core; beyond that a sampled estimator is needed.
MAX_NODES = 10


def coalition_masks(nodes: int) -> npt.NDArray[np.bool_]:
    """List every coalition: bool[2^n, n]. Row r holds node i when bit i of r is set: row 0 is empty, the last full."""
    _check_nodes(nodes)
    return (np.arange(2**nodes)[:, None] >> np.arange(nodes) & 1).astype(np.bool_)


def exact_shapley(utilities: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Shapley value of each node: float64[..., 2^n] -> float64[..., n], in the order of coalition_masks.

    Linear in the utilities, so values of rounds, or of patients, may be added before or after.
    The values of one game sum to utility(all) - utility(none).
    """
    count = utilities.shape[-1]
    nodes = count.bit_length() - 1
    if count != 1 << nodes:
        raise BadInput(f"{count} utilities are not those of all coalitions of some nodes (a power of two)")
    _check_nodes(nodes)
    # Rows of the map sum to zero: taking the empty coalition off changes nothing but the rounding error.
    values: npt.NDArray[np.float64] = (utilities - utilities[..., :1]) @ _shapley_map(nodes)
    return values


def clip_rows(vectors: npt.NDArray[np.float64], clip: float) -> npt.NDArray[np.float64]:
    """Scale rows longer than `clip` back to it: float64[P, n] -> float64[P, n], every L2 norm <= clip.

    A row with a NaN or an infinity becomes zero: the bound must hold for whatever one patient's data produce, and an
    error here would itself tell something about a patient.
    """
    if not (np.isfinite(clip) and clip > 0):
        raise BadInput("the clip is a positive number")
    finite = np.where(np.isfinite(vectors).all(axis=-1, keepdims=True), vectors, 0.0)
    # Dividing by the largest element first keeps the squares from overflowing.
    largest = np.maximum(np.abs(finite).max(axis=-1, keepdims=True, initial=0.0), np.finfo(np.float64).tiny)
    unit = finite / largest
    norm = np.linalg.norm(unit, axis=-1, keepdims=True)
    # A few rounding errors below the clip, so that the bound holds in floating point as well.
    bound = clip * (1 - 1e-14)
    with np.errstate(over="ignore"):
        over = norm * largest > bound
    return np.where(over, unit * (bound / np.where(over, norm, 1.0)), finite)


@lru_cache(maxsize=MAX_NODES + 1)
def _shapley_map(nodes: int) -> npt.NDArray[np.float64]:
    """float64[2^n, n]: +(s-1)!(n-s)!/n! where the node is in a coalition of s, -s!(n-s-1)!/n! where it is not."""
    masks = coalition_masks(nodes)
    with_node = np.array(
        [0.0] + [factorial(s - 1) * factorial(nodes - s) / factorial(nodes) for s in range(1, nodes + 1)]
    )
    without = np.append(with_node[1:], 0.0)
    sizes = masks.sum(axis=1)
    weights: npt.NDArray[np.float64] = np.where(masks, with_node[sizes][:, None], -without[sizes][:, None])
    return weights


def _check_nodes(nodes: int) -> None:
    if not 1 <= nodes <= MAX_NODES:
        raise BadInput(
            f"exact Shapley values are for 1 to {MAX_NODES} nodes, not {nodes}",
            "Score a subset of the nodes per epoch.",
        )
