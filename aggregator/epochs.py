"""What follows a closed round: scoring at the hospitals, and credit at the end of an epoch.

Nothing here can end a run: a hospital that fails is missing from the epoch's credit, by name.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from aggregator.admission import RejectionCode, is_hash
from aggregator.aggregation import model_hash
from aggregator.courier import RELEASE, SCORE, Courier, Reply, by_name
from data_schemas.canonical import canonical_bytes
from data_schemas.frozen import Frozen
from data_schemas.ledger import CreditEntry, MemberEntry, RoundEntry
from data_schemas.messages import (
    EpochRelease,
    RefusalCode,
    ReleaseTask,
    Scored,
    ScoreTask,
    SignedRelease,
    is_contest,
)
from data_schemas.plan import TrainingPlan
from pipeline.contest import recipe_shares
from pipeline.contribution import credit, credit_by_patients, mode_of
from pipeline.signing import verify
from pipeline.terms import Terms

Members = Mapping[str, MemberEntry]
# Scoring sends every update to every hospital, so its cost grows with the square of the federation. A round of more
# updates than this is not scored, and an epoch with such a round asks for no release: nobody spends, nobody is paid.
MOST_SCORED = 64
_log = logging.getLogger("islet.aggregator")
# Failures that may be over a moment later: a hospital is asked once more, or credit would hang on who was busy when.
_PASSING = {
    RefusalCode.NODE_BUSY,
    RejectionCode.NOT_CONNECTED,
    RejectionCode.NO_REPLY,
    RejectionCode.EXPIRED,
    RejectionCode.NODE_UNAVAILABLE,
}


def epoch_of(round_number: int, plan: TrainingPlan) -> int:
    """Credit epoch (from 1) of a round (from 1)."""
    return (round_number - 1) // plan.credit.rounds_per_epoch + 1


def ends_epoch(round_number: int, plan: TrainingPlan) -> bool:
    """Whether a round is the last of its credit epoch; the run's last epoch may be short."""
    return round_number % plan.credit.rounds_per_epoch == 0 or round_number == plan.rounds


def rounds_of(epoch: int, plan: TrainingPlan) -> tuple[int, ...]:
    """List the rounds of a credit epoch."""
    length = plan.credit.rounds_per_epoch
    return tuple(range((epoch - 1) * length + 1, min(epoch * length, plan.rounds) + 1))


def too_many(admitted: Iterable[int]) -> bool:
    """Whether one of these rounds admitted more updates than are scored."""
    return max(admitted, default=0) > MOST_SCORED


def score_task(entry: RoundEntry, federation: str, plan: TrainingPlan, base_velocity: NDArray[np.float32]) -> ScoreTask:
    """Build the task that has a closed round's coalitions scored; nodes and updates in node order.

    base_velocity float32[D] is the server's before the round; nodes need it under a plan with momentum.
    """
    manifests = [signed.manifest for signed in entry.admitted]
    total = sum(manifest.declared_patients for manifest in manifests)
    return ScoreTask(
        federation=federation,
        run=entry.run,
        round=entry.round,
        epoch=epoch_of(entry.round, plan),
        plan=plan,
        nodes=tuple(manifest.node for manifest in manifests),
        shares=tuple(manifest.declared_patients / total for manifest in manifests),
        update_hashes=tuple(manifest.update_hash for manifest in manifests),
        base_model_hash=entry.base_model_hash,
        new_model_hash=entry.new_model_hash,
        base_velocity_hash=model_hash(base_velocity) if plan.server.momentum else None,
    )


def score(
    courier: Courier,
    task: ScoreTask,
    members: Members,
    arrays: Mapping[str, NDArray[np.float32]],
    timeout_s: float,
) -> tuple[str, ...]:
    """Have every hospital score a round (arrays: those of ScoreTask); returns who acknowledged.

    Nobody is asked to score more than MOST_SCORED updates.
    """
    if too_many([len(task.nodes)]):
        _log.warning("round %d: not scored, %d updates are more than %d", task.round, len(task.nodes), MOST_SCORED)
        return ()
    replies = ask_twice(courier, SCORE, task, members, timeout_s=timeout_s, arrays=arrays, group=str(task.round))
    return acknowledged(replies, task.round, task.new_model_hash)


def ask_twice(
    courier: Courier,
    kind: str,
    task: Frozen,
    members: Members,
    *,
    timeout_s: float,
    group: str,
    arrays: Mapping[str, NDArray[np.float32]] | None = None,
) -> list[Reply]:
    """Ask every member, and once more those that were busy or away; the last replies of each, by name."""
    asked, last = set(members), dict[str, list[Reply]]()
    for _ in range(2):
        tasks = dict.fromkeys(sorted(asked), task)
        replies = courier.ask(kind, tasks, members, timeout_s=timeout_s, arrays=arrays, group=group)
        last |= by_name(replies)
        asked = {name for name in asked if any(reply.failure in _PASSING for reply in last[name])}
        if not asked:
            break
    return [reply for name in sorted(last) for reply in last[name]]


def acknowledged(replies: Sequence[Reply], number: int, model: str) -> tuple[str, ...]:
    """Return the hospitals that say they have scored this model of this round; the others are logged."""
    scored = {
        reply.node
        for reply in replies
        if isinstance(reply.body, Scored) and (reply.body.round, reply.body.new_model_hash) == (number, model)
    }
    report("scored", number, replies, scored)
    return tuple(sorted(scored))


