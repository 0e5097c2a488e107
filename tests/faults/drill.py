"""Seeded rounds under random faults: processes are killed, messages go astray, disks are full, checkpoints rot.

What befalls which start of which process, and which message, follows from the seed; how they interleave does not.

Whoever dies is started again, as `restart: always` does; whoever runs the aggregator gives the same command again after
it stopped with a reason. After the last round the files of all sides must tell one true history (history.check).
"""

from __future__ import annotations

import multiprocessing
import time
from collections import Counter
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.faults import history, house, processes
from tests.faults.processes import FINISHED, STOPPED, Doom

# After so many starts of the aggregator the faults end, so that a drill does.
MOST_STARTS = 20
_FAULTY_MESSAGES = 0.12


class Hung(AssertionError):
    """A federation neither finished nor stopped in its time."""


@dataclass
class Outcome:
    """What befell one federation before it finished. faults: how often what."""

    seed: int
    rounds: int
    starts: int
    seconds: float
    faults: Counter[str]


class Federation:
    """The processes of one federation under faults that follow from a seed."""

    def __init__(self, path: Path, seed: int) -> None:
        self.path, self.seed = path, seed
        self.started: Counter[str] = Counter()
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["tests.faults.processes"])
        self.running: dict[str, BaseProcess] = {}

    def run(self, seconds: float) -> None:
        """Start all, and whoever ends again, until the aggregator has finished. Raises Hung."""
        end = time.monotonic() + seconds
        try:
            for name in (*house.NAMES, "aggregator"):
                self.start(name)
            while True:
                sentinels = {process.sentinel: name for name, process in self.running.items()}
                ended = wait(list(sentinels), timeout=max(0.0, end - time.monotonic()))
                if not ended:
                    raise Hung(f"seed {self.seed}: nothing ended within {seconds:g} s; see {self.path}")
                for name in [sentinels[int(sentinel)] for sentinel in ended]:  # type: ignore[call-overload]
                    if name == "aggregator" and self.finished():
                        return
                    self.start(name)
        finally:
            for process in self.running.values():
                process.kill()
                process.join()

    def finished(self) -> bool:
        """Whether the aggregator ended well; a failure that nobody foresaw ends the drill."""
        process = self.running["aggregator"]
        process.join()
        if process.exitcode not in {FINISHED, STOPPED, -9}:
            log = (self.path / "aggregator.log").read_text()[-3000:]
            raise AssertionError(f"seed {self.seed}: the aggregator failed ({process.exitcode})\n{log}")
        if process.exitcode != FINISHED:
            self.spoil_checkpoint()
        return process.exitcode == FINISHED

    def start(self, name: str) -> None:
        """Start a process, doomed or not."""
        self.started[name] += 1
        doom = self.doom(name, 150 if name == "aggregator" else 90)
        if name == "aggregator":
            faults = 0.0 if self.calm else _FAULTY_MESSAGES
            draw = f"{self.seed} {self.started[name]}"
            process = self._context.Process(target=processes.aggregator, args=(self.path, draw, faults, doom))
        else:
            process = self._context.Process(target=processes.hospital, args=(self.path, name, doom))
        process.start()
        self.running[name] = process

    @property
    def calm(self) -> bool:
        """Whether the faults are over."""
        return self.started["aggregator"] > MOST_STARTS

    def doom(self, name: str, span: int) -> Doom:
        """Draw what this start of a process will meet within its first `span` stages."""
        draw = processes.seeded(f"{self.seed} {name} {self.started[name]}")
        if self.calm or draw.random() < 0.05:
            return Doom()
        return Doom(stage=draw.randint(1, span), full_disk=draw.random() < 0.3)

    def spoil_checkpoint(self) -> None:
        """Damage the newest checkpoint now and then, while nobody holds it: tear it, flip a bit, or lose its arrays."""
        draw = processes.seeded(f"{self.seed} checkpoint {self.started['aggregator']}")
        records = sorted((self.path / "aggregator" / "state").glob("*/round-*.json"))
        if not records or draw.random() < 0.7:
            return
        record, arrays = records[-1], records[-1].with_suffix(".npz")
        how = draw.choice(["torn arrays", "torn record", "flipped bit", "lost arrays"])
        target = record if how in {"torn record", "flipped bit"} else arrays
        if not target.exists() or not target.stat().st_size:
            return  # spoilt before
        data = bytearray(target.read_bytes())
        if how == "flipped bit":
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        else:
            del data[draw.randrange(len(data)) :]
        target.write_bytes(bytes(data))
        if how == "lost arrays":
            target.unlink()
        processes.note(self.path, f"checkpoint: {how}")


def drill(template: Path, path: Path, seed: int, rounds: int, seconds: float = 900.0) -> Outcome:
    """Run one federation under the faults of a seed and check its history."""
    started = time.monotonic()
    house.build(template, path, rounds)
    federation = Federation(path, seed)
    federation.run(seconds)
    history.check(path, rounds)
    diary = (path / "diary").read_text().splitlines() if (path / "diary").exists() else []
    faults = Counter(_kind(line) for line in diary)
    return Outcome(seed, rounds, federation.started["aggregator"], time.monotonic() - started, faults)


def _kind(line: str) -> str:
    who, _, what = line.partition(": ")
    if not what:
        return line
    side = who if who in {"aggregator", "checkpoint"} else "hospital"
    return f"{side}: {'stopped with a reason' if what.startswith('stopped') else what}"
