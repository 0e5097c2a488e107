"""Shapley values are exact, obey their axioms, and rows are clipped without exception."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from data_schemas.errors import BadInput
from pipeline.shapley import clip_rows, coalition_masks, exact_shapley


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


@pytest.mark.parametrize("count", [1, 3, 5, 2**11])
def test_other_sizes_are_refused(count: int) -> None:
    """Utilities that are not those of 1 to 10 nodes' coalitions are an error."""
    with pytest.raises(BadInput):
        exact_shapley(np.zeros(count))


@pytest.mark.parametrize("nodes", [0, 11])
def test_masks_of_too_many_nodes_are_refused(nodes: int) -> None:
    """No table is built for more nodes than can be scored."""
    with pytest.raises(BadInput, match="1 to 10 nodes"):
        coalition_masks(nodes)


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
