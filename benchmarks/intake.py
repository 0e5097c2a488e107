"""Importing the exports of 1,000 people with 90 days each, a day more of everybody, and training over that store.

python -m benchmarks.intake [--people 1000] [--days 90]

Makes its own exports, one file for each person in the canonical layout. The peer is pandas.read_csv of the same files,
in the same run: what it takes to look at the text at all. Ratios are of processor time, which other work on the machine
changes little.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from pyarrow import compute
from pyarrow import csv as arrow_csv

from benchmarks.measuring import fresh_process, peak_megabytes, table

STEP_S, DAY_S = 300, 86_400
START_S = 1_704_067_200  # 2024-01-01
KEY = b"k" * 32


def write_exports(folder: Path, people: int, first_day: int, days: int) -> None:
    """Write one file for each person: a reading every five minutes, every person's clock a few seconds off."""
    folder.mkdir(parents=True)
    count = days * DAY_S // STEP_S
    for number in range(people):
        draw = np.random.default_rng([number, first_day])
        second = START_S + number % 300 + first_day * DAY_S + STEP_S * np.arange(count)
        wave = 140 + 40 * np.sin(np.arange(count) / draw.uniform(20, 60)) + draw.normal(0, 3, count)
        stamps = compute.strftime(pa.array(second, pa.timestamp("s")), format="%Y-%m-%dT%H:%M:%S")
        columns = {
            "patient": pa.array([f"person-{number:05d}"] * count),
            "time": stamps,
            "glucose_mg_dl": pa.array(wave.round().astype(int)),
        }
        arrow_csv.write_csv(
            pa.table(columns),
            folder / f"{number:05d}.csv",
            arrow_csv.WriteOptions(quoting_style="none", quoting_header="none"),
        )


def read_csv(folder: Path) -> dict[str, float]:
    """Seconds of pandas.read_csv of every file, one after the other."""
    started, used = time.perf_counter(), time.process_time()
    rows = sum(len(pd.read_csv(path)) for path in sorted(folder.glob("*.csv")))
    return {"seconds": time.perf_counter() - started, "cpu": time.process_time() - used, "rows": rows}


def import_all(folder: Path, store: Path) -> dict[str, float]:
    """Seconds of one import, imports of libraries included."""
    started, used = time.perf_counter(), time.process_time()
    from data_schemas.layout import load_layout
    from hospital_node.importing import import_exports
    from hospital_node.store import Store

    report = import_exports(folder, load_layout("canonical"), "UTC", KEY, Store(store))
    seconds, cpu = time.perf_counter() - started, time.process_time() - used
    return {"seconds": seconds, "cpu": cpu, "rows": report.accepted}


def train(store: Path) -> dict[str, float]:
    """Seconds to cut the windows, and of 20 private steps over them."""
    import torch

    from hospital_node.scratch import scratch
    from hospital_node.store import Store
    from pipeline.forecaster import Forecaster, ForecasterSpec, flatten
    from pipeline.noise import SeededNoise
    from pipeline.private_training import LocalPlan, train_steps
    from pipeline.windows import WindowSpec, cut_windows

    torch.set_num_threads(1)
    started, used = time.perf_counter(), time.process_time()
    windows = cut_windows(Store(store).series(), WindowSpec(), allocate=scratch(store))
    cut, used = time.perf_counter(), time.process_time() - used
    spec = ForecasterSpec()
    plan = LocalPlan(
        steps=20, learning_rate=0.1, sample_rate=0.05, noise_multiplier=1.0, max_grad_norm=1.0, windows_per_patient=4
    )
    train_steps(flatten(Forecaster(spec)), spec, windows, plan, len(windows.series.patients), SeededNoise(1))
    return {"seconds": cut - started, "cpu": used, "training": time.perf_counter() - cut, "rows": len(windows)}


def main(arguments: list[str]) -> None:
    """Print the table, or one part's numbers as JSON."""
    if arguments[:1] == ["--part"]:
        part = {"read_csv": read_csv, "import": import_all, "train": train}[arguments[1]]
        memory = OwnMemory()
        print(json.dumps({**part(*map(Path, arguments[2:])), "peak": peak_megabytes(), "own": memory.peak}))
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("--people", type=int, default=1000)
    parser.add_argument("--days", type=int, default=90)
    asked = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as home:
        all_days, day, store = Path(home) / "all", Path(home) / "day", Path(home) / "store"
        write_exports(all_days, asked.people, 0, asked.days)
        write_exports(day, asked.people, asked.days, 1)
        bare = part_of("read_csv", all_days)
        rows = [line("pandas.read_csv", bare, bare), line("import", part_of("import", all_days, store), bare)]
        bare_day = part_of("read_csv", day)
        rows += [
            line("pandas.read_csv, a day", bare_day, bare_day),
            line("a day more", part_of("import", day, store), bare_day),
        ]
        trained = part_of("train", store)
        rows += [line("cutting windows", trained, bare)]
        size = sum(path.stat().st_size for path in store.rglob("*") if path.is_file()) / 2**20
    print(f"\n{asked.people:,} people, {asked.days} days; the store has {size:,.0f} MB\n")
    print(table(["what", "rows", "seconds", "of it CPU", "times read_csv", "peak MB", "own"], rows))
    print(f"\n20 private steps over the store: {trained['training']:.1f} s")


def part_of(name: str, *paths: Path) -> dict[str, float]:
    """One part's numbers, from a process of its own."""
    found: dict[str, float] = json.loads(fresh_process("benchmarks.intake", "--part", name, *map(str, paths)))
    return found


def line(what: str, part: dict[str, float], bare: dict[str, float]) -> list[str]:
    """A row of the table."""
    ratio = part["cpu"] / bare["cpu"]
    return [
        what,
        f"{part['rows']:,.0f}",
        f"{part['seconds']:.1f}",
        f"{part['cpu']:.1f}",
        f"{ratio:.1f}",
        f"{part['peak']:,.0f}",
        f"{part['own']:,.0f}",
    ]


class OwnMemory(threading.Thread):
    """Watches how much memory is this process's own: mapped files aside, which the system may take back."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0.0
        self.start()

    def run(self) -> None:
        """Look ten times a second."""
        while True:
            status = Path("/proc/self/status").read_text(encoding="ascii")
            anonymous = next(float(li.split()[1]) for li in status.splitlines() if li.startswith("RssAnon"))
            self.peak = max(self.peak, anonymous / 1024)
            time.sleep(0.1)


if __name__ == "__main__":
    main(sys.argv[1:])
