"""One round's updates: ask, admit, ask the missing ones again, and stop with names and reasons when too few came."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from aggregator.admission import AdmittedUpdate, Expectation, RejectionCode, admit
from aggregator.aggregation import in_node_order
from aggregator.courier import TRAIN, Courier, Reply
from aggregator.settings import AggregatorSettings
from data_schemas.errors import IsletError
from data_schemas.ledger import MemberEntry, RejectedUpdate, RoundEntry
from data_schemas.messages import SignedUpdate, TrainTask

Members = Mapping[str, MemberEntry]
# Name of the array in a TrainTask's and its reply's message.
WEIGHTS, UPDATE = "weights", "update"


@dataclass(frozen=True)
class Collected:
    """Enough updates to close a round, in node order, and what became of everybody else's."""

    admitted: tuple[AdmittedUpdate, ...]
    rejected: tuple[RejectedUpdate, ...]


def collect(
    courier: Courier,
    settings: AggregatorSettings,
    expected: Expectation,
    base: NDArray[np.float32],
    *,
    members: Members,
    closed: RoundEntry | None,
    clock: Callable[[], float],
) -> Collected:
    """Ask every member until at least min_updates are admitted; who was admitted is not asked again.

    `closed` is the ledger's entry when this round was closed before and its checkpoint was lost: then exactly its
    updates are admitted again (hospitals return stored replies), because its outcome is already on record.
    Raises IsletError, naming every missing hospital and why, after max_attempts.
    """
    wanted = None if closed is None else {signed.manifest.update_hash for signed in closed.admitted}
    needed = settings.min_updates if wanted is None else len(wanted)
    admitted: dict[str, AdmittedUpdate] = {}
    rejected: dict[str, RejectedUpdate] = {}
    for attempt in range(settings.max_attempts):
        if attempt:
            time.sleep(settings.retry_pause_s)
        courier.wait_for(members, needed)
        task = train_task(expected, clock() + settings.round_timeout_s)
        replies = courier.ask(
            TRAIN,
            {name: task for name in members if name not in admitted},
            members,
            timeout_s=settings.round_timeout_s,
            arrays={WEIGHTS: base},
            group=str(expected.round),
        )
        _sort_out(replies, expected, members=members, wanted=wanted, admitted=admitted, rejected=rejected)
        if len(admitted) >= needed:
            others = tuple(rejected[name] for name in sorted(rejected.keys() - admitted.keys()))
            return Collected(in_node_order(list(admitted.values())), others if closed is None else closed.rejected)
    raise too_few(expected.round, len(admitted), needed, rejected.keys() - admitted.keys(), rejected)


def _sort_out(
    replies: list[Reply],
    expected: Expectation,
    *,
    members: Members,
    wanted: set[str] | None,
    admitted: dict[str, AdmittedUpdate],
    rejected: dict[str, RejectedUpdate],
) -> None:
    """Judge replies in the order in which members joined: of two alike, the newer member's is the copy."""
    seniority = {name: place for place, name in enumerate(members)}
    for reply in sorted(replies, key=lambda r: seniority.get(r.node, len(seniority))):
        if reply.node in admitted:
            continue
        in_round = {update.signed.manifest.update_hash for update in admitted.values()}
        so_far = replace(
            expected,
            seen_hashes=expected.seen_hashes | in_round,
            earlier=(*expected.earlier, *(update.delta for update in admitted.values())),
        )
        outcome = _judge(reply, so_far, members)
        if (
            isinstance(outcome, AdmittedUpdate)
            and wanted is not None
            and outcome.signed.manifest.update_hash not in wanted
        ):
            update_hash = outcome.signed.manifest.update_hash
            outcome = RejectedUpdate(node=reply.node, update_hash=update_hash, code=RejectionCode.NOT_IN_LEDGER_ROUND)
        if isinstance(outcome, AdmittedUpdate):
            admitted[outcome.node] = outcome
        else:
            rejected[reply.node] = outcome


def _judge(reply: Reply, expected: Expectation, members: Members) -> AdmittedUpdate | RejectedUpdate:
    if isinstance(reply.body, SignedUpdate) and set(reply.arrays) == {UPDATE}:
        return admit(reply.body, reply.arrays[UPDATE], expected, members, reply.node)
    code = reply.failure or RejectionCode.MALFORMED_REPLY
    return RejectedUpdate(node=reply.node, update_hash=None, code=str(code))


def train_task(expected: Expectation, deadline_unix: float) -> TrainTask:
    """Build the task of a round."""
    return TrainTask(
        federation=expected.federation,
        run=expected.run,
        round=expected.round,
        plan=expected.plan,
        base_model_hash=expected.base_model_hash,
        deadline_unix=deadline_unix,
    )


def too_few(
    number: int, got: int, needed: int, missing: set[str], rejected: Mapping[str, RejectedUpdate]
) -> IsletError:
    """Say which hospitals a round lacks, and why."""
    reasons = ", ".join(f"{name}: {rejected[name].code}" for name in sorted(missing))
    return IsletError(
        f"round {number} has {got} of the {needed} updates it needs ({reasons})",
        "mend these hospitals' nodes and run the same command again: the run goes on at this round",
    )
