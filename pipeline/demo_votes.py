"""Members meet: nodes on this machine over an embedded grid, by the very messages that a SuperLink carries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aggregator.assembly import Sitting, Table
    from aggregator.settings import AggregatorFolder


@contextmanager
def meeting(folder: AggregatorFolder, nodes: Sequence[Path]) -> Iterator[Table]:
    """Lay a table for the nodes of these folders; the aggregator's ledger is open meanwhile."""
    from aggregator.assembly import Table
    from aggregator.courier import Courier
    from aggregator.embedded_grid import EmbeddedGrid
    from aggregator.grid_exchange import GridExchange
    from hospital_node.client_app import app

    settings = folder.settings
    grid = EmbeddedGrid(app, {str(home): home for home in nodes}, workers=2)
    book = folder.open_ledger()
    try:
        courier = Courier(GridExchange(grid), settings.federation, settings.hello_timeout_s)
        yield Table(courier, book, settings.federation, settings.cosign_timeout_s, folder.released)
    finally:
        book.close()


def hold_sitting(table: Table, registry: Path) -> Sitting:
    """Hold a sitting now, and let the alias in the MLflow store under registry/mlruns follow its decisions."""
    from aggregator.assembly import sit
    from aggregator.promotion import crown

    sitting = sit(table, datetime.now(UTC).isoformat(timespec="seconds"))
    if sitting.champion is not None:
        crown(registry, sitting.champion)
    return sitting


def vote_champion(folder: AggregatorFolder, nodes: Mapping[str, Path], model_hash: str, registry: Path) -> Sitting:
    """Let the first hospital propose a model and all vote for it, each at home; every node serves it afterwards."""
    from hospital_node import ledger_view, statements
    from hospital_node.folder import NodeFolder

    now = datetime.now(UTC)
    with meeting(folder, list(nodes.values())) as table:
        hold_sitting(table, registry)
        for number, home in enumerate(nodes.values()):
            if number == 0:
                with NodeFolder.open(home, sitting=True) as node:
                    action = {"action": "promote", "model_hash": model_hash}
                    statements.propose(node, ledger_view.decided(node), action, 14, now)
                hold_sitting(table, registry)
                proposal = next(reversed(table.ledger.charter().open))
            with NodeFolder.open(home, sitting=True) as node:
                statements.vote(node, ledger_view.decided(node), proposal, now, approve=True)
        return hold_sitting(table, registry)
