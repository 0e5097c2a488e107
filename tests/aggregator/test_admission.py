"""The gate for updates: each check, alone, with a signature that is otherwise right."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from aggregator.admission import AdmittedUpdate, Expectation, RejectionCode, admit, max_update_norm
from aggregator.aggregation import model_hash
from data_schemas.canonical import bytes_hash
from data_schemas.messages import PrivacySpend, SignedUpdate, TrainTask
from data_schemas.plan import PrivacyEvent
from tests.aggregator import small_federation as small

MEMBERS = {name: small.member(name) for name in small.NAMES}
EXPECTED = Expectation(
    federation=small.FEDERATION,
    run="run",
    round=2,
    plan=small.PLAN,
    base_model_hash=model_hash(small.START),
    dimension=small.D,
    seen_hashes=frozenset(),
)
TASK = TrainTask(
    federation=small.FEDERATION,
    run="run",
    round=2,
    plan=small.PLAN,
    base_model_hash=EXPECTED.base_model_hash,
    deadline_unix=0,
)
DELTA = small.honest_delta("alder", TASK)


def code(signed: SignedUpdate, delta: np.ndarray = DELTA, expected: Expectation = EXPECTED) -> str:
    """Return the code of a rejection; an admission is an error of the test."""
    outcome = admit(signed, delta, expected, MEMBERS, "alder")
    assert not isinstance(outcome, AdmittedUpdate)
    assert outcome.node == "alder"
    return outcome.code


def test_an_honest_update_is_admitted_as_a_copy_nobody_can_change() -> None:
    """The admitted delta equals what was sent, is read-only, and does not follow the sender's array."""
    sent = DELTA.copy()
    admitted = admit(small.signed_update("alder", TASK, sent), sent, EXPECTED, MEMBERS, "alder")
    assert isinstance(admitted, AdmittedUpdate)
    sent[0] = 99
    assert np.array_equal(admitted.delta, DELTA)
    with pytest.raises(ValueError, match="read-only"):
        admitted.delta[0] = 1
    assert (admitted.node, admitted.declared_patients) == ("alder", 30)


@pytest.mark.parametrize(
    ("changes", "expected_code"),
    [
        ({"federation": "another"}, RejectionCode.WRONG_FEDERATION),
        ({"run": "another"}, RejectionCode.WRONG_RUN),
        ({"round": 1}, RejectionCode.WRONG_ROUND),
        ({"plan_hash": "1" * 64}, RejectionCode.WRONG_PLAN),
        ({"base_model_hash": "1" * 64}, RejectionCode.WRONG_BASE_MODEL),
        ({"update_hash": "1" * 64}, RejectionCode.WRONG_HASH),
        ({"budget_head": "Jane Doe, 123 mg/dL"}, RejectionCode.WRONG_BUDGET_HEAD),
        ({"node": "birch"}, RejectionCode.WRONG_NODE),
        ({"declared_patients": 31}, RejectionCode.WRONG_DECLARED_PATIENTS),
    ],
)
def test_a_signed_manifest_for_something_else_is_rejected(
    changes: dict[str, Any], expected_code: RejectionCode
) -> None:
    """A right signature over a manifest of another task does not help; each field has its code."""
    assert code(small.signed_update("alder", TASK, DELTA, **changes)) == expected_code


@pytest.mark.parametrize(
    ("changes", "expected_code"),
    [
        ({"unit": "window (weaker than patient)"}, RejectionCode.WRONG_UNIT),
        ({"delta": 1e-3}, RejectionCode.WRONG_DELTA),
        ({"event": PrivacyEvent(sample_rate=0.5, noise_multiplier=0.1, steps=5)}, RejectionCode.WRONG_EVENT),
    ],
)
def test_an_update_that_was_not_protected_as_the_plan_says_is_rejected(
    changes: dict[str, Any], expected_code: RejectionCode
) -> None:
    """Unit, delta and event of the spend must be those of the plan."""
    spend = PrivacySpend.model_validate(small.spend(small.PLAN.round_event).model_dump() | changes)
    assert code(small.signed_update("alder", TASK, DELTA, spend=spend)) == expected_code


def test_a_signature_of_anybody_else_is_rejected() -> None:
    """Neither another member's key nor a malformed signature passes."""
    signed = small.signed_update("alder", TASK, DELTA)
    other = signed.model_copy(update={"signature": small.key_of("birch").sign(signed.manifest)})
    assert code(other) == RejectionCode.BAD_SIGNATURE
    assert code(signed.model_copy(update={"signature": "zz"})) == RejectionCode.BAD_SIGNATURE


