"""Credit at home: every coalition of a round is scored on this node's held-out patients; the scores stay at the node.

Coalition models are built from updates that are already private, so they cost training patients nothing. What a
held-out patient's readings say about them is summed over a credit epoch and released once, clipped and noised
(hospital_node.release). Per-round Shapley values (FedSV, Wang et al. 2020) are linear in the utility, so they may
be summed first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from data_schemas.canonical import bytes_hash, content_hash
from data_schemas.messages import Refusal, RefusalCode, Scored, ScoreTask, SignedUpdate, TrainTask
from data_schemas.units import HORIZON_MINUTES, SENSOR_MAX_MG_DL, SENSOR_MIN_MG_DL
from hospital_node import ledger_view, replies, scores
from hospital_node.cohorts import held_out_windows
from hospital_node.folder import NodeFolder
from pipeline.robust import mean_of, norm_factors, stepped
from pipeline.shapley import MAX_NODES, game_of

if TYPE_CHECKING:
    from pipeline.forecaster import ForecasterSpec
    from pipeline.windows import Windows

Vector = NDArray[np.float32]
_SCORED_MINUTES = (30, 60)
_COLUMNS = [HORIZON_MINUTES.index(minutes) for minutes in _SCORED_MINUTES]
# Coalition models held in memory at once.
_AT_A_TIME = 64


@dataclass(frozen=True)
class HeldOut:
    """Windows of the held-out patients: x float32[W,T,F], last float32[W], target and mask [W,2] at 30 and 60 minutes.

    owner: int64[W], position of each window's patient in `patients`.
    """

    patients: tuple[str, ...]
    owner: NDArray[np.int64]
    x: Vector
    last: Vector
    target: Vector
    mask: NDArray[np.bool_]


def score(
    node: NodeFolder, task: ScoreTask, base: Vector, updates: Vector, velocity: Vector | None = None
) -> Scored | Refusal:
    """Score a round's coalitions on this node's held-out patients and keep the result at home.

    base [D], updates [n, D], and under a plan with momentum the server's velocity [D] before the round.
    Idempotent: the same task again changes nothing, another task for the same round replaces its scores.
    Only an acknowledgement leaves, the same whatever the readings say.
    """
    if task.federation != node.settings.federation:
        return Refusal(code=RefusalCode.UNKNOWN_FEDERATION)
    if not _well_formed(task, base, updates, velocity):
        return Refusal(code=RefusalCode.MALFORMED_TASK)
    if not _as_signed(node, task, base, updates, velocity):
        return Refusal(code=RefusalCode.MODEL_MISMATCH)
    place, task_hash = scores.Place(task.run, task.epoch, task.round), content_hash(task)
    if not scores.is_scored(node.scores_db, place, task_hash):
        held_out = load_held_out(node, task.plan.model.history_minutes, task.plan.credit.windows_per_patient)
        by_patient = shapley_by_patient(task, base, updates, held_out)
        scores.put(node.scores_db, place, task_hash, task.nodes, by_patient)
    return Scored(round=task.round, new_model_hash=task.new_model_hash)


def shapley_by_patient(
    task: ScoreTask, base: Vector, updates: Vector, held_out: HeldOut
) -> dict[str, NDArray[np.float64]]:
    """Shapley vector float64[n], in mg/dL, of every held-out patient; from a sample above ten nodes."""
    game = game_of(len(task.nodes), coalition_seed(task))
    factors = norm_factors(updates, task.shares, task.plan.server.rule)
    steps = weighted_steps(updates, factors * np.array(task.shares), task.plan.server.learning_rate)
    utilities = coalition_utilities(base, steps, game.coalitions, held_out, task.plan.model.hidden_size)
    return dict(zip(held_out.patients, game.values(utilities), strict=True))


def coalition_seed(task: ScoreTask) -> bytes:
    """Public seed of a round's sample of coalitions: it hangs on every admitted update, so no one node chooses it."""
    told = {"run": task.run, "round": task.round, "nodes": task.nodes, "updates": task.update_hashes}
    return bytes.fromhex(content_hash(told))


