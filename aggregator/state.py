"""The aggregator's checkpoints: one per closed round, written atomically, found again after any crash.

Layout of the state folder:

    lock                    held (flock) while an aggregator works here
    sittings.lock           held while a standing run of sittings goes on
    <run>/round-00012.npz   weights, velocity, ring of the last models, base model, its velocity, updates of round 12
    <run>/sum-00012.npz     round 12 under secure aggregation, before its masks are removed (aggregator.transcript)
    <run>/round-00012.json  record of round 12 and the SHA-256 of the .npz; its appearance is the commit

Records are kept for ever; arrays are kept for the newest rounds only.
"""

from __future__ import annotations

import fcntl
import io
import logging
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from aggregator.aggregation import ServerState, model_hash
from aggregator.progress import RoundSummary
from data_schemas.canonical import bytes_hash, canonical_bytes, content_hash
from data_schemas.errors import NodeBusy, StorageFailed
from data_schemas.frozen import Frozen, later
from data_schemas.ledger import RejectedUpdate, SecureSum
from data_schemas.messages import Hex32, SignedUpdate
from pipeline.signing import write_durably

_KEEP_ARRAYS = 3
_RECORD_NAME = re.compile(r"round-(\d{5})\.json")
_log = logging.getLogger("islet.aggregator")


class RoundRecord(Frozen):
    """The JSON half of a checkpoint: enough to write the round's ledger entry again, byte for byte."""

    federation: str
    run: str
    round: int = Field(ge=1)
    plan_hash: Hex32
    base_model_hash: Hex32
    new_model_hash: Hex32
    velocity_hash: Hex32 | None = later(None)
    admitted: tuple[SignedUpdate, ...]
    rejected: tuple[RejectedUpdate, ...]
    sum: SecureSum | None = later(None)
    ledger_size: int
    ledger_root: Hex32
    summary: RoundSummary


class _Envelope(Frozen):
    """A record with the hashes that make a torn or altered file visible."""

    record: RoundRecord
    record_hash: Hex32
    arrays_hash: Hex32


@dataclass(frozen=True)
class Checkpoint:
    """A closed round: its record, the server's state after it, what it began with, and updates float32[n, D].

    base, base_velocity: weights and velocity before the round, float32[D]. Under secure aggregation there are no
    updates (n = 0) and their sum is total int64[D], which is empty otherwise.
    """

    record: RoundRecord
    server: ServerState
    base: NDArray[np.float32]
    base_velocity: NDArray[np.float32]
    updates: NDArray[np.float32]
    total: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))


@dataclass(frozen=True)
class StateFolder:
    """A state folder that this process holds; made by `hold`."""

    path: Path

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint durably: arrays first, then the record whose appearance commits the round.

        Raises StorageFailed when the disk refuses; the checkpoints before it are untouched.
        """
        folder, name = self._run_folder(checkpoint.record.run), f"round-{checkpoint.record.round:05d}"
        arrays = _pack(checkpoint)
        envelope = _Envelope(
            record=checkpoint.record,
            record_hash=content_hash(checkpoint.record),
            arrays_hash=bytes_hash(arrays),
        )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_durably(folder / f"{name}.npz", arrays)
            write_durably(folder / f"{name}.json", canonical_bytes(envelope))
            for old in sorted(folder.glob("round-*.npz"))[:-_KEEP_ARRAYS]:
                old.unlink()
        except OSError as error:
            raise StorageFailed(
                f"the checkpoint of round {checkpoint.record.round} could not be written: {error.strerror}",
                "free space or repair the disk, then run the same command again: it goes on from the round before",
            ) from error

    def newest(self, run: str) -> Checkpoint | None:
        """Find the newest whole checkpoint of a run; damaged ones are skipped with a warning."""
        for path in sorted(self._run_folder(run).glob("round-*.json"), reverse=True):
            checkpoint = _load(path, run)
            if checkpoint is not None:
                return checkpoint
            _log.warning("checkpoint %s is damaged or has no arrays; trying the one before", path.name)
        return None

    def summaries(self, run: str) -> tuple[RoundSummary, ...]:
        """Summaries of every closed round that can be read, in order."""
        paths = sorted(self._run_folder(run).glob("round-*.json"))
        envelopes = [_read_envelope(path) for path in paths]
        return tuple(envelope.record.summary for envelope in envelopes if envelope is not None)

    def _run_folder(self, run: str) -> Path:
        return self.path / run


@contextmanager
def hold(path: Path) -> Iterator[StateFolder]:
    """Hold a state folder (created at need) until the block ends. Raises NodeBusy when another process holds it."""
    busy = NodeBusy(
        "another aggregator works on this state folder",
        "wait until it has finished, or stop it; two aggregators must never share a folder",
    )
    with _locked(path / "lock", busy):
        for leftover in path.glob("*/.*.new"):  # a kill in the middle of a write left it
            leftover.unlink()
        yield StateFolder(path)


def hold_sittings(path: Path) -> AbstractContextManager[None]:
    """Hold a state folder's standing run of sittings until the block ends. Raises NodeBusy when there is one."""
    what_to_do = "leave it at that: what members sign is taken in, and a second run would only keep hospitals busy"
    return _locked(path / "sittings.lock", NodeBusy("a standing run holds the sittings already", what_to_do))


@contextmanager
def _locked(file: Path, busy: NodeBusy) -> Iterator[None]:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise busy from error
        yield


def _pack(checkpoint: Checkpoint) -> bytes:
    server, buffer = checkpoint.server, io.BytesIO()
    np.savez(
        buffer,
        weights=server.weights,
        velocity=server.velocity,
        recent=np.stack(server.recent),
        base=checkpoint.base,
        base_velocity=checkpoint.base_velocity,
        updates=checkpoint.updates,
        total=checkpoint.total,
    )
    return buffer.getvalue()


def _read_envelope(path: Path) -> _Envelope | None:
    try:
        envelope = _Envelope.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
    named = _RECORD_NAME.fullmatch(path.name)
    right_place = named is not None and int(named.group(1)) == envelope.record.round
    return envelope if right_place and content_hash(envelope.record) == envelope.record_hash else None


def _load(path: Path, run: str) -> Checkpoint | None:
    envelope = _read_envelope(path)
    if envelope is None or envelope.record.run != run:
        return None
    try:
        packed = path.with_suffix(".npz").read_bytes()
    except OSError:
        return None
    if bytes_hash(packed) != envelope.arrays_hash:
        return None
    with np.load(io.BytesIO(packed), allow_pickle=False) as arrays:
        server = ServerState(weights=arrays["weights"], velocity=arrays["velocity"], recent=tuple(arrays["recent"]))
        # A checkpoint of before it was kept: the round's scoring, if it is repeated, is refused by nodes, no more.
        base_velocity = arrays.get("base_velocity", np.zeros_like(server.velocity))
        begun = arrays["base"], base_velocity
        total = arrays.get("total", np.zeros(0, dtype=np.int64))
        checkpoint = Checkpoint(envelope.record, server, *begun, arrays["updates"], total)
    return checkpoint if model_hash(server.weights) == envelope.record.new_model_hash else None