def release_code(signed: SignedRelease, task: ReleaseTask, asked: str, member: MemberEntry) -> str | None:
    """Why a release cannot be used, or None: signature, identity, order of nodes, declared number, cost, sizes."""
    release = signed.release
    if not verify(member.public_key, canonical_bytes(release), signed.signature):
        return "bad-signature"
    promised = (task.federation, task.run, task.epoch, asked, task.nodes, member.declared_heldout_patients)
    if promised != (
        release.federation,
        release.run,
        release.epoch,
        release.node,
        release.nodes,
        release.declared_heldout_patients,
    ) or not is_hash(release.budget_head):
        return "wrong-release"
    return _abstention_code(release) if release.abstained else _values_code(release, task)


def _abstention_code(release: EpochRelease) -> str | None:
    silent = not release.shapley_mg_dl and release.spend is None and release.noise_std_mg_dl >= 0
    return None if silent else "wrong-abstention"


def _values_code(release: EpochRelease, task: ReleaseTask) -> str | None:
    """Check cost, noise, size: nobody may claim less noise than the plan adds, or a score no patients can produce."""
    spend, plan, declared = release.spend, task.plan.credit, release.declared_heldout_patients
    if spend is None or spend.unit != "patient" or spend.delta != task.plan.privacy.delta:
        return "wrong-spend"
    noise_std = plan.noise_multiplier * plan.clip_mg_dl / declared if declared else 0.0
    if spend.event != task.plan.release_event or not declared:
        return "wrong-event"
    if not math.isclose(release.noise_std_mg_dl, noise_std, rel_tol=1e-9):
        return "wrong-noise"
    if len(release.shapley_mg_dl) != len(task.nodes):
        return "wrong-shape"
    # A mean of clipped vectors is at most the clip times actual over declared patients; ten of each is generous.
    limit = 10 * (plan.clip_mg_dl + noise_std)
    return None if all(abs(value) <= limit for value in release.shapley_mg_dl) else "out-of-range"


def collect_credit(
    courier: Courier,
    task: ReleaseTask,
    members: Members,
    timeout_s: float,
    *,
    admitted: Iterable[int],
    terms: Iterable[Terms],
) -> CreditEntry:
    """Collect the epoch's releases and turn them into credit; without usable releases nothing is paid for data.

    admitted: how many updates each of the epoch's rounds admitted; terms: what held when each closed.
    """
    counts = tuple(admitted)
    asked = {} if too_many(counts) else members
    replies = ask_twice(courier, RELEASE, task, asked, timeout_s=timeout_s, group=f"epoch {task.epoch}")
    usable = _usable(replies, task, members)
    report("released", task.epoch, replies, usable.keys())
    rounds = rounds_of(task.epoch, task.plan)
    pot = task.plan.credit.pot_micro_credits_per_round * len(rounds)
    algorithm = recipe_shares(terms, task.plan.credit.pot_micro_credits_per_round)
    for_data = pot - sum(share.micro_credits for share in algorithm)
    releases = tuple(usable[name] for name in sorted(usable))
    declared = {name: member.declared_training_patients for name, member in members.items()}
    nodes = [name for name in task.nodes if not is_contest(name)]
    lines, unpaid = credit([signed.release for signed in releases], nodes, for_data, declared)
    return CreditEntry(
        run=task.run,
        epoch=task.epoch,
        rounds=rounds,
        mode=mode_of(counts),
        pot_micro_credits=pot,
        unpaid_micro_credits=unpaid,
        lines=lines,
        releases=releases,
        algorithm=algorithm,
    )


def credit_of_sums(task: ReleaseTask, closed: Sequence[RoundEntry], terms: Iterable[Terms]) -> CreditEntry:
    """Return the credit of an epoch whose updates nobody saw one by one: by declared patients; no hospital is asked."""
    rounds = rounds_of(task.epoch, task.plan)
    pot = task.plan.credit.pot_micro_credits_per_round * len(rounds)
    algorithm = recipe_shares(terms, task.plan.credit.pot_micro_credits_per_round)
    lines, unpaid = credit_by_patients(
        [entry.patients() for entry in closed], pot - sum(share.micro_credits for share in algorithm)
    )
    return CreditEntry(
        run=task.run,
        epoch=task.epoch,
        rounds=rounds,
        mode="declared-patients",
        pot_micro_credits=pot,
        unpaid_micro_credits=unpaid,
        lines=lines,
        releases=(),
        algorithm=algorithm,
    )


def _usable(replies: Sequence[Reply], task: ReleaseTask, members: Members) -> dict[str, SignedRelease]:
    found: dict[str, SignedRelease] = {}
    for reply in replies:
        if isinstance(reply.body, SignedRelease) and reply.node not in found:
            code = release_code(reply.body, task, reply.node, members[reply.node])
            if code is None:
                found[reply.node] = reply.body
            else:
                _log.warning("epoch %d: release of %s not used: %s", task.epoch, reply.node, code)
    return found


def report(verb: str, number: int, replies: Sequence[Reply], done: Collection[str]) -> None:
    """Log who did not do what was asked, and why."""
    for reply in replies:
        if reply.node not in done:
            _log.info("%s: %d not %s: %s", reply.node, number, verb, reply.failure or "unusable reply")
