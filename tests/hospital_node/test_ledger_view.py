"""The node trains on what its copy of the ledger says was decided, and stops when the log contradicts itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from data_schemas.canonical import bytes_hash, canonical_bytes, content_hash
from data_schemas.governance import (
    CreditPolicy,
    DecisionEntry,
    FoundingEntry,
    Pause,
    PrivacyPolicy,
    Proposal,
    ProposalEntry,
    Vote,
    VoteEntry,
)
from data_schemas.ledger import MemberEntry, ModelEntry, PlanEntry, RoundEntry
from data_schemas.messages import (
    Cosigned,
    CosignTask,
    PrivacySpend,
    Refusal,
    RefusalCode,
    Scored,
    ScoreTask,
    SignedUpdate,
    TrainTask,
    UpdateManifest,
    WitnessState,
)
from data_schemas.plan import RELATION, TrainingPlan
from hospital_node import ledger_copy, ledger_view, local_round, scoring, witness
from hospital_node.folder import NodeFolder
from hospital_node.published_model import PublishedModels
from pipeline import checkpoint, merkle
from pipeline.charter import run_name
from pipeline.checkpoint import Checkpoint
from pipeline.robust import stepped
from pipeline.signing import PrivateKey
from tests.hospital_node.small_node import FEDERATION, NOW, base_weights, fill, make_node, plan, train_task

AGGREGATOR = PrivateKey.from_seed(b"a" * 32)
SOUTH = PrivateKey.from_seed(b"o" * 32)
AT = "2026-01-01T00:00:00+00:00"
PLAN = plan()
BASE = base_weights(PLAN)
RUN = run_name(FEDERATION, PLAN, bytes_hash(BASE.tobytes()))


class Log:
    """An aggregator's log in memory."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []

    def add(self, entry: Any) -> None:
        """Sign and append an entry."""
        content = {"index": len(self.lines), "recorded_at": AT, "entry": entry.model_dump(mode="json")}
        self.lines.append(canonical_bytes({**content, "signature": AGGREGATOR.sign(content)}))

    def task(self, old_size: int) -> CosignTask:
        """Ask for a cosignature of everything, showing the entries from old_size on."""
        tree = merkle.Tree(merkle.leaf_hash(line) for line in self.lines)
        note = checkpoint.sign(Checkpoint("ledger/one", tree.size, tree.root().hex()), AGGREGATOR)
        entries = tuple(line.decode() for line in self.lines[old_size:])
        return CosignTask(federation=FEDERATION, checkpoint=note, old_size=old_size, entries=entries)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = make_node(tmp_path / "north", aggregator_public_key=AGGREGATOR.public.hex)
    fill(made, 12)
    return made


def member(path: Path) -> MemberEntry:
    with NodeFolder.open(path) as node:
        key = node.key.public.hex
    return MemberEntry(node="north", public_key=key, declared_training_patients=10, declared_heldout_patients=4)


def founding(**changes: Any) -> FoundingEntry:
    privacy = PrivacyPolicy(max_epsilon_training=8, max_epsilon_heldout=8, min_patients=2).model_copy(update=changes)
    credit = CreditPolicy(max_pot_micro_credits_per_round=1000)
    return FoundingEntry(federation=FEDERATION, privacy=privacy, credit=credit)


def log_of(*entries: Any) -> Log:
    log = Log()
    for entry in entries:
        log.add(entry)
    return log


def show(path: Path, task: CosignTask) -> Cosigned | WitnessState | Refusal:
    with NodeFolder.open(path) as node:
        return witness.cosign(node, task, 1_800_000_000)


def trained(path: Path, task: TrainTask | None = None) -> RefusalCode | None:
    """Train and return the code of a refusal, if there is one."""
    with NodeFolder.open(path) as node:
        outcome = local_round.train(node, task or train_task(PLAN, BASE, run=RUN), BASE, NOW)
    return outcome.code if isinstance(outcome, Refusal) else None


def test_a_decided_round_is_trained(path: Path) -> None:
    """Founded, a member, the plan logged, the run's own first model: the node trains."""
    log = log_of(founding(), member(path), PlanEntry(run=RUN, plan_hash=content_hash(PLAN)))
    assert isinstance(show(path, log.task(0)), Cosigned)

    assert trained(path) is None


