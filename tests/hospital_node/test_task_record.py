"""What the operator of a node sees: a structured log and counts, and no reading, name or secret in either."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from flwr.supercore.task_identity import TaskIdentity

from data_schemas.layout import load_layout
from data_schemas.messages import HelloTask, Refusal, RefusalCode
from hospital_node import local_round
from hospital_node.folder import NodeFolder
from hospital_node.importing import import_exports
from hospital_node.store import Store
from hospital_node.task_record import note, record, task_metrics
from pipeline.log_lines import MAX_BYTES, append
from pipeline.prometheus import render
from tests.hospital_node.small_node import FEDERATION, base_weights, fill, make_node, plan, train_task
from tests.hospital_node.test_client_app import asked

NAME, DEVICE = "Marquardt-Plantedname", "SN-PLANTED-99817"
PLANTED_MG_DL = (137.031, 251.047)


@pytest.fixture(autouse=True)
def identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's Message() reads the sender from a process-wide identity."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def lines(home: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (home / "reports" / "node.log").read_text().splitlines()]


def test_each_task_leaves_a_line_and_a_count(tmp_path: Path) -> None:
    """Action, outcome and seconds; a refusal is a warning; counts add up over processes because they are in a file."""
    home = make_node(tmp_path / "north")
    for _ in range(3):
        asked(home, "query.hello", HelloTask(federation=FEDERATION))
    asked(home, "query.hello", HelloTask(federation="elsewhere"))

    assert [line["outcome"] for line in lines(home)] == ["hello"] * 3 + ["unknown-federation"]
    assert [line["level"] for line in lines(home)] == ["info"] * 3 + ["warning"]
    text = render(task_metrics(home))
    assert 'islet_tasks_total{action="query.hello",outcome="hello"} 3' in text
    assert 'islet_tasks_total{action="query.hello",outcome="unknown-federation"} 1' in text


def test_no_reading_name_or_secret_is_in_log_or_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted in exports, in keys and in another library's error text: none of it is found in what operators see."""
    home, exports = make_node(tmp_path / "north"), tmp_path / "exports"
    exports.mkdir()
    times = [f"2026-01-01T{hour:02d}:{minute:02d}:00+00:00" for hour in range(3) for minute in (0, 5)]
    rows = [f"{NAME},{at},{PLANTED_MG_DL[number % 2]}" for number, at in enumerate(times)]
    (exports / f"{DEVICE}.csv").write_text("\n".join(["patient,time,glucose_mg_dl", *rows, ""]))
    with NodeFolder.open(home) as node:
        import_exports(exports, load_layout("canonical"), "UTC", node.pseudonym_key, Store(node.store))
        pseudonyms = Store(node.store).patients()
        secrets = [node.key.seed.hex(), node.pseudonym_key.hex()]
    fill(home, patients=12)
    weights = base_weights(plan())
    asked(home, "train", train_task(plan(), weights, deadline_unix=4e9), {"weights": weights})

    def fail(*_: object) -> None:
        raise ValueError(f"{NAME} {PLANTED_MG_DL} {secrets[0]}")

    monkeypatch.setattr(local_round, "train", fail)
    asked(home, "train", train_task(plan(), weights, deadline_unix=4e9), {"weights": weights})

    seen = (home / "reports" / "node.log").read_text() + render(task_metrics(home))
    assert pseudonyms
    planted = [NAME, DEVICE, *map(str, PLANTED_MG_DL), *secrets, *pseudonyms, "person-00"]
    assert [marker for marker in planted if marker in seen] == []
    assert "ValueError at" in seen


def test_damaged_counts_begin_again_and_an_unwritable_log_stops_nothing(tmp_path: Path) -> None:
    """What the operator sees is less important than what the node answers."""
    home = make_node(tmp_path / "north")
    (home / "reports" / "tasks.json").write_text("{")
    record(home, "train", Refusal(code=RefusalCode.NODE_BUSY), 0.5)
    assert 'outcome="node-busy"} 1' in render(task_metrics(home))

    record(tmp_path / "nowhere", "train", Refusal(code=RefusalCode.NODE_BUSY), 0.5)
    assert render(task_metrics(tmp_path / "nowhere")) == ""


def test_a_log_is_for_its_owner_and_does_not_grow_for_ever(tmp_path: Path) -> None:
    """Mode 0600, one line each whatever the message holds, and one old file beside the present one."""
    home = make_node(tmp_path / "north")
    note(home, "error", "two\nlines")
    log = home / "reports" / "node.log"
    assert log.stat().st_mode & 0o777 == 0o600
    assert len(lines(home)) == 1

    log.write_bytes(b"x" * (MAX_BYTES + 1))
    append(log, "new")
    assert log.read_text() == "new\n"
    assert (home / "reports" / "node.log.1").stat().st_size == MAX_BYTES + 1
