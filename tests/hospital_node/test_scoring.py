"""Credit at home: scores agree with brute force, one clipped and noised vector leaves, abstaining costs nothing."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from data_schemas.canonical import bytes_hash, canonical_bytes
from data_schemas.messages import Refusal, RefusalCode, ReleaseTask, Scored, ScoreTask, SignedRelease
from data_schemas.plan import TrainingPlan
from data_schemas.units import DELTA
from hospital_node import local_round, release, scores, scoring
from hospital_node.budget import epsilon
from hospital_node.folder import NodeFolder
from hospital_node.split import heldout
from hospital_node.store import Store
from pipeline.forecaster import Forecaster, ForecasterSpec, predict, unflatten
from pipeline.signing import verify
from pipeline.windows import WindowSpec, cut_windows
from tests.hospital_node.small_node import FEDERATION, NOW, base_weights, fill, make_node, plan, train_task

Vector = npt.NDArray[np.float32]
NODES = ("east", "south", "west")
SHARES = (0.5, 0.3, 0.2)


@pytest.fixture
def node_path(tmp_path: Path) -> Path:
    path = make_node(tmp_path / "north")
    fill(path, patients=12)
    return path


def updates_for(task_plan: TrainingPlan, count: int = 3, scale: float = 0.3) -> Vector:
    """Random updates; only of the heads when the plan trains the heads."""
    model = Forecaster(ForecasterSpec(hidden_size=task_plan.model.hidden_size))
    heads = sum(p.numel() for head in (model.mean_head, model.quantile_head) for p in head.parameters())
    drawn = np.random.default_rng(9).normal(0, scale, (count, len(base_weights(task_plan)))).astype(np.float32)
    if task_plan.local.trainable == "head":
        drawn[:, :-heads] = 0
    return drawn


def hash_of(vector: npt.NDArray[np.float32]) -> str:
    return bytes_hash(np.ascontiguousarray(vector).tobytes())


def score_task(task_plan: TrainingPlan, base: Vector, updates: Vector, **changes: Any) -> ScoreTask:
    shares = changes.get("shares", SHARES)
    step = sum(share * update.astype(np.float64) for share, update in zip(shares, updates, strict=True))
    new = (base.astype(np.float64) + task_plan.server.learning_rate * step).astype(np.float32)
    values: dict[str, Any] = {
        "federation": FEDERATION,
        "run": "run-1",
        "round": 1,
        "epoch": 1,
        "plan": task_plan,
        "nodes": NODES,
        "shares": SHARES,
        "update_hashes": tuple(hash_of(update) for update in updates),
        "base_model_hash": hash_of(base),
        "new_model_hash": hash_of(new),
    }
    return ScoreTask(**{**values, **changes})


def release_task(task_plan: TrainingPlan, **changes: Any) -> ReleaseTask:
    values: dict[str, Any] = {
        "federation": FEDERATION,
        "run": "run-1",
        "epoch": 1,
        "plan": task_plan,
        "nodes": NODES,
        "deadline_unix": NOW + 60,
    }
    return ReleaseTask(**{**values, **changes})


def scored(path: Path, task: ScoreTask, base: Vector, updates: Vector) -> Scored | Refusal:
    with NodeFolder.open(path) as node:
        return scoring.score(node, task, base, updates)


def released(path: Path, task: ReleaseTask, now: float = NOW) -> SignedRelease | Refusal:
    with NodeFolder.open(path) as node:
        return release.release(node, task, now)


def sums(path: Path, nodes: tuple[str, ...] = NODES) -> npt.NDArray[np.float64]:
    with NodeFolder.open(path) as node:
        return scores.epoch_sums(node.scores_db, "run-1", 1, nodes)


def brute_force(path: Path, task_plan: TrainingPlan, base: Vector, updates: Vector) -> npt.NDArray[np.float64]:
    """Shapley values [P, n] by averaging over all orders, every coalition's RMSE computed on its own."""
    with NodeFolder.open(path) as node:
        series = Store(node.store).series()
        mine = [p for p in series.patients if heldout(p, node.pseudonym_key, node.settings.heldout_fraction)]
    windows = cut_windows(series.select(mine), WindowSpec(history_minutes=task_plan.model.history_minutes))
    rows = []
    for start, end in windows.by_patient():
        picks = np.linspace(start, end - 1, task_plan.credit.windows_per_patient).round().astype(int)
        batch = windows.gather(windows.anchors[picks])

        def utility(members: tuple[int, ...], batch: Any = batch, count: int = len(picks)) -> float:
            step = sum((SHARES[i] * updates[i].astype(np.float64) for i in members), np.zeros(len(base)))
            weights = (base + task_plan.server.learning_rate * step).astype(np.float32)
            model = unflatten(weights, ForecasterSpec(hidden_size=task_plan.model.hidden_size))
            forecast = predict(model, batch.x, batch.last)[0]
            errors = []
            for column in (5, 11):
                real = [
                    (float(forecast[w, column]) - float(batch.y[w, column])) ** 2
                    for w in range(count)
                    if batch.mask[w, column]
                ]
                errors.append(math.sqrt(sum(real) / len(real)))
            return -sum(errors) / 2

        values = np.zeros(3)
        for order in itertools.permutations(range(3)):
            for place, member in enumerate(order):
                before = tuple(sorted(order[:place]))
                values[member] += utility(tuple(sorted((*before, member)))) - utility(before)
        rows.append(values / 6)
    return np.array(rows)


