"""What a round costs under secure aggregation, beside the plain round: processor time and bytes.

python -m benchmarks.secure_aggregation
python -m benchmarks.secure_aggregation 6 20        federations of so many hospitals

One round of the demo's plan with real nodes and messages in one process, one message at a time. Each hospital has 12
people with two days of made-up readings: training is short, so the ratios are the worst that hospitals would see.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from flwr.app import Context, Message

from aggregator import governance, server_app
from aggregator.embedded_grid import EmbeddedGrid
from aggregator.progress import RoundSummary
from aggregator.settings import AggregatorFolder, AggregatorSettings, create
from benchmarks.local_round import fill_store
from benchmarks.measuring import ROOT, table
from data_schemas.governance import FoundingEntry
from data_schemas.ledger import CreditEntry, MemberEntry
from data_schemas.plan import AggregationMode
from hospital_node import client_app
from hospital_node.folder import NodeFolder
from hospital_node.settings import NodeSettings
from pipeline import edwards, masking, pedersen
from pipeline.plans import load_plan
from pipeline.wire import from_record

PLAN = load_plan(ROOT / "data_schemas" / "plans" / "demo.toml", rounds=1)
PEOPLE, DAYS, FEDERATION = 12, 2, "bench"
ROUND = ("train", "train.masked", "query.secure", "evaluate")


@dataclass
class Meter:
    """Processor seconds of nodes by action, and bytes to and from them, of the messages of a round."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    down: int = 0
    up: int = 0

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer as the node does."""
        action, started = message.metadata.message_type, time.thread_time()
        reply = client_app.app(message, context)
        self.seconds[action] += time.thread_time() - started
        if action in ROUND and action != "evaluate":
            self.down += size(message)
            self.up += size(reply)
        return reply


class Silent:
    """An observer that looks away."""

    def round_closed(self, summary: RoundSummary) -> None:
        """Nothing."""

    def epoch_closed(self, credit: CreditEntry) -> None:
        """Nothing."""

    def champion_decided(self, model_hash: str) -> None:
        """Nothing."""


def size(message: Message) -> int:
    """Bytes of a message's body and arrays."""
    body, arrays = from_record(message.content)
    return len(body) + sum(array.nbytes for array in arrays.values())


def federation(place: Path, count: int, mode: AggregationMode) -> tuple[AggregatorFolder, dict[str, Path]]:
    """Found a federation of so many hospitals with readings."""
    folder = create(place / "aggregator", AggregatorSettings(federation=FEDERATION, retry_pause_s=0.0))
    folder.plan_path.write_text(PLAN.model_dump_json())
    homes = {f"node-{number:02d}": place / f"node-{number:02d}" for number in range(count)}
    book, at = folder.open_ledger(), "2026-01-01T00:00:00+00:00"
    founding = governance.founding_of(FEDERATION, PLAN)
    privacy = founding.privacy.model_copy(update={"aggregation": mode})
    policy = FoundingEntry(federation=FEDERATION, privacy=privacy, credit=founding.credit)
    governance.found_federation(book, policy, at)
    for home in homes.values():
        governance.admit_member(book, make_node(home, folder.key().public.hex), at)
    book.close()
    return folder, homes


def make_node(home: Path, aggregator_key: str) -> MemberEntry:
    """Make a node whose store holds made-up readings."""
    settings = NodeSettings(
        name=home.name,
        federation=FEDERATION,
        aggregator_public_key=aggregator_key,
        declared_training_patients=10,
        declared_heldout_patients=2,
        heldout_fraction=0.2,
        min_patients=2,
        max_epsilon_training=100.0,
        max_epsilon_heldout=100.0,
    )
    NodeFolder.create(home, settings)
    fill_store(home / "store", PEOPLE, DAYS)
    with NodeFolder.open(home) as node:
        return MemberEntry(
            node=home.name,
            public_key=node.key.public.hex,
            declared_training_patients=10,
            declared_heldout_patients=2,
        )


def measured(count: int, mode: AggregationMode) -> tuple[Meter, float]:
    """Meter of the nodes' round, and processor seconds of all else: the aggregator, sittings, and the grid."""
    with tempfile.TemporaryDirectory() as place:
        folder, homes = federation(Path(place), count, mode)
        meter, started = Meter(), time.process_time()
        server_app.run_folder(EmbeddedGrid(meter, homes, workers=1), folder, Silent())  # type: ignore[arg-type]
        return meter, time.process_time() - started - sum(meter.seconds.values())


def first_commitment() -> tuple[float, float]:
    """Seconds of a commitment to 5,500 weights in a new process, which has to find the generators first, and later."""
    values = masking.quantised(np.random.default_rng(0).normal(0, 0.01, 5500).astype(np.float32), 30)
    edwards.hashed.cache_clear()
    times = [time.process_time()]
    for _ in range(2):
        pedersen.commit(values, 1)
        times.append(time.process_time())
    return times[1] - times[0], times[2] - times[1]


def main(counts: list[int]) -> None:
    """Measure, and print the tables of docs/secure-aggregation.md."""
    cold, warm = first_commitment()
    print(f"commitment to 5,500 weights: {cold:.2f} s in a new process, {warm:.2f} s later\n")
    measured(3, "secure")  # imports and generators
    heads = ["hospitals", "training", "plain round", "secure round", "ratio", "aggregator", "ratio", "up", "down"]
    rows = []
    for count in counts:
        plain, rest = measured(count, "plain")
        secure, more = measured(count, "secure")
        a, b = (sum(meter.seconds[action] for action in ROUND) / count for meter in (plain, secure))
        rows.append(
            [
                str(count),
                f"{plain.seconds['train'] / count:.2f} s",
                f"{a:.2f} s",
                f"{b:.2f} s",
                f"{b / a:.2f}",
                f"{rest:.1f} -> {more:.1f} s",
                f"{more / rest:.2f}",
                f"{plain.up / count / 1e3:.0f} -> {secure.up / count / 1e3:.0f} kB",
                f"{plain.down / count / 1e3:.0f} -> {secure.down / count / 1e3:.0f} kB",
            ]
        )
        print(table(heads, rows), flush=True)


if __name__ == "__main__":
    main([int(text) for text in sys.argv[1:]] or [6, 20, 50])
