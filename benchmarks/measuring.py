"""How everything here is timed: one thread, variants in turn within one run, and medians of ratios to the first.

A step's time is the processor time of this process, so that other programs on the machine matter little; on a GPU it is
the clock's.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[1]


def interleaved(
    variants: Mapping[str, Callable[[], float | None]], *, seconds: float, slow: Sequence[str] = ()
) -> dict[str, tuple[float, float]]:
    """Median milliseconds of each variant, and median ratio to the first variant of the same turn.

    Every turn runs all variants once, so a slow moment of a shared machine meets them alike. After one turn that
    warms up there are three turns at least, and more for about `seconds`; the variants in `slow` take part in one.
    A variant that runs in another process returns the milliseconds that it took there; others return None.
    """
    for name, run in variants.items():
        if name not in slow:
            run()
    turns = [{name: _milliseconds(run) for name, run in variants.items()}]
    quick = {name: run for name, run in variants.items() if name not in slow}
    until = time.perf_counter() + seconds
    while len(turns) < 3 or time.perf_counter() < until:
        turns.append({name: _milliseconds(run) for name, run in quick.items()})
    first = next(iter(variants))
    return {
        name: (
            statistics.median(turn[name] for turn in turns if name in turn),
            statistics.median(turn[name] / turn[first] for turn in turns if name in turn),
        )
        for name in variants
    }


def _milliseconds(run: Callable[[], float | None]) -> float:
    import torch

    gpu = torch.cuda.is_available()
    now = time.perf_counter if gpu else time.process_time
    if gpu:
        torch.cuda.synchronize()
    started = now()
    elsewhere = run()
    if gpu:
        torch.cuda.synchronize()
    return 1e3 * (now() - started) if elsewhere is None else elsewhere


def restart_peak() -> float:
    """Let the record of this process's peak memory start again from what it holds now, in MB (Linux: see proc(5))."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return peak_megabytes()


def peak_megabytes() -> float:
    """Most memory this process held at a time, in MB: resource's ru_maxrss, which cannot be started again, in VmHWM."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(float(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024


class Watch(threading.Thread):
    """Watches this process and those it started, every `pause_s` seconds.

    peak: MB, what they share counted once.  own: without mapped files, which the system may take back.  others_cpu:
    seconds that the others used.
    """

    def __init__(self, pause_s: float = 0.2) -> None:
        super().__init__(daemon=True)
        self._pause_s = pause_s
        self.peak = self.own = 0.0
        self._cpu: dict[str, float] = {}
        self._ended = threading.Event()
        self.start()

    @property
    def others_cpu(self) -> float:
        """Seconds of processor time that the other processes used."""
        return sum(self._cpu.values())

    def run(self) -> None:
        """Look until stopped."""
        while not self._ended.wait(self._pause_s):
            self._look()

    def stop(self) -> None:
        """Look no more."""
        self._ended.set()
        self.join()

    def _look(self) -> None:
        peak = own = 0.0
        for process in family(str(os.getpid())):
            with suppress(OSError):
                rows = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="ascii").splitlines()[1:]
                size = {row.split()[0]: float(row.split()[1]) / 1024 for row in rows}
                peak, own = peak + size["Pss:"], own + size["Pss_Anon:"]
                if process != str(os.getpid()):
                    ticks = stat_fields(process)[11:13]
                    self._cpu[process] = sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
        self.peak, self.own = max(self.peak, peak), max(self.own, own)


def family(process: str) -> list[str]:
    """The process, and those that it and they started."""
    above = {}
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            above[path.name] = stat_fields(path.name)[1]
    found = [process]
    for one in found:
        found += [child for child, parent in above.items() if parent == one]
    return found


def stat_fields(process: str) -> list[str]:
    """Fields of proc(5) stat from the state on: what is before may hold spaces."""
    return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()


def fresh_process(module: str, *arguments: str, python: str = sys.executable) -> str:
    """Last line printed by `python -m module arguments` in a new process; empty where it printed nothing."""
    command = [python, "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    lines = done.stdout.strip().splitlines()
    return lines[-1] if lines else ""


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
