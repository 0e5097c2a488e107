"""A challenger's run ends with a contest: every hospital scores its model against the champion.

What is scored leaves a hospital as one value of the release that pays the run's last epoch (pipeline.contest).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from aggregator.aggregation import model_hash
from aggregator.courier import CONTEST, Courier
from aggregator.epochs import acknowledged, ask_twice
from aggregator.governance import Federation
from data_schemas.ledger import ContestEntry
from data_schemas.messages import ContestTask, contest_name
from data_schemas.plan import TrainingPlan
from pipeline.charter import Charter
from pipeline.contest import contest_entry
from pipeline.terms import Terms


def hold(
    courier: Courier,
    federation: Federation,
    run: str,
    plan: TrainingPlan,
    weights: NDArray[np.float32],
    timeout_s: float,
) -> tuple[str, ...]:
    """Have the run's model float32[D] scored against the champion; the value that releases hold then, if any.

    Nothing is asked where the run's plan is no challenger, or nobody was champion when its last round closed.
    """
    terms = _terms(federation.charter, run, plan.rounds)
    if terms is None or terms.champion is None:
        return ()
    task = ContestTask(
        federation=str(federation.charter.federation),
        run=run,
        plan=plan,
        model_hash=model_hash(weights),
        champion_hash=terms.champion,
    )
    members, arrays = federation.members, {"weights": weights}
    replies = ask_twice(courier, CONTEST, task, members, timeout_s=timeout_s, arrays=arrays, group="contest")
    acknowledged(replies, plan.rounds, task.model_hash)
    return (task.value_name,)


def settled(federation: Federation, run: str, released: str) -> ContestEntry | None:
    """Settle the contest of a published run (released: its model's hash) from its last epoch's releases, if it had one.

    What was settled before is returned as it was.
    """
    terms = _terms(federation.charter, run, federation.models[run].round)
    last = max((epoch for credited, epoch in federation.credits if credited == run), default=None)
    if terms is None or terms.entrant is None or terms.champion is None or last is None:
        return None
    releases = [signed.release for signed in federation.credits[run, last].releases]
    if not any(contest_name(released, terms.champion) in release.nodes for release in releases):
        return None
    return contest_entry(run, terms.entrant, released, terms.champion, releases)


def _terms(charter: Charter, run: str, last_round: int) -> Terms | None:
    """What held when a challenger's last round closed; None for a run that challenges nobody."""
    terms = charter.terms.get((run, last_round))
    return None if terms is None or terms.entrant is None else terms
