"""The one credit vector of an epoch that leaves a node: a clipped, noised sum over its held-out patients.

Gaussian mechanism: adding or removing one held-out patient changes the sum by at most clip_mg_dl in L2 norm; the noise
has standard deviation noise_multiplier x clip_mg_dl in every coordinate. The divisor is the DECLARED number of held-out
patients, a constant.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data_schemas.messages import EpochRelease, PrivacySpend, Refusal, RefusalCode, ReleaseTask, SignedRelease
from data_schemas.plan import CreditPlan
from hospital_node import ledger_view, replies, scores
from hospital_node.budget import BudgetExhausted
from hospital_node.ceilings import Declined, check_plan, check_release, require
from hospital_node.folder import NodeFolder
from hospital_node.local_round import reserve, spend_of
from hospital_node.randomness import noise_source
from pipeline.shapley import clip_rows

_Z95 = 1.96


def release(node: NodeFolder, task: ReleaseTask, now_unix: float) -> SignedRelease | Refusal:
    """Release the epoch's noised Shapley vector, an abstention, or a refusal.

    A task that was answered before gets the stored answer, bit for bit.
    """
    try:
        return _release(node, task, now_unix)
    except Declined as declined:
        return Refusal(code=declined.code)
    except BudgetExhausted:
        return Refusal(code=RefusalCode.BUDGET_EXHAUSTED)


def noise_std_mg_dl(credit: CreditPlan, declared_patients: int) -> float:
    """Return the standard deviation of the noise on each released value, in mg/dL."""
    return credit.noise_multiplier * credit.clip_mg_dl / max(declared_patients, 1)


def abstains(credit: CreditPlan, declared_patients: int) -> bool:
    """Whether a release would be worthless: its noise reaches as far as the mean of clipped vectors ever can.

    The rule looks at the plan and the declared number only, so abstaining tells nothing and costs nothing.
    """
    return declared_patients < 2 or _Z95 * noise_std_mg_dl(credit, declared_patients) >= credit.clip_mg_dl


def _release(node: NodeFolder, task: ReleaseTask, now_unix: float) -> SignedRelease:
    require(task.federation == node.settings.federation, RefusalCode.UNKNOWN_FEDERATION)
    require(_well_formed(task), RefusalCode.MALFORMED_TASK)
    book = node.budget()
    if (stored := book.stored_reply(task.task_id)) is not None:
        return replies.unpack(SignedRelease, stored)[0]
    ledger_view.check_decided(node, task)
    check_plan(node.settings, task.plan)
    if abstains(task.plan.credit, node.settings.declared_heldout_patients):
        return _signed(node, task, (), None, book.head())
    check_release(node.settings, book, task.plan, task.run, task.epoch)
    require(now_unix < task.deadline_unix, RefusalCode.DEADLINE_TOO_CLOSE)
    sums = scores.epoch_sums(node.scores_db, task.run, task.epoch, task.nodes)
    reservation = reserve(node, book, task, "heldout", now_unix)
    signed = _signed(node, task, _noised(node, task, sums), spend_of(reservation), reservation.head)
    return replies.unpack(SignedRelease, book.commit(task.task_id, replies.pack(signed)))[0]


def _well_formed(task: ReleaseTask) -> bool:
    return 1 <= len(task.nodes) == len(set(task.nodes)) and 1 <= task.epoch <= task.plan.credit_epochs


def _noised(node: NodeFolder, task: ReleaseTask, sums: NDArray[np.float64]) -> tuple[float, ...]:
    """float64[n] from the patients' vectors float64[P, n]."""
    credit, declared = task.plan.credit, node.settings.declared_heldout_patients
    source = noise_source(node.settings, task.plan, task.run, f"release {task.task_id}")
    total = clip_rows(sums, credit.clip_mg_dl).sum(axis=0)
    noise = source.normal(len(task.nodes)).numpy() * (credit.noise_multiplier * credit.clip_mg_dl)
    return tuple(float(value) for value in (total + noise) / declared)


def _signed(
    node: NodeFolder, task: ReleaseTask, values: tuple[float, ...], spend: PrivacySpend | None, head: str
) -> SignedRelease:
    settings = node.settings
    body = EpochRelease(
        federation=task.federation,
        run=task.run,
        epoch=task.epoch,
        node=settings.name,
        nodes=task.nodes,
        shapley_mg_dl=values,
        noise_std_mg_dl=noise_std_mg_dl(task.plan.credit, settings.declared_heldout_patients),
        declared_heldout_patients=settings.declared_heldout_patients,
        abstained=spend is None,
        spend=spend,
        budget_head=head,
    )
    return SignedRelease(release=body, signature=node.key.sign(body))
