"""A closed round under secure aggregation, checked at the hospital: commitments, their sum, and the model it makes.

Whoever sent less, more or something else than was committed, and an aggregator that adds up wrongly or logs another
model, does not get past this. Only the signed log can raise the alarm, never a message alone.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data_schemas.canonical import bytes_hash, content_hash
from data_schemas.messages import RefusalCode
from data_schemas.secure import Checked, CheckTask
from hospital_node import ledger_view
from hospital_node.ceilings import Declined, require
from hospital_node.folder import NodeFolder
from hospital_node.ledger_copy import round_entry
from pipeline.commitments import adds_up, total_hash
from pipeline.masking import mean_of
from pipeline.robust import stepped

Vector = NDArray[np.float32]


def check(
    node: NodeFolder, task: CheckTask, base: Vector, total: NDArray[np.int64], velocity: Vector | None
) -> Checked:
    """Check base float32[D], total int64[D] and, under momentum, velocity float32[D] against log and commitments.

    Raises Declined for arrays that are not the logged ones and, after the alarm, for a log that is wrong about itself.
    """
    require(task.federation == node.settings.federation, RefusalCode.UNKNOWN_FEDERATION)
    charter = ledger_view.decided(node)
    require((task.run, task.round) in charter.rounds, RefusalCode.MODEL_MISMATCH)
    closed, before = round_entry(node, task.run, task.round), charter.rounds.get((task.run, task.round - 1))
    if closed.sum is None:
        raise Declined(RefusalCode.MODEL_MISMATCH)
    server, still = task.plan.server, np.zeros_like(base)
    moved = still if velocity is None else velocity
    logged = (closed.plan_hash, closed.base_model_hash, closed.sum.total_hash, closed.sum, closed.new_model_hash)
    shown = (content_hash(task.plan), _hash(base), total_hash(total), task.sum, task.new_model_hash)
    require(logged == shown and base.shape == total.shape == moved.shape, RefusalCode.MODEL_MISMATCH)
    begun = None if before is None else before.velocity_hash
    require(not server.momentum or _hash(moved) == (begun or _hash(still)), RefusalCode.MODEL_MISMATCH)
    mean = mean_of(total, sum(closed.patients().values()))
    weights, after = stepped(base, moved, mean, server)
    if not adds_up(closed.admitted, total, closed.sum):
        ledger_view.raise_alarm(node, closed, "its sum is not what the hospitals committed to")
        raise Declined(RefusalCode.ALARM)
    kept = _hash(after) if server.momentum else None
    if (_hash(weights), kept) != (closed.new_model_hash, closed.velocity_hash):
        ledger_view.raise_alarm(node, closed, f"its model is not the step by its sum, which is {_hash(weights)}")
        raise Declined(RefusalCode.ALARM)
    return Checked(round=task.round, new_model_hash=closed.new_model_hash)


def _hash(vector: Vector) -> str:
    return bytes_hash(np.ascontiguousarray(vector, dtype="<f4").tobytes())
