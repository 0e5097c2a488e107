"""The server step: exact, order-independent, reproducible."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from aggregator.admission import AdmittedUpdate
from aggregator.aggregation import (
    ServerState,
    cosine,
    initial_state,
    mean_update,
    model_hash,
    released_weights,
    server_step,
    shares,
)
from data_schemas.canonical import bytes_hash
from data_schemas.messages import TrainTask
from data_schemas.plan import ServerSpec
from tests.aggregator import small_federation as small

TASK = TrainTask(
    federation=small.FEDERATION, run="r", round=1, plan=small.PLAN, base_model_hash="0" * 64, deadline_unix=0
)


def update(name: str, delta: np.ndarray) -> AdmittedUpdate:
    return AdmittedUpdate(small.signed_update(name, TASK, delta), delta)


UPDATES = [update(name, small.honest_delta(name, TASK)) for name in small.NAMES]


def test_shares_follow_declared_patients_and_add_up_to_one() -> None:
    """30, 20 and 50 declared patients give 0.3, 0.2 and 0.5, in node order."""
    assert shares(list(reversed(UPDATES))) == (0.3, 0.2, 0.5)


def test_the_mean_is_weighted_by_patients() -> None:
    """Constant updates 1, 2 and 3 with shares 0.3, 0.2 and 0.5 have the mean 2.2."""
    flat = [update(name, np.full(4, i + 1, dtype=np.float32)) for i, name in enumerate(small.NAMES)]
    assert mean_update(flat) == pytest.approx(np.full(4, 2.2))


def test_the_result_is_the_same_to_the_last_bit_in_every_order() -> None:
    """All orders of arrival give one model hash, also where float sums would differ."""
    wild = [
        update(n, (d.delta * 10.0**k).astype(np.float32))
        for k, (n, d) in enumerate(zip(small.NAMES, UPDATES, strict=True))
    ]
    spec = ServerSpec(learning_rate=0.7, momentum=0.9, average_last_rounds=2)
    start = initial_state(small.START)
    assert len({model_hash(server_step(start, mean_update(order), spec).weights) for order in permutations(wild)}) == 1


def test_momentum_follows_its_recurrence() -> None:
    """For a constant mean m: velocities m and (1 + momentum) m, each times the learning rate moves the weights."""
    m = np.full(3, 0.5, dtype=np.float32)
    spec = ServerSpec(learning_rate=2.0, momentum=0.5, average_last_rounds=3)
    first = server_step(initial_state(np.zeros(3, dtype=np.float32)), m.astype(np.float64), spec)
    second = server_step(first, m.astype(np.float64), spec)
    assert first.weights == pytest.approx(np.full(3, 1.0))
    assert second.velocity == pytest.approx(np.full(3, 0.75))
    assert second.weights == pytest.approx(np.full(3, 2.5))
    assert second.weights.dtype == second.velocity.dtype == np.float32


def test_the_released_model_is_the_mean_of_the_last_rounds_only() -> None:
    """With average_last_rounds 2, the third round's release forgets the first round."""
    state, one = initial_state(np.zeros(2, dtype=np.float32)), np.ones(2, dtype=np.float32)
    assert np.array_equal(released_weights(state), np.zeros(2))
    for _ in range(3):
        state = server_step(
            state, one.astype(np.float64), ServerSpec(learning_rate=1, momentum=0, average_last_rounds=2)
        )
    assert np.array_equal(released_weights(state), np.full(2, 2.5, dtype=np.float32))
    assert len(state.recent) == 2


def test_a_step_leaves_the_state_before_it_unchanged() -> None:
    """The global vector of the round before keeps its bytes: training never writes into it."""
    start = initial_state(small.START)
    before = model_hash(start.weights)
    server_step(start, mean_update(UPDATES), small.PLAN.server)
    assert model_hash(start.weights) == before
    assert isinstance(start, ServerState)


def test_a_model_is_named_by_its_little_endian_float32_bytes() -> None:
    """Byte order of the machine does not change the name."""
    assert model_hash(small.START.astype(">f4").astype(np.float32)) == bytes_hash(small.START.astype("<f4").tobytes())


def test_cosine_of_known_vectors() -> None:
    """Parallel 1, opposite -1, orthogonal 0, and 0 for a zero vector instead of a division by zero."""
    x, y = np.array([1.0, 0.0]), np.array([0.0, 2.0])
    assert [cosine(x, 3 * x), cosine(x, -x), cosine(x, y), cosine(x, 0 * x)] == [1.0, -1.0, 0.0, 0.0]