@pytest.mark.parametrize("trainable", ["all", "head"])
def test_scores_agree_with_brute_force(node_path: Path, trainable: str) -> None:
    """Each held-out patient's vector is the average marginal value over all orders, with or without shared features."""
    task_plan = plan(local__trainable=trainable)
    base, updates = base_weights(task_plan), updates_for(task_plan)
    task = score_task(task_plan, base, updates)

    assert Scored(round=1, new_model_hash=task.new_model_hash) == scored(node_path, task, base, updates)

    expected = brute_force(node_path, task_plan, base, updates)
    assert len(expected) >= 2
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(sums(node_path), expected, atol=2e-3)


def test_eleven_nodes_are_scored_from_a_sample(node_path: Path) -> None:
    """Values of eleven nodes, from half of the coalitions, are close to those from all, for every patient."""
    nodes = tuple(f"node-{number:02d}" for number in range(11))
    task_plan = plan(local__trainable="head")
    base, updates = base_weights(task_plan), updates_for(task_plan, 11)
    shares = tuple(np.arange(1, 12) / 66)
    task = score_task(task_plan, base, updates, nodes=nodes, shares=shares)
    assert isinstance(scored(node_path, task, base, updates), Scored)
    with NodeFolder.open(node_path) as node:
        held_out = scoring.load_held_out(node, 60, task_plan.credit.windows_per_patient)
    everything = np.array(list(itertools.product([False, True], repeat=11)))
    steps, sizes = scoring.weighted_steps(updates, np.array(shares), 1.0), everything.sum(axis=1)
    table = scoring.coalition_utilities(base, steps, everything, held_out, 4)
    weight = np.array([1 / (11 * math.comb(10, size)) for size in range(11)])
    joined, left = weight[sizes - 1], weight[np.minimum(sizes, 10)]
    expected = np.stack([table @ np.where(column, joined, -left) for column in everything.T], axis=1)

    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(sums(node_path, nodes), expected, atol=0.01 * np.ptp(expected))


def test_updates_that_move_the_lstm_are_scored_in_full(node_path: Path) -> None:
    """A plan that says heads only does not make an update of the whole model look like one of its heads."""
    task_plan = plan(local__trainable="head")
    base, updates = base_weights(task_plan), updates_for(plan())

    scored(node_path, score_task(task_plan, base, updates), base, updates)

    np.testing.assert_allclose(sums(node_path), brute_force(node_path, task_plan, base, updates), atol=2e-3)


def test_rounds_add_up_and_a_repeated_round_does_not(node_path: Path) -> None:
    """An epoch's sums are over its rounds, whatever the order of nodes; scoring a round again changes nothing."""
    task_plan = plan()
    base, updates = base_weights(task_plan), updates_for(task_plan)
    task = score_task(task_plan, base, updates)
    for _ in range(2):
        scored(node_path, task, base, updates)
    once = sums(node_path)
    scored(node_path, score_task(task_plan, base, updates, round=2), base, updates)

    np.testing.assert_allclose(sums(node_path), 2 * once)
    turned = sums(node_path, ("absent", *reversed(NODES)))
    np.testing.assert_allclose(turned[:, 1:], 2 * once[:, ::-1])
    assert not turned[:, 0].any()


