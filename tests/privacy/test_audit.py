"""The audit audits: canaries on the real training path, and planted bugs that must stay caught."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import audit
from benchmarks.audit import CORRECT, PLANTED, QUICK, Finding, examine, make_canaries
from pipeline.noise import SeededNoise


@pytest.fixture(scope="module")
def findings() -> dict[str, Finding]:
    """Every path examined once at the reduced size, repeatably."""
    return {v.name: examine(QUICK, v, SeededNoise(1)) for v in (CORRECT, *PLANTED)}


def test_the_real_path_is_consistent_with_its_claim(findings: dict[str, Finding]) -> None:
    """No bound above the claimed epsilon, and the claim is the accountant's."""
    found = findings[CORRECT.name]

    assert found.caught_by_canaries == 0
    assert found.claimed == pytest.approx(QUICK.epsilon, rel=2e-3)
    assert not found.caught_by_recomputation


@pytest.mark.parametrize("variant", PLANTED[:-1], ids=lambda v: v.name)
def test_a_planted_bug_of_the_mechanism_is_caught_by_canaries(
    findings: dict[str, Finding], variant: audit.Variant
) -> None:
    """Too little noise, none, no clipping, windows as patients: a bound stands above the claim."""
    assert findings[variant.name].caught_by_canaries == 1


def test_a_planted_bug_of_the_accounting_is_caught_by_recomputation(findings: dict[str, Finding]) -> None:
    """Epsilon restarted each round claims less than the events add up to, whatever canaries can see."""
    found = findings[PLANTED[-1].name]

    assert found.caught_by_recomputation
    assert found.claimed < found.recomputed == findings[CORRECT.name].claimed


def test_every_canary_owns_its_coordinate() -> None:
    """Without noise, a canary that is in moves its own coordinate by its clip, and no other canary's."""
    setting = replace(QUICK, histories=10, hidden_size=16, rounds=1, steps=1, sample_rate=1.0, epsilon=8.0)
    canaries = make_canaries(setting, 0)
    quiet = replace(CORRECT, noise_factor=0.0)

    scores, included = audit.attack(canaries, setting, quiet, SeededNoise(0), 0)

    step = setting.local_plan.learning_rate * audit.CLIP / len(canaries)
    assert 0 < included.sum() < len(canaries)
    np.testing.assert_allclose(scores[included], step, rtol=0.01)
    np.testing.assert_allclose(scores[~included], 0.0, atol=0.01 * step)


def test_the_report_is_a_table_and_a_picture(findings: dict[str, Finding], tmp_path: Path) -> None:
    """Every path has a line with its verdict, the picture is written, and wrong verdicts are named."""
    every = list(findings.values())

    audit.picture(every, tmp_path / "audit.svg")

    assert audit.wrong(every) == []
    assert all(v.name in audit.table(every) for v in (CORRECT, *PLANTED))
    assert "<svg" in (tmp_path / "audit.svg").read_text()
    swapped = replace(findings[CORRECT.name], bounds=findings["no noise"].bounds)
    unseen = replace(findings["no noise"], bounds=findings[CORRECT.name].bounds)
    assert audit.wrong([swapped, unseen]) == [CORRECT.name, "no noise"]