def test_a_hospital_that_is_no_member_is_rejected() -> None:
    """Membership comes from the ledger, not from the message."""
    outcome = admit(small.signed_update("alder", TASK, DELTA), DELTA, EXPECTED, {}, "alder")
    assert getattr(outcome, "code", None) == RejectionCode.UNKNOWN_MEMBER


def test_bytes_seen_before_are_rejected() -> None:
    """An update whose hash is on record is a replay, even under a fresh signature."""
    seen = Expectation(**{**vars(EXPECTED), "seen_hashes": frozenset({bytes_hash(DELTA.tobytes())})})
    assert code(small.signed_update("alder", TASK, DELTA), expected=seen) == RejectionCode.REPLAYED


@pytest.mark.parametrize(
    ("delta", "expected_code"),
    [
        (DELTA.astype(np.float64), RejectionCode.WRONG_DTYPE),
        (DELTA.astype(">f4"), RejectionCode.WRONG_DTYPE),
        (DELTA[:-1], RejectionCode.WRONG_SHAPE),
        (DELTA[None, :], RejectionCode.WRONG_SHAPE),
        (np.float32(1), RejectionCode.WRONG_SHAPE),
        (np.where(np.arange(small.D) == 3, np.nan, DELTA).astype(np.float32), RejectionCode.NOT_FINITE),
        (np.where(np.arange(small.D) == 3, -np.inf, DELTA).astype(np.float32), RejectionCode.NOT_FINITE),
        (DELTA * np.float32(1e6), RejectionCode.NORM_TOO_LARGE),
        (np.full(small.D, 3e38, dtype=np.float32), RejectionCode.NORM_TOO_LARGE),
    ],
)
def test_an_array_that_cannot_be_averaged_is_rejected(delta: np.ndarray, expected_code: RejectionCode) -> None:
    """Type, shape, NaN, infinity and size are checked although hash and signature fit."""
    delta = np.asarray(delta)
    assert code(small.signed_update("alder", TASK, delta), delta) == expected_code


def test_a_hostile_text_in_place_of_a_hash_never_reaches_the_ledger() -> None:
    """Only 64 hex digits are put on record as an update's hash."""
    signed = small.signed_update("alder", TASK, DELTA, update_hash="Jane Doe, 123 mg/dL")
    outcome = admit(signed, DELTA, EXPECTED, MEMBERS, "alder")
    assert getattr(outcome, "update_hash", "") is None


@pytest.mark.parametrize("dimension", [16, 5000])
def test_honest_noise_stays_far_below_the_norm_bound(dimension: int) -> None:
    """200 simulated hospitals whose every gradient is as long and as aligned as clipping allows: all are admitted."""
    random, plan, patients = np.random.default_rng(3), small.PLAN, 30
    lr, clip = plan.local.learning_rate, plan.privacy.max_grad_norm
    aligned = np.zeros(dimension)
    aligned[0] = clip
    worst = 0.0
    for _ in range(200):
        total = np.zeros(dimension)
        for _ in range(plan.local.steps_per_round):
            sampled = random.binomial(patients, plan.privacy.sample_rate)
            noise = random.normal(0, plan.privacy.noise_multiplier * clip, dimension)
            total += lr * (sampled * aligned + noise) / (plan.privacy.sample_rate * patients)
        worst = max(worst, float(np.linalg.norm(total)))
    bound = max_update_norm(plan, patients, dimension)
    assert worst < bound < 10 * worst


def test_an_update_without_its_noise_is_not_private() -> None:
    """An empty update, or one far quieter than the plan's noise, was not made by the plan."""
    for quiet in (np.zeros_like(DELTA), DELTA * np.float32(0.01)):
        assert code(small.signed_update("alder", TASK, quiet), quiet) == RejectionCode.NOT_PRIVATE


def test_a_copy_is_rejected_however_it_is_scaled() -> None:
    """What points where the last step or a colleague's update points is a copy; another honest update is not."""
    colleague = small.honest_delta("birch", TASK)
    known = replace(EXPECTED, earlier=(np.zeros_like(DELTA), colleague))
    assert isinstance(admit(small.signed_update("alder", TASK, DELTA), DELTA, known, MEMBERS, "alder"), AdmittedUpdate)
    for factor in (0.9, 1.1):
        copy = (colleague * np.float32(factor)).astype(np.float32)
        assert code(small.signed_update("alder", TASK, copy), copy, known) == RejectionCode.COPIED