def weighted_steps(updates: Vector, shares: NDArray[np.float64], learning_rate: float) -> NDArray[np.float64]:
    """float64[n, D]: what each update adds to the model of a coalition that holds it."""
    return learning_rate * shares[:, None] * updates.astype(np.float64)


def coalition_utilities(
    base: Vector, steps: NDArray[np.float64], coalitions: NDArray[np.bool_], held_out: HeldOut, hidden_size: int
) -> NDArray[np.float64]:
    """Return utilities float64[P, m]: minus the mean of a patient's RMSE at 30 and at 60 minutes, in mg/dL.

    The model of coalition S, bool[m, n], is base[D] plus the sum of its members' steps[n, D]. Where steps move the
    heads alone, all models share the LSTM's features, and only the heads that are scored are ever made. A patient
    without a target at a horizon has 0 there for every model, which is worth nothing to anybody.
    """
    import torch

    from pipeline.forecaster import ForecasterSpec, mean_head_slice

    torch.set_num_threads(1)  # nodes may share a machine: more threads than cores slow everybody down
    spec, parts = ForecasterSpec(hidden_size=hidden_size), []
    scored = mean_head_slice(spec)
    shared = not steps[:, : scored.start].any()
    encoded = _encoded(base, held_out, spec) if shared else None
    for start in range(0, len(coalitions), _AT_A_TIME):
        chosen = coalitions[start : start + _AT_A_TIME]
        heads = (base[scored] + chosen @ steps[:, scored]).astype(np.float32)
        if encoded is not None:
            parts.append(_utility(_forecasts(heads, encoded, held_out), held_out))
            continue
        for members, head in zip(chosen, heads, strict=True):
            own = _encoded((base + members @ steps).astype(np.float32), held_out, spec)
            parts.append(_utility(_forecasts(head[None], own, held_out), held_out))
    return np.concatenate(parts, axis=1)


def model_utilities(weights: Vector, held_out: HeldOut, hidden_size: int) -> NDArray[np.float64]:
    """Return the utility float64[P] of one model float32[D]."""
    none = np.zeros((0, len(weights))), np.zeros((1, 0), dtype=np.bool_)
    return coalition_utilities(weights, *none, held_out, hidden_size)[:, 0]


def _encoded(weights: Vector, held_out: HeldOut, spec: ForecasterSpec) -> Vector:
    """Features of every window, float32[W, 2H+1]."""
    import torch

    from pipeline.forecaster import unflatten

    model = unflatten(weights, spec)
    if not len(held_out.x):
        return np.zeros((0, 2 * spec.hidden_size + 1), dtype=np.float32)
    with torch.inference_mode():
        encoded: Vector = model.encode(torch.from_numpy(held_out.x)).numpy()
    return encoded


def _forecasts(heads: Vector, encoded: Vector, held_out: HeldOut) -> Vector:
    """Forecasts float32[k, 2, W] in mg/dL of flat mean heads [k, ...] on features [W, 2H+1]."""
    from pipeline.forecaster import mean_heads

    weight, bias = mean_heads(heads)
    change = weight[:, _COLUMNS].reshape(-1, encoded.shape[1]) @ encoded.T
    change = change.reshape(len(heads), len(_COLUMNS), -1) + bias[:, _COLUMNS, None]
    return (held_out.last + change).clip(SENSOR_MIN_MG_DL, SENSOR_MAX_MG_DL)


def load_held_out(node: NodeFolder, history_minutes: int, windows_per_patient: int) -> HeldOut:
    """Up to `windows_per_patient` windows of every held-out patient, evenly spread over the record: always the same."""
    return heldout_of(held_out_windows(node, history_minutes), windows_per_patient)


def heldout_of(windows: Windows, windows_per_patient: int) -> HeldOut:
    """Pick evenly spread windows of every patient and gather them."""
    chosen = [_spread(windows.anchors[a:b], windows_per_patient) for a, b in windows.by_patient()]
    owner = np.repeat(np.arange(len(chosen)), [len(anchors) for anchors in chosen])
    batch = windows.gather(np.concatenate([*chosen, np.zeros(0, dtype=np.int64)]))
    return HeldOut(
        patients=windows.series.patients,
        owner=owner.astype(np.int64),
        x=batch.x,
        last=batch.last,
        target=batch.y[:, _COLUMNS],
        mask=batch.mask[:, _COLUMNS],
    )


