"""Quantiles between the stored ones, probabilities, and people who keep their numbers."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest

from data_schemas.units import QUANTILES
from pipeline.scored import ALARM_PROBABILITY, level_at, probability_beyond, surely_beyond

NORMAL = NormalDist(120, 25)
LEVELS = np.array([[NORMAL.inv_cdf(q) for q in QUANTILES]])


@pytest.mark.parametrize("q", [0.02, 0.05, 0.1, 0.25, 0.4, 0.5, 0.9, 0.95])
def test_quantiles_between_are_exact_for_a_normal_forecast(q: float) -> None:
    """The 10% and 90% quantiles of a Gaussian forecast come out of its five stored quantiles."""
    assert level_at(LEVELS, q)[0] == pytest.approx(NORMAL.inv_cdf(q), abs=1e-9)


@pytest.mark.parametrize("threshold", [54.0, 70.0, 119.0, 180.0, 250.0])
def test_probabilities_are_exact_for_a_normal_forecast(threshold: float) -> None:
    """P(below) and P(above) of a Gaussian forecast follow from its quantiles, and add up to one."""
    below, above = (float(probability_beyond(LEVELS, threshold, sign)[0]) for sign in (-1.0, 1.0))
    assert below == pytest.approx(NORMAL.cdf(threshold), abs=1e-6)
    assert below + above == pytest.approx(1.0, abs=1e-6)


def test_probability_survives_quantiles_that_coincide() -> None:
    """Quantiles clipped to the sensor's range give a certainty, not an error."""
    low = np.full((1, 5), 40.0)
    assert probability_beyond(low, 70.0, -1.0)[0] == pytest.approx(1.0, abs=1e-6)
    assert probability_beyond(low, 180.0, 1.0)[0] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("threshold", [54.0, 70.0, 110.0, 130.0, 180.0])
def test_alarms_by_probability_follow_the_probability(threshold: float) -> None:
    """An alarm stands where P(beyond) is at least the stated level, and nowhere else."""
    draw = np.random.default_rng(4)
    levels = np.sort(draw.normal(120, 40, (500, 5)), axis=-1)
    for sign in (-1.0, 1.0):
        chance = probability_beyond(levels, threshold, sign)
        clear = np.abs(chance - ALARM_PROBABILITY) > 1e-6
        assert np.array_equal(surely_beyond(levels, threshold, sign)[clear], (chance >= ALARM_PROBABILITY)[clear])
