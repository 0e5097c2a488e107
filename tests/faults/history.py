"""What must hold after any history of faults, read from the files alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from aggregator import ledger, server_app, settings
from aggregator.admission import AdmittedUpdate
from aggregator.aggregation import initial_state, mean_update, model_hash, released_weights, server_step
from aggregator.verification import verify_ledger
from data_schemas.canonical import bytes_hash
from data_schemas.ledger import CreditEntry, ModelEntry, RoundEntry
from data_schemas.messages import SignedUpdate
from data_schemas.plan import TrainingPlan
from data_schemas.units import DELTA
from hospital_node import ledger_view, own_rounds
from hospital_node.budget import Reservation, epsilon
from hospital_node.folder import NodeFolder
from hospital_node.witness import witnessed_note
from tests.faults.house import NAMES

Update = tuple[SignedUpdate, np.ndarray]


def check(path: Path, rounds: int, names: tuple[str, ...] = NAMES, aggregator: str = "aggregator") -> None:
    """Fail, saying what does not hold, unless the federation's files tell one true history."""
    folder = settings.open_folder(path / aggregator)
    witnessed = [note for name in names if (note := witnessed_note(path / name))]
    report = verify_ledger(folder.path / "ledger.db", folder.key().public.hex, witnessed, every_signature=True)
    assert report.cosigned_by, "nobody cosigned"
    entries = [line.entry for line in ledger.read_entries(folder.path / "ledger.db")]
    closed = [entry for entry in entries if isinstance(entry, RoundEntry)]
    assert [entry.round for entry in closed] == list(range(1, rounds + 1)), "a round is missing or logged twice"
    plan = folder.load_plan()
    epochs = [entry.epoch for entry in entries if isinstance(entry, CreditEntry)]
    assert epochs == list(range(1, plan.credit_epochs + 1)), "an epoch is missing or credited twice"
    books = {name: _book(path / name) for name in names}
    made = {name: updates for name, (updates, _) in books.items()}
    _each_update_in_one_aggregate(folder, closed, made, [e for e in entries if isinstance(e, ModelEntry)])
    for name, (_, rows) in books.items():
        _nothing_spent_twice_or_lost(name, rows, closed, plan)
        _copy_is_the_ledger(path / name, folder)


def _book(home: Path) -> tuple[dict[str, Update], tuple[Reservation, ...]]:
    """Read a node's verified book: every update it ever answered with, by hash, and every reservation."""
    updates: dict[str, Update] = {}
    with NodeFolder.open(home) as node:
        book = node.budget()
        for signed, delta in own_rounds.updates(book):
            assert bytes_hash(delta.tobytes()) == signed.manifest.update_hash
            updates[signed.manifest.update_hash] = (signed, delta)
        alarm = ledger_view.alarm(node)
        assert alarm is None, f"{home.name} raised an alarm: {alarm}"
        return updates, book.rows()


def _each_update_in_one_aggregate(
    folder: settings.AggregatorFolder,
    closed: list[RoundEntry],
    made: dict[str, dict[str, Update]],
    models: list[ModelEntry],
) -> None:
    """Add all up again from the hospitals' own books: the models are those of the ledger, and nothing else went in."""
    logged = Counter(signed.manifest.update_hash for entry in closed for signed in entry.admitted)
    assert set(logged.values()) <= {1}, "an update is in two entries"
    state, plan = initial_state(server_app.load_initial_weights(folder)), folder.load_plan()
    for entry in closed:
        assert entry.base_model_hash == model_hash(state.weights), f"round {entry.round} starts elsewhere"
        pairs = [made[signed.manifest.node][signed.manifest.update_hash] for signed in entry.admitted]
        assert [signed for signed, _ in pairs] == list(entry.admitted), "the ledger has another manifest than the book"
        updates = [AdmittedUpdate(signed, delta) for signed, delta in pairs]
        state = server_step(state, mean_update(updates, plan.server.rule), plan.server)
        assert entry.new_model_hash == model_hash(state.weights), f"round {entry.round} is not the sum of its updates"
    assert [entry.model_hash for entry in models] == [model_hash(released_weights(state))]


def _nothing_spent_twice_or_lost(
    name: str, rows: tuple[Reservation, ...], closed: list[RoundEntry], plan: TrainingPlan
) -> None:
    training = [row for row in rows if row.cohort == "training"]
    heldout = [row for row in rows if row.cohort == "heldout"]
    assert len(training) <= len(closed), f"{name} paid for {len(training)} rounds of {len(closed)}"
    assert len(heldout) <= plan.credit_epochs, f"{name} paid for {len(heldout)} releases"
    by_head = {row.head: row for row in rows}
    for number, row in enumerate(training, start=1):
        assert row.epsilon_after == epsilon([r.event for r in training[:number]], DELTA), f"{name} miscounted"
    for entry in closed:
        for signed in entry.admitted:
            if signed.manifest.node == name:
                row = by_head.pop(signed.manifest.budget_head)  # each update has a reservation of its own
                assert signed.manifest.spend.epsilon_after == row.epsilon_after, f"{name} told another epsilon"


def _copy_is_the_ledger(home: Path, folder: settings.AggregatorFolder) -> None:
    book = folder.open_ledger()
    logged: tuple[Any, ...] = book.payloads(0)
    book.close()
    with NodeFolder.open(home) as node:
        held = tuple(line.decode() for line in ledger_view.payloads(node))
    assert held == tuple(logged[: len(held)]), f"{home.name} holds another history"
