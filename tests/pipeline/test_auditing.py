"""Bounds of one-run audits: right on known cases, below the truth on mechanisms that keep their word."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pipeline.auditing import (
    AuditBounds,
    Guesses,
    audit,
    caught,
    gaussian_bound,
    gaussian_epsilon,
    guess,
    one_run_bound,
    one_run_p_value,
    spread,
)


def game(mu: float, canaries: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Play the game against a Gaussian mechanism: scores N(mu, 1) for canaries that are in, N(0, 1) for others."""
    draw = np.random.default_rng(seed)
    included = draw.random(canaries) < 0.5
    return draw.normal(size=canaries) + mu * included, included


def test_without_delta_the_p_value_is_a_binomial_tail() -> None:
    """Randomised response at epsilon log 3 is right with chance 3/4: 9 or 10 of 10 right has its binomial chance."""
    expected = 10 * 0.75**9 * 0.25 + 0.75**10

    assert one_run_p_value(Guesses(10, 10, 9), math.log(3), 0.0) == pytest.approx(expected, rel=1e-9)


def test_delta_makes_the_p_value_larger_by_its_share() -> None:
    """The term of delta is 2 m delta times the largest mean chance of missing by i or less, and stops at one."""
    guesses = Guesses(canaries=50, made=2, right=2)
    tail, one_below, two_below = 0.25, 0.5, 0.25

    slip = max(one_below, (one_below + two_below) / 2)

    assert one_run_p_value(guesses, 0.0, 1e-3) == pytest.approx(tail + 2 * 50 * 1e-3 * slip)
    assert one_run_p_value(guesses, 0.0, 0.5) == 1.0


def test_guessing_like_a_coin_refutes_nothing() -> None:
    """Half of the guesses right, or none made, bounds epsilon by zero only."""
    assert one_run_bound(Guesses(400, 400, 200), 1e-5) == 0.0
    assert gaussian_bound(Guesses(400, 400, 200), 1e-5) == 0.0
    assert one_run_bound(Guesses(400, 0, 0), 1e-5) == 0.0


def test_the_bounds_of_ever_better_guesses_grow() -> None:
    """More right guesses refute more, and both bounds stand above zero well before all are right."""
    found = [
        (one_run_bound(Guesses(500, 500, right), 1e-5), gaussian_bound(Guesses(500, 500, right), 1e-5))
        for right in (300, 400, 499)
    ]

    assert found == sorted(found)
    assert found[0] > (0.0, 0.0)


@pytest.mark.parametrize("mu", [0.5, 1.0, 2.0])
def test_a_gaussian_mechanism_is_bounded_from_below(mu: float) -> None:
    """Over 20 games both bounds stay below the true epsilon (95% each) and the Gaussian one reaches a third of it."""
    truth = gaussian_epsilon(mu, 1e-5)
    bounds = [audit(*game(mu, 1000, seed), 1e-5) for seed in range(20)]

    assert sum(caught(b, truth) for b in bounds) <= 2
    assert np.mean([b.gaussian for b in bounds]) > truth / 3
    assert all(b.one_run >= 0 for b in bounds)


def test_epsilon_of_a_gaussian_mechanism_is_known() -> None:
    """1-GDP at its own delta: delta(1) = Phi(-1/2) - e Phi(-3/2), from tables 0.3085 - e x 0.0668 = 0.1269."""
    assert gaussian_epsilon(1.0, 0.12693) == pytest.approx(1.0, abs=1e-3)
    assert gaussian_epsilon(0.0, 1e-5) == 0.0


def test_guesses_are_taken_from_both_ends() -> None:
    """Of four scores two guesses take the highest as in and the lowest as out."""
    scores, included = np.array([0.1, 3.0, -2.0, 0.2]), np.array([True, True, False, False])

    assert guess(scores, included, 2) == Guesses(4, 2, 2)
    assert guess(scores, ~included, 2) == Guesses(4, 2, 0)


@pytest.mark.parametrize("wrong", [(4, 5, 3), (4, 3, 4), (0, 0, 0), (4, 2, -1)])
def test_impossible_counts_are_refused(wrong: tuple[int, int, int]) -> None:
    """More right than made, or more made than canaries, is a mistake of the caller."""
    with pytest.raises(ValueError, match="right guesses"):
        Guesses(*wrong)


def test_either_bound_above_the_claim_catches() -> None:
    """A claim is refuted by the larger of the two bounds."""
    bounds = AuditBounds(1.0, 2.0, Guesses(4, 4, 2))

    assert caught(bounds, 1.5)
    assert not caught(bounds, 2.0)
    assert (spread([1.0, 1.0]), spread([2.0, 1.0])) == ("1.00", "1.00 to 2.00")
