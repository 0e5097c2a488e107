"""How everything here is timed: one thread, variants in turn within one run, and medians of ratios to the first."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


def interleaved(
    variants: Mapping[str, Callable[[], object]], *, seconds: float, most: int = 40
) -> dict[str, tuple[float, float]]:
    """Median milliseconds of each variant, and median ratio to the first variant of the same turn.

    Every turn runs all variants once, so a slow moment of a shared machine meets them alike. After one turn that
    warms up, turns are taken for about `seconds`: three at least, `most` at most.
    """
    turns: list[dict[str, float]] = []
    until = time.perf_counter() + seconds
    while len(turns) < 4 or (time.perf_counter() < until and len(turns) <= most):
        turns.append({name: _milliseconds(run) for name, run in variants.items()})
    kept, first = turns[1:], next(iter(variants))
    return {
        name: (
            statistics.median(turn[name] for turn in kept),
            statistics.median(turn[name] / turn[first] for turn in kept),
        )
        for name in variants
    }


def _milliseconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - started)


def fresh_process(module: str, *arguments: str) -> str:
    """Last line printed by `python -m module arguments` in a new process; empty where it printed nothing."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    lines = done.stdout.strip().splitlines()
    return lines[-1] if lines else ""


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
