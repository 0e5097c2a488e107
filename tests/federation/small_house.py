"""A federation of real nodes and a real aggregator in one process: every word between them is a Flower message."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aggregator import governance, settings
from aggregator.assembly import Sitting, Table, sit
from aggregator.settings import AggregatorFolder
from data_schemas.canonical import bytes_hash
from data_schemas.governance import StatementCode
from data_schemas.ledger import MemberEntry, ModelEntry
from data_schemas.plan import RELATION
from hospital_node import ledger_copy, ledger_view, statements
from hospital_node.folder import NodeFolder
from pipeline.charter import Charter
from pipeline.demo_votes import meeting
from pipeline.export import write_model
from pipeline.model_card import CardPrivacy, ModelCard, TrainedOn
from tests.hospital_node import small_node
from tests.hospital_node.small_node import FEDERATION

NAMES = ("alder", "birch", "cedar", "dogwood", "elm")
PLAN = small_node.plan()
START = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass
class House:
    """The aggregator's folder, the nodes' homes by name, and a clock that the tests move."""

    folder: AggregatorFolder
    homes: dict[str, Path]
    now: datetime = START

    @contextmanager
    def table(self, names: Sequence[str] | None = None) -> Iterator[Table]:
        """Lay a table for these nodes, all by default."""
        with meeting(self.folder, [self.homes[name] for name in names or self.homes]) as table:
            yield table

    def sit(self, names: Sequence[str] | None = None, *, attest: bool = False) -> Sitting:
        """Hold one sitting, as a new process would; a minute passes."""
        self.now += timedelta(minutes=1)
        with self.table(names) as table:
            return sit(table, self.now.isoformat(timespec="seconds"), attest=attest)

    def charter(self) -> Charter:
        """What the aggregator's ledger says."""
        book = self.folder.open_ledger()
        try:
            return book.charter().copy()
        finally:
            book.close()

    def copy_at(self, name: str) -> Charter:
        """What a node's own copy says."""
        with NodeFolder.open(self.homes[name], sitting=True) as node:
            return ledger_view.decided(node)

    def copy_of_credits(self, name: str) -> dict[str, int]:
        """Micro-credits by hospital, as a node's own copy adds them up."""
        with NodeFolder.open(self.homes[name], sitting=True) as node:
            return ledger_copy.read(node).replay.micro_credits

    def propose(self, action: dict[str, Any], by: str = "alder", days: float = 14) -> Path:
        """Sign a proposal at home."""
        with NodeFolder.open(self.homes[by], sitting=True) as node:
            return statements.propose(node, ledger_view.decided(node), action, days, self.now)

    def vote(self, *names: str, approve: bool = True) -> list[Path]:
        """Sign votes at home on the proposal that was made last."""
        files = []
        for name in names:
            with NodeFolder.open(self.homes[name], sitting=True) as node:
                charter = ledger_view.decided(node)
                newest = next(reversed(charter.open))
                files.append(statements.vote(node, charter, newest, self.now, approve=approve))
        return files

    def decide(self, action: dict[str, Any], *yes: str, by: str = "alder") -> Sitting:
        """Propose and vote at home, with a sitting after each."""
        self.propose(action, by)
        self.sit()
        self.vote(*yes)
        return self.sit()

    def refused(self, name: str) -> list[str]:
        """Codes that a node was told."""
        with NodeFolder.open(self.homes[name], sitting=True) as node:
            return [code for _, code in statements.refused(node)]

    def waiting(self, name: str) -> int:
        """How much a node has signed that is not in its copy of the ledger yet."""
        with NodeFolder.open(self.homes[name], sitting=True) as node:
            return len(statements.waiting(node))


def build(place: Path) -> House:
    """Found a federation of five."""
    folder = settings.create(place / "aggregator", settings.AggregatorSettings(federation=FEDERATION), seed=1)
    folder.plan_path.write_text(PLAN.model_dump_json())
    house = House(folder, {name: join(place / name, folder) for name in NAMES})
    book = folder.open_ledger()
    governance.found_federation(book, governance.founding_of(FEDERATION, PLAN), START.isoformat())
    for home in house.homes.values():
        governance.admit_member(book, member(home), START.isoformat())
    book.close()
    return house


def join(home: Path, folder: AggregatorFolder) -> Path:
    """Make a node that follows the aggregator's ledger."""
    return small_node.make_node(home, name=home.name, aggregator_public_key=folder.key().public.hex)


def member(home: Path) -> MemberEntry:
    """Return what a node declares."""
    with NodeFolder.open(home) as node:
        return MemberEntry(
            node=node.settings.name,
            public_key=node.key.public.hex,
            declared_training_patients=node.settings.declared_training_patients,
            declared_heldout_patients=node.settings.declared_heldout_patients,
        )


def publish(house: House, seed: int, *, lie: float = 0.0, weights: NDArray[np.float32] | None = None) -> str:
    """Let the aggregator release a model: on its shelf and in the ledger. lie: added to the epsilon of its card."""
    weights = small_node.base_weights(PLAN, seed) if weights is None else weights
    digest = bytes_hash(np.ascontiguousarray(weights).tobytes())
    trained_on = tuple(TrainedOn(node=n, declared_training_patients=10, declared_heldout_patients=4) for n in NAMES)
    privacy = CardPrivacy(unit="patient", epsilon=3.0 + lie, delta=1e-5, rounds=4, noise_source="seeded")
    card = ModelCard(version=f"run-{seed}", model_hash=digest, spec=PLAN.model, trained_on=trained_on, privacy=privacy)
    house.folder.released.mkdir(exist_ok=True)
    write_model(house.folder.released / digest[:12], weights, PLAN.model, card)
    book = house.folder.open_ledger()
    book.append(
        ModelEntry(
            run=f"run-{seed}",
            round=4,
            model_hash=digest,
            unit="patient",
            relation=RELATION,
            delta=1e-5,
            epsilon_by_node=dict.fromkeys(NAMES, 3.0),
        ),
        house.now.isoformat(),
    )
    book.close()
    return digest


def codes(sitting: Sitting, name: str) -> list[StatementCode]:
    """Why statements that a node handed over were refused."""
    return list(sitting.refused.get(name, {}).values())