def _spread(anchors: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    if len(anchors) <= count:
        return anchors
    return anchors[np.linspace(0, len(anchors) - 1, count).round().astype(np.int64)]


def _utility(forecasts: Vector, held_out: HeldOut) -> NDArray[np.float64]:
    """float64[P, k] from forecasts [k, 2, W]; a patient's windows lie together."""
    errors = (forecasts - held_out.target.T) * held_out.mask.T
    counts = np.bincount(held_out.owner, minlength=len(held_out.patients))
    filled = np.flatnonzero(counts)
    starts = np.concatenate([[0], np.cumsum(counts[filled])[:-1]]).astype(np.int64)
    utilities = np.zeros((len(counts), len(forecasts)))
    if len(filled):
        sums = np.add.reduceat(np.square(errors, dtype=np.float64), starts, axis=2)
        seen = np.add.reduceat(held_out.mask.T.astype(np.float64), starts, axis=1)
        utilities[filled] = -np.sqrt(sums / np.maximum(seen, 1)).mean(axis=1).T
    return utilities


def _well_formed(task: ScoreTask, base: Vector, updates: Vector, velocity: Vector | None) -> bool:
    from pipeline.forecaster import ForecasterSpec, weight_count

    count, dimension = len(task.nodes), weight_count(ForecasterSpec(hidden_size=task.plan.model.hidden_size))
    return (
        1 <= count <= MAX_NODES
        and len(set(task.nodes)) == count == len(task.shares) == len(task.update_hashes)
        and all(share > 0 for share in task.shares)
        and math.isclose(sum(task.shares), 1.0, abs_tol=1e-9)
        and base.dtype == updates.dtype == np.float32
        and base.shape == (dimension,)
        and updates.shape == (count, dimension)
        and bool(np.isfinite(base).all() and np.isfinite(updates).all())
        and (velocity is None) == (task.plan.server.momentum == 0)
        and (velocity is None or (velocity.shape == base.shape and bool(np.isfinite(velocity).all())))
    )


def _as_signed(node: NodeFolder, task: ScoreTask, base: Vector, updates: Vector, velocity: Vector | None) -> bool:
    """Check the hashes, this node's own update, and that the new model is the sum of the updates.

    A logged model that is not the sum of the logged updates raises the node's alarm.
    """
    hashes = [_hash(update) for update in updates]
    if _hash(base) != task.base_model_hash or hashes != list(task.update_hashes):
        return False
    if (None if velocity is None else _hash(velocity)) != task.base_velocity_hash:
        return False
    own = dict(zip(task.nodes, hashes, strict=True)).get(node.settings.name)
    if own is not None and own != _signed_hash(node, task):
        return False
    still, server = np.zeros_like(base), task.plan.server
    mean = mean_of(updates, task.shares, server.rule)
    weights, moved = stepped(base, still if velocity is None else velocity, mean, server)
    kept = (None, None) if velocity is None else (_hash(moved), _hash(still))
    true_to_log = ledger_view.holds_with_log(node, task, _hash(weights), *kept)
    return true_to_log and _hash(weights) == task.new_model_hash


def _hash(vector: Vector) -> str:
    return bytes_hash(np.ascontiguousarray(vector).tobytes())


def _signed_hash(node: NodeFolder, task: ScoreTask) -> str | None:
    """Hash of the update this node committed for the same round, plan and base."""
    asked = TrainTask(
        federation=task.federation,
        run=task.run,
        round=task.round,
        plan=task.plan,
        base_model_hash=task.base_model_hash,
        deadline_unix=0.0,
    )
    reply = node.budget().stored_reply(asked.task_id)
    return None if reply is None else replies.unpack(SignedUpdate, reply)[0].manifest.update_hash
