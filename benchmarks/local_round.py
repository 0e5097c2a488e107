"""A whole training round at a node of 50 patients with 60 days each, and where its time goes.

python -m benchmarks.local_round
python -m benchmarks.local_round --node FOLDER     one node's rounds in this process, as JSON
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.measuring import ROOT, table
from data_schemas.canonical import bytes_hash
from data_schemas.messages import Refusal, TrainTask
from data_schemas.plan import TrainingPlan
from data_schemas.reading import COLUMNS, QualityReport, ValidReadings
from hospital_node import cohorts, local_round
from hospital_node.folder import NodeFolder
from hospital_node.settings import NodeSettings
from hospital_node.store import Store
from pipeline.plans import load_plan

PATIENTS, DAYS, NODES = 50, 60, 6
PLAN = ROOT / "data_schemas" / "plans" / "demo.toml"


def experiment() -> TrainingPlan:
    """Return the demo's plan with the whole network trained and 20 steps a round."""
    plan = load_plan(PLAN)
    local = plan.local.model_copy(update={"steps_per_round": 20, "trainable": "all"})
    # as much noise as makes a few rounds affordable whatever the number of steps
    privacy = plan.privacy.model_copy(update={"noise_multiplier": 20.0})
    return plan.model_copy(update={"local": local, "privacy": privacy, "seed": None})


def make_node(folder: Path) -> None:
    """Make a node whose store holds synthetic readings, one every five minutes."""
    settings = NodeSettings(
        name=folder.name,
        federation="bench",
        declared_training_patients=PATIENTS,
        declared_heldout_patients=2,
        heldout_fraction=0.2,
        min_patients=2,
        max_epsilon_training=1000.0,
        max_epsilon_heldout=1000.0,
        seed=1,
    )
    NodeFolder.create(folder, settings)
    fill_store(folder / "store", PATIENTS, DAYS)


def fill_store(folder: Path, people: int, days: int) -> None:
    """Make a store of synthetic readings, one every five minutes."""
    draw, minutes = np.random.default_rng(1), 5 * np.arange(days * 288)
    starts = pd.Timestamp("2026-01-01", tz="UTC") + pd.to_timedelta(minutes, unit="min")
    frames = [
        pd.DataFrame(
            {
                "patient": f"person-{number:03d}",
                "measured_at": starts,
                "zone": "UTC",
                "glucose_mg_dl": 140 + 40 * np.sin(minutes / draw.uniform(20, 60)) + draw.normal(0, 3, len(minutes)),
                "flags": 0,
                "source": "0" * 64,
            }
        )
        for number in range(people)
    ]
    frame = pd.concat(frames, ignore_index=True)
    frame = frame.assign(row=np.arange(len(frame))).reindex(columns=list(COLUMNS)).astype(COLUMNS)
    report = QualityReport(len(frame), len(frame), {}, {}, {}, people)
    nothing = frame.iloc[:0].assign(rule=pd.Series(dtype="str"))
    Store(folder).add(ValidReadings(frame), nothing, report, ["0" * 64])


def one_round(folder: Path, plan: TrainingPlan, number: int) -> float:
    """Seconds of one round from message to signed update, at most one node folder at a time."""
    from pipeline.forecaster import Forecaster, ForecasterSpec, flatten

    weights = flatten(Forecaster(ForecasterSpec(hidden_size=plan.model.hidden_size)))
    task = TrainTask(
        federation="bench",
        run=f"run-{time.time_ns()}",
        round=number,
        plan=plan,
        base_model_hash=bytes_hash(weights.tobytes()),
        deadline_unix=time.time() + 3600,
    )
    started = time.perf_counter()
    with NodeFolder.open(folder) as node:
        answer = local_round.train(node, task, weights, time.time())
    if isinstance(answer, Refusal):
        raise TypeError(f"the node refused: {answer.code}")
    return time.perf_counter() - started


