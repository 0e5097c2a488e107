"""What a round costs with ten, a hundred and a thousand hospitals on one machine, over Flower's simulation on Ray.

The ServerApp's loop and the ClientApp are those of every other run; Ray's actors carry the messages. A simulated
hospital has keys, store, budget book and ledger copy of its own, and two days of people drawn, with replacement, from
one hospital of the shipped sample.
It needs the extra `simulation` (Ray); `--grid embedded` carries the same messages in this process instead.

    python -m benchmarks.simulation --nodes 10 100 1000
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np

from aggregator.progress import RoundSummary
from aggregator.settings import AggregatorFolder
from benchmarks.measuring import ROOT, Watch, family, fresh_process, stat_fields
from data_schemas.ledger import CreditEntry
from data_schemas.reading import QualityReport, ValidReadings

PEOPLE, DECLARED, HELDOUT = 10, 8, 2
_READINGS = 2 * 288
_SAMPLE, _ZONE = "duke", "America/New_York"
# A short local round: what is measured is how the federation's cost grows, not how long a hospital trains.
_STEPS, _WINDOWS = 2, 8
_LONG = 86_400.0
_UNDER_WAY = 2  # messages for each actor: one at work, one waiting


@dataclass
class Clock:
    """An observer that notes when each round was closed, and how much processor time everybody had used by then."""

    closed: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    admitted: list[int] = field(default_factory=list)

    def round_closed(self, summary: RoundSummary) -> None:
        """Note the time, and how many updates came in."""
        self.closed.append(time.monotonic())
        self.processor.append(sum(map(_processor_s, family(str(os.getpid())))))
        self.admitted.append(len(summary.admitted))
        sys.stderr.write(f"round {summary.round}: {len(summary.admitted)} admitted\n")

    def epoch_closed(self, credit: CreditEntry) -> None:
        """Nothing to note."""

    def champion_decided(self, model_hash: str) -> None:
        """Nothing to note."""


def import_sample(path: Path) -> None:
    """Import one shipped hospital's exports into a store at `path`."""
    from data_schemas.layout import load_layout
    from hospital_node.importing import import_exports
    from hospital_node.store import Store

    exports = ROOT / "hospital_node" / "sample_exports" / _SAMPLE
    import_exports(exports, load_layout(_SAMPLE), _ZONE, bytes(32), Store(path))


def make_hospital(
    home: Path, name: str, people: list[Any], draw: np.random.Generator, folder: AggregatorFolder
) -> None:
    """A node that holds PEOPLE people drawn from `people` with replacement, under new pseudonyms."""
    import pandas as pd

    from hospital_node.folder import NodeFolder
    from hospital_node.settings import NodeSettings
    from hospital_node.store import Store

    plan = folder.load_plan()
    settings = NodeSettings(
        name=name,
        federation=folder.settings.federation,
        aggregator_public_key=folder.key().public.hex,
        declared_training_patients=DECLARED,
        declared_heldout_patients=HELDOUT,
        heldout_fraction=HELDOUT / PEOPLE,
        max_epsilon_training=plan.privacy.epsilon,
        max_epsilon_heldout=plan.credit.epsilon,
        min_patients=1,
    )
    NodeFolder.create(home, settings)
    drawn = [people[i].assign(patient=f"{name}-{n:02d}") for n, i in enumerate(draw.integers(len(people), size=PEOPLE))]
    frame = pd.concat(drawn, ignore_index=True)
    frame["row"] = np.arange(len(frame))
    valid = ValidReadings(frame.astype(people[0].dtypes.to_dict()))
    report = QualityReport(len(frame), len(frame), {}, {}, {}, PEOPLE)
    nothing = frame.iloc[:0].assign(rule=pd.Series(dtype="str"))
    Store(home / "store").add(valid, nothing, report, [f"{draw.integers(2**63):064x}"])


def build(path: Path, sample: Path, nodes: int, rounds: int) -> tuple[AggregatorFolder, dict[str, Path]]:
    """A founded federation of that many hospitals under `path`."""
    from hospital_node.store import Store
    from pipeline.demo import PLAN, admit, found

    text = PLAN.read_text(encoding="utf-8")
    for name, value in {"steps_per_round": _STEPS, "windows_per_patient": _WINDOWS, "average_last_rounds": 1}.items():
        text = re.sub(rf"^{name} = .*$", f"{name} = {value}", text, flags=re.M)
    (path / "plan.toml").write_text(text)
    timeouts = dict.fromkeys(("hello_timeout_s", "round_timeout_s", "score_timeout_s", "cosign_timeout_s"), _LONG)
    plan = path / "plan.toml"
    folder = found(path / "hub", "simulated", plan, rounds=rounds, min_updates=nodes, **timeouts)
    store, draw = Store(sample), np.random.default_rng(1)
    people = [store.readings(patient).iloc[:_READINGS] for patient in store.patients()]
    homes = {f"h{number:04d}": path / "nodes" / f"h{number:04d}" for number in range(nodes)}
    for name, home in homes.items():
        make_hospital(home, name, people, draw, folder)
    admit(folder, list(homes.values()))
    return folder, homes


