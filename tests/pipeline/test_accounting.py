"""Solving for noise at the edges of what can be asked."""

from __future__ import annotations

import pytest

from data_schemas.plan import PrivacyEvent
from pipeline.accounting import calibrate, epsilon_of


@pytest.mark.parametrize("asked", [(0.0, 1e-5, 0.5, 1), (1.0, 0.0, 0.5, 1), (1.0, 1e-5, 1.5, 1), (1.0, 1e-5, 0.5, 0)])
def test_nonsense_is_refused(asked: tuple[float, float, float, int]) -> None:
    """Epsilon, delta, sample rate and steps must be possible."""
    with pytest.raises(ValueError, match="out of range"):
        calibrate(*asked)


def test_an_epsilon_that_no_noise_reaches_is_refused() -> None:
    """Renyi accounting has a floor at its largest order; below it the search says so and ends."""
    with pytest.raises(ValueError, match="no noise multiplier"):
        calibrate(1e-4, 1e-5, 1.0, 1)


@pytest.mark.parametrize(("epsilon", "steps"), [(0.5, 400), (100.0, 1)])
def test_the_search_goes_both_ways(epsilon: float, steps: int) -> None:
    """Noise far above and far below where the search begins is found as closely."""
    noise = calibrate(epsilon, 1e-5, 1.0, steps)

    spent = [
        epsilon_of([PrivacyEvent(sample_rate=1.0, noise_multiplier=n, steps=steps)], 1e-5)
        for n in (noise, 0.99 * noise)
    ]
    assert spent[0] <= epsilon < spent[1]