def node_times(folder: Path) -> dict[str, float]:
    """Seconds of one node's work in this process: imports, reading, first and later rounds, and the bare arithmetic."""
    plan, started = experiment(), time.perf_counter()
    import pipeline.private_training  # noqa: F401

    got = {"imports": time.perf_counter() - started}
    with NodeFolder.open(folder) as node:
        started = time.perf_counter()
        windows = cohorts.training_windows(node, plan.model.history_minutes)
        got["reading and cutting"] = time.perf_counter() - started
        started = time.perf_counter()
        cohorts.training_windows(node, plan.model.history_minutes)
        got["the same again"] = time.perf_counter() - started
    got["first round"] = one_round(folder, plan, 1)
    rounds = [_both_clocks(lambda: one_round(folder, plan, 1)) for _ in range(5)]
    bare = [_both_clocks(lambda: _arithmetic(plan, windows)) for _ in range(5)]
    for what, pairs in (("later round", rounds), ("of it arithmetic", bare)):
        got[what] = statistics.median(clock for clock, _ in pairs)
        got[f"{what}, processor time"] = statistics.median(cpu for _, cpu in pairs)
    return got


def _both_clocks(run: Callable[[], float]) -> tuple[float, float]:
    """Seconds by the clock, as `run` says, and of processor time, which other programs hardly change."""
    started = time.process_time()
    return run(), time.process_time() - started


def _arithmetic(plan: TrainingPlan, windows: Any) -> float:
    """Seconds of the same steps' gathering, forward and backward passes and sums, in a bare loop."""
    import torch

    from pipeline.book_keeping import Book, add_clipped_gradients, parts_of
    from pipeline.forecaster import Forecaster, ForecasterSpec, window_losses

    torch.set_num_threads(1)
    model = Forecaster(ForecasterSpec(hidden_size=plan.model.hidden_size))
    model.tapped, model.book = True, Book()
    for head in (model.mean_head, model.quantile_head):
        model.book.watch(head)
    draw, k = np.random.default_rng(0), plan.local.windows_per_patient
    joined = round(plan.privacy.sample_rate * len(windows.series.patients))
    started = time.perf_counter()
    for _ in range(plan.local.steps_per_round):
        batch = windows.gather(draw.choice(windows.anchors, k * joined))
        x, y, mask, last = (
            torch.from_numpy(a.reshape(k, joined, *a.shape[1:])) for a in (batch.x, batch.y, batch.mask, batch.last)
        )
        for part in parts_of(x, model.spec.hidden_size):
            mean, quantiles = model.residuals(x[:, part])
            losses = window_losses(mean, quantiles, y[:, part] - last[:, part].unsqueeze(-1), mask[:, part])
            add_clipped_gradients(model.book.take(), losses.mean(dim=0).sum(), plan.privacy.max_grad_norm)
    return time.perf_counter() - started


def threads_seconds(folders: list[Path], workers: int) -> float:
    """Seconds until every node has trained one round, `workers` threads at a time in this process."""
    plan, waiting = experiment(), list(folders)

    def work() -> None:
        while waiting:
            one_round(waiting.pop(), plan, 1)

    threads = [threading.Thread(target=work) for _ in range(workers)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - started


def processes(folders: list[Path]) -> list[dict[str, float]]:
    """`node_times` of every node, each in a process of its own, all at once."""
    command = [sys.executable, "-m", "benchmarks.local_round", "--node"]
    running = [
        subprocess.Popen([*command, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True) for folder in folders
    ]
    return [json.loads(process.communicate()[0].strip().splitlines()[-1]) for process in running]


def main(arguments: list[str]) -> None:
    """Print both tables, or one node's times."""
    if arguments[:1] == ["--node"]:
        print(json.dumps(node_times(Path(arguments[1]))))
        return
    with tempfile.TemporaryDirectory() as home:
        folders = [Path(home) / f"node-{number}" for number in range(NODES)]
        for folder in folders:
            make_node(folder)
        alone = processes(folders[:1])[0]
        together = processes(folders)
        rows = [
            [what, f"{seconds:.2f}", f"{statistics.median(other[what] for other in together):.2f}"]
            for what, seconds in alone.items()
        ]
        print(f"\nA round of 20 steps at a node with {PATIENTS} patients of {DAYS} days, in seconds\n")
        print(table(["what", "one node alone", f"each of {NODES} processes at once"], rows))
        threads_seconds(folders, 1)  # reads the stores
        pairs = [(threads_seconds(folders, 1), threads_seconds(folders, 2)) for _ in range(3)]
        ratio = statistics.median(one / two for one, two in pairs)
        print(f"\n{NODES} nodes in one process: {pairs[0][0]:.2f} s with one worker")
        print(f"Two workers: {ratio:.2f} times as fast")


if __name__ == "__main__":
    main(sys.argv[1:])
