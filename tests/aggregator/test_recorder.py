"""What MLflow missed is logged later: a real store, held by another program, and a run that is started again."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from aggregator.progress import RoundSummary
from aggregator.recorder import Recorder
from data_schemas.ledger import CreditEntry
from tests.aggregator.small_federation import build, run


class Held:
    """Passes rounds on to a recorder; another program holds its store until the second round."""

    def __init__(self, recorder: Recorder, database: Path) -> None:
        self._recorder = recorder
        self._holder = sqlite3.connect(database, check_same_thread=False)
        self._holder.execute("BEGIN EXCLUSIVE")

    def round_closed(self, summary: RoundSummary) -> None:
        """Let the store go before the second round."""
        if summary.round == 2:
            self._holder.close()
        self._recorder.round_closed(summary)

    def epoch_closed(self, credit: CreditEntry) -> None:
        """Leave credit out."""

    def champion_decided(self, model_hash: str) -> None:
        """Leave votes out."""


def steps(database: Path) -> list[int]:
    """Rounds that the store has."""
    with closing(sqlite3.connect(database)) as connection:
        return sorted(step for (step,) in connection.execute("SELECT step FROM metrics WHERE key = 'round/admitted'"))


@pytest.mark.slow
def test_what_mlflow_missed_is_logged_when_it_is_back(tmp_path: Path) -> None:
    """A round that was closed while the store was held comes with the next; one that is lacking, at the next start."""
    folder, told = build(tmp_path), list[str]()
    recorder, database = Recorder.start(folder.path, folder, told.append), folder.path / "mlruns" / "mlflow.db"
    run(tmp_path, Held(recorder, database))

    assert len(told) == 1
    assert recorder.missed == []
    assert steps(database) == [1, 2, 3]
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("DELETE FROM metrics WHERE step = 2")

    assert Recorder.start(folder.path, folder, told.append).missed == []
    assert steps(database) == [1, 2, 3]
