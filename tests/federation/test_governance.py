"""The members govern: what is signed at home travels, is counted, and takes effect at every node."""

from __future__ import annotations

import json
import shutil
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from aggregator.courier import TRAIN
from aggregator.release import find_release
from aggregator.rounds import run_identity
from aggregator.verification import verify_ledger
from data_schemas.canonical import canonical_bytes, content_hash
from data_schemas.errors import BadInput, CheckFailed
from data_schemas.governance import ProposalEntry, StatementCode, VoteEntry
from data_schemas.ledger import PlanEntry
from data_schemas.messages import RefusalCode, SignedUpdate, TrainTask
from data_schemas.plan import PrivacyEvent
from hospital_node import champion, ledger_view, statements
from hospital_node.endpoint import create_app
from hospital_node.folder import NodeFolder
from pipeline.cli_governance import federation_enter
from pipeline.demo_votes import vote_champion
from pipeline.signing import PrivateKey
from tests.federation import small_house
from tests.federation.small_house import NAMES, PLAN, House
from tests.hospital_node import small_node
from tests.hospital_node.small_node import FEDERATION

PAUSE = {"action": "pause", "paused": True}
BASE = small_node.base_weights(PLAN)
RUN = run_identity(FEDERATION, PLAN, BASE)


@pytest.fixture
def house(tmp_path: Path) -> House:
    """A federation of five whose nodes have seen the ledger."""
    made = small_house.build(tmp_path)
    assert made.sit().cosigned_by == NAMES
    return made


def trained(house: House, *names: str) -> dict[str, str | None]:
    """Ask nodes to train round 1 of the plan; the code of each one's refusal, None for an update."""
    small_plan = PlanEntry(run=RUN, plan_hash=content_hash(PLAN))
    task = small_node.train_task(PLAN, BASE, run=RUN, deadline_unix=4e9)
    with house.table(names) as table:
        table.ledger.append_once(("plan", RUN), small_plan, house.now.isoformat())
        members = table.ledger.members()
        house.sit()
        replies = table.courier.ask(TRAIN, dict.fromkeys(names, task), members, timeout_s=60, arrays={"weights": BASE})
    assert all(reply.failure or isinstance(reply.body, SignedUpdate) for reply in replies)
    return {reply.node: reply.failure for reply in replies}


def test_what_is_signed_at_home_travels_and_is_decided(house: House) -> None:
    """A proposal and votes go out with cosignatures; the outcome stops training everywhere; outboxes empty."""
    house.propose(PAUSE)
    assert house.waiting("alder") == 1
    first = house.sit()
    assert (first.entered, first.decided) == (1, ())
    assert house.waiting("alder") == 0
    assert list(house.copy_at("elm").open) == list(house.charter().open)
    house.vote("birch", "cedar", "dogwood")
    second = house.sit()
    assert second.entered == 3
    assert [made.accepted for made in second.decided] == [True]
    assert all(house.copy_at(name).paused for name in NAMES)
    assert trained(house, "alder", "elm") == dict.fromkeys(("alder", "elm"), RefusalCode.FEDERATION_PAUSED)

    house.decide({"action": "pause", "paused": False}, "alder", "birch", "cedar")
    small_node.fill(house.homes["alder"], 12)
    assert trained(house, "alder") == {"alder": None}
    key = house.folder.key().public.hex
    assert verify_ledger(house.folder.path / "ledger.db", key, every_signature=True).counts["decision"] == 2


def test_a_hospital_that_was_away_catches_up(house: House) -> None:
    """What it signed meanwhile waits and is counted at the next sitting that it attends."""
    house.propose(PAUSE)
    house.sit()
    house.vote("elm", "birch", "cedar")
    assert house.sit(["alder", "birch", "cedar"]).decided == ()
    assert house.waiting("elm") == 1
    assert [made.accepted for made in house.sit().decided] == [True]
    assert house.copy_at("elm").paused


def test_a_sitting_goes_on_while_a_round_does(house: House) -> None:
    """The ledger is shown and votes are handed over while another process holds the node folder for a round."""
    house.propose(PAUSE)
    house.sit()
    house.vote("birch", "cedar", "dogwood")
    with NodeFolder.open(house.homes["alder"]), NodeFolder.open(house.homes["birch"]):
        assert house.sit().cosigned_by == NAMES
    assert house.copy_at("alder").paused


def test_the_same_files_enter_by_any_other_way(house: House, tmp_path: Path) -> None:
    """A statement needs no connection: its file is what the aggregator enters, once."""
    house.now = datetime.now(UTC)
    file = house.propose(PAUSE)
    kept = tmp_path / file.name
    kept.write_bytes(file.read_bytes())
    federation_enter(house.folder.path, [kept])
    assert len(house.charter().open) == 1
    with pytest.raises(BadInput, match="made-before"):
        federation_enter(house.folder.path, [kept])
    assert house.sit().refused == {}
    assert house.waiting("alder") == 0


