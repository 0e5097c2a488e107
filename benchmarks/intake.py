"""Importing the exports of 1,000 people with 90 days each, a day more of everybody, and training over that store.

python -m benchmarks.intake [--people 1000] [--days 90]

Makes its own exports in the canonical layout: a file for each person, and all people in one file in order of time. The
peer is pandas.read_csv of the same files, in the same run: what it takes to look at the text at all. Ratios are of
processor time, which other work on the machine changes little; time and memory are those of all processes together.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from pyarrow import compute
from pyarrow import csv as arrow_csv

from benchmarks.measuring import Watch, fresh_process, table

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


def write_one_export(folder: Path, people: int, days: int) -> None:
    """Write one file, in order of time: all people at the first step, all at the next, and so on."""
    folder.mkdir(parents=True)
    person, steps = np.arange(people), DAY_S // STEP_S
    names = pa.array([f"person-{number:05d}" for number in person])
    draw = np.random.default_rng(people)
    with (folder / "all.csv").open("wb") as file:
        for day in range(days):
            step = np.arange(day * steps, (day + 1) * steps)[:, None]
            second = (START_S + STEP_S * step + person % STEP_S).reshape(-1)
            wave = 140 + 40 * np.sin(step / (20 + person % 40)) + draw.normal(0, 3, (steps, people))
            columns = {
                "patient": names.take(pa.array(np.tile(person, steps))),
                "time": compute.strftime(pa.array(second, pa.timestamp("s")), format="%Y-%m-%dT%H:%M:%S"),
                "glucose_mg_dl": pa.array(wave.reshape(-1).round().astype(int)),
            }
            plain = arrow_csv.WriteOptions(include_header=day == 0, quoting_style="none", quoting_header="none")
            arrow_csv.write_csv(pa.table(columns), file, plain)


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
    cut = time.perf_counter()
    spec = ForecasterSpec()
    plan = LocalPlan(
        steps=20, learning_rate=0.1, sample_rate=0.05, noise_multiplier=1.0, max_grad_norm=1.0, windows_per_patient=4
    )
    train_steps(flatten(Forecaster(spec)), spec, windows, plan, len(windows.series.patients), SeededNoise(1))
    end, cpu = time.perf_counter(), time.process_time() - used
    return {"seconds": end - started, "cpu": cpu, "cutting": cut - started, "training": end - cut, "rows": len(windows)}


PARTS = {"read_csv": read_csv, "import": import_all, "train": train}


def main(arguments: list[str]) -> None:
    """Print the table, or one part's numbers as JSON."""
    if arguments[:1] == ["--part"]:
        watch = Watch()
        found = PARTS[arguments[1]](*map(Path, arguments[2:]))
        watch.stop()
        found["cpu"] += watch.others_cpu
        print(json.dumps({**found, "peak": watch.peak, "own": watch.own}))
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("--people", type=int, default=1000)
    parser.add_argument("--days", type=int, default=90)
    asked = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as home:
        measured(Path(home), asked.people, asked.days)


def measured(home: Path, people: int, days: int) -> None:
    """Make the exports, measure every part in a process of its own, and print the table."""
    write_exports(home / "all", people, 0, days)
    write_exports(home / "day", people, days, 1)
    rows = []
    for what, name in (("a file for each person", "all"), ("a day more", "day")):
        bare = part_of("read_csv", home / name)
        rows += [line(f"pandas.read_csv, {what}", bare, bare)]
        rows += [line(f"import, {what}", part_of("import", home / name, home / "store"), bare)]
    trained = part_of("train", home / "store")
    rows += [line("cutting windows and 20 private steps", trained, bare)]
    for name in ("all", "day", "store"):
        shutil.rmtree(home / name)
    write_one_export(home / "one", people, days)
    bare = part_of("read_csv", home / "one")
    rows += [line("pandas.read_csv, one file", bare, bare)]
    rows += [line("import, one file", part_of("import", home / "one", home / "store"), bare)]
    print(f"\n{people:,} people, {days} days\n")
    print(table(["what", "rows", "seconds", "of it CPU", "times read_csv", "peak MB", "own"], rows))
    print(f"\ncutting windows {trained['cutting']:.1f} s, 20 private steps over the store {trained['training']:.1f} s")


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


if __name__ == "__main__":
    main(sys.argv[1:])
