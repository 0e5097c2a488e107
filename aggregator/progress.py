"""What people see of a run while it goes on."""

from __future__ import annotations

from typing import Protocol

from data_schemas.frozen import Frozen
from data_schemas.ledger import CreditEntry, RejectedUpdate
from data_schemas.messages import Hex32


class RoundSummary(Frozen):
    """One closed round as people watch it. Norms are L2 norms of updates; seconds: from asking to the new model.

    epsilon_by_node is what each hospital last reported as its training cohort's total, at the plan's delta.
    """

    run: str
    round: int
    rounds: int
    admitted: tuple[str, ...]
    rejected: tuple[RejectedUpdate, ...]
    update_norms: dict[str, float]
    cosine_to_mean: dict[str, float]
    model_hash: Hex32
    epsilon_by_node: dict[str, float]
    seconds: float


class Observer(Protocol):
    """Is told of every closed round and credit epoch, at least once: after a crash the newest are told again.

    One that raises is reported in the log and stops nothing.
    """

    def round_closed(self, summary: RoundSummary) -> None:
        """Hear that a round is in the state folder and in the ledger."""

    def epoch_closed(self, credit: CreditEntry) -> None:
        """Hear that a credit epoch is in the ledger."""

    def champion_decided(self, model_hash: str) -> None:
        """Hear which model the members have decided to serve; told at every sitting."""
