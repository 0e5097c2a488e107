"""What a hospital allows: a proposed plan against the node's own ceilings. The server proposes; these rules decide.

No rule looks at a reading or counts patients in the store: a refusal is a message too, and must not tell who is there.
"""

from __future__ import annotations

from data_schemas.messages import RefusalCode
from data_schemas.plan import PrivacyEvent, TrainingPlan
from data_schemas.units import DELTA
from hospital_node.budget import BudgetBook, Cohort, epsilon
from hospital_node.settings import NodeSettings

# Rounding of the accountant; far below the third decimal that anybody reads.
_ROUNDING = 1e-9


class Declined(Exception):
    """The node does not do what it was asked; the code is all that leaves."""

    def __init__(self, code: RefusalCode) -> None:
        super().__init__(code.value)
        self.code = code


def require(allowed: bool, code: RefusalCode) -> None:
    """Raise Declined with this code unless `allowed`."""
    if not allowed:
        raise Declined(code)


def seeded(settings: NodeSettings, plan: TrainingPlan) -> bool:
    """Whether noise may be repeatable: only where the plan AND the hospital's own settings name a seed."""
    return plan.seed is not None and settings.seed is not None


def check_plan(settings: NodeSettings, plan: TrainingPlan) -> None:
    """Raise Declined for what no budget can pay: noise the server could repeat, a weaker unit, a larger delta."""
    require(plan.seed is None or seeded(settings, plan), RefusalCode.PLAN_MISMATCH)
    require(plan.privacy.unit == "patient", RefusalCode.PLAN_EXCEEDS_CEILING)
    require(plan.privacy.delta <= DELTA, RefusalCode.PLAN_EXCEEDS_CEILING)


def check_training(settings: NodeSettings, book: BudgetBook, plan: TrainingPlan, run: str, round_number: int) -> None:
    """Raise Declined unless this node may train a round of the plan.

    In its first round of a run the node looks ahead: every round left must fit under the ceiling, or it would spend
    patients' budget on a run that it cannot finish.
    """
    check_plan(settings, plan)
    require(round_number <= plan.rounds, RefusalCode.PLAN_MISMATCH)
    require(settings.declared_training_patients >= settings.min_patients, RefusalCode.TOO_FEW_PATIENTS)
    ceiling, delta, event = settings.max_epsilon_training, plan.privacy.delta, plan.round_event
    require(plan.privacy.epsilon <= ceiling, RefusalCode.PLAN_EXCEEDS_CEILING)
    require(_total(event, plan.rounds, delta) <= plan.privacy.epsilon + _ROUNDING, RefusalCode.PLAN_MISMATCH)
    ahead = 1 if _begun(book, "training", run) else plan.rounds - round_number + 1
    require(book.projected("training", event, ahead, delta) <= ceiling, RefusalCode.BUDGET_EXHAUSTED)


def check_release(settings: NodeSettings, book: BudgetBook, plan: TrainingPlan, run: str, epoch: int) -> None:
    """Raise Declined unless this node may release a credit vector; it looks ahead as in training."""
    ceiling, delta, event = settings.max_epsilon_heldout, plan.privacy.delta, plan.release_event
    require(plan.credit.epsilon <= ceiling, RefusalCode.PLAN_EXCEEDS_CEILING)
    total = _total(event, plan.credit_epochs, delta)
    require(total <= plan.credit.epsilon + _ROUNDING, RefusalCode.PLAN_MISMATCH)
    ahead = 1 if _begun(book, "heldout", run) else plan.credit_epochs - epoch + 1
    require(book.projected("heldout", event, ahead, delta) <= ceiling, RefusalCode.BUDGET_EXHAUSTED)


def _total(event: PrivacyEvent, times: int, delta: float) -> float:
    """Epsilon of a whole plan, which its claimed epsilon must not understate."""
    return epsilon((event.model_copy(update={"steps": event.steps * times}),), delta)


def _begun(book: BudgetBook, cohort: Cohort, run: str) -> bool:
    return any(row.run == run and row.cohort == cohort for row in book.rows())
