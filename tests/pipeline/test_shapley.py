"""Shapley values are exact, obey their axioms, and rows are clipped without exception."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from data_schemas.errors import BadInput
from pipeline.shapley import COALITIONS, MAX_NODES, clip_rows, coalition_masks, game_of


def exact_shapley(utilities: np.ndarray) -> np.ndarray:
    return game_of(utilities.shape[-1].bit_length() - 1, b"").values(utilities)


def _by_permutations(utilities: np.ndarray, nodes: int) -> np.ndarray:
    """Average marginal contribution over all orders in which the nodes may arrive: the definition."""
    orders = list(itertools.permutations(range(nodes)))
    values = np.zeros(nodes)
    for order in orders:
        coalition = 0
        for node in order:
            values[node] += utilities[coalition | 1 << node] - utilities[coalition]
            coalition |= 1 << node
    return values / len(orders)


@pytest.mark.parametrize("nodes", range(1, 8))
def test_equals_the_average_over_permutations(nodes: int) -> None:
    """The linear map gives what the definition gives, for random games."""
    utilities = np.random.default_rng(nodes).normal(16.0, 5.0, 2**nodes)

    np.testing.assert_allclose(exact_shapley(utilities), _by_permutations(utilities, nodes), atol=1e-12)


@pytest.mark.parametrize("nodes", [1, 2, 5, 10])
def test_efficiency(nodes: int) -> None:
    """The values sum to what all nodes together bring."""
    utilities = np.random.default_rng(nodes).normal(size=(3, 2**nodes))

    np.testing.assert_allclose(exact_shapley(utilities).sum(axis=-1), utilities[:, -1] - utilities[:, 0], atol=1e-12)


def test_null_player() -> None:
    """A node that changes no coalition's utility has the value 0."""
    masks = coalition_masks(6)
    others = np.delete(np.arange(6), 3)
    game = np.random.default_rng(0).normal(size=2**5)
    utilities = game[(masks[:, others] * 2 ** np.arange(5)).sum(axis=1)]

    assert abs(exact_shapley(utilities)[3]) < 1e-14


def test_symmetry() -> None:
    """Two nodes that can stand for each other in every coalition have the same value."""
    masks = coalition_masks(5)
    swapped = masks[:, [1, 0, 2, 3, 4]]
    game = np.random.default_rng(1).normal(size=2**5)
    utilities = game + game[(swapped * 2 ** np.arange(5)).sum(axis=1)]
    values = exact_shapley(utilities)

    assert values[0] == pytest.approx(values[1], abs=1e-14)
    assert values[0] != pytest.approx(values[2], abs=1e-3)


def test_linearity_over_rounds_and_patients() -> None:
    """Values of summed games are the summed values: patients and rounds may be added before or after."""
    games = np.random.default_rng(2).normal(size=(4, 7, 2**6))

    assert exact_shapley(games).shape == (4, 7, 6)
    np.testing.assert_allclose(exact_shapley(games).sum(axis=(0, 1)), exact_shapley(games.sum(axis=(0, 1))), atol=1e-12)


def test_ten_nodes_of_an_additive_game() -> None:
    """In a game where everyone brings a fixed amount, the value is that amount, at the largest size too."""
    amounts = np.linspace(-3.0, 7.0, 10)

    np.testing.assert_allclose(exact_shapley(coalition_masks(10) @ amounts + 1e6), amounts, atol=1e-9)


def test_masks_name_every_coalition_once() -> None:
    """Rows are the binary numbers of the coalitions: empty first, all last."""
    masks = coalition_masks(4)

    assert masks.shape == (16, 4)
    assert masks.dtype == np.bool_
    assert (masks @ (1 << np.arange(4))).tolist() == list(range(16))


@pytest.mark.parametrize("nodes", [0, MAX_NODES + 1])
def test_games_of_too_many_nodes_are_refused(nodes: int) -> None:
    """No coalitions are chosen for more nodes than can be scored."""
    with pytest.raises(BadInput, match="1 to 64 nodes"):
        game_of(nodes, b"")


def _forecasts(nodes: int, seed: int) -> Callable[[np.ndarray], np.ndarray]:
    """Make a utility like the real one: minus the RMSE of 64 forecasts that every member's noisy share improves."""
    draw = np.random.default_rng(seed)
    error, shares = draw.normal(0, 16, 64), draw.dirichlet(np.ones(nodes))
    updates = [-draw.uniform(0, 1) * (0.2 * error + draw.normal(0, 3, 64)) + draw.normal(0, 4, 64) for _ in shares]
    return lambda coalitions: -np.sqrt(np.square(error + (coalitions * shares) @ np.stack(updates)).mean(axis=-1))