def forged(house: House, kind: str) -> bytes:
    """A vote that must not count, as bytes of an outbox file at elm."""
    cast = VoteEntry.model_validate_json(house.vote("elm")[0].read_bytes())
    changes: dict[str, Any] = {
        "other-federation": {"federation": "elsewhere"},
        "other-members": {"member_set": "0" * 64},
        "no-such-proposal": {"proposal_hash": "0" * 64},
        "bad-signature": {"approve": False},
        "not-a-member": {"node": "mallory"},
    }
    vote = cast.vote.model_copy(update=changes[kind])
    with NodeFolder.open(house.homes["elm"]) as node:
        signature = cast.signature if kind == "bad-signature" else node.key.sign(vote)
    for old in (house.homes["elm"] / "outbox").iterdir():
        old.unlink()
    return canonical_bytes(VoteEntry(vote=vote, signature=signature))


@pytest.mark.parametrize(
    "kind", ["other-federation", "other-members", "no-such-proposal", "bad-signature", "not-a-member"]
)
def test_a_forged_vote_is_refused_with_its_code(house: House, kind: str) -> None:
    """It does not enter the log, the node is told the code, and it is not sent again."""
    house.propose(PAUSE)
    house.sit()
    (house.homes["elm"] / "outbox" / "vote-forged.json").write_bytes(forged(house, kind))
    before = house.charter().votes
    assert small_house.codes(house.sit(), "elm") == [StatementCode(kind)]
    assert house.charter().votes == before
    assert house.refused("elm") == [kind]
    assert house.sit().refused == {}


def test_a_replayed_vote_and_a_late_one_are_refused(house: House) -> None:
    """A vote counts once, whoever hands it over again; after the expiry none does, and no quorum is a rejection."""
    house.propose(PAUSE, days=1)
    house.sit()
    kept = house.vote("birch")[0].read_bytes()
    house.sit()
    (house.homes["cedar"] / "outbox").mkdir()
    (house.homes["cedar"] / "outbox" / "vote-again.json").write_bytes(kept)
    assert small_house.codes(house.sit(), "cedar") == [StatementCode.VOTED_BEFORE]
    house.vote("dogwood")
    house.now += timedelta(days=2)
    sitting = house.sit()
    assert small_house.codes(sitting, "dogwood") == [StatementCode.EXPIRED]
    assert [made.accepted for made in sitting.decided] == [False]


def test_nothing_senseless_is_signed(house: House) -> None:
    """A node refuses to sign what the rules would refuse, by its own copy: no round trip is needed to learn it."""
    house.propose(PAUSE)
    house.sit()
    house.vote("alder")
    with pytest.raises(CheckFailed, match="voted-before"):
        house.vote("alder")
    with pytest.raises(CheckFailed, match="no-effect"):
        house.propose({"action": "promote", "model_hash": "0" * 64})
    with pytest.raises(CheckFailed, match="no-effect"):
        house.propose({"action": "remove", "node": "nobody"})


def test_removing_needs_two_thirds_of_the_others(house: House) -> None:
    """Two of the four others are too few, three remove; the removed hospital is told, and refused from then on."""
    house.now = datetime.now(UTC)
    house.propose({"action": "remove", "node": "elm"})
    house.sit()
    house.vote("alder", "birch")
    with pytest.raises(CheckFailed, match="may-not-vote"):
        house.vote("elm")
    assert house.sit().decided == ()
    late = house.propose(PAUSE, by="elm")
    house.vote("cedar")
    assert [made.accepted for made in house.sit(NAMES[:-1]).decided] == [True]
    assert "elm" not in house.charter().members
    assert "elm" in house.copy_at("elm").members
    assert house.sit().cosigned_by == NAMES[:-1]
    with NodeFolder.open(house.homes["elm"], sitting=True) as node:
        assert ledger_view.removed(node)
    with pytest.raises(CheckFailed, match="not-a-member"):
        house.propose({"action": "pause", "paused": False}, by="elm")
    assert house.sit().entered == 0
    with pytest.raises(BadInput, match="other-members"):
        federation_enter(house.folder.path, [late])
    with NodeFolder.open(house.homes["elm"]) as node:
        entry = ProposalEntry.model_validate_json(late.read_bytes())
        proposal = entry.proposal.model_copy(update={"member_set": house.charter().member_set})
        late.write_bytes(canonical_bytes(ProposalEntry(proposal=proposal, signature=node.key.sign(proposal))))
    with pytest.raises(BadInput, match="not-a-member"):
        federation_enter(house.folder.path, [late])