def test_what_was_not_decided_is_refused(path: Path) -> None:
    """Each missing decision has its code."""
    plan_entry = PlanEntry(run=RUN, plan_hash=content_hash(PLAN))
    assert trained(path) is RefusalCode.NOT_FOUNDED
    log = log_of(founding())
    show(path, log.task(0))
    assert trained(path) is RefusalCode.NOT_A_MEMBER
    log.add(member(path))
    assert isinstance(show(path, log.task(1)), Cosigned)
    assert trained(path) is RefusalCode.PLAN_NOT_DECIDED
    log.add(plan_entry)
    show(path, log.task(2))
    assert trained(path, train_task(PLAN, BASE, run=RUN, round=2)) is RefusalCode.MODEL_NOT_DECIDED
    other = train_task(plan(rounds=3), BASE, run=RUN)
    assert trained(path, other) is RefusalCode.PLAN_NOT_DECIDED


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"max_epsilon_training": 7.0}, RefusalCode.PLAN_OUTSIDE_POLICY),
        ({"max_epsilon_heldout": 7.0}, RefusalCode.PLAN_OUTSIDE_POLICY),
        ({"min_patients": 11}, RefusalCode.TOO_FEW_PATIENTS),
    ],
)
def test_a_plan_beyond_the_policy_is_refused(path: Path, changes: dict[str, Any], code: RefusalCode) -> None:
    """The aggregator may log a plan, but only within what the members decided."""
    show(path, log_of(founding(**changes), member(path), PlanEntry(run=RUN, plan_hash=content_hash(PLAN))).task(0))

    assert trained(path) is code


def vote_to_pause(path: Path, log: Log) -> None:
    """Enter a decided proposal to pause, by the node's own vote."""
    with NodeFolder.open(path) as node:
        members = ledger_view.charter_of(tuple(log.lines), AGGREGATOR.public.hex).member_set
        proposal = Proposal(
            federation=FEDERATION,
            action=Pause(paused=True),
            proposed_by="north",
            member_set=members,
            expires_at="2026-02-01T00:00:00+00:00",
        )
        name = content_hash(proposal)
        vote = Vote(federation=FEDERATION, proposal_hash=name, node="north", member_set=members, approve=True)
        log.add(ProposalEntry(proposal=proposal, signature=node.key.sign(proposal)))
        log.add(VoteEntry(vote=vote, signature=node.key.sign(vote)))
    log.add(DecisionEntry(proposal_hash=name, accepted=True))


def test_a_vote_to_pause_stops_training(path: Path) -> None:
    """After the members' decision the node refuses, whatever the aggregator asks."""
    log = log_of(founding(), member(path), PlanEntry(run=RUN, plan_hash=content_hash(PLAN)))
    vote_to_pause(path, log)
    assert isinstance(show(path, log.task(0)), Cosigned)

    assert trained(path) is RefusalCode.FEDERATION_PAUSED


def test_a_log_that_breaks_the_rules_or_forks_is_not_taken(path: Path) -> None:
    """An outcome without votes, another history, a gap: refused, and the copy stays as it was."""
    log = log_of(founding(), member(path))
    show(path, log.task(0))
    assert show(path, log.task(0)) == WitnessState(size=2)
    fork = log_of(founding(min_patients=1), member(path), PlanEntry(run=RUN, plan_hash="0" * 64))
    assert show(path, fork.task(2)) == Refusal(code=RefusalCode.LEDGER_FORK)
    log.add(DecisionEntry(proposal_hash="1" * 64, accepted=True))
    assert show(path, log.task(2)) == Refusal(code=RefusalCode.LEDGER_BREAKS_RULES)
    with NodeFolder.open(path) as node:
        assert len(ledger_view.payloads(node)) == 2


def test_a_torn_line_is_fetched_again(path: Path) -> None:
    """A crash in the middle of a write costs a repetition, nothing else."""
    log = log_of(founding(), member(path))
    show(path, log.task(0))
    copy = path / ledger_copy.COPY
    copy.write_bytes(copy.read_bytes()[:-20])

    assert show(path, log.task(2)) == WitnessState(size=1)
    assert isinstance(show(path, log.task(1)), Cosigned)
    with NodeFolder.open(path) as node:
        assert ledger_view.payloads(node) == tuple(log.lines)


def closed_round(update: npt.NDArray[np.float32], new: str, run: str = RUN, **changes: Any) -> RoundEntry:
    """One round in which only south's update was admitted."""
    task_plan = changes.pop("plan", PLAN)
    values = {"round": 1, "base_model_hash": hash_of(BASE), "plan_hash": content_hash(task_plan), **changes}
    manifest = UpdateManifest(
        federation=FEDERATION,
        run=run,
        round=values["round"],
        node="south",
        plan_hash=values["plan_hash"],
        base_model_hash=values["base_model_hash"],
        update_hash=hash_of(update),
        declared_patients=10,
        spend=PrivacySpend(unit="patient", event=PLAN.round_event, epsilon_after=1, delta=1e-5),
        budget_head="0" * 64,
    )
    signed = SignedUpdate(manifest=manifest, signature=SOUTH.sign(manifest))
    return RoundEntry(run=run, new_model_hash=new, admitted=(signed,), rejected=(), **values)