def test_a_round_asked_differently_replaces_its_scores(node_path: Path) -> None:
    """A server that closes a round anew is scored on the new one; the old scores are gone."""
    task_plan = plan()
    base, updates = base_weights(task_plan), updates_for(task_plan)
    scored(node_path, score_task(task_plan, base, updates), base, updates)
    before = sums(node_path)

    halved = (updates / 2).astype(np.float32)
    scored(node_path, score_task(task_plan, base, halved), base, halved)

    assert before.shape == sums(node_path).shape
    assert not np.allclose(before, sums(node_path))


def test_what_is_not_what_the_task_names_is_not_scored(node_path: Path) -> None:
    """Other base, other updates, another new model, and malformed shares are refused; nothing is stored."""
    task_plan = plan()
    base, updates = base_weights(task_plan), updates_for(task_plan)
    good = score_task(task_plan, base, updates)
    nan = updates.copy()
    nan[0, 0] = np.nan
    cases = [
        (good, base + 1, updates, RefusalCode.MODEL_MISMATCH),
        (good, base, updates[::-1], RefusalCode.MODEL_MISMATCH),
        (good.model_copy(update={"new_model_hash": "0" * 64}), base, updates, RefusalCode.MODEL_MISMATCH),
        (good.model_copy(update={"federation": "other"}), base, updates, RefusalCode.UNKNOWN_FEDERATION),
        (good.model_copy(update={"shares": (0.5, 0.5, 0.5)}), base, updates, RefusalCode.MALFORMED_TASK),
        (good.model_copy(update={"nodes": ("east", "east", "west")}), base, updates, RefusalCode.MALFORMED_TASK),
        (good, base[:-1], updates, RefusalCode.MALFORMED_TASK),
        (score_task(task_plan, base, updates), base, nan, RefusalCode.MALFORMED_TASK),
    ]

    for task, sent_base, sent_updates, code in cases:
        assert Refusal(code=code) == scored(node_path, task, sent_base, sent_updates)
    assert sums(node_path).shape == (0, 3)


def test_a_node_sees_that_its_own_update_was_swapped(node_path: Path) -> None:
    """A task with another update under this node's name is refused; with the one it signed it is scored."""
    task_plan = plan()
    base = base_weights(task_plan)
    with NodeFolder.open(node_path) as node:
        outcome = local_round.train(node, train_task(task_plan, base), base, NOW)
    assert not isinstance(outcome, Refusal)
    names = ("north", "south", "west")
    forged = updates_for(task_plan)
    honest = np.concatenate([outcome[1][None], forged[1:]])

    lie, truth = (score_task(task_plan, base, updates, nodes=names) for updates in (forged, honest))

    assert Refusal(code=RefusalCode.MODEL_MISMATCH) == scored(node_path, lie, base, forged)
    assert isinstance(scored(node_path, truth, base, honest), Scored)


def put(path: Path, vectors: dict[str, list[float]]) -> None:
    with NodeFolder.open(path) as node:
        arrays = {patient: np.array(vector) for patient, vector in vectors.items()}
        scores.put(node.scores_db, scores.Place("run-1", 1, 1), "task", NODES, arrays)


def test_a_release_is_signed_accounted_and_repeated_word_for_word(node_path: Path) -> None:
    """One vector leaves, with its noise and cost; a replay is the same bytes and costs nothing."""
    put(node_path, {"a": [1.0, 0.5, -0.5], "b": [0.2, 0.1, 0.0]})
    task = release_task(plan())

    first = released(node_path, task)
    again = released(node_path, task.model_copy(update={"deadline_unix": NOW - 1}), NOW + 9)

    assert isinstance(first, SignedRelease)
    assert first == again
    body = first.release
    with NodeFolder.open(node_path) as node:
        assert verify(node.key.public.hex, canonical_bytes(body), first.signature)
        assert epsilon([task.plan.release_event], DELTA) == node.budget().spent("heldout")
        assert node.budget().spent("training") == 0.0
    assert body.spend is not None
    assert (task.plan.release_event, False, 3) == (body.spend.event, body.abstained, len(body.shapley_mg_dl))
    assert body.noise_std_mg_dl == 1.5 * 5.0 / 4


def test_one_patient_moves_the_release_by_at_most_the_clip(tmp_path: Path) -> None:
    """With the same noise, adding a patient with any vector, even without bounds, moves the sum by the clip at most."""
    vectors = {"a": [1.0, 0.5, -0.5], "b": [0.2, 0.1, 0.0]}
    outcomes = {}
    for label, extra in {"without": None, "huge": [1e9, -1e9, 1e9], "nan": [math.nan, 0.0, 0.0]}.items():
        path = make_node(tmp_path / label)
        put(path, vectors if extra is None else {**vectors, "c": extra})
        signed = released(path, release_task(plan()))
        assert isinstance(signed, SignedRelease)
        outcomes[label] = np.array(signed.release.shapley_mg_dl) * 4

    assert pytest.approx(np.linalg.norm(outcomes["huge"] - outcomes["without"])) == 5.0
    np.testing.assert_allclose(outcomes["nan"], outcomes["without"])


