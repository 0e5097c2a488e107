"""Membership as the ledger tells it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from aggregator.governance import admit_member, replay
from aggregator.ledger import Ledger
from data_schemas.errors import BadInput, Tampered
from data_schemas.ledger import LedgerEntry, PlanEntry, RoundEntry
from data_schemas.messages import TrainTask
from tests.aggregator import small_federation as small

AT = "2026-01-01T00:00:00+00:00"


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    """Open an empty ledger."""
    book = Ledger(tmp_path / "ledger.db", small.key_of("aggregator"), small.FEDERATION)
    yield book
    book.close()


def test_members_are_those_in_the_log_as_they_joined(ledger: Ledger) -> None:
    """Whoever was admitted is a member, with the key and numbers of its entry; nobody else is."""
    for name in ("birch", "alder"):
        admit_member(ledger, small.member(name), AT)
    members = replay(ledger.entries()).members
    assert list(members) == ["birch", "alder"]
    assert members["alder"] == small.member("alder")


def test_admitting_the_same_hospital_again_changes_nothing(ledger: Ledger) -> None:
    """A repeated admission adds no entry."""
    assert admit_member(ledger, small.member("alder"), AT) is not None
    assert admit_member(ledger, small.member("alder"), AT) is None
    assert ledger.size == 1


def test_the_newest_declared_numbers_count(ledger: Ledger) -> None:
    """A member may publish other numbers under its key, and go back to the old ones."""
    larger = small.member("alder").model_copy(update={"declared_training_patients": 99})
    for member in (small.member("alder"), larger, small.member("alder"), larger):
        admit_member(ledger, member, AT)
        assert replay(ledger.entries()).members["alder"] == member


@pytest.mark.parametrize("taken", ["name", "key"])
def test_one_hospital_has_one_name_and_one_key(ledger: Ledger, taken: str) -> None:
    """Another key under a member's name, or another name for a member's key, is refused."""
    admit_member(ledger, small.member("alder"), AT)
    twin = {"public_key": small.key_of("x").public.hex} if taken == "name" else {"node": "twin"}
    with pytest.raises(BadInput, match=f"this {taken} already belongs"):
        admit_member(ledger, small.member("alder").model_copy(update=twin), AT)
    assert ledger.size == 1


def test_the_federation_is_frozen(ledger: Ledger) -> None:
    """What was replayed cannot be edited into something the log does not say."""
    admit_member(ledger, small.member("alder"), AT)
    federation = replay(ledger.entries())
    with pytest.raises(TypeError):
        federation.members["mallory"] = small.member("birch")  # type: ignore[index]


@pytest.mark.parametrize("what", ["plan", "key"])
def test_a_log_that_contradicts_itself_is_refused(what: str) -> None:
    """Two plans for one run, or a changed key under one name, cannot come from an honest log."""
    one, two = PlanEntry(run="r", plan_hash="1" * 64), PlanEntry(run="r", plan_hash="2" * 64)
    if what == "key":
        one = small.member("alder")
        two = one.model_copy(update={"public_key": small.key_of("x").public.hex})
    log = [LedgerEntry(index=i, recorded_at=AT, entry=entry, signature="") for i, entry in enumerate((one, two))]
    with pytest.raises(Tampered, match="contradicts"):
        replay(log)


def test_hashes_seen_before_leave_out_the_round_that_is_repeated() -> None:
    """All runs count, and of the running one only the rounds before the one that is collected."""

    def closed(run: str, number: int, update_hash: str) -> LedgerEntry:
        task = TrainTask(
            federation="f", run=run, round=number, plan=small.PLAN, base_model_hash="0" * 64, deadline_unix=0
        )
        signed = small.signed_update("alder", task, small.START, update_hash=update_hash)
        entry = RoundEntry(
            run=run,
            round=number,
            plan_hash="1" * 64,
            base_model_hash="2" * 64,
            new_model_hash="3" * 64,
            admitted=(signed,),
            rejected=(),
        )
        return LedgerEntry(index=number, recorded_at=AT, entry=entry, signature="")

    federation = replay([closed("a", 1, "a1"), closed("a", 2, "a2"), closed("b", 1, "b1"), closed("b", 5, "b5")])
    assert federation.update_hashes("a", 2) == {"a1", "b1", "b5"}
