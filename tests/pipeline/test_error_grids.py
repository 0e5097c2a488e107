"""Error grids: points checked by hand against the published figures, and that every point has exactly one zone."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.error_grids import PARKES_LOWER, PARKES_UPPER, ZONE_NAMES, clarke_zones, parkes_zones


@pytest.mark.parametrize(
    ("reference", "estimate", "zone"),
    [
        (100, 100, "A"),
        (100, 119, "A"),
        (60, 65, "A"),
        (40, 69, "A"),
        (100, 130, "B"),
        (150, 90, "B"),
        (250, 190, "B"),
        (100, 211, "C"),
        (160, 40, "C"),
        (50, 100, "D"),
        (65, 79, "D"),
        (300, 100, "D"),
        (60, 200, "E"),
        (250, 60, "E"),
    ],
)
def test_clarke_by_hand(reference: float, estimate: float, zone: str) -> None:
    """A point lies in the zone where the figure of 1987 has it."""
    assert ZONE_NAMES[int(clarke_zones(np.array(reference), np.array(estimate)))] == zone


@pytest.mark.parametrize(
    ("reference", "estimate", "zone"),
    [
        (100, 100, "A"),
        (200, 250, "A"),
        (20, 49, "A"),
        (45, 5, "A"),
        (200, 300, "B"),
        (300, 200, "B"),
        (60, 25, "B"),
        (100, 200, "C"),
        (300, 100, "C"),
        (150, 20, "C"),
        (60, 200, "D"),
        (400, 50, "D"),
        (10, 120, "D"),
        (20, 200, "E"),
        (40, 400, "E"),
    ],
)
def test_parkes_by_hand(reference: float, estimate: float, zone: str) -> None:
    """A point lies in the zone where the type 1 figure of 2000 has it."""
    assert ZONE_NAMES[int(parkes_zones(np.array(reference), np.array(estimate)))] == zone


@pytest.mark.parametrize("grid", [clarke_zones, parkes_zones])
def test_every_point_has_one_zone(grid: type[object]) -> None:
    """On 0..600 in both directions every point gets one of the five zones, and all five occur."""
    axis = np.arange(0, 601, 2.0)
    zones = grid(axis[:, None], axis[None, :])
    assert zones.shape == (301, 301)
    assert set(np.unique(zones)) == {0, 1, 2, 3, 4}
    assert np.all(np.diagonal(zones) == 0)


@pytest.mark.parametrize("n", range(len(PARKES_UPPER)))
def test_parkes_vertices_belong_to_the_safer_zone(n: int) -> None:
    """A vertex of the n-th boundary is in zone n, and just beyond it the next zone begins."""
    for boundary, step in ((PARKES_UPPER[n], (0, 0.5)), *(((PARKES_LOWER[n], (0.5, 0)),) if n < 3 else ())):
        for x, y in boundary:
            assert parkes_zones(np.array(x), np.array(y)) <= n
            assert parkes_zones(np.array(x + step[0]), np.array(y + step[1])) == n + 1


def test_worse_zones_lie_further_out() -> None:
    """Going up from the diagonal the Parkes zone never improves."""
    estimate = np.arange(100, 600.0)
    for reference in (20.0, 60.0, 100.0):
        assert np.all(np.diff(parkes_zones(np.full_like(estimate, reference), estimate).astype(int)) >= 0)
