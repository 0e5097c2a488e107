"""The hospital's switch: while it is off nothing about patients is answered, and leaving is a signed word."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_schemas.canonical import canonical_bytes
from data_schemas.errors import BadInput, Tampered
from data_schemas.messages import HelloTask, Refusal, RefusalCode, SignedUpdate
from hospital_node.participation import FILE, STATEMENT, leave, left_with, participation, pause, resume
from pipeline.signing import verify
from tests.hospital_node.small_node import FEDERATION, base_weights, fill, make_node, plan, train_task
from tests.hospital_node.test_client_app import FAR, Reply, asked, identity
from tests.hospital_node.test_scoring import score_task, updates_for

__all__ = ["identity"]
NOW = 1_800_000_000.0


@pytest.fixture
def home(tmp_path: Path) -> Path:
    path = make_node(tmp_path / "north")
    fill(path, patients=3)
    return path


def train(home: Path) -> Reply:
    weights = base_weights(plan())
    return asked(home, "train", train_task(plan(), weights, deadline_unix=FAR), {"weights": weights})[0]


def test_a_paused_node_refuses_every_task_about_patients(home: Path) -> None:
    """Training, scoring and credit are refused with node-paused; who asked, and the refusal, are on record."""
    pause(home, NOW, "key:1")
    base, updates = base_weights(plan()), updates_for(plan())
    assert train(home) == Refusal(code=RefusalCode.NODE_PAUSED)
    scored = asked(home, "evaluate", score_task(plan(), base, updates), {"base": base, "updates": updates})[0]
    assert scored == Refusal(code=RefusalCode.NODE_PAUSED)
    assert asked(home, "query.hello", HelloTask(federation=FEDERATION))[0].kind == "hello"
    tasks = [json.loads(line) for line in (home / "reports" / "tasks.jsonl").read_text().splitlines()]
    assert [task["outcome"] for task in tasks] == ["node-paused", "node-paused"]
    assert tasks[0]["operation"].startswith("train round 1 of ")


def test_a_resumed_node_trains_again(home: Path) -> None:
    """Pausing loses nothing: after resuming the same task is answered."""
    pause(home, NOW, "key:1")
    resume(home, NOW + 60, "key:1")
    assert isinstance(train(home), SignedUpdate)


def test_leaving_is_signed_and_final(home: Path) -> None:
    """The statement verifies under the node's key, is the same when asked for again, and cannot be taken back."""
    signed = leave(home, NOW, "key:1")
    assert verify(signed.leaving.public_key, canonical_bytes(signed.leaving), signed.signature)
    assert leave(home, NOW + 99, "key:1") == signed == left_with(home)
    assert train(home) == Refusal(code=RefusalCode.NODE_LEFT)
    for turn in (pause, resume):
        with pytest.raises(BadInput, match="has left"):
            turn(home, NOW, "key:1")
    assert participation(home).state == "left"


def test_a_kill_between_statement_and_switch_is_completed(home: Path) -> None:
    """Where only the statement reached the disk, leaving again turns the switch and signs nothing new."""
    signed = leave(home, NOW, "key:1")
    (home / FILE).unlink()
    assert leave(home, NOW + 1, "key:1") == signed
    assert participation(home).state == "left"


@pytest.mark.parametrize("content", [b"", b"{", b'{"state": "perhaps"}', b"[]"])
def test_a_damaged_switch_stops_the_node(home: Path, content: bytes) -> None:
    """A switch that cannot be read is not taken for one that is on."""
    (home / FILE).write_bytes(content)
    with pytest.raises(Tampered):
        participation(home)
    assert train(home) == Refusal(code=RefusalCode.INTERNAL)
    (home / STATEMENT).write_bytes(content)
    with pytest.raises(Tampered):
        left_with(home)
