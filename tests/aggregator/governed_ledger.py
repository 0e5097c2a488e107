"""A ledger with a bit of everything that the federation's page shows: a finished run, proposals, votes, a champion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aggregator import governance
from aggregator.settings import AggregatorFolder
from data_schemas.canonical import content_hash
from data_schemas.governance import (
    Attestation,
    AttestationEntry,
    CreditPolicy,
    FoundingEntry,
    PrivacyPolicy,
    Proposal,
    ProposalEntry,
    Vote,
    VoteEntry,
)
from tests.aggregator import small_federation as small

AT, ENDS = "2026-01-02T00:00:00+00:00", "2126-01-01T00:00:00+00:00"


def build(place: Path) -> AggregatorFolder:
    """Run three rounds of three hospitals; promote the model, reject one proposal, leave one open; cosign again."""
    folder = small.build(place)
    book = folder.open_ledger()
    privacy = PrivacyPolicy(max_epsilon_training=8, max_epsilon_heldout=4, min_patients=1)
    credit = CreditPolicy(max_pot_micro_credits_per_round=2_000_000)
    governance.found_federation(book, FoundingEntry(federation=small.FEDERATION, privacy=privacy, credit=credit), AT)
    book.close()
    result = small.run(place)
    book = folder.open_ledger()
    try:
        _decide(book, {"action": "promote", "model_hash": result.model_hash}, {"alder": True, "birch": True})
        _decide(book, {"action": "pause", "paused": True}, {"alder": False, "cedar": False})
        weaker = privacy.model_copy(update={"max_epsilon_training": 12.0}).model_dump()
        _decide(book, {"action": "privacy-policy", "policy": weaker}, {"cedar": True})
        told = Attestation(
            federation=small.FEDERATION,
            node="alder",
            releases=4,
            budget_head="0" * 64,
            epsilon_training=2.5,
            epsilon_heldout=1.25,
        )
        governance.enter(book, AttestationEntry(attestation=told, signature=small.key_of("alder").sign(told)), AT)
    finally:
        book.close()
    small.run(place)  # a finished run only renews the cosignatures
    return folder


def _decide(book: Any, action: dict[str, Any], votes: dict[str, bool]) -> None:
    bound: dict[str, Any] = {"federation": small.FEDERATION, "member_set": book.charter().member_set}
    proposal = Proposal.model_validate({**bound, "action": action, "proposed_by": "birch", "expires_at": ENDS})
    governance.enter(book, ProposalEntry(proposal=proposal, signature=small.key_of("birch").sign(proposal)), AT)
    for name, approve in votes.items():
        vote = Vote(proposal_hash=content_hash(proposal), node=name, approve=approve, **bound)
        governance.enter(book, VoteEntry(vote=vote, signature=small.key_of(name).sign(vote)), AT)
    governance.decide(book, AT)
