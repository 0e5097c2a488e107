"""The rule by which updates become a step bounds what one hospital can do."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.robust import mean_of, norm_factors


def test_the_plain_mean_is_weighted_by_patients() -> None:
    """Each update counts as its share of patients."""
    updates = np.array([[1.0, 0.0], [0.0, 2.0]], dtype=np.float32)

    assert mean_of(updates, (0.75, 0.25), "patient-weighted-mean").tolist() == [0.75, 0.5]


def test_no_update_is_larger_than_the_median_hospitals() -> None:
    """A huge update is scaled to the patient-weighted median norm and keeps its direction; others are untouched."""
    updates = np.array([[3.0, 4.0], [0.0, 1.0], [6e6, 8e6]], dtype=np.float32)
    factors = norm_factors(updates, (0.4, 0.3, 0.3), "norm-bounded-mean")

    assert factors.tolist() == pytest.approx([1.0, 1.0, 5e-7])
    assert mean_of(updates, (0.4, 0.3, 0.3), "norm-bounded-mean") == pytest.approx([2.1, 3.1])


def test_an_empty_update_stays_empty() -> None:
    """A hospital that learned nothing divides nothing by zero."""
    updates = np.zeros((3, 2), dtype=np.float32)

    assert mean_of(updates, (0.4, 0.3, 0.3), "norm-bounded-mean").tolist() == [0.0, 0.0]
