"""The membership attack: a coin on a model that saw nobody, certain on one that learnt its people by heart."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pipeline.fitting import FitPlan, fit
from pipeline.forecaster import Forecaster, ForecasterSpec, flatten
from pipeline.membership import attack, auc
from pipeline.windows import Series, Windows, cut_windows
from tests.privacy.cohort import cohort

SPEC = ForecasterSpec(hidden_size=8)
START = flatten(Forecaster(SPEC, seed=1))


def people(first: int, last: int) -> Windows:
    """Random walks, so that what is learnt of one person says nothing of another."""
    windows = cohort(last)
    steps = np.random.default_rng(1).normal(0, 6, len(windows.series.glucose_mg_dl))
    glucose = (120 + np.cumsum(steps) % 150).astype(np.float32)
    series = replace(windows.series, glucose_mg_dl=glucose)
    return cut_windows(series.select(series.patients[first:last]), windows.spec)


def test_auc_counts_pairs_and_halves_ties() -> None:
    """Of four pairs two are right and one is a tie: 2.5 of 4."""
    assert auc(np.array([1.0, 3.0]), np.array([1.0, 2.0])) == 2.5 / 4


def test_a_model_that_learnt_its_people_by_heart_gives_them_away() -> None:
    """Overfitted to six people, the attack tells them from six others well above chance, interval included."""
    members, others = people(0, 6), people(6, 12)
    fitted = fit(START, SPEC, [members], FitPlan(steps=400, batch_size=64, learning_rate=1e-2))

    found = attack(fitted, START, SPEC, [members], [others])

    assert (found.members, found.others) == (6, 6)
    assert found.auc > 0.9
    assert 0.5 < found.low <= found.auc <= found.high <= 1.0


def test_the_start_itself_gives_nobody_away() -> None:
    """A model that never moved improves on nobody: every score ties, AUC one half."""
    found = attack(START, START, SPEC, [people(0, 3)], [people(3, 6)], resamples=50)

    assert (found.auc, found.low, found.high) == (0.5, 0.5, 0.5)


def test_people_without_windows_are_left_out_and_nobody_is_refused() -> None:
    """Too short a record gives no score; an empty side is a mistake of the caller."""
    short = Series(("x",), np.array([0, 1]), np.array([0]), np.array([100.0], dtype=np.float32))
    nothing = cut_windows(short, people(0, 1).spec)

    found = attack(START, START, SPEC, [people(0, 2), nothing], [people(2, 4)], resamples=10)

    assert found.members == 2
    with pytest.raises(ValueError, match="both sides"):
        attack(START, START, SPEC, [nothing], [people(2, 4)])
