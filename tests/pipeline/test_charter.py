"""Members decide: one hospital, one vote, and only what was signed for this federation and proposal counts."""

from __future__ import annotations

import pytest

from data_schemas.canonical import content_hash
from data_schemas.governance import (
    Admit,
    Attestation,
    AttestationEntry,
    CreditPolicy,
    DecisionEntry,
    FoundingEntry,
    Pause,
    PrivacyPolicy,
    Promote,
    Proposal,
    ProposalEntry,
    Remove,
    RollBack,
    RotateKey,
    SetPrivacy,
    Vote,
    VoteEntry,
)
from data_schemas.ledger import MemberEntry, ModelEntry, PlanEntry
from pipeline.charter import Charter
from pipeline.signing import PrivateKey

NAMES = ("alder", "birch", "cedar", "dogwood", "elm")
KEYS = {name: PrivateKey.from_seed(name.encode().ljust(32, b".")) for name in (*NAMES, "fir", "new")}
NOW, LATER, AFTER = "2026-01-01T00:00:00+00:00", "2026-01-02T00:00:00+00:00", "2026-03-01T00:00:00+00:00"
PRIVACY = PrivacyPolicy(max_epsilon_training=8, max_epsilon_heldout=4, min_patients=5)


@pytest.fixture
def charter() -> Charter:
    """Return a federation of five that has begun."""
    made = Charter()
    credit = CreditPolicy(max_pot_micro_credits_per_round=1000)
    assert made.take_entry(FoundingEntry(federation="f", privacy=PRIVACY, credit=credit), NOW) == ""
    for name in NAMES:
        assert made.take_entry(_member(name), NOW) == ""
    assert made.take_entry(PlanEntry(run="r", plan_hash="0" * 64), NOW) == ""
    return made


def _member(name: str) -> MemberEntry:
    return MemberEntry(
        node=name, public_key=KEYS[name].public.hex, declared_training_patients=9, declared_heldout_patients=3
    )


def _proposal(charter: Charter, action: object, by: str = "alder", **changes: object) -> Proposal:
    values = {"federation": "f", "action": action, "proposed_by": by, "member_set": charter.member_set}
    return Proposal.model_validate({**values, "expires_at": "2026-02-01T00:00:00+00:00", **changes})


def _propose(charter: Charter, action: object) -> Proposal:
    proposal = _proposal(charter, action)
    entry = ProposalEntry(proposal=proposal, signature=KEYS["alder"].sign(proposal))
    assert charter.take_entry(entry, NOW) == ""
    return proposal


def _vote(charter: Charter, proposal: Proposal, node: str, approve: bool, **changes: object) -> str:
    vote = Vote(
        federation="f",
        proposal_hash=content_hash(proposal),
        node=node,
        member_set=proposal.member_set,
        approve=approve,
    ).model_copy(update=changes)
    return charter.take_entry(VoteEntry(vote=vote, signature=KEYS[node].sign(vote)), LATER)


def _decide(charter: Charter, proposal: Proposal, accepted: bool, at: str = LATER) -> str:
    return charter.take_entry(DecisionEntry(proposal_hash=content_hash(proposal), accepted=accepted), at)


def test_more_than_half_decide(charter: Charter) -> None:
    """Three of five pause the federation; two do not, and nobody can log an outcome that the votes do not give."""
    proposal = _propose(charter, Pause(paused=True))
    for node in ("alder", "birch"):
        assert _vote(charter, proposal, node, True) == ""
    assert charter.outcome(content_hash(proposal), LATER) is None
    assert "follow from the votes" in _decide(charter, proposal, True)
    assert "follow from the votes" in _decide(charter, proposal, False)
    assert _vote(charter, proposal, "cedar", True) == ""
    assert _decide(charter, proposal, True) == ""

    assert charter.paused
    assert "no such open proposal" in _decide(charter, proposal, True)


def test_after_expiry_a_quorum_decides(charter: Charter) -> None:
    """Two to one of five is a majority of a quorum once the time is over; without a quorum it is a rejection."""
    first, second = _propose(charter, Pause(paused=True)), _propose(charter, Pause(paused=False))
    for node, approve in (("alder", True), ("birch", True), ("cedar", False)):
        assert _vote(charter, first, node, approve) == ""
    assert _vote(charter, second, "alder", True) == ""

    assert _decide(charter, first, True, AFTER) == ""
    assert _decide(charter, second, False, AFTER) == ""
    assert charter.paused


def test_a_removal_needs_two_thirds_without_its_subject(charter: Charter) -> None:
    """Three of the four others remove a member; the member itself has no vote; afterwards it signs nothing."""
    proposal = _propose(charter, Remove(node="elm"))
    assert "subject" in _vote(charter, proposal, "elm", False)
    for node in ("alder", "birch"):
        assert _vote(charter, proposal, node, True) == ""
    assert charter.outcome(content_hash(proposal), LATER) is None
    assert _vote(charter, proposal, "cedar", True) == ""
    assert _decide(charter, proposal, True) == ""

    assert "elm" not in charter.members
    later = _proposal(charter, Pause(paused=True), by="elm")
    entry = ProposalEntry(proposal=later, signature=KEYS["elm"].sign(later))
    assert "not a member" in charter.take_entry(entry, LATER)