def south(path: Path) -> MemberEntry:
    return member(path).model_copy(update={"node": "south", "public_key": SOUTH.public.hex})


def task_of(closed: RoundEntry, task_plan: TrainingPlan = PLAN, base_velocity: str | None = None) -> ScoreTask:
    return ScoreTask(
        federation=FEDERATION,
        run=closed.run,
        round=closed.round,
        epoch=1,
        plan=task_plan,
        nodes=("south",),
        shares=(1.0,),
        update_hashes=(closed.admitted[0].manifest.update_hash,),
        base_model_hash=closed.base_model_hash,
        new_model_hash=closed.new_model_hash,
        base_velocity_hash=base_velocity,
    )


def hash_of(vector: npt.NDArray[np.float32]) -> str:
    return bytes_hash(vector.tobytes())


@pytest.mark.parametrize("false", ["", "model", "velocity", "shown velocity"])
def test_a_round_under_momentum_is_added_up_from_the_logged_velocity(path: Path, false: str) -> None:
    """The second round's model follows from the velocity that the first round logged, and from no other."""
    task_plan = plan(server__momentum=0.5)
    run, update = run_name(FEDERATION, task_plan, hash_of(BASE)), np.full_like(BASE, 0.01)
    mean, changes = update.astype(np.float64), {"plan": task_plan, "run": run}
    base, velocity = stepped(BASE, np.zeros_like(BASE), mean, task_plan.server)
    shown = velocity + 1 if false == "shown velocity" else velocity  # one that leads to the false model in the log
    new = [hash_of(vector) for vector in stepped(base, shown, mean, task_plan.server)]
    logged = {"base_model_hash": hash_of(base), "velocity_hash": "e" * 64 if false == "velocity" else new[1]}
    rounds = [
        closed_round(update, hash_of(base), velocity_hash=hash_of(velocity), **changes),
        closed_round(update, "e" * 64 if false == "model" else new[0], round=2, **logged, **changes),
    ]
    log = log_of(founding(), member(path), south(path), PlanEntry(run=run, plan_hash=content_hash(task_plan)), *rounds)
    assert isinstance(show(path, log.task(0)), Cosigned)
    with NodeFolder.open(path) as node:
        answer = scoring.score(node, task_of(rounds[1], task_plan, hash_of(shown)), base, update[None], shown)
        raised = ledger_view.alarm(node)

    assert isinstance(answer, Scored) is (not false)
    assert (raised is not None) is (false in ("model", "velocity"))


@pytest.mark.parametrize("honest", [True, False])
def test_a_false_sum_in_the_log_raises_the_alarm_for_good(path: Path, honest: bool) -> None:
    """The node adds up the logged updates again; a logged model that is not their sum stops it durably."""
    update = np.full_like(BASE, 0.01)
    true = (BASE.astype(np.float64) + update.astype(np.float64)).astype(np.float32)
    closed = closed_round(update, hash_of(true) if honest else "e" * 64)
    log = log_of(founding(), member(path), south(path), PlanEntry(run=RUN, plan_hash=content_hash(PLAN)), closed)
    assert isinstance(show(path, log.task(0)), Cosigned)
    task = task_of(closed)
    with NodeFolder.open(path) as node:
        scoring.score(node, task, BASE, update[None])
        raised = ledger_view.alarm(node)

    assert (raised is None) is honest
    assert trained(path) is (None if honest else RefusalCode.ALARM)


def test_a_published_model_has_its_place_in_the_ledger(path: Path) -> None:
    """The endpoint names entry and leaf hash of the model that answers, once this node's copy publishes it."""
    published = PublishedModels(path)
    model = ModelEntry(
        run=RUN, round=4, model_hash="ab" * 32, unit="patient", relation=RELATION, delta=1e-5, epsilon_by_node={}
    )
    assert published.place(model.model_hash) is None
    log = Log()
    log.add(member(path))
    log.add(model)
    (path / "ledger.jsonl").write_bytes(b"".join(line + b"\n" for line in log.lines))
    place = published.place(model.model_hash)
    assert place is not None
    assert (place.entry, place.leaf_hash) == (1, merkle.leaf_hash(log.lines[1]).hex())
    assert published.place("cd" * 32) is None
    # An entry that the aggregator did not sign publishes nothing.
    forged = log.lines[1].replace(b"ab" * 32, b"cd" * 32)
    (path / "ledger.jsonl").write_bytes(log.lines[0] + b"\n" + forged + b"\n")
    assert published.place("cd" * 32) is None
