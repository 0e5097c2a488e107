"""Every named artefact of a hostile hospital or aggregator is refused, with its code."""

from __future__ import annotations

from pathlib import Path

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from data_schemas.messages import SignedUpdate
from hospital_node import client_app
from pipeline.wire import from_record, to_record
from tests.conformance.case import Case
from tests.conformance.table import ALL, PAGE, with_table
from tests.conformance.tasks import BASE, decided, holding, made, train_task
from tests.hospital_node.small_node import fill, plan


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_each_artefact_is_refused_with_its_code(case: Case, tmp_path: Path) -> None:
    """The code on record is the expected one, and nothing else of the artefact had an effect."""
    assert case.observe(tmp_path) == case.code


def test_every_artefact_has_a_name_of_its_own_and_a_row_in_the_page() -> None:
    """At least forty, named once each; the table in docs/reliability.md is the list itself."""
    names = [case.name for case in ALL]
    assert len(set(names)) == len(names) >= 40
    page = PAGE.read_text(encoding="utf-8")
    assert page == with_table(page), "run: python -m tests.conformance"


def test_a_run_config_changes_nothing(tmp_path: Path) -> None:
    """Flower's run config, which nobody signs, cannot raise epsilon, name a seed, weaken the unit or move the home."""
    home = made(tmp_path)
    holding(home, decided(home, plan()))
    fill(home, 12)
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
    message = Message(to_record(train_task(plan()), {"weights": BASE}), 2, "train", ttl=60.0)
    message.metadata.__dict__["_message_id"] = "m1"
    hostile = {
        "home": str(tmp_path / "elsewhere"),
        "epsilon": 100.0,
        "noise-multiplier": 0.0,
        "unit": "window (weaker than patient)",
        "seed": 1,
        "rounds": 400,
    }
    context = Context(1, 2, {"home": str(home)}, RecordDict(), hostile)
    body, _ = from_record(client_app.app(message, context).content)

    spend = SignedUpdate.model_validate_json(body).manifest.spend
    assert (spend.event, spend.unit, spend.delta) == (plan().round_event, "patient", 1e-5)
    assert not (tmp_path / "elsewhere").exists()
