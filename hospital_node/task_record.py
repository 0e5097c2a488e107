"""What a node tells its operator about tasks: a line of the structured log for each, and counts for /metrics.

    reports/node.log      one JSON line a task and a failure; never sent
    reports/tasks.json    counts by action and outcome, seconds, privacy spent: what /metrics shows

Outcomes are kinds of reply and refusal codes. No count depends on a patient's data: a node answers by settings, plan
and budget only.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from pathlib import Path
from typing import Any

from data_schemas.frozen import Frozen
from data_schemas.messages import PrivacySpend, Refusal, SignedRelease, SignedUpdate
from data_schemas.secure import MaskedUpdate
from pipeline.log_lines import append, log_line
from pipeline.prometheus import Metric

LOG, TASKS = Path("reports") / "node.log", Path("reports") / "tasks.json"
_MAX_BYTES = 64 * 1024


def note(home: Path, level: str, message: str, **more: object) -> None:
    """Add a line to the node's own log."""
    append(home / LOG, log_line("clientapp", level, message.replace("\n", " "), **more))


def record(home: Path, action: str, body: Frozen, seconds: float) -> None:
    """Note an answered task in the log and in the counts. A record that cannot be written stops nothing."""
    outcome = body.code.value if isinstance(body, Refusal) else str(getattr(body, "kind", "reply"))
    body = body.signed if isinstance(body, MaskedUpdate) else body
    number = {"round": body.manifest.round, "run": body.manifest.run} if isinstance(body, SignedUpdate) else {}
    level = "warning" if isinstance(body, Refusal) else "info"
    note(home, level, f"{action}: {outcome}", action=action, outcome=outcome, seconds=round(seconds, 3), **number)
    try:
        _count(home / TASKS, action, outcome, seconds, _spent(body))
    except OSError:
        return


def task_metrics(home: Path) -> tuple[Metric, ...]:
    """Counts of what this node has answered, for /metrics."""
    try:
        held = _parsed((home / TASKS).read_bytes())
    except OSError:
        held = _parsed(b"")
    answered = [({"action": a, "outcome": o}, float(n)) for a, by in held["answered"].items() for o, n in by.items()]
    return (
        Metric("islet_tasks_total", "counter", "Answered tasks of the federation.", answered),
        Metric(
            "islet_task_seconds_total",
            "counter",
            "Time spent on tasks.",
            [({"action": action}, value) for action, value in held["seconds"].items()],
        ),
        Metric(
            "islet_epsilon_spent",
            "gauge",
            "Patient-level epsilon spent at delta 1e-5, as last released.",
            [({"cohort": cohort}, value) for cohort, value in held["epsilon"].items()],
        ),
        Metric(
            "islet_last_task_timestamp_seconds",
            "gauge",
            "When the last task was answered.",
            [({}, held["at"])] if held["at"] else [],
        ),
    )


def _spent(body: Frozen) -> tuple[str, PrivacySpend] | None:
    if isinstance(body, SignedUpdate):
        return "training", body.manifest.spend
    if isinstance(body, SignedRelease) and body.release.spend is not None:
        return "heldout", body.release.spend
    return None


def _count(path: Path, action: str, outcome: str, seconds: float, spent: tuple[str, PrivacySpend] | None) -> None:
    """Count under the file's own lock: a node that is busy answers too, and then two processes count."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        held = _parsed(os.pread(descriptor, _MAX_BYTES, 0))
        by = held["answered"].setdefault(action, {})
        by[outcome] = by.get(outcome, 0) + 1
        held["seconds"][action] = held["seconds"].get(action, 0.0) + seconds
        held["at"] = time.time()
        if spent is not None:
            held["epsilon"][spent[0]] = spent[1].epsilon_after
        data = json.dumps(held).encode()
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, data, 0)
    finally:
        os.close(descriptor)


def _parsed(data: bytes) -> dict[str, Any]:
    """Counts of a file; of a damaged one none: Prometheus takes that for a restart."""
    try:
        held = json.loads(data)
        return {"answered": held["answered"], "seconds": held["seconds"], "epsilon": held["epsilon"], "at": held["at"]}
    except (ValueError, KeyError, TypeError):
        return {"answered": {}, "seconds": {}, "epsilon": {}, "at": 0.0}
