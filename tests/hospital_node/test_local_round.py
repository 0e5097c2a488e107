"""A training round at the node: what it refuses, what it signs, and that no kill loses or doubles anything."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from data_schemas.canonical import bytes_hash, canonical_bytes, content_hash
from data_schemas.messages import Refusal, RefusalCode, SignedUpdate, TrainTask
from data_schemas.units import DELTA
from hospital_node import book_file, local_round, replies
from hospital_node.budget import BudgetBook, epsilon
from hospital_node.folder import NodeFolder
from hospital_node.randomness import noise_source
from pipeline.signing import verify
from tests.hospital_node.small_node import NOW, base_weights, fill, make_node, plan, settings, train_task

Vector = npt.NDArray[np.float32]


@pytest.fixture
def node_path(tmp_path: Path) -> Path:
    path = make_node(tmp_path / "north")
    fill(path, patients=14)
    return path


def trained(path: Path, task: TrainTask, weights: Vector, now: float = NOW) -> tuple[SignedUpdate, Vector] | Refusal:
    with NodeFolder.open(path) as node:
        return local_round.train(node, task, weights, now)


def answered(path: Path, task: TrainTask, weights: Vector, now: float = NOW) -> tuple[SignedUpdate, Vector]:
    outcome = trained(path, task, weights, now)
    assert not isinstance(outcome, Refusal)
    return outcome


def spent(path: Path) -> float:
    with NodeFolder.open(path) as node:
        return node.budget().spent("training")


def test_an_update_is_signed_with_what_it_cost(node_path: Path) -> None:
    """The manifest names plan, base, update, declared patients and epsilon spent, and carries the node's signature."""
    weights = base_weights(plan())
    task = train_task(plan(), weights)

    signed, update = answered(node_path, task, weights)

    manifest = signed.manifest
    with NodeFolder.open(node_path) as node:
        assert verify(node.key.public.hex, canonical_bytes(manifest), signed.signature)
        assert node.budget().rows()[0].head == manifest.budget_head
    assert (weights.shape, np.dtype("<f4")) == (update.shape, update.dtype)
    assert np.abs(update).max() > 0
    assert bytes_hash(update.tobytes()) == manifest.update_hash
    assert (content_hash(task.plan), task.base_model_hash) == (manifest.plan_hash, manifest.base_model_hash)
    assert manifest.declared_patients == settings().declared_training_patients
    assert (manifest.spend.event, manifest.spend.unit) == (task.plan.round_event, "patient")
    assert manifest.spend.epsilon_after == epsilon([task.plan.round_event], DELTA) == spent(node_path)