def test_weaker_privacy_needs_two_thirds_and_stricter_does_not(charter: Charter) -> None:
    """More epsilon needs four of five; less needs three."""
    weaker = _propose(charter, SetPrivacy(policy=PRIVACY.model_copy(update={"max_epsilon_training": 9.0})))
    stricter = _propose(charter, SetPrivacy(policy=PRIVACY.model_copy(update={"max_epsilon_training": 2.0})))
    for node in ("alder", "birch", "cedar"):
        assert _vote(charter, weaker, node, True) == _vote(charter, stricter, node, True) == ""

    assert charter.outcome(content_hash(weaker), LATER) is None
    assert _decide(charter, stricter, True) == ""
    assert charter.privacy is not None
    assert charter.privacy.max_epsilon_training == 2


def test_a_vote_counts_once_and_nowhere_else(charter: Charter) -> None:
    """A second vote, a vote for another federation, members or proposal, a late one and a forged one are refused."""
    proposal = _propose(charter, Pause(paused=True))
    assert _vote(charter, proposal, "birch", True) == ""
    assert "before" in _vote(charter, proposal, "birch", False)
    assert "federation" in _vote(charter, proposal, "cedar", True, federation="g")
    assert "members" in _vote(charter, proposal, "cedar", True, member_set="1" * 64)
    assert "no such" in _vote(charter, proposal, "cedar", True, proposal_hash="1" * 64)
    vote = Vote(
        federation="f",
        proposal_hash=content_hash(proposal),
        node="cedar",
        member_set=charter.member_set,
        approve=True,
    )
    assert "signature" in charter.take_entry(VoteEntry(vote=vote, signature=KEYS["birch"].sign(vote)), LATER)
    genuine = VoteEntry(vote=vote, signature=KEYS["cedar"].sign(vote))
    assert "expired" in charter.take_entry(genuine, AFTER)
    assert charter.votes[content_hash(proposal)] == {"birch": True}


def test_who_joins_is_voted_on_and_open_proposals_lapse(charter: Charter) -> None:
    """After the start nobody joins without a vote; a decision that changes the members ends what was open."""
    assert "without a vote" in charter.take_entry(_member("new"), LATER)
    pending = _propose(charter, Pause(paused=True))
    admission = _propose(
        charter,
        Admit(
            node="new",
            public_key=KEYS["new"].public.hex,
            declared_training_patients=9,
            declared_heldout_patients=3,
        ),
    )
    for node in ("alder", "birch", "cedar"):
        assert _vote(charter, admission, node, True) == _vote(charter, pending, node, True) == ""
    assert _decide(charter, admission, True) == ""

    assert charter.members["new"] == _member("new")
    assert "members" in _vote(charter, pending, "new", True)
    assert "follow" in _decide(charter, pending, True)
    assert _decide(charter, pending, False) == ""


def test_a_rotated_key_signs_and_the_old_one_does_not(charter: Charter) -> None:
    """The hospital signs with the new key from then on; the old one is kept for what it cosigned."""
    proposal = _propose(charter, RotateKey(node="elm", public_key=KEYS["fir"].public.hex))
    for node in ("alder", "birch", "cedar"):
        assert _vote(charter, proposal, node, True) == ""
    assert _decide(charter, proposal, True) == ""

    said = Attestation(
        federation="f", node="elm", releases=2, budget_head="0" * 64, epsilon_training=1, epsilon_heldout=0
    )
    assert "signature" in charter.take_entry(
        AttestationEntry(attestation=said, signature=KEYS["elm"].sign(said)), LATER
    )
    assert charter.take_entry(AttestationEntry(attestation=said, signature=KEYS["fir"].sign(said)), LATER) == ""
    assert charter.keys["elm"] == [KEYS["elm"].public.hex, KEYS["fir"].public.hex]


def test_models_are_promoted_and_rolled_back(charter: Charter) -> None:
    """Only a published model is promoted, only an earlier champion is rolled back to."""
    for number in (1, 2):
        model = ModelEntry(
            run=f"r{number}",
            round=1,
            model_hash=f"{number:064x}",
            unit="patient",
            relation="",
            delta=1e-5,
            epsilon_by_node={},
        )
        assert charter.take_entry(model, NOW) == ""
    unknown = _proposal(charter, Promote(model_hash="3".rjust(64, "0")))
    entry = ProposalEntry(proposal=unknown, signature=KEYS["alder"].sign(unknown))
    assert "not in the ledger" in charter.take_entry(entry, NOW)
    for action in (Promote(model_hash=f"{1:064x}"), Promote(model_hash=f"{2:064x}"), RollBack(model_hash=f"{1:064x}")):
        proposal = _propose(charter, action)
        for node in ("alder", "birch", "cedar"):
            assert _vote(charter, proposal, node, True) == ""
        assert _decide(charter, proposal, True) == ""

    assert charter.champions == [f"{n:064x}" for n in (1, 2, 1)]
