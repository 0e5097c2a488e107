"""Rounds as MLflow keeps them. MLflow may be out of order: the run says so, goes on, and logs later what was missed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from aggregator.governance import replay
from aggregator.ledger import read_entries
from aggregator.rounds import run_identity
from aggregator.server_app import load_initial_weights
from aggregator.state import StateFolder

if TYPE_CHECKING:
    from aggregator.progress import RoundSummary
    from aggregator.registry import Registry
    from aggregator.settings import AggregatorFolder
    from data_schemas.ledger import CreditEntry


@dataclass(frozen=True)
class Recorder:
    """Writes a run's series into one MLflow store, or, without a registry, nowhere. tell: hears of outages.

    missed: what MLflow did not take; it is offered again after the next thing that it takes.
    """

    tell: Callable[[str], None]
    registry: Registry | None
    run_id: str
    missed: list[Callable[[Registry], object]] = field(default_factory=list)

    @classmethod
    def start(cls, root: Path, folder: AggregatorFolder, tell: Callable[[str], None]) -> Recorder:
        """Open the MLflow store under root/mlruns, find or make the folder's run, and log the rounds it lacks."""
        from aggregator.registry import Registry, RegistryFailed

        plan = folder.load_plan()
        members = tuple(replay(read_entries(folder.path / "ledger.db")).members.values())
        run = run_identity(folder.settings.federation, plan, load_initial_weights(folder))
        try:
            registry = Registry(root, folder.settings.mlflow_database)
            run_id = registry.start_run(run, folder.settings.federation, plan, members)
        except RegistryFailed as error:
            tell(f"MLflow is out of order, the run goes on without it: {error.message}")
            return cls(tell, None, "")
        recorder = cls(tell, registry, run_id)
        for summary in StateFolder(folder.state).summaries(run):
            recorder.round_closed(summary)
        return recorder

    def round_closed(self, summary: RoundSummary) -> None:
        """Log a round's series."""
        self._log(lambda registry: registry.log_round(self.run_id, summary))

    def errors_measured(self, round_number: int, rmse_30: Mapping[str, float]) -> None:
        """Log held-out RMSE by hospital: on public data only."""
        self._log(lambda registry: registry.log_errors(self.run_id, round_number, rmse_30))

    def epoch_closed(self, credit: CreditEntry) -> None:
        """Log an epoch's credit."""
        self._log(lambda registry: registry.log_credit(self.run_id, credit))

    def champion_decided(self, model_hash: str) -> None:
        """Let the alias `champion` follow the members' vote."""
        self._log(lambda registry: registry.crown(model_hash))

    def _log(self, call: Callable[[Registry], object]) -> None:
        if self.registry is None:
            return
        if why := _refusal(self.registry, call):
            self.tell(f"MLflow did not take it, the run goes on: {why}")
            self.missed.append(call)
            return
        self.missed[:] = [earlier for earlier in self.missed if _refusal(self.registry, earlier)]


def _refusal(registry: Registry, call: Callable[[Registry], object]) -> str:
    """Why MLflow did not take something; empty when it did."""
    from aggregator.registry import RegistryFailed

    try:
        call(registry)
    except RegistryFailed as error:
        return error.message
    return ""
