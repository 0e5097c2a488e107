"""The server step: patient-weighted mean of admitted updates, momentum, and the average of the last models.

Federated averaging (McMahan et al. 2017, algorithm 1) with server momentum (Hsu et al. 2019, FedAvgM). Sums run in node
order and in float64, so the same updates give the same bytes whatever order they arrived in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from aggregator.admission import AdmittedUpdate
from data_schemas.canonical import bytes_hash
from data_schemas.plan import AggregationRule, ServerSpec
from pipeline.robust import mean_of, stepped

Vector = NDArray[np.float32]


@dataclass(frozen=True)
class ServerState:
    """The global model: weights float32[D], velocity float32[D], weights of the last rounds (oldest first)."""

    weights: Vector
    velocity: Vector
    recent: tuple[Vector, ...] = field(default=())


def initial_state(weights: Vector) -> ServerState:
    """State before round 1: the start weights float32[D], no velocity, no finished round."""
    start = np.array(weights, dtype=np.float32)
    return ServerState(weights=start, velocity=np.zeros_like(start))


def model_hash(weights: Vector) -> str:
    """SHA-256 of the little-endian float32 bytes: the name of a model everywhere."""
    return bytes_hash(np.ascontiguousarray(weights, dtype="<f4").tobytes())


def in_node_order(updates: Sequence[AdmittedUpdate]) -> tuple[AdmittedUpdate, ...]:
    """Sort updates by node name: the one order every sum and every message uses."""
    return tuple(sorted(updates, key=lambda update: update.node))


def shares(updates: Sequence[AdmittedUpdate]) -> tuple[float, ...]:
    """Each node's declared patients over the sum of all declared, in node order; they add up to 1."""
    counts = [update.declared_patients for update in in_node_order(updates)]
    return tuple(count / sum(counts) for count in counts)


def mean_update(
    updates: Sequence[AdmittedUpdate], rule: AggregationRule = "patient-weighted-mean"
) -> NDArray[np.float64]:
    """Patient-weighted mean of the updates under the plan's rule, float64[D]."""
    ordered = in_node_order(updates)
    return mean_of(np.stack([update.delta for update in ordered]), shares(ordered), rule)


def server_step(state: ServerState, mean: NDArray[np.float64], spec: ServerSpec) -> ServerState:
    """One round: the step of pipeline.robust by the mean update float64[D], and the ring of the last models."""
    weights, velocity = stepped(state.weights, state.velocity, mean, spec)
    recent = (*state.recent, weights)[-spec.average_last_rounds :]
    return ServerState(weights=weights, velocity=velocity, recent=recent)


def released_weights(state: ServerState) -> Vector:
    """Return what is published: the mean of the last rounds' weights, float32[D]; before round 1 the start."""
    if not state.recent:
        return state.weights
    mean: NDArray[np.float64] = np.mean([weights.astype(np.float64) for weights in state.recent], axis=0)
    return mean.astype(np.float32)


def cosine(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    """Cosine of the angle between two vectors; 0 when one of them is zero."""
    a64, b64 = a.astype(np.float64), b.astype(np.float64)
    product = float(np.linalg.norm(a64) * np.linalg.norm(b64))
    return float(a64 @ b64) / product if product > 0 else 0.0