def test_a_replay_gives_the_same_bytes_and_costs_nothing(node_path: Path) -> None:
    """The same task again, even after its deadline, is answered from the book; the next round is another release."""
    weights = base_weights(plan())
    task = train_task(plan(), weights)
    first, update = answered(node_path, task, weights)
    cost = spent(node_path)

    again, same = answered(node_path, task.model_copy(update={"deadline_unix": NOW - 5}), weights, NOW + 9)

    assert (first, update.tobytes(), cost) == (again, same.tobytes(), spent(node_path))
    _, other = answered(node_path, train_task(plan(), weights, round=2), weights)
    assert other.tobytes() != update.tobytes()
    assert spent(node_path) > cost


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], RefusalCode]] = {
    "another federation": ({}, {}, {"federation": "other"}, RefusalCode.UNKNOWN_FEDERATION),
    "another base model": ({}, {}, {"base_model_hash": "0" * 64}, RefusalCode.MODEL_MISMATCH),
    "a larger epsilon": ({}, {"privacy__epsilon": 9.0}, {}, RefusalCode.PLAN_EXCEEDS_CEILING),
    "a larger delta": ({}, {"privacy__delta": 1e-4}, {}, RefusalCode.PLAN_EXCEEDS_CEILING),
    "a weaker unit": (
        {},
        {"privacy__unit": "window (weaker than patient)"},
        {},
        RefusalCode.PLAN_EXCEEDS_CEILING,
    ),
    "too little noise for its claim": ({}, {"privacy__noise_multiplier": 0.4}, {}, RefusalCode.PLAN_MISMATCH),
    "a ceiling below the claim": ({"max_epsilon_training": 1.0}, {}, {}, RefusalCode.PLAN_EXCEEDS_CEILING),
    "a round past the plan": ({}, {}, {"round": 5}, RefusalCode.PLAN_MISMATCH),
    "a seed the hospital did not choose": ({"seed": None}, {}, {}, RefusalCode.PLAN_MISMATCH),
    "fewer declared patients than it asks": ({"min_patients": 11}, {}, {}, RefusalCode.TOO_FEW_PATIENTS),
    "a deadline that has passed": ({}, {}, {"deadline_unix": NOW - 1}, RefusalCode.DEADLINE_TOO_CLOSE),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_the_hospital_does_not_allow_is_refused_and_costs_nothing(tmp_path: Path, why: str) -> None:
    """A server that asks for more than the node's own settings allow gets a code, and the book stays empty."""
    own, proposed, asked, code = REFUSED[why]
    path = make_node(tmp_path / "north", **own)
    weights = base_weights(plan())

    assert Refusal(code=code) == trained(path, train_task(plan(**proposed), weights, **asked), weights)
    with NodeFolder.open(path) as node:
        assert node.budget().rows() == ()


def test_weights_that_are_not_the_named_model_are_refused(node_path: Path) -> None:
    """Other weights than the hash says, another length, and weights that are not finite are refused before spending."""
    weights = base_weights(plan())
    broken = weights.copy()
    broken[3] = np.nan
    for sent, task in (
        (weights + 1, train_task(plan(), weights)),
        (weights[:-1], train_task(plan(), weights[:-1])),
        (broken, train_task(plan(), broken)),
    ):
        assert Refusal(code=RefusalCode.MODEL_MISMATCH) == trained(node_path, task, sent)
    assert spent(node_path) == 0.0


def test_a_run_that_cannot_be_finished_is_refused_in_its_first_round(node_path: Path) -> None:
    """With budget left for two rounds of four, a run of four is not begun and a run of two is."""
    weights = base_weights(plan())
    first, second = plan(), plan(rounds=2, privacy__epsilon=8.0)
    for number in (1, 2, 3, 4):
        answered(node_path, train_task(first, weights, round=number), weights)
    with NodeFolder.open(node_path) as node:
        ceiling = node.budget().projected("training", second.round_event, 2) + 1e-6
    (node_path / "node.toml").write_text(
        (node_path / "node.toml").read_text().replace("max_epsilon_training = 8.0", f"max_epsilon_training = {ceiling}")
    )

    claim = {"privacy__epsilon": ceiling}
    long = train_task(plan(**claim), weights, run="run-2")
    short = train_task(plan(rounds=2, **claim), weights, run="run-3")

    assert Refusal(code=RefusalCode.BUDGET_EXHAUSTED) == trained(node_path, long, weights)
    answered(node_path, short, weights)
    answered(node_path, short.model_copy(update={"round": 2}), weights)
    again = short.model_copy(update={"base_model_hash": bytes_hash((weights + 1).tobytes())})
    assert Refusal(code=RefusalCode.BUDGET_EXHAUSTED) == trained(node_path, again, weights + 1)


def test_a_round_that_would_be_late_is_refused_before_it_spends(node_path: Path) -> None:
    """With a last round of 100 s, 60 s are too few: nothing is spent. Each such refusal halves the estimate."""
    weights = base_weights(plan())
    (node_path / "reports/last_round.json").write_text('{"seconds":100.0}')
    task = train_task(plan(), weights, deadline_unix=NOW + 60)

    assert Refusal(code=RefusalCode.DEADLINE_TOO_CLOSE) == trained(node_path, task, weights)
    assert spent(node_path) == 0.0
    assert Refusal(code=RefusalCode.DEADLINE_TOO_CLOSE) == trained(node_path, task, weights)
    answered(node_path, task, weights)


def test_noise_is_secure_unless_both_sides_name_a_seed() -> None:
    """Only where plan and hospital both name a seed do draws repeat, and then they depend on node, run and round."""
    both = settings()

    def draw(own: Any, asked: Any, run: str = "run-1", purpose: str = "round 1") -> bytes:
        return noise_source(own, asked, run, purpose).normal(8).numpy().tobytes()

    assert draw(both, plan()) == draw(both, plan())
    others = [
        draw(both, plan(seed=4)),
        draw(settings(seed=2), plan()),
        draw(settings(name="south"), plan()),
        draw(both, plan(), run="run-2"),
        draw(both, plan(), purpose="round 2"),
        draw(both, plan(seed=None)),
        draw(both, plan(seed=None)),
        draw(settings(seed=None), plan(seed=None)),
        draw(settings(seed=None), plan(seed=None)),
    ]
    assert len({draw(both, plan()), *others}) == 1 + len(others)


def test_without_a_seed_two_nodes_never_send_the_same_update(tmp_path: Path) -> None:
    """Two nodes with the same readings and no seed differ: the noise is drawn afresh."""
    weights = base_weights(plan())
    task = train_task(plan(seed=None), weights)
    updates = []
    for name in ("a", "b"):
        path = make_node(tmp_path / name, seed=None)
        fill(path, patients=4)
        updates.append(answered(path, task, weights)[1].tobytes())

    assert updates[0] != updates[1]


def test_an_empty_store_trains_on_noise_alone(tmp_path: Path) -> None:
    """Whether anybody is there must not show: a node without readings answers like any other."""
    path = make_node(tmp_path / "north")
    weights = base_weights(plan())

    _, update = answered(path, train_task(plan(), weights), weights)

    assert np.isfinite(update).all()
    assert np.abs(update).max() > 0


def _die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _killed_round(path: str, point: str) -> None:
    """Train a round in this process and die at `point`."""
    targets: dict[str, tuple[Any, str]] = {
        "before the reservation": (BudgetBook, "reserve"),
        "after the reservation": (local_round, "_update"),
        "after training": (BudgetBook, "commit"),
        "after the commit": (replies, "unpack"),
    }
    if point in targets:
        owner, name = targets[point]
        setattr(owner, name, _die)
    else:
        _die_at_seal(1 if point == "inside the reservation" else 2)
    weights = base_weights(plan())
    trained(Path(path), train_task(plan(), weights), weights)


def _die_at_seal(count: int) -> None:
    """Die instead of writing the seal for the count-th time: the row is on the disk, its seal is not."""
    original, seen = book_file.write_seal, []

    def write(*args: Any, **kwargs: Any) -> None:
        seen.append(1)
        if len(seen) == count:
            _die()
        original(*args, **kwargs)

    book_file.write_seal = write


COUNTED = {
    "before the reservation": 0,
    "inside the reservation": 1,
    "after the reservation": 1,
    "after training": 1,
    "inside the commit": 1,
    "after the commit": 1,
}


@pytest.mark.parametrize("point", COUNTED)
def test_killed_at_any_point_a_round_is_counted_once_and_answered_once(
    node_path: Path, tmp_path: Path, point: str
) -> None:
    """Kill -9 anywhere: what was reserved is spent, and the replay gives the bytes of an undisturbed node."""
    weights = base_weights(plan())
    task = train_task(plan(), weights)
    undisturbed = make_node(tmp_path / "undisturbed")
    fill(undisturbed, patients=14)
    expected = answered(undisturbed, task, weights)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pipeline.private_training", "tests.hospital_node.small_node"])

    process = context.Process(target=_killed_round, args=(str(node_path), point))
    process.start()
    process.join()

    assert process.exitcode == -signal.SIGKILL
    assert COUNTED[point] * epsilon([task.plan.round_event], DELTA) == spent(node_path)
    signed, update = answered(node_path, task, weights)
    again = answered(node_path, task, weights)
    assert (expected[0], expected[1].tobytes()) == (signed, update.tobytes()) == (again[0], again[1].tobytes())
    assert epsilon([task.plan.round_event], DELTA) == spent(node_path)
