"""What the log must say of a securely aggregated round, and which votes make a run one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from data_schemas.governance import CreditPolicy, FoundingEntry, PrivacyPolicy
from data_schemas.ledger import PlanEntry, RoundEntry, SecureSum
from data_schemas.messages import SignedUpdate, TrainTask
from pipeline import edwards, pedersen
from pipeline.charter import Charter
from pipeline.commitments import adds_up, commitment_hash, sum_fault, total_hash
from pipeline.contribution import credit_by_patients
from tests.aggregator import small_federation as small

AT = "2026-01-02T00:00:00+00:00"
VALUES = {name: np.arange(16, dtype=np.int64) * (place + 1) - 7 for place, name in enumerate(small.NAMES)}
TASK = TrainTask(
    federation=small.FEDERATION, run="run", round=1, plan=small.PLAN, base_model_hash="0" * 64, deadline_unix=0
)


def committed(name: str, **changes: Any) -> SignedUpdate:
    """A hospital's commitment to its values under blinder 5."""
    told = edwards.encode(pedersen.commit(VALUES[name], 5))
    given = {"update_hash": commitment_hash(told), "commitment": told, **changes}
    return small.signed_update(name, TASK, small.honest_delta(name, TASK), **given)


def entry(admitted: tuple[SignedUpdate, ...], roster: int | None = 3) -> RoundEntry:
    total = np.sum(list(VALUES.values()), axis=0)
    told = None if roster is None else SecureSum(roster=roster, total_hash=total_hash(total), blinder=f"{15:064x}")
    common = {"run": "run", "round": 1, "plan_hash": "0" * 64, "base_model_hash": "0" * 64, "new_model_hash": "1" * 64}
    return RoundEntry(**common, admitted=admitted, rejected=(), sum=told)


ALL = tuple(committed(name) for name in small.NAMES)
PLAIN = small.signed_update("alder", TASK, small.honest_delta("alder", TASK))


@pytest.mark.parametrize(
    ("closed", "secure", "wrong"),
    [
        (entry(ALL), True, ""),
        (entry((PLAIN,), None), False, ""),
        (entry(ALL), False, "not aggregated as its run"),
        (entry((PLAIN,), None), True, "not aggregated as its run"),
        (entry(ALL, None), False, "an update is a commitment"),
        (entry(ALL[:2]), True, "of 2 updates, of 3 that began"),
        (entry(ALL, 5), True, "of 3 updates, of 5 that began"),
        (entry(ALL, 2), True, "of 3 updates, of 2 that began"),
        (entry((*ALL[:2], committed("cedar", commitment=None))), True, "cedar: it has no commitment"),
        (entry((*ALL[:2], committed("cedar", update_hash="0" * 64))), True, "cedar: it has no commitment"),
        (entry((*ALL[:2], committed("cedar", commitment="02" + "00" * 31))), True, "cedar: it has no commitment"),
    ],
)
def test_a_round_says_how_it_was_added_up(closed: RoundEntry, secure: bool, wrong: str) -> None:
    """Sum and commitments are there exactly in secure runs, of enough hospitals, each named after its commitment."""
    assert (wrong in sum_fault(closed, secure=secure)) if wrong else sum_fault(closed, secure=secure) == ""


def test_the_logged_sum_opens_the_commitments_or_does_not() -> None:
    """The right total does; one that differs by 1, or one of fewer hospitals, does not."""
    closed, total = entry(ALL), np.sum(list(VALUES.values()), axis=0)
    assert closed.sum is not None
    other = total + np.eye(1, 16, 4, dtype=np.int64)[0]

    assert adds_up(closed.admitted, total, closed.sum)
    assert not adds_up(closed.admitted, other, closed.sum)
    assert not adds_up(closed.admitted, other, closed.sum.model_copy(update={"total_hash": total_hash(other)}))
    assert not adds_up(closed.admitted[:2], total, closed.sum)


def test_credit_by_patients_pays_who_was_there_by_declared_patients() -> None:
    """Two rounds of 1000: all three (30, 20, 50 patients), then two of them; the pot is paid to the last unit."""
    lines, unpaid = credit_by_patients([entry(ALL).patients(), entry((ALL[0], ALL[2])).patients()], 2001)

    assert {line.node: line.micro_credits for line in lines} == {"alder": 675, "birch": 200, "cedar": 1125}
    assert unpaid == 1
    assert all(line.shapley_mg_dl == 0 for line in lines)


def test_a_vote_decides_how_runs_that_begin_are_aggregated() -> None:
    """A run is logged as the policy says; a run begun in plain stops when members want sums only, not the reverse."""
    open_policy = PrivacyPolicy(max_epsilon_training=8, max_epsilon_heldout=4, min_patients=1)
    strict = open_policy.model_copy(update={"aggregation": "secure"})
    charter = Charter()
    founding = FoundingEntry(
        federation="trial", privacy=open_policy, credit=CreditPolicy(max_pot_micro_credits_per_round=9)
    )
    assert charter.take_entry(founding, AT) == ""
    secret = PlanEntry(run="b", plan_hash="0" * 64, aggregation="secure")
    assert "not-decided" in charter.take_entry(secret, AT)
    assert charter.take_entry(PlanEntry(run="a", plan_hash="0" * 64), AT) == ""
    assert charter.may_go_on("a")

    charter.privacy = strict
    assert not charter.may_go_on("a")
    assert charter.take_entry(secret, AT) == ""
    assert "not-decided" in charter.take_entry(PlanEntry(run="c", plan_hash="0" * 64), AT)
    charter.privacy = open_policy
    assert charter.may_go_on("b")
    assert open_policy.weaker_than(strict)
    assert not strict.weaker_than(open_policy)
    bounded = small.PLAN.model_copy(
        update={"server": small.PLAN.server.model_copy(update={"rule": "norm-bounded-mean"})}
    )
    assert open_policy.allows(bounded)
    assert not strict.allows(bounded)


def test_what_was_hashed_before_stays_what_it_is() -> None:
    """Plain updates, rounds, plans and policies are written as they were before there was secure aggregation."""
    policy = PrivacyPolicy(max_epsilon_training=8, max_epsilon_heldout=4, min_patients=1)
    written = [policy, PLAIN, entry((PLAIN,), None), PlanEntry(run="a", plan_hash="0" * 64)]
    text = " ".join(value.model_dump_json() for value in written)

    assert not any(word in text for word in ("aggregation", "commitment", '"sum"'))
