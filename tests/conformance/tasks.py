"""What an aggregator may ask of a hospital, or try to have it believe.

Each is a Flower message to the real ClientApp of a node that follows a ledger. Whatever it answers, its budget book
must be as it was: `spent` is looked at after every case.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from data_schemas.canonical import bytes_hash, content_hash
from data_schemas.ledger import PlanEntry
from data_schemas.messages import HelloTask, Refusal, ReleaseTask, ScoreTask, TrainTask
from data_schemas.plan import TrainingPlan
from hospital_node import client_app, ledger_copy
from hospital_node.folder import NodeFolder
from hospital_node.gate import approved
from pipeline.charter import run_name
from pipeline.wire import from_record, to_record
from tests.conformance.case import Case
from tests.hospital_node.small_node import FEDERATION, base_weights, fill, make_node, plan
from tests.hospital_node.test_ledger_view import AGGREGATOR, Log, founding, log_of, member, vote_to_pause

FAR = 4e9
BASE = base_weights(plan())
# What the other members may have agreed to; the hospital's own ceilings still hold.
LAX = {"max_epsilon_training": 1e6, "max_epsilon_heldout": 1e6, "min_patients": 1}
WEAK = "window (weaker than patient)"


def answer(home: Path, kind: str, content: RecordDict) -> str:
    """Give the node one message; return the code of its refusal, or what it answered instead."""
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
    message = Message(content, 2, kind, ttl=60.0)
    message.metadata.__dict__["_message_id"] = "m1"
    context = Context(run_id=1, node_id=2, node_config={"home": str(home)}, state=RecordDict(), run_config={})
    body, arrays = from_record(client_app.app(message, context).content)
    try:
        refusal = Refusal.model_validate_json(body)
    except ValueError:
        return body.decode()
    assert arrays == {}
    return str(refusal.code)


def spent(home: Path) -> int:
    with NodeFolder.open(home) as node:
        return len(node.budget().rows())


def made(path: Path, **own: Any) -> Path:
    return make_node(path / "north", aggregator_public_key=AGGREGATOR.public.hex, **own)


def holding(home: Path, log: Log) -> Path:
    """Give a node this log as its copy."""
    (home / ledger_copy.COPY).write_bytes(b"".join(line + b"\n" for line in log.lines))
    return home


def decided(home: Path, task_plan: TrainingPlan, policy: dict[str, Any] | None = None) -> Log:
    """Return a log in which the members agreed to a plan under a policy that allows nearly everything."""
    plan_entry = PlanEntry(run=run_of(task_plan), plan_hash=content_hash(task_plan))
    return log_of(founding(**{**LAX, **(policy or {})}), member(home), plan_entry)


def run_of(task_plan: TrainingPlan, base: np.ndarray = BASE) -> str:
    return run_name(FEDERATION, task_plan, bytes_hash(base.tobytes()))


def train_task(task_plan: TrainingPlan, base: np.ndarray = BASE, **changes: Any) -> TrainTask:
    values: dict[str, Any] = {
        "federation": FEDERATION,
        "run": run_of(task_plan, base),
        "round": 1,
        "plan": task_plan,
        "base_model_hash": bytes_hash(base.tobytes()),
        "deadline_unix": FAR,
    }
    return TrainTask(**{**values, **changes})


def trained(
    path: Path,
    *,
    proposed: dict[str, Any] | None = None,
    asked: dict[str, Any] | None = None,
    policy: dict[str, Any] | None = None,
    own: dict[str, Any] | None = None,
    weights: np.ndarray = BASE,
    log: Callable[[Path, TrainingPlan], Log] | None = None,
    patients: int = 0,
) -> str:
    """Ask for a round of a plan that the ledger says was decided, unless `log` is another ledger."""
    task_plan = plan(**(proposed or {}))
    home = made(path, **(own or {}))
    holding(home, log(home, task_plan) if log else decided(home, task_plan, policy))
    if patients:
        fill(home, patients)
    return unspent(home, "train", to_record(train_task(task_plan, **(asked or {})), {"weights": weights}))


def unspent(home: Path, kind: str, content: RecordDict) -> str:
    before = spent(home)
    code = answer(home, kind, content)
    assert spent(home) == before
    return code


def paused(home: Path, task_plan: TrainingPlan) -> Log:
    log = decided(home, task_plan)
    vote_to_pause(home, log)
    return log


def exhausted(path: Path) -> str:
    """Ask for a run when others have spent all but one round of the ceiling."""
    home, event = made(path), plan().round_event
    with NodeFolder.open(home) as node:
        book = node.budget()
        left = book.rounds_left("training", event, 8.0)
        spent_before = event.model_copy(update={"steps": event.steps * (left - 1)})
        told = {"asked_by": FEDERATION, "run": "before", "at": "2026-01-01T00:00:00+00:00", "noise": "secure"}
        book.reserve("0" * 64, "training", "patient", spent_before, ceiling_epsilon=8.0, **told)
    holding(home, decided(home, plan()))
    return unspent(home, "train", to_record(train_task(plan()), {"weights": BASE}))


def malformed(path: Path, change: Callable[[RecordDict], object], kind: str = "train") -> str:
    home = made(path)
    holding(home, decided(home, plan()))
    content = to_record(train_task(plan()), {"weights": BASE})
    change(content)
    return unspent(home, kind, content)


def body_of(record: RecordDict) -> ConfigRecord:
    return record.config_records["body"]


def replaced(old: bytes, new: bytes) -> Callable[[RecordDict], object]:
    def change(record: RecordDict) -> None:
        changed = bytes(body_of(record)["json"]).replace(old, new, 1)
        assert changed != body_of(record)["json"]
        body_of(record)["json"] = changed

    return change


def released(path: Path, *, logged: bool = True, proposed: dict[str, Any] | None = None, **asked: Any) -> str:
    task_plan = plan(**(proposed or {}))
    home = made(path)
    holding(home, decided(home, task_plan if logged else plan(name="other")))
    values: dict[str, Any] = {
        "federation": FEDERATION,
        "run": run_of(task_plan),
        "epoch": 1,
        "plan": task_plan,
        "nodes": ("north", "south"),
        "deadline_unix": FAR,
    }
    return unspent(home, "query.release", to_record(ReleaseTask(**{**values, **asked})))


def scored(path: Path, change: Callable[[dict[str, Any], np.ndarray], None]) -> str:
    """Ask to score a round of two updates after `change` altered the task's fields or the updates."""
    updates = np.random.default_rng(5).normal(0, 0.1, (2, len(BASE))).astype(np.float32)
    step = 0.5 * updates[0].astype(np.float64) + 0.5 * updates[1].astype(np.float64)
    values: dict[str, Any] = {
        "federation": FEDERATION,
        "run": run_of(plan()),
        "round": 1,
        "epoch": 1,
        "plan": plan(),
        "nodes": ("east", "west"),
        "shares": (0.5, 0.5),
        "update_hashes": tuple(bytes_hash(update.tobytes()) for update in updates),
        "base_model_hash": bytes_hash(BASE.tobytes()),
        "new_model_hash": bytes_hash((BASE.astype(np.float64) + step).astype(np.float32).tobytes()),
    }
    change(values, updates)
    home = made(path)
    holding(home, decided(home, plan()))
    return unspent(home, "evaluate", to_record(ScoreTask(**values), {"base": BASE, "updates": updates}))