def test_weaker_privacy_needs_two_thirds_and_a_hospital_may_be_stricter_alone(house: House) -> None:
    """Four of five raise the ceiling; three do not; a node's own lower ceiling still refuses the plan."""
    weaker = {"max_epsilon_training": 20, "max_epsilon_heldout": 8, "min_patients": 1}
    house.propose({"action": "privacy-policy", "policy": weaker})
    house.sit()
    house.vote("alder", "birch", "cedar")
    assert house.sit().decided == ()
    house.vote("dogwood")
    assert [made.accepted for made in house.sit().decided] == [True]
    privacy = house.copy_at("elm").privacy
    assert privacy is not None
    assert privacy.max_epsilon_training == 20
    small_node.fill(house.homes["alder"], 12)
    toml = house.homes["elm"] / "node.toml"
    toml.write_text(toml.read_text().replace("max_epsilon_training = 8.0", "max_epsilon_training = 1.0"))
    assert trained(house, "alder", "elm") == {"alder": None, "elm": RefusalCode.PLAN_EXCEEDS_CEILING}

    stricter = {"max_epsilon_training": 4, "max_epsilon_heldout": 8, "min_patients": 1}
    house.decide({"action": "privacy-policy", "policy": stricter}, "alder", "birch", "cedar")
    again = small_node.train_task(PLAN, BASE, run=RUN, round=1, deadline_unix=4e9)
    assert isinstance(again, TrainTask)
    assert trained(house, "birch") == {"birch": RefusalCode.PLAN_OUTSIDE_POLICY}


def test_a_hospital_joins_by_vote(house: House, tmp_path: Path) -> None:
    """Before the vote it is a stranger; afterwards it is shown the whole ledger, cosigns, trains and votes."""
    home = small_house.join(tmp_path / "fir", house.folder)
    declared = small_house.member(home).model_dump(exclude={"kind"})
    house.homes["fir"] = home
    assert "fir" not in house.sit().cosigned_by
    house.decide({"action": "admit", **declared}, "alder", "birch", "cedar")
    assert house.sit().cosigned_by == (*NAMES, "fir")
    small_node.fill(home, 12)
    assert trained(house, "fir") == {"fir": None}
    house.propose(PAUSE, by="fir")
    assert house.sit().entered == 1


def test_a_key_is_rotated_by_vote_and_the_budget_book_stays(house: House) -> None:
    """The node makes its next key, members accept it, it signs with it at once; its spent budget is still there."""
    from hospital_node.identity import propose_new_key
    from hospital_node.ledger_view import decided

    with NodeFolder.open(house.homes["elm"]) as node:
        event = PrivacyEvent(sample_rate=0.5, noise_multiplier=4.0, steps=4)
        node.budget().reserve(
            "t", "training", "patient", event, asked_by="f", run="r", at="now", ceiling_epsilon=8, noise="seeded"
        )
        spent, old = node.budget().spent("training"), node.key.public.hex
        propose_new_key(node, decided(node), 14, house.now)
    house.sit()
    house.vote("alder", "birch", "cedar")
    assert house.sit().cosigned_by == NAMES
    with NodeFolder.open(house.homes["elm"]) as node:
        assert node.key.public.hex == house.charter().members["elm"].public_key != old
        assert node.budget().spent("training") == spent > 0
    house.propose(PAUSE, by="elm")
    assert house.sit(attest=True).entered == 1 + len(NAMES)
    assert house.charter().attested["elm"].epsilon_training == pytest.approx(spent)
    key = house.folder.key().public.hex
    assert "elm" in verify_ledger(house.folder.path / "ledger.db", key, every_signature=True).members


def test_budget_attestations_reach_the_ledger(house: House) -> None:
    """Every node attests its book when asked; the same book is not attested twice, one with less spent never."""
    small_node.fill(house.homes["alder"], 12)
    assert trained(house, "alder") == {"alder": None}
    assert house.sit(attest=True).entered == len(NAMES)
    said = house.charter().attested["alder"]
    with NodeFolder.open(house.homes["alder"]) as node:
        book = node.budget()
        assert (said.releases, said.budget_head) == (1, book.head())
        assert said.epsilon_training == pytest.approx(book.spent("training"))
        assert said.epsilon_training > 0
        assert statements.attest(node, house.charter(), house.now) is None
        less = said.model_copy(update={"releases": 2, "epsilon_training": 0.0})
        entry = {"kind": "attestation", "attestation": less.model_dump(), "signature": node.key.sign(less)}
    assert house.sit(attest=True).entered == 0
    (house.homes["alder"] / "outbox" / "attestation-less.json").write_bytes(canonical_bytes(entry))
    assert small_house.codes(house.sit(), "alder") == [StatementCode.ATTESTS_LESS]