@pytest.mark.parametrize("nodes", [11, 12])
@pytest.mark.parametrize("seed", range(4))
def test_a_sample_gives_nearly_the_exact_values(nodes: int, seed: int) -> None:
    """1,024 coalitions of 2,048 or 4,096 give every node's value within 1% of the spread, and their sum exactly."""
    utility, everything = _forecasts(nodes, seed), np.array(list(itertools.product([0, 1], repeat=nodes)))
    sizes, table = everything.sum(axis=1), utility(everything)
    weight = np.array([1 / (nodes * math.comb(nodes - 1, s)) for s in range(nodes)])
    with_node, without = weight[sizes - 1], weight[np.minimum(sizes, nodes - 1)]
    exact = np.array([table @ np.where(column, with_node, -without) for column in everything.T.astype(bool)])
    game = game_of(nodes, bytes([seed]))
    values = game.values(utility(game.coalitions))

    assert len(game.coalitions) == COALITIONS
    assert values.sum() == pytest.approx(table[-1] - table[0], abs=1e-12)
    assert np.abs(values - exact).max() < 0.01 * np.ptp(exact)


@pytest.mark.parametrize("nodes", [11, 20, 37, MAX_NODES])
def test_every_sample_is_fair_and_public(nodes: int) -> None:
    """Coalitions differ, come with their complements, hold every single node; the seed alone decides which they are."""
    one, same, other = (game_of(nodes, seed).coalitions for seed in (b"a", b"a", b"b"))
    rows = {row.tobytes() for row in one}

    assert len(rows) == len(one) == COALITIONS
    assert {(~row).tobytes() for row in one} == rows
    assert sorted(np.flatnonzero(row)[0] for row in one if row.sum() == 1) == list(range(nodes))
    assert not one[0].any()
    assert one[-1].all()
    assert (one == same).all()
    assert not (one == other).all()


def test_the_sample_of_a_seed_is_known() -> None:
    """Another implementation, or another version of a library, must draw the very same coalitions."""
    packed = np.packbits(game_of(12, b"known answer").coalitions, axis=1).tobytes()

    assert hashlib.sha256(packed).hexdigest() == "7832c131b9d0e1eab9ab41d3d8cf42d51b9eb1dbda650019b93b4a3649115256"


@pytest.mark.parametrize("nodes", [11, 30, MAX_NODES])
def test_a_sample_is_exact_where_everyone_brings_a_fixed_amount(nodes: int) -> None:
    """In an additive game no coalition is missing: the values are the amounts, and an idle node has none."""
    amounts = np.append(np.linspace(-3.0, 7.0, nodes - 1), 0.0)
    game = game_of(nodes, b"seed")

    np.testing.assert_allclose(game.values(game.coalitions @ amounts + 1e3), amounts, atol=1e-9)


@given(
    hnp.arrays(np.float64, st.tuples(st.integers(0, 5), st.integers(1, 6)), elements=st.floats(width=64)),
    st.floats(1e-6, 1e6),
)
def test_no_row_is_longer_than_the_clip(vectors: np.ndarray, clip: float) -> None:
    """Whatever floats a row holds, NaN and infinities included, its clipped norm is finite and at most the clip."""
    clipped = clip_rows(vectors, clip)

    assert clipped.shape == vectors.shape
    assert (np.sqrt((clipped**2).sum(axis=1)) <= clip).all()


def test_clipping_keeps_direction_and_short_rows() -> None:
    """A long row keeps its direction, a short one stays as it is, a row that is not finite becomes zero."""
    rows = np.array([[3.0, 4.0], [0.3, 0.4], [np.nan, 1.0], [0.0, 0.0], [1e308, 1e308]])
    clipped = clip_rows(rows, 1.0)

    np.testing.assert_allclose(clipped[0], [0.6, 0.8], rtol=1e-12)
    assert clipped[1].tolist() == [0.3, 0.4]
    assert clipped[2].tolist() == clipped[3].tolist() == [0.0, 0.0]
    np.testing.assert_allclose(clipped[4], [0.5**0.5] * 2, rtol=1e-12)


@pytest.mark.parametrize("clip", [0.0, -1.0, float("nan"), float("inf")])
def test_a_clip_that_bounds_nothing_is_refused(clip: float) -> None:
    """The clip is a positive number."""
    with pytest.raises(BadInput, match="positive"):
        clip_rows(np.ones((1, 2)), clip)
