"""A challenger competes: voted in, trained, scored at every node against the champion, paid while it is champion."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from aggregator import epochs
from aggregator.assembly import sit
from aggregator.courier import TRAIN
from aggregator.embedded_grid import EmbeddedGrid
from aggregator.rounds import FederationResult, run_identity
from aggregator.server_app import run_folder
from aggregator.verification import verify_ledger
from data_schemas.canonical import content_hash
from data_schemas.ledger import ContestEntry, CreditEntry, PlanEntry
from data_schemas.messages import RefusalCode
from data_schemas.plan import TrainingPlan
from hospital_node.client_app import app
from pipeline.bundle import code_hash
from tests.aggregator.small_federation import Watcher
from tests.federation import small_house
from tests.federation.small_house import House
from tests.hospital_node import small_node
from tests.hospital_node.small_node import FEDERATION

# Another architecture and recipe than the champion's; one release, with the noise of epsilon 8.
ONE_EPOCH = {"rounds": 2, "credit__noise_multiplier": 0.7, "server__average_last_rounds": 1}
RIVAL = small_node.plan(
    name="rival",
    model={"history_minutes": 120, "hidden_size": 5},
    server__momentum=0.5,
    **ONE_EPOCH,
)
TRAINING = ("alder", "birch", "cedar")
LATER = small_node.plan(name="later", **{**ONE_EPOCH, "rounds": 1})


def run(house: House, plan: TrainingPlan) -> FederationResult:
    """Train a plan from a start model of its own."""
    np.savez(house.folder.path / "start.npz", weights=small_node.base_weights(plan))
    (house.folder.path / "plan.json").write_text(plan.model_dump_json())
    folder = replace(house.folder, settings=house.folder.settings.model_copy(update={"initial_weights": "start.npz"}))
    return run_folder(EmbeddedGrid(app, {name: house.homes[name] for name in TRAINING}), folder, Watcher())


def entries(house: House, kind: type) -> list[object]:
    """Return the ledger's entries of a kind."""
    book = house.folder.open_ledger()
    try:
        return [line.entry for line in book.entries() if isinstance(line.entry, kind)]
    finally:
        book.close()


@pytest.fixture
def house(tmp_path: Path) -> House:
    """A federation with patients and a poor champion, whose policy keeps a quarter of the pot for recipes."""
    made = small_house.build(tmp_path)
    for home in (made.homes[name] for name in TRAINING):
        small_node.fill(home, 12, hours=6)
    made.sit()
    policy = {"max_pot_micro_credits_per_round": 1000, "algorithm_permille": 250}
    made.decide({"action": "credit-policy", "policy": policy}, "alder", "birch", "cedar")
    weights = small_node.base_weights(small_house.PLAN) + np.float32(0.5)
    poor = small_house.publish(made, 1, weights=weights)
    made.sit()
    made.decide({"action": "promote", "model_hash": poor}, "alder", "birch", "cedar")
    return made


def test_a_challenger_that_wins_is_paid_while_the_champion_runs_its_recipe(house: House) -> None:
    """The others than its entrant decide beyond noise; it costs no release of its own; each node and auditor agrees."""
    entered = {"action": "challenge", "plan": RIVAL.model_dump(mode="json"), "code_hash": code_hash()}
    house.decide(entered, "alder", "cedar", "elm", by="birch")
    result = run(house, RIVAL)

    (contest,) = entries(house, ContestEntry)
    assert isinstance(contest, ContestEntry)
    assert contest.won
    assert contest.entrant == "birch"
    assert contest.interval_low_mg_dl > 0
    assert [score.node for score in contest.scores] == ["alder", "cedar"]
    (paid,) = entries(house, CreditEntry)
    assert isinstance(paid, CreditEntry)
    assert all(len(signed.release.shapley_mg_dl) == len(TRAINING) + 1 for signed in paid.releases)
    assert {line.node for line in paid.lines} == set(TRAINING)
    assert paid.algorithm == ()
    assert house.copy_at("alder").authors == {content_hash(RIVAL): "birch"}

    house.decide({"action": "promote", "model_hash": result.model_hash}, "alder", "cedar", "elm")
    run(house, LATER)
    paid = entries(house, CreditEntry)[-1]
    assert isinstance(paid, CreditEntry)
    assert [(share.node, share.micro_credits) for share in paid.algorithm] == [("birch", 250)]
    assert sum(line.micro_credits for line in paid.lines) + paid.unpaid_micro_credits == 750
    report = verify_ledger(house.folder.path / "ledger.db", house.folder.key().public.hex, every_signature=True)
    assert report.micro_credits == house.copy_of_credits("alder")


def test_no_contest_is_held_where_a_round_has_too_many_updates_to_score(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody scores, releases or is paid, the contest stays out, and each node and auditor agrees with that."""
    monkeypatch.setattr(epochs, "MOST_SCORED", 2)
    entered = {"action": "challenge", "plan": RIVAL.model_dump(mode="json"), "code_hash": code_hash()}
    house.decide(entered, "alder", "cedar", "elm", by="birch")
    run(house, RIVAL)

    assert entries(house, ContestEntry) == []
    (unpaid,) = entries(house, CreditEntry)
    assert isinstance(unpaid, CreditEntry)
    assert unpaid.releases == ()
    assert unpaid.unpaid_micro_credits == unpaid.pot_micro_credits
    report = verify_ledger(house.folder.path / "ledger.db", house.folder.key().public.hex, every_signature=True)
    assert report.micro_credits == house.copy_of_credits("alder")
    assert not any(report.micro_credits.values())


def test_a_node_runs_no_other_code_than_was_voted(tmp_path: Path) -> None:
    """A challenger of another wheel than the installed one trains nowhere; the refusal says why."""
    house = small_house.build(tmp_path)
    house.sit()
    entered = {"action": "challenge", "plan": RIVAL.model_dump(mode="json"), "code_hash": "0" * 64}
    house.decide(entered, "alder", "cedar", "elm", by="birch")
    weights = small_node.base_weights(RIVAL)
    name = run_identity(FEDERATION, RIVAL, weights)
    task = small_node.train_task(RIVAL, weights, run=name, deadline_unix=4e9)
    with house.table(["alder"]) as table:
        table.ledger.append(PlanEntry(run=name, plan_hash=content_hash(RIVAL)), house.now.isoformat())
        sit(table, house.now.isoformat())
        members = table.ledger.members()
        (reply,) = table.courier.ask(TRAIN, {"alder": task}, members, timeout_s=60, arrays={"weights": weights})
    assert reply.failure == RefusalCode.CODE_NOT_DECIDED