def test_the_voted_model_is_at_every_node_and_a_roll_back_is_too(house: House) -> None:
    """Promoted models are handed over and served; a roll-back needs nothing but the decision in the log.

    A running endpoint follows each time, and answers every request on the way.
    """
    one, two = small_house.publish(house, 1), small_house.publish(house, 2)
    house.sit()
    assert [champion.served(home) for home in house.homes.values()] == [None] * 5
    with TestClient(create_app(house.homes["alder"])) as client:
        assert client.get("/readyz").status_code == 503
        assert house.decide({"action": "promote", "model_hash": one}, *NAMES[:3]).installed == NAMES
        follows(client, one)
        assert house.decide({"action": "promote", "model_hash": two}, *NAMES[1:4], by="elm").installed == NAMES
        assert [champion.served(home) for home in house.homes.values()] == [two] * 5
        follows(client, two)
        shutil.rmtree(house.folder.released)
        assert house.decide({"action": "roll-back", "model_hash": one}, *NAMES[:3]).installed == ()
        follows(client, one)
        link = house.homes["alder"] / "model"
        link.unlink()
        link.symlink_to(house.homes["alder"] / "models" / two)
        while "islet_models_refused_total 1" not in client.get("/metrics").text:
            time.sleep(0.05)
        assert client.get("/readyz").json()["model_hash"] == one
    with pytest.raises(CheckFailed, match="have not decided to serve"):
        create_app(house.homes["alder"])
    with pytest.raises(BadInput, match="the members decide"):
        create_app(house.homes["birch"], house.homes["birch"] / "models" / one)
    assert [champion.served(home) for name, home in house.homes.items() if name != "alder"] == [one] * 4
    assert [champion.is_champion(home, one) for home in house.homes.values()] == [True] * 5
    assert not champion.is_champion(house.homes["alder"], two)


def test_all_hospitals_vote_for_a_model_in_one_go(house: House, tmp_path: Path) -> None:
    """What the demo does at its end: one proposal, a vote of every hospital, a champion everywhere."""
    one = small_house.publish(house, 1)
    sitting = vote_champion(house.folder, house.homes, one, tmp_path)
    assert (sitting.champion, [made.accepted for made in sitting.decided]) == (one, [True])
    assert sitting.installed == NAMES
    assert vote_champion(house.folder, house.homes, one, tmp_path).installed == ()


def follows(client: TestClient, model_hash: str) -> None:
    """Ask until this model answers; no request on the way may fail."""
    while (answer := client.get("/readyz")).json()["model_hash"] != model_hash:
        assert answer.status_code == 200
        time.sleep(0.05)


@pytest.mark.parametrize("lie", ["weights", "card", "undecided"])
def test_a_model_that_was_not_decided_is_not_taken(house: House, lie: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other weights than decided, a card that claims less privacy spent, or no decision at all: refused with a code."""
    from aggregator.courier import MODEL
    from data_schemas.messages import ModelTask

    one = small_house.publish(house, 1, lie=-2.0 if lie == "card" else 0.0)
    house.sit()
    if lie != "undecided":
        house.propose({"action": "promote", "model_hash": one})
        house.sit()
        house.vote(*NAMES[:3])
        monkeypatch.setattr("aggregator.assembly._hand_over", lambda *_: ())
        house.sit()
    model = find_release(house.folder.released, one)
    assert model is not None
    weights = model.weights + np.float32(1) if lie == "weights" else model.weights
    with house.table() as table:
        task = ModelTask(federation=FEDERATION, card=model.card)
        members = table.ledger.members()
        replies = table.courier.ask(
            MODEL, dict.fromkeys(NAMES, task), members, timeout_s=60, arrays={"weights": weights}
        )
    expected = RefusalCode.MODEL_MISMATCH if lie == "card" else RefusalCode.MODEL_NOT_DECIDED
    assert {reply.failure for reply in replies} == {expected}
    assert [champion.served(home) for home in house.homes.values()] == [None] * 5


def test_a_damaged_outbox_file_stops_nothing(house: House) -> None:
    """What is no statement stays where it is; the rest goes out."""
    house.propose(PAUSE)
    (house.homes["alder"] / "outbox" / "vote-half.json").write_text(json.dumps({"kind": "vote"}))
    assert house.sit().entered == 1


def test_a_key_that_was_never_a_members_is_not_shown_the_ledger(house: House) -> None:
    """A node that lost its key is a stranger, and the sitting goes on without it."""
    file = house.homes["elm"] / "keys" / "node.ed25519"
    file.unlink()
    PrivateKey.generate().save(file)
    assert house.sit().cosigned_by == NAMES[:-1]
