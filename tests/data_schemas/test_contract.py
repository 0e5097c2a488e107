"""The shared words: units, canonical bytes, plans and messages."""

import os

import pytest
from pydantic import ValidationError

import data_schemas
from data_schemas.canonical import canonical_bytes, content_hash
from data_schemas.errors import BadInput, CheckFailed, IsletError, Tampered
from data_schemas.frozen import Frozen
from data_schemas.ledger import RoundEntry
from data_schemas.messages import TrainTask
from data_schemas.plan import PrivacyEvent, TrainingPlan
from data_schemas.units import mg_dl, mmol_l
from tests.hospital_node import small_node

PLAN = {
    "name": "trial",
    "model": {"history_minutes": 120, "hidden_size": 8},
    "rounds": 4,
    "local": {"steps_per_round": 3, "windows_per_patient": 4, "learning_rate": 0.1, "trainable": "all"},
    "server": {"learning_rate": 1.0, "momentum": 0.0, "average_last_rounds": 2},
    "privacy": {"epsilon": 8, "max_grad_norm": 0.1, "sample_rate": 0.5, "noise_multiplier": 1.5},
    "credit": {
        "rounds_per_epoch": 3,
        "windows_per_patient": 8,
        "clip_mg_dl": 0.5,
        "noise_multiplier": 1.0,
        "epsilon": 4,
        "pot_micro_credits_per_round": 1_000_000,
    },
}


def test_units_round_trip() -> None:
    """Converting to mmol/L and back gives the same mg/dL."""
    assert mg_dl(mmol_l(180.0)) == pytest.approx(180.0)
    assert mg_dl(10.0) == pytest.approx(180.156)


def test_canonical_bytes_do_not_depend_on_key_order() -> None:
    """Equal values have equal bytes and hashes, whatever the order of their keys."""
    assert canonical_bytes({"b": 1, "a": 2}) == canonical_bytes({"a": 2, "b": 1})
    assert content_hash({"a": 1}) != content_hash({"a": 2})


def test_a_plan_is_frozen_and_refuses_unknown_fields() -> None:
    """A plan cannot be changed after it was read, and a misspelt setting is an error."""
    plan = TrainingPlan.model_validate(PLAN)

    with pytest.raises(ValidationError):
        plan.rounds = 5  # type: ignore[misc]
    with pytest.raises(ValidationError):
        TrainingPlan.model_validate(PLAN | {"epsilon": 1})


def test_a_plan_states_what_its_rounds_cost() -> None:
    """The event of a round and of a release carry the plan's own noise, rate and steps."""
    plan = TrainingPlan.model_validate(PLAN)

    assert plan.round_event == PrivacyEvent(sample_rate=0.5, noise_multiplier=1.5, steps=3)
    assert plan.release_event == PrivacyEvent(sample_rate=1.0, noise_multiplier=1.0, steps=1)
    assert plan.credit_epochs == 2


def test_the_average_cannot_be_longer_than_the_run() -> None:
    """Averaging more rounds than there are is refused."""
    with pytest.raises(ValidationError, match="average_last_rounds"):
        TrainingPlan.model_validate(PLAN | {"rounds": 1})


def test_a_replayed_task_keeps_its_identity() -> None:
    """The task id ignores the deadline, so that asking again is recognised, and nothing else."""
    plan = TrainingPlan.model_validate(PLAN)
    first = TrainTask(federation="f", run="r", round=1, plan=plan, base_model_hash="0" * 64, deadline_unix=1.0)

    assert first.task_id == first.model_copy(update={"deadline_unix": 9.0}).task_id
    assert first.task_id != first.model_copy(update={"round": 2}).task_id


def test_errors_carry_exit_codes_and_hints() -> None:
    """Wrong use exits with 2, a failed check with 1, and a tampered file is named with its offset."""
    tampered = Tampered("ledger.db", 4096, "leaf hash differs")

    assert BadInput("no such layout", "give one of: a, b").exit_code == 2
    assert issubclass(BadInput, IsletError)
    assert isinstance(tampered, CheckFailed)
    assert tampered.exit_code == 1
    assert str(tampered) == "ledger.db: leaf hash differs at offset 4096"


def test_values_with_nan_are_refused() -> None:
    """A NaN never gets into a value that crosses a room."""

    class Number(Frozen):
        value: float

    with pytest.raises(ValidationError):
        Number(value=float("nan"))


def test_telemetry_of_the_libraries_is_off() -> None:
    """Importing anything of Islet switches off the telemetry of Flower, Ray, MLflow and Great Expectations."""
    assert data_schemas.__name__ == "data_schemas"
    assert os.environ["FLWR_TELEMETRY_ENABLED"] == "0"
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert os.environ["GX_ANALYTICS_ENABLED"] == "false"


def test_what_was_hashed_before_an_upgrade_keeps_its_hash() -> None:
    """Plan, task and round of version 0.1.0 as first written: fields that came later do not change their names."""
    task_plan = small_node.plan()
    zero = "0" * 64
    task = TrainTask(federation="f", run="r", round=1, plan=task_plan, base_model_hash=zero, deadline_unix=0.0)
    entry = RoundEntry(
        run="r", round=1, plan_hash=zero, base_model_hash=zero, new_model_hash=zero, admitted=(), rejected=()
    )

    assert content_hash(task_plan) == "60bb457101f74506b31cac56512f01e27e2d777757736a768f699885d25f722d"
    assert task.task_id == "8427724bd654416332ef7c6338be70db2a2d561ae6c4a8d3669ef758e2dd5e43"
    assert content_hash(entry) == "d4c04d82146b6f048cf2cc95cbf2978f9ac4e321538957c719fe5032d7000d72"
