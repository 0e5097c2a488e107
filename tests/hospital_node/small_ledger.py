"""A federation of three around the node `north`: a ledger with rounds and credit that obeys every rule."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_schemas.canonical import bytes_hash, content_hash
from data_schemas.governance import CreditPolicy, DecisionEntry, Promote, Proposal, ProposalEntry, Vote, VoteEntry
from data_schemas.ledger import CreditEntry, LedgerEntry, MemberEntry, ModelEntry, PlanEntry, RoundEntry
from data_schemas.messages import (
    EpochRelease,
    PrivacySpend,
    SignedRelease,
    SignedUpdate,
    UpdateManifest,
)
from data_schemas.plan import RELATION
from hospital_node import local_round
from hospital_node.folder import NodeFolder
from hospital_node.release import noise_std_mg_dl
from pipeline.charter import Charter, run_name
from pipeline.contribution import credit
from pipeline.signing import PrivateKey
from tests.hospital_node.small_node import FEDERATION, NOW, base_weights, plan, train_task
from tests.hospital_node.test_ledger_view import Log, founding, log_of, member, show

OTHERS = {"east": PrivateKey.from_seed(b"e" * 32), "south": PrivateKey.from_seed(b"s" * 32)}
NAMES = ("east", "north", "south")
POT = 1_000_000
PLAN = plan(credit__pot_micro_credits_per_round=POT)
BASE = base_weights(PLAN)
RUN, PLAN_HASH = run_name(FEDERATION, PLAN, bytes_hash(BASE.tobytes())), content_hash(PLAN)


def live(home: Path, model_hash: str) -> Log:
    """Train, log and credit two epochs of two rounds with the node, and let it cosign everything.

    model_hash: of the model that the run publishes.
    """
    policy = founding().model_copy(update={"credit": CreditPolicy(max_pot_micro_credits_per_round=POT)})
    log = log_of(policy, *members(home), PlanEntry(run=RUN, plan_hash=PLAN_HASH))
    show(home, log.task(0))
    draw, base = np.random.default_rng(3), BASE
    for number in range(1, PLAN.rounds + 1):
        held = len(log.lines)
        with NodeFolder.open(home) as node:
            task = train_task(PLAN, base, run=RUN, round=number)
            signed, _ = local_round.train(node, task, base, NOW)  # type: ignore[misc]
        grown = (base + draw.normal(0, 0.01, base.shape)).astype(np.float32)
        updates = [signed, *(update(name, number, base) for name in OTHERS)]
        log.add(round_entry(number, base, grown, sorted(updates, key=lambda u: u.manifest.node)))
        if number % PLAN.credit.rounds_per_epoch == 0:
            log.add(credit_entry(home, number // PLAN.credit.rounds_per_epoch, draw))
        show(home, log.task(held))
        base = grown
    log.add(
        ModelEntry(
            run=RUN,
            round=PLAN.rounds,
            model_hash=model_hash,
            unit="patient",
            relation=RELATION,
            delta=1e-5,
            epsilon_by_node=dict.fromkeys(NAMES, 3.0),
        )
    )
    propose_champion(home, log, model_hash)
    show(home, log.task(held + 2))
    return log


def propose_champion(home: Path, log: Log, model_hash: str) -> None:
    """The members vote the published model into service."""
    with NodeFolder.open(home) as node:
        keys = {**OTHERS, "north": node.key}
    replay = Charter()
    for line in log.lines:
        replay.take(LedgerEntry.model_validate_json(line))
    proposal = Proposal(
        federation=FEDERATION,
        action=Promote(model_hash=model_hash),
        proposed_by="north",
        member_set=replay.member_set,
        expires_at="2030-01-01T00:00:00+00:00",
    )
    log.add(ProposalEntry(proposal=proposal, signature=keys["north"].sign(proposal)))
    for name in ("east", "south"):
        vote = Vote(
            federation=FEDERATION,
            proposal_hash=content_hash(proposal),
            node=name,
            member_set=replay.member_set,
            approve=True,
        )
        log.add(VoteEntry(vote=vote, signature=keys[name].sign(vote)))
    log.add(DecisionEntry(proposal_hash=content_hash(proposal), accepted=True))


def members(home: Path) -> list[MemberEntry]:
    """The node and two more."""
    own = member(home)
    return [own, *(own.model_copy(update={"node": n, "public_key": key.public.hex}) for n, key in OTHERS.items())]


def update(name: str, number: int, base: np.ndarray) -> SignedUpdate:
    """A signed update of another member; only its hash is logged."""
    manifest = UpdateManifest(
        federation=FEDERATION,
        run=RUN,
        round=number,
        node=name,
        plan_hash=PLAN_HASH,
        base_model_hash=bytes_hash(base.tobytes()),
        update_hash=bytes_hash(f"{name} {number}".encode()),
        declared_patients=10,
        spend=PrivacySpend(unit="patient", event=PLAN.round_event, epsilon_after=float(number), delta=1e-5),
        budget_head="0" * 64,
    )
    return SignedUpdate(manifest=manifest, signature=OTHERS[name].sign(manifest))


def round_entry(number: int, base: np.ndarray, grown: np.ndarray, admitted: list[SignedUpdate]) -> RoundEntry:
    """A closed round."""
    return RoundEntry(
        run=RUN,
        round=number,
        plan_hash=PLAN_HASH,
        base_model_hash=bytes_hash(base.tobytes()),
        new_model_hash=bytes_hash(grown.tobytes()),
        admitted=tuple(admitted),
        rejected=(),
    )


def credit_entry(home: Path, epoch: int, draw: np.random.Generator) -> CreditEntry:
    """Credit of an epoch, from releases that all three signed."""
    with NodeFolder.open(home) as node:
        keys = {**OTHERS, "north": node.key}
    releases = [release(name, epoch, keys[name], draw.normal(0.4, 0.1, len(NAMES))) for name in NAMES]
    rounds = tuple(range((epoch - 1) * 2 + 1, epoch * 2 + 1))
    pot = PLAN.credit.pot_micro_credits_per_round * len(rounds)
    lines, unpaid = credit([r.release for r in releases], NAMES, pot, dict.fromkeys(NAMES, 10))
    return CreditEntry(
        run=RUN,
        epoch=epoch,
        rounds=rounds,
        mode="exact-shapley-weighted-median",
        pot_micro_credits=pot,
        unpaid_micro_credits=unpaid,
        lines=lines,
        releases=tuple(releases),
    )


def release(name: str, epoch: int, key: PrivateKey, values: np.ndarray) -> SignedRelease:
    """A signed release."""
    body = EpochRelease(
        federation=FEDERATION,
        run=RUN,
        epoch=epoch,
        node=name,
        nodes=NAMES,
        shapley_mg_dl=tuple(float(v) for v in values),
        noise_std_mg_dl=noise_std_mg_dl(PLAN.credit, 4),
        declared_heldout_patients=4,
        abstained=False,
        spend=PrivacySpend(unit="patient", event=PLAN.release_event, epsilon_after=float(epoch), delta=1e-5),
        budget_head="0" * 64,
    )
    return SignedRelease(release=body, signature=key.sign(body))
