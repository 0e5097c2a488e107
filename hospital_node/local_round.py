"""One training round at the hospital: check, reserve the budget, train privately, sign, commit, and only then answer.

Readings -> windows -> clipped and noised update -> SignedUpdate. Everything that can fail without touching the privacy
budget (the plan, the deadline, the store) is looked at before the reservation.
"""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from data_schemas.canonical import bytes_hash, canonical_bytes, content_hash
from data_schemas.messages import (
    PrivacySpend,
    Refusal,
    RefusalCode,
    ReleaseTask,
    SignedUpdate,
    TrainTask,
    UpdateManifest,
)
from hospital_node import ledger_view, replies
from hospital_node.budget import BudgetBook, BudgetExhausted, Cohort, Reservation, book_key
from hospital_node.ceilings import Declined, check_training, require
from hospital_node.cohorts import training_windows
from hospital_node.folder import NodeFolder
from hospital_node.randomness import noise_kind, noise_source
from pipeline import edwards, masking, pedersen
from pipeline.commitments import commitment_hash
from pipeline.signing import write_durably

if TYPE_CHECKING:
    from pipeline.windows import Windows

Vector = NDArray[np.float32]
# A round may take this many times as long as the last one did before it counts as late.
_SLACK = 1.5


def train(node: NodeFolder, task: TrainTask, weights: Vector, now_unix: float) -> tuple[SignedUpdate, Vector] | Refusal:
    """Train one round from base weights float32[D]; the update is a difference float32[D].

    A task that was answered before gets the stored answer, bit for bit: no second release, no second cost. Raises what
    the store, the keys and the budget book raise; the caller turns that into a code.
    """
    try:
        return trained(node, task, weights, now_unix)
    except Declined as declined:
        return Refusal(code=declined.code)
    except BudgetExhausted:
        return Refusal(code=RefusalCode.BUDGET_EXHAUSTED)