def test_the_noise_has_the_announced_size(tmp_path: Path) -> None:
    """Over 600 released values of patients who score nothing, the spread is noise_std_mg_dl within 10%."""
    path = make_node(tmp_path / "north", max_epsilon_heldout=1e6)
    values: list[float] = []
    nodes = tuple(f"n{i}" for i in range(10))
    wide = plan(rounds=120, credit__epsilon=1e6)
    for epoch in range(1, 61):
        signed = released(path, release_task(wide, epoch=epoch, nodes=nodes))
        assert isinstance(signed, SignedRelease)
        values.extend(signed.release.shapley_mg_dl)

    assert pytest.approx(float(np.std(values)), rel=0.1) == 1.5 * 5.0 / 4


@pytest.mark.parametrize(
    ("own", "proposed"),
    [({"declared_heldout_patients": 1}, {}), ({"declared_heldout_patients": 4}, {"credit__noise_multiplier": 2.1})],
)
def test_a_node_whose_noise_would_drown_every_score_abstains(
    tmp_path: Path, own: dict[str, Any], proposed: dict[str, Any]
) -> None:
    """Too few declared patients: a signed abstention without values, decided without data and without cost."""
    for label, filled in (("empty", 0), ("full", 6)):
        path = make_node(tmp_path / label, **own)
        if filled:
            put(path, {f"p{i}": [3.0, 1.0, 1.0] for i in range(filled)})

        signed = released(path, release_task(plan(**proposed)))

        assert isinstance(signed, SignedRelease)
        assert (signed.release.abstained, signed.release.shapley_mg_dl, signed.release.spend) == (True, (), None)
        with NodeFolder.open(path) as node:
            assert node.budget().rows() == ()


@pytest.mark.parametrize(
    ("own", "proposed", "asked", "code"),
    [
        ({}, {}, {"federation": "other"}, RefusalCode.UNKNOWN_FEDERATION),
        ({}, {"credit__epsilon": 9.0}, {}, RefusalCode.PLAN_EXCEEDS_CEILING),
        ({}, {"credit__noise_multiplier": 0.3}, {}, RefusalCode.PLAN_MISMATCH),
        ({"seed": None}, {}, {}, RefusalCode.PLAN_MISMATCH),
        ({}, {}, {"deadline_unix": NOW}, RefusalCode.DEADLINE_TOO_CLOSE),
        ({}, {}, {"epoch": 3}, RefusalCode.MALFORMED_TASK),
        ({}, {}, {"nodes": ("east", "east")}, RefusalCode.MALFORMED_TASK),
    ],
)
def test_a_release_that_is_not_allowed_is_refused_and_costs_nothing(
    tmp_path: Path, own: dict[str, Any], proposed: dict[str, Any], asked: dict[str, Any], code: RefusalCode
) -> None:
    """The held-out cohort has its own ceiling, checked before anything is spent."""
    path = make_node(tmp_path / "north", **own)

    assert Refusal(code=code) == released(path, release_task(plan(**proposed), **asked))
    with NodeFolder.open(path) as node:
        assert node.budget().rows() == ()


def test_held_out_budget_runs_out(tmp_path: Path) -> None:
    """A second run that would take the held-out cohort past its ceiling is refused."""
    path = make_node(tmp_path / "north", max_epsilon_heldout=4.0)
    one = plan(rounds=2, credit__epsilon=4.0)
    assert isinstance(released(path, release_task(one)), SignedRelease)

    assert Refusal(code=RefusalCode.BUDGET_EXHAUSTED) == released(path, release_task(one, run="run-2"))


def test_a_node_without_held_out_readings_acknowledges_like_any_other(tmp_path: Path) -> None:
    """Whether anybody is held out must not show in the reply."""
    path = make_node(tmp_path / "north")
    base, updates = base_weights(plan()), updates_for(plan())
    task = score_task(plan(), base, updates)

    assert Scored(round=1, new_model_hash=task.new_model_hash) == scored(path, task, base, updates)
    assert sums(path).shape == (0, 3)
