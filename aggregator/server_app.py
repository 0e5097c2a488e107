"""Flower ServerApp `app`: the same federated run whether a SuperLink or an embedded grid carries the messages.

The aggregator's folder is the only configuration. Its path comes with the run (`aggregator-folder` in the run config,
or ISLET_AGGREGATOR_HOME where the ServerApp starts); everything else is in the folder.
"""

from __future__ import annotations

import logging
import os
from datetime import UTC, datetime
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

import numpy as np
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from numpy.typing import NDArray

from aggregator.assembly import Table, sit
from aggregator.courier import Courier
from aggregator.grid_exchange import GridExchange
from aggregator.progress import Observer, RoundSummary
from aggregator.promotion import crown
from aggregator.rounds import FederationResult, run_federation
from aggregator.settings import AggregatorFolder, open_folder
from aggregator.state import hold, hold_sittings
from data_schemas.errors import BadInput
from data_schemas.ledger import CreditEntry
from pipeline.log_lines import JsonLines

if TYPE_CHECKING:
    from aggregator.recorder import Recorder

FOLDER, SIT_EVERY_S = "aggregator-folder", "sit-every-s"
_log = logging.getLogger("islet.aggregator")

app = ServerApp()


class LogObserver:
    """Writes one line per round and epoch to the log, and lets a recorder keep it."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def round_closed(self, summary: RoundSummary) -> None:
        """Log who was admitted and who was not."""
        rejected = ", ".join(f"{update.node}: {update.code}" for update in summary.rejected) or "nobody"
        _log.info(
            "round %d/%d: %d admitted, rejected %s",
            summary.round,
            summary.rounds,
            len(summary.admitted),
            rejected,
        )
        self._recorder.round_closed(summary)

    def epoch_closed(self, credit: CreditEntry) -> None:
        """Log who earned what."""
        lines = ", ".join(f"{line.node} {line.micro_credits}" for line in credit.lines)
        _log.info("epoch %d: micro-credits %s, unpaid %d", credit.epoch, lines, credit.unpaid_micro_credits)
        self._recorder.epoch_closed(credit)

    def champion_decided(self, model_hash: str) -> None:
        """Log which model every node serves, and let MLflow's alias follow."""
        _log.info("champion: %s", model_hash)
        self._recorder.champion_decided(model_hash)


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run, or resume, the federation of the folder that the run configuration names, and release its model."""
    from aggregator.recorder import Recorder
    from aggregator.release import release

    configured = str(context.run_config.get(FOLDER) or os.environ.get("ISLET_AGGREGATOR_HOME", ""))
    if not configured:
        raise BadInput(
            "the run does not say where the aggregator's folder is",
            f"give {FOLDER} in the run config, or set ISLET_AGGREGATOR_HOME",
        )
    folder = open_folder(Path(configured))
    if every_s := float(str(context.run_config.get(SIT_EVERY_S, 0.0))):
        with hold_sittings(folder.state):
            keep_sitting(grid, folder, every_s, Event())
        return
    (folder.path / "log").mkdir(exist_ok=True, mode=0o700)
    _log.addHandler(JsonLines("serverapp", folder.path / "log" / "aggregator.log"))
    _log.setLevel(logging.INFO)
    recorder = Recorder.start(folder.path, folder, _log.warning)
    released = release(folder, run_folder(grid, folder, LogObserver(recorder)), recorder)
    _log.info("released the model %s", released.name)


def keep_sitting(grid: Grid, folder: AggregatorFolder, every_s: float, stop: Event) -> None:
    """Hold a sitting of the members every so many seconds until `stop` is set; a run that trains may go on beside it.

    MLflow's alias, in the store under the folder's mlruns/, follows what they decide.
    """
    settings, ledger = folder.settings, folder.open_ledger()
    courier = Courier(GridExchange(grid), settings.federation, settings.hello_timeout_s)
    table = Table(courier, ledger, settings.federation, settings.cosign_timeout_s, folder.released)
    crowned: str | None = None
    try:
        while not stop.is_set():
            sitting = sit(table, datetime.now(UTC).isoformat(timespec="seconds"))
            for decision in sitting.decided:
                _log.info("%s %s", decision.proposal_hash[:12], "accepted" if decision.accepted else "rejected")
            if sitting.champion not in (None, crowned) and crown(folder.path, str(sitting.champion)):
                crowned = sitting.champion
            stop.wait(every_s)
    finally:
        ledger.close()


def run_folder(grid: Grid, folder: AggregatorFolder, observer: Observer) -> FederationResult:
    """Run the plan of an aggregator folder over a grid. Raises NodeBusy when another aggregator holds the folder."""
    with hold(folder.state) as state:
        ledger = folder.open_ledger()
        try:
            return run_federation(
                grid,
                folder.settings,
                folder.load_plan(),
                load_initial_weights(folder),
                ledger=ledger,
                state=state,
                observer=observer,
                released=folder.released,
            )
        finally:
            ledger.close()


def load_initial_weights(folder: AggregatorFolder) -> NDArray[np.float32]:
    """Start model float32[D] from array `weights` of settings.initial_weights, or of the public warm start."""
    import pipeline

    named = folder.settings.initial_weights
    path = folder.path / named if named else Path(pipeline.__file__).with_name("warm_start.npz")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            weights = np.asarray(arrays["weights"])
    except (OSError, KeyError, ValueError) as error:
        raise BadInput(
            f"cannot read the start model {path.name}", "it is an .npz with a float32 array `weights`"
        ) from error
    if weights.ndim != 1 or weights.dtype != np.float32 or not np.isfinite(weights).all():
        raise BadInput(f"the start model {path.name} is not a finite float32 vector", "export it again as float32[D]")
    return weights
