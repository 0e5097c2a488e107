"""scores.db: per-patient Shapley vectors of each scored round. It holds one line per held-out person and never leaves.

Lost or damaged it costs credit, not privacy: whatever it holds, a release clips every patient's sum and is accounted.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_schemas.errors import StorageFailed

Vector = NDArray[np.float64]
_ROUNDS = """CREATE TABLE IF NOT EXISTS rounds
 (run TEXT, epoch INTEGER, round INTEGER, task TEXT, nodes TEXT, PRIMARY KEY (run, epoch, round))"""
_SCORES = """CREATE TABLE IF NOT EXISTS scores
 (run TEXT, epoch INTEGER, round INTEGER, patient TEXT, shapley BLOB, PRIMARY KEY (run, epoch, round, patient))"""


@dataclass(frozen=True)
class Place:
    """Which round of which credit epoch a vector belongs to."""

    run: str
    epoch: int
    round: int

    @property
    def key(self) -> tuple[str, int, int]:
        """The same as a row key."""
        return self.run, self.epoch, self.round


def is_scored(path: Path, place: Place, task: str) -> bool:
    """Whether exactly this task was scored before."""
    with _open(path) as db:
        row = db.execute("SELECT task FROM rounds WHERE run = ? AND epoch = ? AND round = ?", place.key).fetchone()
    return row is not None and row[0] == task


def put(path: Path, place: Place, task: str, nodes: Sequence[str], by_patient: Mapping[str, Vector]) -> None:
    """Store a round's vectors float64[n] by patient, in place of any earlier ones of the same round."""
    with _open(path) as db:
        db.execute("BEGIN IMMEDIATE")
        for table in ("rounds", "scores"):
            db.execute(f"DELETE FROM {table} WHERE run = ? AND epoch = ? AND round = ?", place.key)  # noqa: S608
        db.execute("INSERT INTO rounds VALUES (?, ?, ?, ?, ?)", (*place.key, task, json.dumps(list(nodes))))
        rows = [(*place.key, patient, vector.astype("<f8").tobytes()) for patient, vector in by_patient.items()]
        db.executemany("INSERT INTO scores VALUES (?, ?, ?, ?, ?)", rows)
        db.execute("COMMIT")


def epoch_sums(path: Path, run: str, epoch: int, nodes: Sequence[str]) -> Vector:
    """Sum of each patient's vectors over the epoch's rounds: float64[P, n], in the order of `nodes`.

    A node that took no part in a round has 0 there.
    """
    with _open(path) as db:
        orders = dict(
            db.execute("SELECT round, nodes FROM rounds WHERE run = ? AND epoch = ?", (run, epoch)).fetchall()
        )
        rows = db.execute(
            "SELECT patient, round, shapley FROM scores WHERE run = ? AND epoch = ? ORDER BY round, patient",
            (run, epoch),
        ).fetchall()
    sums: dict[str, Vector] = {}
    for patient, round_number, blob in rows:
        total = sums.setdefault(patient, np.zeros(len(nodes)))
        scored = dict(zip(json.loads(orders[round_number]), np.frombuffer(blob, dtype="<f8"), strict=True))
        total += np.array([scored.get(node, 0.0) for node in nodes])
    return np.stack([sums[p] for p in sorted(sums)]) if sums else np.zeros((0, len(nodes)))


@contextmanager
def _open(path: Path) -> Iterator[sqlite3.Connection]:
    try:
        if not path.exists():
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
        with closing(sqlite3.connect(path, isolation_level=None, timeout=5.0)) as db:
            db.execute("PRAGMA synchronous=FULL")
            for statement in (_ROUNDS, _SCORES):
                db.execute(statement)
            yield db
    except (sqlite3.Error, OSError) as error:
        raise StorageFailed(
            "scores.db cannot be used", "Free some space; if the file is damaged, remove it: its rounds earn no credit."
        ) from error
