"""Which way a private step may bend a forecast."""

from __future__ import annotations

import pytest
import torch

from pipeline.forecaster import Forecaster, ForecasterSpec
from pipeline.horizon_curves import projection, projections


@pytest.mark.parametrize("curves", [1, 2, 5, 12])
def test_a_projection_keeps_smooth_changes_and_nothing_twice(curves: int) -> None:
    """It is orthogonal, has as many dimensions as curves, and leaves the same change at every horizon alone."""
    matrix = projection(curves)

    torch.testing.assert_close(matrix @ matrix, matrix, rtol=0, atol=1e-6)
    torch.testing.assert_close(matrix, matrix.T, rtol=0, atol=1e-6)
    assert float(matrix.trace()) == pytest.approx(curves, abs=1e-5)
    torch.testing.assert_close(matrix @ torch.ones(12), torch.ones(12), rtol=0, atol=1e-5)


def test_two_curves_hold_a_change_that_grows_with_the_horizon() -> None:
    """A straight line over the horizons loses less than 2% of its square; a change of one horizon alone most of it."""
    kept, line, spike = projection(2), torch.linspace(0, 1, 12), torch.eye(12)[5]

    assert float((kept @ line).square().sum() / line.square().sum()) > 0.98
    assert float((kept @ spike).square().sum()) < 0.2


def test_twelve_curves_are_every_way() -> None:
    """Then nothing is projected; fewer concern the four parameters of the heads."""
    model = Forecaster(ForecasterSpec(hidden_size=4))

    assert projections(model, 12) == {}
    assert {p.shape[0]: m.shape[0] for p, m in projections(model, 2).items()} == {12: 12, 60: 60}


@pytest.mark.parametrize("curves", [0, 13])
def test_other_numbers_are_refused(curves: int) -> None:
    """There are 12 horizons."""
    with pytest.raises(ValueError, match="1 to 12"):
        projection(curves)