def setting(**changes: Any) -> Callable[[dict[str, Any], np.ndarray], None]:
    return lambda values, _updates: values.update(changes)


def nan_weights(path: Path) -> str:
    broken = BASE.copy()
    broken[0] = math.nan
    return trained(path, asked={"base_model_hash": bytes_hash(broken.tobytes())}, weights=broken)


def bundle(path: Path, approve: str | None) -> str:
    """Offer a node code that is not what it approved; the gate looks at the bytes alone and unpacks nothing."""
    home = made(path, approved_bundle=approve)
    return "admitted" if approved(home, b"code from the server") else "bundle-refused"


def spoil(_values: dict[str, Any], updates: np.ndarray) -> None:
    updates[1, 0] += 1


CASES: tuple[Case, ...] = (
    Case(
        "other-bundle", "code with other bytes than the approved", "bundle-refused", partial(bundle, approve="a" * 64)
    ),
    Case("first-bundle", "code for a hospital that approved none", "bundle-refused", partial(bundle, approve=None)),
    Case(
        "larger-epsilon",
        "a plan of epsilon 100, voted by the others",
        "plan-exceeds-ceiling",
        partial(trained, proposed={"privacy__epsilon": 100.0}),
    ),
    Case(
        "larger-delta-plan",
        "a plan with delta 1e-3",
        "plan-exceeds-ceiling",
        partial(trained, proposed={"privacy__delta": 1e-3}),
    ),
    Case(
        "weaker-unit-plan",
        "privacy per window, voted by the others",
        "plan-exceeds-ceiling",
        partial(trained, proposed={"privacy__unit": WEAK}, policy={"unit": WEAK}),
    ),
    Case(
        "understated-epsilon",
        "less noise than the plan's epsilon needs",
        "plan-mismatch",
        partial(trained, proposed={"privacy__noise_multiplier": 0.4}),
    ),
    Case(
        "more-rounds-than-paid",
        "400 rounds at the noise of four",
        "plan-mismatch",
        partial(trained, proposed={"rounds": 400}),
    ),
    Case(
        "seeded-noise",
        "noise that the server can repeat and subtract",
        "plan-mismatch",
        partial(
            trained,
            own={"seed": None},
            log=lambda p, t: log_of(founding(**LAX), member(p), PlanEntry(run=run_of(t), plan_hash=content_hash(t))),
        ),
    ),
    Case(
        "no-noise",
        "a plan without noise",
        "malformed-task",
        partial(
            malformed,
            change=replaced(
                b'"max_grad_norm":0.05,"noise_multiplier":2.5', b'"max_grad_norm":0.05,"noise_multiplier":0'
            ),
        ),
    ),
    Case("round-after-the-last", "round 5 of 4", "model-not-decided", partial(trained, asked={"round": 5})),
    Case("spent-budget", "a second run after the first spent the ceiling", "budget-exhausted", exhausted),
    Case(
        "passed-deadline",
        "work whose deadline has passed",
        "deadline-too-close",
        partial(trained, asked={"deadline_unix": 1.0}, patients=8),
    ),
    Case(
        "too-small-cohort",
        "training on fewer patients than the hospital allows",
        "too-few-patients",
        partial(trained, own={"min_patients": 11}),
    ),
    Case(
        "other-federation",
        "a task of another federation",
        "unknown-federation",
        partial(trained, asked={"federation": "other"}),
    ),
    Case(
        "other-weights",
        "weights that are not the named model",
        "model-mismatch",
        partial(trained, weights=BASE + np.float32(1)),
    ),
    Case(
        "short-weights",
        "a model of another size",
        "model-mismatch",
        partial(trained, asked={"base_model_hash": bytes_hash(BASE[:-1].tobytes())}, weights=BASE[:-1]),
    ),
    Case("nan-weights", "a model with a weight that is not a number", "model-mismatch", nan_weights),
    Case("wide-weights", "float64 weights", "malformed-task", partial(trained, weights=BASE.astype(np.float64))),
    Case(
        "own-model",
        "a model of its own to this hospital alone",
        "model-not-decided",
        partial(
            trained,
            asked={"base_model_hash": bytes_hash((BASE + np.float32(1)).tobytes())},
            weights=BASE + np.float32(1),
        ),
    ),
    Case(
        "skipped-round",
        "round 2 before round 1 is in the ledger",
        "model-not-decided",
        partial(trained, asked={"round": 2}),
    ),
    Case("not-founded", "training before there is a policy", "not-founded", partial(trained, log=lambda _p, _t: Log())),
    Case(
        "not-a-member",
        "training by a hospital that was not admitted",
        "not-a-member",
        partial(trained, log=lambda _p, t: log_of(founding(), PlanEntry(run=run_of(t), plan_hash=content_hash(t)))),
    ),
    Case(
        "plan-not-logged",
        "a plan that is not in the ledger",
        "plan-not-decided",
        partial(trained, log=lambda p, _t: log_of(founding(), member(p))),
    ),
    Case(
        "changed-plan",
        "another plan than the ledger names for the run",
        "plan-not-decided",
        partial(trained, asked={"run": run_of(plan())}, proposed={"rounds": 3}, log=lambda p, _t: decided(p, plan())),
    ),
    Case(
        "beyond-the-policy",
        "a logged plan that costs more than was voted",
        "plan-outside-policy",
        partial(trained, policy={"max_epsilon_training": 7.0}),
    ),
    Case(
        "beyond-the-pot",
        "a logged plan that pays more than was voted",
        "plan-outside-policy",
        partial(trained, proposed={"credit__pot_micro_credits_per_round": 10**9}),
    ),
    Case(
        "beyond-the-minimum",
        "fewer patients than was voted",
        "too-few-patients",
        partial(trained, policy={"min_patients": 11}),
    ),
    Case("paused", "training while the members voted to pause", "federation-paused", partial(trained, log=paused)),
    Case(
        "task-unknown-field",
        "a field that overrides a ceiling",
        "malformed-task",
        partial(malformed, change=replaced(b'{"base', b'{"max_epsilon_training":100,"base')),
    ),
    Case("task-not-json", "a task that is not JSON", "malformed-task", partial(malformed, change=replaced(b"}", b""))),
    Case(
        "task-of-another-kind",
        "a greeting in place of a training task",
        "malformed-task",
        partial(malformed, change=lambda r: body_of(r).update({"json": b'{"federation":"trial"}'})),
    ),
    Case(
        "task-nan-epsilon",
        "a ceiling that is not a number",
        "malformed-task",
        partial(malformed, change=replaced(b'"epsilon":8,"max_grad', b'"epsilon":NaN,"max_grad')),
    ),
    Case(
        "task-negative-round",
        "round minus one",
        "malformed-task",
        partial(malformed, change=replaced(b'"round":1', b'"round":-1')),
    ),
    Case(
        "task-without-weights",
        "a training task without its model",
        "malformed-task",
        partial(malformed, change=lambda r: r.array_records["arrays"].clear()),
    ),
    Case(
        "task-without-body",
        "an empty message",
        "malformed-task",
        partial(malformed, change=lambda r: r.config_records["body"].clear()),
    ),
    Case(
        "hello-other-federation",
        "a greeting by another federation",
        "unknown-federation",
        lambda p: answer(made(p), "query.hello", to_record(HelloTask(federation="other"))),
    ),
    Case(
        "release-not-logged",
        "a credit vector for a plan nobody decided",
        "plan-not-decided",
        partial(released, logged=False),
    ),
    Case(
        "release-larger-epsilon",
        "a credit vector at epsilon 100",
        "plan-exceeds-ceiling",
        partial(released, proposed={"credit__epsilon": 100.0}),
    ),
    Case(
        "release-understated",
        "a credit vector with less noise than it says",
        "plan-mismatch",
        partial(released, proposed={"credit__noise_multiplier": 0.1}),
    ),
    Case("release-more-epochs", "a third credit vector of two", "malformed-task", partial(released, epoch=3)),
    Case(
        "release-twice-named",
        "one hospital twice, to read its value better",
        "malformed-task",
        partial(released, nodes=("south", "south")),
    ),
    Case(
        "release-late", "a credit vector after the deadline", "deadline-too-close", partial(released, deadline_unix=1.0)
    ),
    Case("score-other-update", "an update that is not the signed one", "model-mismatch", partial(scored, change=spoil)),
    Case(
        "score-false-sum",
        "a new model that is not the sum",
        "model-mismatch",
        partial(scored, change=setting(new_model_hash="e" * 64)),
    ),
    Case(
        "score-forged-own",
        "a forged update under the hospital's own name",
        "model-mismatch",
        partial(scored, change=setting(nodes=("east", "north"))),
    ),
    Case(
        "score-shares",
        "shares that favour one hospital",
        "model-mismatch",
        partial(scored, change=setting(shares=(0.9, 0.1))),
    ),
    Case(
        "score-shares-above-one",
        "shares that sum to two",
        "malformed-task",
        partial(scored, change=setting(shares=(1.0, 1.0))),
    ),
)
