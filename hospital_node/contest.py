"""A challenger's model against the champion, on this node's held-out patients; the scores stay at the node.

They are kept as one more scored round of the run's last epoch: one value per held-out patient, the challenger's utility
minus the champion's (hospital_node.scoring). The epoch's release clips and noises it with the patient's other values,
so a contest spends nothing of its own. The champion is the one this node keeps; only the challenger is sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from data_schemas.canonical import bytes_hash, content_hash
from data_schemas.errors import BadInput, Tampered
from data_schemas.messages import ContestTask, Refusal, RefusalCode, Scored
from data_schemas.plan import ModelSpec
from hospital_node import ledger_view, scores
from hospital_node.ceilings import check_plan, require
from hospital_node.champion import MODELS
from hospital_node.cohorts import held_out_windows
from hospital_node.folder import NodeFolder
from hospital_node.scoring import HeldOut, heldout_of, model_utilities

if TYPE_CHECKING:
    from pipeline.windows import Windows

Vector = NDArray[np.float32]


def score(node: NodeFolder, task: ContestTask, weights: Vector) -> Scored | Refusal:
    """Score a challenger float32[D] against the champion; only an acknowledgement leaves.

    The log must say that the run's plan is a challenger, and that this champion was the champion when its last round
    closed. Raises Declined.
    """
    require(task.federation == node.settings.federation, RefusalCode.UNKNOWN_FEDERATION)
    require(_fits(task, weights), RefusalCode.MODEL_MISMATCH)
    charter = ledger_view.check_decided(node, task)
    check_plan(node.settings, task.plan)
    terms = None if charter is None else charter.terms.get((task.run, task.plan.rounds))
    fought = terms is not None and terms.entrant is not None and terms.champion == task.champion_hash
    champion = _champion(node, task.champion_hash) if fought else None
    if champion is None:
        return Refusal(code=RefusalCode.MODEL_NOT_DECIDED)
    # The place after the run's last round: its epoch's release adds it up with the rounds.
    place = scores.Place(task.run, task.plan.credit_epochs, task.plan.rounds + 1)
    if not scores.is_scored(node.scores_db, place, content_hash(task)):
        by_patient = _improvements(node, task.plan.credit.windows_per_patient, (task.plan.model, weights), champion)
        scores.put(node.scores_db, place, content_hash(task), (task.value_name,), by_patient)
    return Scored(round=task.plan.rounds, new_model_hash=task.model_hash)


def on_same_readings(windows: Sequence[Windows], windows_per_patient: int) -> list[HeldOut]:
    """Pick the same readings of the same series for models that look back differently far."""
    common = windows[0].anchors
    for other in windows[1:]:
        common = np.intersect1d(common, other.anchors)
    offsets = np.searchsorted(common, windows[0].series.starts).astype(np.int64)
    return [heldout_of(replace(cut, anchors=common, offsets=offsets), windows_per_patient) for cut in windows]


def _improvements(
    node: NodeFolder, windows_per_patient: int, challenger: tuple[ModelSpec, Vector], champion: tuple[ModelSpec, Vector]
) -> dict[str, NDArray[np.float64]]:
    """float64[1] in mg/dL of every held-out patient: the challenger's utility minus the champion's."""
    models = (challenger, champion)
    cut = [held_out_windows(node, spec.history_minutes) for spec, _ in models]
    held = on_same_readings(cut, windows_per_patient)
    new, old = (
        model_utilities(weights, held_out, spec.hidden_size)
        for (spec, weights), held_out in zip(models, held, strict=True)
    )
    return dict(zip(held[0].patients, (new - old)[:, None], strict=True))


def _fits(task: ContestTask, weights: Vector) -> bool:
    from pipeline.forecaster import ForecasterSpec, weight_count

    return (
        weights.shape == (weight_count(ForecasterSpec(hidden_size=task.plan.model.hidden_size)),)
        and bool(np.isfinite(weights).all())
        and bytes_hash(np.ascontiguousarray(weights).tobytes()) == task.model_hash
    )


def _champion(node: NodeFolder, model_hash: str) -> tuple[ModelSpec, Vector] | None:
    """Shape and weights of a champion that this node keeps."""
    from pipeline.export import load_model

    try:
        model = load_model(node.path / MODELS / model_hash)
    except (BadInput, Tampered):
        return None
    return model.spec, model.weights