def expected_seconds(node: NodeFolder) -> float:
    """How long the next round will take: as long as the last one; 0 where nothing is known yet."""
    try:
        return float(json.loads(node.last_round_json.read_bytes())["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0


def utc_text(unix: float) -> str:
    """Time in seconds since 1970 as ISO 8601, UTC, to the second."""
    return datetime.fromtimestamp(unix, UTC).isoformat(timespec="seconds")


def check(node: NodeFolder, book: BudgetBook, task: TrainTask, *, secure: bool) -> tuple[SignedUpdate, Vector] | None:
    """Return the stored answer of a task, or None when this node may train it; Declined for all others.

    secure: the answer is for secure aggregation. One that was made for it is never handed out in plain.
    """
    require(task.federation == node.settings.federation, RefusalCode.UNKNOWN_FEDERATION)
    if (stored := book.stored_reply(task.task_id)) is not None:
        answer = replies.unpack(SignedUpdate, stored)
        require(secure == (answer[0].manifest.commitment is not None), RefusalCode.OTHER_AGGREGATION)
        return answer
    ledger_view.check_training(node, task, secure=secure)
    check_training(node.settings, book, task.plan, task.run, task.round)
    return None


def trained(
    node: NodeFolder, task: TrainTask, weights: Vector, now_unix: float, *, secure: bool = False
) -> tuple[SignedUpdate, Vector]:
    """Do what `train` does, for plain or secure aggregation. Raises Declined and BudgetExhausted."""
    started = time.monotonic()
    require(task.federation == node.settings.federation, RefusalCode.UNKNOWN_FEDERATION)
    require(_is_base(task, weights), RefusalCode.MODEL_MISMATCH)
    book = node.budget()
    if (answer := check(node, book, task, secure=secure)) is not None:
        return answer
    windows = training_windows(node, task.plan.model.history_minutes)
    _check_deadline(node, now_unix + time.monotonic() - started, task.deadline_unix)
    reservation = reserve(node, book, task, "training", now_unix)
    begun = time.monotonic()
    update = _update(node, task, weights, windows)
    _remember_duration(node, time.monotonic() - begun)
    signed = _sign(node, task, update, reservation, _commitment(node, task, update) if secure else None)
    return replies.unpack(SignedUpdate, book.commit(task.task_id, replies.pack(signed, update)))


def _is_base(task: TrainTask, weights: Vector) -> bool:
    from pipeline.forecaster import ForecasterSpec, weight_count

    return (
        weights.dtype == np.float32
        and weights.shape == (weight_count(ForecasterSpec(hidden_size=task.plan.model.hidden_size)),)
        and bool(np.isfinite(weights).all())
        and bytes_hash(np.ascontiguousarray(weights).tobytes()) == task.base_model_hash
    )


def _check_deadline(node: NodeFolder, now_unix: float, deadline_unix: float) -> None:
    """Decline a round that would not be done in time; halve the estimate each time: one slow round locks nobody out."""
    seconds = expected_seconds(node)
    if now_unix + _SLACK * seconds < deadline_unix:
        return
    if now_unix < deadline_unix:
        _remember_duration(node, seconds / 2)
    raise Declined(RefusalCode.DEADLINE_TOO_CLOSE)


def reserve(
    node: NodeFolder, book: BudgetBook, task: TrainTask | ReleaseTask, cohort: Cohort, now_unix: float
) -> Reservation:
    """Reserve what a task that was not answered yet costs its cohort, under the node's own ceiling."""
    training = cohort == "training"
    reserved = book.reserve(
        task.task_id,
        cohort,
        task.plan.privacy.unit,
        task.plan.round_event if training else task.plan.release_event,
        asked_by=task.federation,
        run=task.run,
        at=utc_text(now_unix),
        ceiling_epsilon=node.settings.max_epsilon_training if training else node.settings.max_epsilon_heldout,
        noise=noise_kind(node.settings, task.plan),
        delta=task.plan.privacy.delta,
    )
    if isinstance(reserved, bytes):
        raise TypeError("a committed task is answered before it is reserved")
    return reserved


def _update(node: NodeFolder, task: TrainTask, weights: Vector, windows: Windows) -> Vector:
    import torch

    from pipeline.forecaster import ForecasterSpec
    from pipeline.private_training import LocalPlan, train_steps

    torch.set_num_threads(1)  # nodes may share a machine: more threads than cores slow everybody down
    plan = LocalPlan.of(task.plan, task.plan.privacy.noise_multiplier)
    spec = ForecasterSpec(hidden_size=task.plan.model.hidden_size)
    source = noise_source(node.settings, task.plan, task.run, f"round {task.round} from {task.base_model_hash}")
    result = train_steps(weights, spec, windows, plan, node.settings.declared_training_patients, source)
    return np.ascontiguousarray(result.delta, dtype=np.float32)


def _remember_duration(node: NodeFolder, seconds: float) -> None:
    write_durably(node.last_round_json, canonical_bytes({"seconds": round(seconds, 3)}) + b"\n", mode=0o600)


def blinder(node: NodeFolder, task: TrainTask) -> int:
    """Blinder of the commitment to a task's update: it follows from the budget book's secret and is kept nowhere."""
    return masking.scalar(book_key(node.book_identity), f"blinder {task.task_id}")


def _commitment(node: NodeFolder, task: TrainTask, update: Vector) -> str:
    whole = masking.quantised(update, node.settings.declared_training_patients)
    return edwards.encode(pedersen.commit(whole, blinder(node, task)))


def _sign(
    node: NodeFolder, task: TrainTask, update: Vector, reservation: Reservation, commitment: str | None
) -> SignedUpdate:
    manifest = UpdateManifest(
        federation=task.federation,
        run=task.run,
        round=task.round,
        node=node.settings.name,
        plan_hash=content_hash(task.plan),
        base_model_hash=task.base_model_hash,
        update_hash=bytes_hash(update.tobytes()) if commitment is None else commitment_hash(commitment),
        declared_patients=node.settings.declared_training_patients,
        spend=spend_of(reservation),
        budget_head=reservation.head,
        commitment=commitment,
    )
    return SignedUpdate(manifest=manifest, signature=node.key.sign(manifest))


def spend_of(reservation: Reservation) -> PrivacySpend:
    """Tell the federation what a reservation cost."""
    return PrivacySpend(
        unit=reservation.unit,
        event=reservation.event,
        epsilon_after=reservation.epsilon_after,
        delta=reservation.delta,
    )
