"""The contest at home: same readings for both models, nothing but an acknowledgement leaves."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest

from data_schemas.canonical import bytes_hash
from data_schemas.errors import BadInput
from data_schemas.messages import ContestTask, RefusalCode
from hospital_node import contest
from hospital_node.ceilings import Declined
from hospital_node.cohorts import held_out_windows
from hospital_node.folder import NodeFolder
from pipeline.bundle import code_hash, wheel_hash
from pipeline.forecaster import Forecaster, ForecasterSpec, flatten
from tests.hospital_node import small_node


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A node with patients."""
    home = small_node.make_node(tmp_path / "north")
    small_node.fill(home, 12)
    return home


def test_models_that_look_back_differently_far_are_scored_on_the_same_readings(path: Path) -> None:
    """Last readings and targets are the same, person by person; what they look back on is each model's own."""
    with NodeFolder.open(path) as node:
        short, long = contest.on_same_readings([held_out_windows(node, minutes) for minutes in (60, 180)], 6)
    assert short.patients == long.patients
    assert np.array_equal(short.owner, long.owner)
    assert np.array_equal(short.last, long.last)
    assert np.array_equal(short.target, long.target)
    assert short.x.shape[1] < long.x.shape[1]
    assert len(short.x)


def test_a_node_without_a_ledger_holds_no_contest(path: Path) -> None:
    """Nothing says who is champion; other weights than the named ones are no contest either."""
    plan = small_node.plan()
    weights = flatten(Forecaster(ForecasterSpec(hidden_size=plan.model.hidden_size), seed=1))
    told = {"federation": small_node.FEDERATION, "run": "r", "plan": plan, "champion_hash": "0" * 64}
    task = ContestTask.model_validate({**told, "model_hash": bytes_hash(weights.tobytes())})
    with NodeFolder.open(path) as node:
        answer = contest.score(node, task, weights)
        assert getattr(answer, "code", None) is RefusalCode.MODEL_NOT_DECIDED
        with pytest.raises(Declined, match="model-mismatch"):
            contest.score(node, task, weights + np.float32(1))


def test_a_wheel_and_its_installation_have_one_hash(tmp_path: Path) -> None:
    """The hash covers the Python files that run at a node; another byte is another hash, and no wheel none."""
    root, wheel = Path(contest.__file__).parents[1], tmp_path / "islet.whl"
    files = [file for room in ("data_schemas", "pipeline", "hospital_node") for file in (root / room).rglob("*.py")]
    with zipfile.ZipFile(wheel, "w") as archive:
        for file in files:
            archive.write(file, file.relative_to(root).as_posix())
        archive.writestr("aggregator/rounds.py", "x = 1")
    assert wheel_hash(wheel) == code_hash()
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("pipeline/more.py", "x = 1")
    assert wheel_hash(wheel) != code_hash()
    (tmp_path / "no.whl").write_bytes(b"no")
    with pytest.raises(BadInput, match="no wheel"):
        wheel_hash(tmp_path / "no.whl")