class FewAtOnce:
    """A Flower Grid with few messages under way: it pushes the next when one is answered.

    Flower's simulation looks through all messages for every simulated hospital, ten times a second.
    """

    def __init__(self, grid: Any, most: int) -> None:
        self._grid, self._most, self._replies = grid, most, dict[str, Any]()

    def __getattr__(self, name: str) -> Any:
        """All else is the grid's."""
        return getattr(self._grid, name)

    def push_messages(self, messages: Iterable[Any]) -> list[str]:
        """Return when all are answered; their ids."""
        waiting, pushed, open_ids = deque(messages), list[str](), set[str]()
        while waiting or open_ids:
            for _ in range(min(len(waiting), self._most - len(open_ids))):
                (sent,) = self._grid.push_messages([waiting.popleft()])
                pushed.append(sent)
                open_ids.add(sent)
            got = {reply.metadata.reply_to_message_id: reply for reply in self._grid.pull_messages(open_ids)}
            self._replies |= got
            open_ids -= got.keys()
            time.sleep(0.02)
        return pushed

    def pull_messages(self, message_ids: Iterable[str]) -> list[Any]:
        """Hand over what was answered."""
        return [self._replies.pop(sent) for sent in message_ids if sent in self._replies]


def run_on_ray(folder: AggregatorFolder, homes: dict[str, Path], clock: Clock, actors: int) -> None:
    """Run the federation with Ray's actors as hospitals."""
    from flwr.app import Context, Message
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.simulation import run_simulation

    from aggregator.server_app import run_folder

    places = [str(homes[name]) for name in sorted(homes)]

    class Hospitals(ClientApp):
        """The hospitals' ClientApp; whose folder it works in follows from the simulated node's number."""

        def __call__(self, message: Message, context: Context) -> Message:
            from hospital_node.client_app import app

            home = places[int(str(context.node_config["partition-id"]))]
            ours = Context(context.run_id, context.node_id, {"home": home}, context.state, context.run_config)
            return app(message, ours)

    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:  # noqa: ARG001
        run_folder(cast(Grid, FewAtOnce(grid, _UNDER_WAY * actors)), folder, clock)

    resources = {"init_args": {"num_cpus": actors}, "client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server, Hospitals(), len(homes), backend_config=resources)  # type: ignore[arg-type]


def run_embedded(folder: AggregatorFolder, homes: dict[str, Path], clock: Clock, workers: int) -> None:
    """Run the federation in this process."""
    from aggregator.embedded_grid import EmbeddedGrid
    from aggregator.server_app import run_folder
    from hospital_node.client_app import app

    run_folder(EmbeddedGrid(app, homes, workers=workers), folder, clock)


def _processor_s(pid: str) -> float:
    """Processor time of a process and of the children that it has outlived."""
    try:
        return sum(map(int, stat_fields(pid)[11:15])) / os.sysconf("SC_CLK_TCK")
    except OSError:
        return 0.0


def measure(sample: Path, nodes: int, rounds: int, grid: str, workers: int) -> dict[str, float]:
    """Seconds of each part and peak memory of one federation, in a folder that is removed afterwards."""
    os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    # Ray's actors would give way to everything else on the machine.
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 Ray spells it so
    clock, run = Clock(), run_on_ray if grid == "ray" else run_embedded
    with tempfile.TemporaryDirectory(prefix="islet-simulation-") as folder:
        started = time.monotonic()
        hub, homes = build(Path(folder), sample, nodes, rounds)
        built = time.monotonic()
        watch = Watch(pause_s=1.0)
        run(hub, homes, clock, workers)
        watch.stop()
        ended = time.monotonic()
    if clock.admitted != [nodes] * rounds:
        raise RuntimeError(f"not every update was admitted: {clock.admitted}")
    return {
        "nodes": nodes,
        "build": built - started,
        "first": clock.closed[0] - built,
        "round": float(np.median(np.diff(clock.closed))),
        "processor": float(np.median(np.diff(clock.processor))),
        "run": ended - built,
        "peak_mb": watch.peak,
    }


def main() -> None:
    """Print a table; each size runs in a process of its own."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--nodes", type=int, nargs="+", default=[10, 100, 1000])
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--grid", choices=("ray", "embedded"), default="ray")
    options.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    options.add_argument("--sample", type=Path, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.rounds < 2:
        options.error("a later round needs two rounds at least")
    if given.sample:
        print(json.dumps(measure(given.sample, given.nodes[0], given.rounds, given.grid, given.workers)))
        return
    with tempfile.TemporaryDirectory(prefix="islet-sample-") as sample:
        import_sample(Path(sample))
        table(given, sample)


def table(given: argparse.Namespace, sample: str) -> None:
    """Print a row for each size, as it is measured."""
    print(
        "| hospitals | made in s | first round s | a later round s | processor time of it s |"
        " of it each hospital ms | whole run s | peak memory MB |"
    )
    print("|---|---|---|---|---|---|---|---|", flush=True)
    shared = ("--rounds", given.rounds, "--grid", given.grid, "--workers", given.workers)
    for nodes in given.nodes:
        asked = ("--sample", sample, "--nodes", nodes, *shared)
        got = json.loads(fresh_process("benchmarks.simulation", *map(str, asked)))
        print(
            f"| {nodes:,} | {got['build']:.0f} | {got['first']:.1f} | {got['round']:.1f} | {got['processor']:.1f} | "
            f"{1000 * got['processor'] / nodes:.0f} | {got['run']:.0f} | {got['peak_mb']:,.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
