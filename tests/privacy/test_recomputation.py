"""The reported epsilon is what somebody else would compute from the budget book's events.

Somebody else: Renyi divergences of the sampled Gaussian by numerical integration of their definition (Mironov, Talwar
and Zhang 2019, section 3.3: the divergence of the mixture from the Gaussian is the larger one), not by the series
expansions of the accountant, composed and converted by Canonne, Kamath and Steinke 2020, proposition 12.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from data_schemas.plan import PrivacyEvent
from data_schemas.units import DELTA
from hospital_node.budget import BudgetBook
from pipeline.plans import load_plan

ORDERS = (*range(2, 64), 128, 256)
PLANS = Path(__file__).parents[2] / "data_schemas" / "plans"
KEY = b"k" * 32


def renyi(order: float, sample_rate: float, noise: float) -> float:
    """Log of E[(1 - q + q e^((2z-1)/2s^2))^a] over z ~ N(0, s^2), divided by a - 1, by the trapezoid rule."""
    if sample_rate == 1.0:
        return order / (2 * noise**2)
    z = np.linspace(-40 * noise, order + 40 * noise, 200_001)
    with np.errstate(divide="ignore"):
        ratio = np.logaddexp(math.log1p(-sample_rate), math.log(sample_rate) + (2 * z - 1) / (2 * noise**2))
    exponent = order * ratio - z**2 / (2 * noise**2) - math.log(noise * math.sqrt(2 * math.pi))
    top = float(exponent.max())
    integral = math.log(float(np.exp(exponent - top).sum()) * float(z[1] - z[0])) + top
    return integral / (order - 1)


def recomputed(events: Sequence[PrivacyEvent], delta: float) -> float:
    """Epsilon of all events together at delta."""
    best = math.inf
    steps: dict[tuple[float, float], int] = {}
    for e in events:
        steps[e.sample_rate, e.noise_multiplier] = steps.get((e.sample_rate, e.noise_multiplier), 0) + e.steps
    for order in ORDERS:
        total = sum(n * renyi(order, q, s) for (q, s), n in steps.items())
        best = min(best, total + math.log1p(-1 / order) - math.log(delta * order) / (order - 1))
    return best


def write(path: Path, events: Sequence[PrivacyEvent]) -> BudgetBook:
    """Book the events, one task each."""
    BudgetBook.create(path, KEY)
    book = BudgetBook(path, KEY)
    for number, event in enumerate(events):
        book.reserve(
            f"task {number}",
            "training",
            "patient",
            event,
            asked_by="trial",
            run=f"run-{number // 2}",
            at="2026-11-22T10:00:00+00:00",
            ceiling_epsilon=math.inf,
            noise="secure",
        )
    return BudgetBook(path, KEY)


def event(sample_rate: float, noise: float, steps: int) -> PrivacyEvent:
    return PrivacyEvent(sample_rate=sample_rate, noise_multiplier=noise, steps=steps)


@pytest.mark.parametrize(
    "events",
    [
        [event(0.3, 2.0, 5)] * 4,
        [event(0.2, 1.1, 10), event(0.05, 0.9, 40), event(0.5, 6.0, 3)],
        [event(1.0, 3.0, 1)],
        [event(1.0, 4.0, 2), event(0.3, 2.5, 20)],
    ],
    ids=["rounds of one plan", "plans of several runs", "one release", "release and rounds"],
)
def test_epsilon_of_the_book_equals_an_independent_recomputation(tmp_path: Path, events: list[PrivacyEvent]) -> None:
    """To 1e-6, over all runs together, and the last row carries the same number."""
    book = write(tmp_path / "budget.db", events)

    assert book.spent("training") == pytest.approx(recomputed(book.events("training"), DELTA), abs=1e-6)
    assert book.rows()[-1].epsilon_after == book.spent("training")


@pytest.mark.parametrize("path", sorted(PLANS.glob("*.toml")), ids=lambda path: path.stem)
def test_a_shipped_plan_costs_what_it_says(path: Path) -> None:
    """All rounds of the plan, recomputed, stay within its epsilon and reach 99% of it; so does its credit."""
    plan = load_plan(path)

    training = recomputed([plan.round_event] * plan.rounds, plan.privacy.delta)
    credit = recomputed([plan.release_event] * plan.credit_epochs, plan.privacy.delta)

    assert 0.99 * plan.privacy.epsilon < training <= plan.privacy.epsilon
    assert 0.99 * plan.credit.epsilon < credit <= plan.credit.epsilon
