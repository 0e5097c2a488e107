"""Checkpoints: whole or not there, found again, guarded by one lock."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregator import state as module
from aggregator.aggregation import ServerState, model_hash
from aggregator.progress import RoundSummary
from aggregator.state import Checkpoint, RoundRecord, StateFolder, hold
from data_schemas.errors import NodeBusy, StorageFailed
from data_schemas.messages import TrainTask
from tests.aggregator import small_federation as small


def checkpoint(number: int, run: str = "run") -> Checkpoint:
    """Make a checkpoint whose arrays all tell the round's number."""
    weights = np.full(small.D, number, dtype=np.float32)
    task = TrainTask(federation="f", run=run, round=number, plan=small.PLAN, base_model_hash="0" * 64, deadline_unix=0)
    summary = RoundSummary(
        run=run,
        round=number,
        rounds=9,
        admitted=("alder",),
        rejected=(),
        update_norms={"alder": 1.0},
        cosine_to_mean={"alder": 1.0},
        model_hash=model_hash(weights),
        epsilon_by_node={"alder": 0.1 * number},
        seconds=0.5,
    )
    record = RoundRecord(
        federation="f",
        run=run,
        round=number,
        plan_hash="1" * 64,
        base_model_hash="2" * 64,
        new_model_hash=model_hash(weights),
        admitted=(small.signed_update("alder", task, weights),),
        rejected=(),
        ledger_size=number,
        ledger_root="3" * 64,
        summary=summary,
    )
    server = ServerState(weights, weights / 2, (weights - 1, weights))
    return Checkpoint(record, server, weights - 1, weights / 3, np.stack([weights, weights]))


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[StateFolder]:
    """Hold a state folder."""
    with hold(tmp_path / "state") as held:
        yield held


def same(a: Checkpoint | None, b: Checkpoint) -> bool:
    """Whether two checkpoints agree in every byte."""
    assert a is not None
    arrays = [(a.server.weights, b.server.weights), (a.server.velocity, b.server.velocity)]
    arrays += [(a.base, b.base), (a.updates, b.updates), *zip(a.server.recent, b.server.recent, strict=True)]
    return a.record == b.record and all(x.tobytes() == y.tobytes() and x.dtype == y.dtype for x, y in arrays)


def test_what_is_saved_comes_back(folder: StateFolder) -> None:
    """Record and arrays of the newest round are read back bit for bit; another run does not see them."""
    assert folder.newest("run") is None
    folder.save(checkpoint(1))
    folder.save(checkpoint(2))
    assert same(folder.newest("run"), checkpoint(2))
    assert folder.newest("other") is None


def test_records_are_kept_for_ever_and_arrays_for_the_newest_three_rounds(folder: StateFolder) -> None:
    """Six rounds leave six records and three arrays."""
    for number in range(1, 7):
        folder.save(checkpoint(number))
    assert sorted(path.name for path in folder.path.glob("run/*.npz")) == [f"round-0000{n}.npz" for n in (4, 5, 6)]
    assert [summary.round for summary in folder.summaries("run")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("suffix", [".json", ".npz"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "remove"])
def test_a_damaged_newest_checkpoint_gives_the_one_before(
    folder: StateFolder, caplog: pytest.LogCaptureFixture, suffix: str, damage: str
) -> None:
    """Truncated, altered, empty or missing halves are never used; the log names the file."""
    for number in (1, 2):
        folder.save(checkpoint(number))
    victim: Path = folder.path / "run" / f"round-00002{suffix}"
    data = bytearray(victim.read_bytes())
    match damage:
        case "truncate":
            victim.write_bytes(data[: len(data) // 2])
        case "flip":
            data[len(data) // 2] ^= 1
            victim.write_bytes(data)
        case "empty":
            victim.write_bytes(b"")
        case "remove":
            victim.unlink()
    assert same(folder.newest("run"), checkpoint(1))
    assert ("round-00002.json" in caplog.text) == ((suffix, damage) != (".json", "remove"))


def test_every_flipped_bit_of_a_record_is_noticed(folder: StateFolder) -> None:
    """No single bit of the record can change without the checkpoint being refused."""
    folder.save(checkpoint(1))
    victim = folder.path / "run" / "round-00001.json"
    original = victim.read_bytes()
    for position in range(0, len(original), 7):
        data = bytearray(original)
        data[position] ^= 1
        victim.write_bytes(data)
        assert folder.newest("run") is None, position


def test_a_checkpoint_under_another_rounds_name_is_not_used(folder: StateFolder) -> None:
    """A copied file cannot turn the clock back or forward."""
    folder.save(checkpoint(1))
    for suffix in (".json", ".npz"):
        source = folder.path / "run" / f"round-00001{suffix}"
        source.with_name(f"round-00009{suffix}").write_bytes(source.read_bytes())
    assert same(folder.newest("run"), checkpoint(1))


def test_a_crash_between_arrays_and_record_leaves_the_round_before(
    folder: StateFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record commits: new arrays without it change nothing, and saving again completes the round."""
    folder.save(checkpoint(1))
    write = module.write_durably

    def dies_at_the_record(path: Path, data: bytes, mode: int = 0o644) -> None:
        if path.suffix == ".json":
            raise KeyboardInterrupt
        write(path, data, mode)

    monkeypatch.setattr(module, "write_durably", dies_at_the_record)
    with pytest.raises(KeyboardInterrupt):
        folder.save(checkpoint(2))
    assert same(folder.newest("run"), checkpoint(1))
    monkeypatch.undo()
    folder.save(checkpoint(2))
    assert same(folder.newest("run"), checkpoint(2))


def test_a_disk_that_refuses_is_reported_and_keeps_what_was_there(folder: StateFolder) -> None:
    """A run folder that cannot be made (a file is in its place) is a StorageFailed with what to do."""
    folder.save(checkpoint(1))
    (folder.path / "blocked").write_text("")
    with pytest.raises(StorageFailed) as failed:
        folder.save(checkpoint(1, run="blocked"))
    assert "same command again" in failed.value.hint
    assert same(folder.newest("run"), checkpoint(1))


def _try_to_hold(path: Path, answer: Any) -> None:
    try:
        with hold(path):
            answer.put("held")
    except NodeBusy:
        answer.put("busy")


def test_the_folder_is_held_by_one_process_and_freed_at_its_end(tmp_path: Path) -> None:
    """Another process is refused while the folder is held and admitted afterwards."""
    spawn = multiprocessing.get_context("forkserver")
    answer = spawn.SimpleQueue()

    def ask() -> str:
        other = spawn.Process(target=_try_to_hold, args=(tmp_path, answer))
        other.start()
        other.join(60)
        return answer.get()

    with hold(tmp_path) as held:
        assert isinstance(held, StateFolder)
        assert ask() == "busy"
    assert ask() == "held"


def test_leftover_temporary_files_are_swept(tmp_path: Path) -> None:
    """A kill while a file was written leaves a temporary file; the next holder removes it."""
    leftover = tmp_path / "run" / ".round-00001.npz.0a1b2c3d.new"
    leftover.parent.mkdir()
    leftover.write_bytes(b"half")
    with hold(tmp_path):
        assert not leftover.exists()
