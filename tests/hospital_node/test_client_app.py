"""The message boundary, through Flower's own messages: what comes in is checked, and only documented fields go out."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from pydantic import TypeAdapter

from data_schemas.canonical import bytes_hash, content_hash
from data_schemas.frozen import Frozen
from data_schemas.governance import DecisionEntry, Promote, Proposal, ProposalEntry, Vote, VoteEntry
from data_schemas.ledger import ModelEntry, PlanEntry
from data_schemas.messages import (
    Cosigned,
    Hello,
    HelloTask,
    Installed,
    ModelTask,
    Refusal,
    RefusalCode,
    ReleaseTask,
    Scored,
    SignedRelease,
    SignedUpdate,
    WitnessState,
)
from data_schemas.plan import RELATION
from hospital_node import client_app
from hospital_node.folder import NodeFolder
from hospital_node.ledger_copy import COPY
from hospital_node.ledger_view import charter_of
from pipeline.model_card import CardPrivacy, ModelCard, TrainedOn, card_bytes
from pipeline.signing import PrivateKey
from pipeline.wire import from_record, to_record
from tests.hospital_node.small_node import FEDERATION, base_weights, fill, make_node, plan, train_task
from tests.hospital_node.test_ledger_view import RUN, Log, founding, log_of, member
from tests.hospital_node.test_scoring import NODES, score_task, updates_for

Arrays = dict[str, npt.NDArray[Any]]
Reply = Hello | Refusal | SignedUpdate | Scored | SignedRelease | WitnessState | Cosigned | Installed
FAR = 4e9
# A plan whose noise on credit is larger than any score.
DROWNED, DROWNED_RUN = plan(credit__noise_multiplier=2.1), "drowned"
CHAMPION = bytes_hash(base_weights(plan(), seed=5).tobytes())
AGGREGATOR = PrivateKey.from_seed(b"a" * 32)
PRIVACY_PAGE = Path(__file__).parents[2] / "docs" / "privacy.md"


@pytest.fixture(autouse=True)
def identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's Message() reads the sender from a process-wide identity."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    path = make_node(tmp_path / "north", aggregator_public_key=AGGREGATOR.public.hex)
    fill(path, patients=12)
    plans = [PlanEntry(run=run, plan_hash=content_hash(p)) for run, p in ((RUN, plan()), (DROWNED_RUN, DROWNED))]
    log = log_of(founding(), member(path), *plans)
    promote(log, path, CHAMPION)
    (path / COPY).write_bytes(b"".join(line + b"\n" for line in log.lines))
    return path


def card_of(model_hash: str) -> ModelCard:
    """Return a card of a model of one hospital."""
    return ModelCard(
        version="run-5",
        model_hash=model_hash,
        spec=plan().model,
        trained_on=(TrainedOn(node="north", declared_training_patients=10, declared_heldout_patients=4),),
        privacy=CardPrivacy(unit="patient", epsilon=3.0, delta=1e-5, rounds=4, noise_source="seeded"),
    )


def promote(log: Log, path: Path, model_hash: str) -> None:
    """Add what makes a model the champion of a federation of one."""
    published = {"round": 4, "unit": "patient", "relation": RELATION, "delta": 1e-5, "epsilon_by_node": {"north": 3.0}}
    log.add(ModelEntry(run="run-5", model_hash=model_hash, **published))
    members = charter_of(tuple(log.lines), AGGREGATOR.public.hex).member_set
    bound: dict[str, Any] = {"federation": FEDERATION, "member_set": members}
    action, ends = Promote(model_hash=model_hash), "2026-02-01T00:00:00+00:00"
    proposal = Proposal(action=action, proposed_by="north", expires_at=ends, **bound)
    vote = Vote(proposal_hash=content_hash(proposal), node="north", approve=True, **bound)
    with NodeFolder.open(path) as node:
        log.add(ProposalEntry(proposal=proposal, signature=node.key.sign(proposal)))
        log.add(VoteEntry(vote=vote, signature=node.key.sign(vote)))
    log.add(DecisionEntry(proposal_hash=content_hash(proposal), accepted=True))


def sent(home: Path, kind: str, content: RecordDict) -> tuple[Reply, Arrays]:
    message = Message(content, 2, kind, ttl=60.0)
    message.metadata.__dict__["_message_id"] = "m1"
    context = Context(run_id=1, node_id=2, node_config={"home": str(home)}, state=RecordDict(), run_config={})
    answer = client_app.app(message, context)
    body, arrays = from_record(answer.content)
    assert dict(context.state) == {}
    reply: Reply = TypeAdapter(Reply).validate_json(body)
    return reply, arrays


def asked(home: Path, kind: str, task: Frozen, arrays: Arrays | None = None) -> tuple[Reply, Arrays]:
    return sent(home, kind, to_record(task, arrays))


def conversation(home: Path) -> list[tuple[Reply, Arrays]]:
    """One real reply of every kind."""
    task_plan = plan()
    weights, updates = base_weights(task_plan), updates_for(task_plan)
    log = Log()
    log.lines = (home / COPY).read_bytes().splitlines()
    log.add(PlanEntry(run="run", plan_hash="0" * 64))
    cosign = log.task(len(log.lines) - 1)
    release = ReleaseTask(federation=FEDERATION, run=RUN, epoch=1, plan=task_plan, nodes=NODES, deadline_unix=FAR)
    drowned = release.model_copy(update={"plan": DROWNED, "run": DROWNED_RUN})
    score = score_task(task_plan, weights, updates)
    train = train_task(task_plan, weights, run=RUN, deadline_unix=FAR)
    champion = base_weights(task_plan, seed=5)
    model = ModelTask(federation=FEDERATION, card=card_bytes(card_of(CHAMPION)).decode())
    return [
        asked(home, "query.hello", HelloTask(federation=FEDERATION)),
        asked(home, "query.hello", HelloTask(federation="other")),
        asked(home, "train", train, {"weights": weights}),
        asked(home, "evaluate", score, {"base": weights, "updates": updates}),
        asked(home, "query.score", score, {"base": weights, "updates": updates}),
        asked(home, "query.release", release),
        asked(home, "query.release", drowned),
        asked(home, "query.cosign", cosign),
        asked(home, "query.cosign", cosign),
        asked(home, "query.model", model, {"weights": champion}),
    ]


def leaves(value: Any, prefix: str) -> set[str]:
    """Dotted names of all fields of a message; the parts of a list share their list's name."""
    if isinstance(value, dict):
        return {name for key, part in value.items() for name in leaves(part, f"{prefix}.{key}")}
    return {prefix}


def documented() -> set[str]:
    """First column of the field table of the privacy page."""
    return set(re.findall(r"^\| `([\w.]+)` \|", PRIVACY_PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE))


def test_every_field_that_leaves_is_in_the_privacy_page(home: Path) -> None:
    """Real replies of every kind: a field or array without a row in docs/privacy.md fails, and so does a stale row."""
    replies = conversation(home)

    left = {name for reply, _ in replies for name in leaves(reply.model_dump(mode="json"), type(reply).__name__)}
    left |= {f"{type(reply).__name__}.array.{name}" for reply, arrays in replies for name in arrays}

    kinds: list[type] = [Hello, Refusal, SignedUpdate, Scored, Scored, SignedRelease, SignedRelease, Cosigned]
    kinds += [WitnessState, Installed]
    assert kinds == [type(reply) for reply, _ in replies]
    assert set() == left - documented()
    assert set() == documented() - left


def test_an_update_travels_as_float32(home: Path) -> None:
    """The update array has the shape of the weights and the little-endian float32 type that its hash is over."""
    task_plan = plan()
    weights = base_weights(task_plan)

    reply, arrays = asked(
        home, "train", train_task(task_plan, weights, run=RUN, deadline_unix=FAR), {"weights": weights}
    )

    assert isinstance(reply, SignedUpdate)
    assert ((weights.shape, np.dtype("<f4")), {"update"}) == (
        (arrays["update"].shape, arrays["update"].dtype),
        set(arrays),
    )


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"body": ConfigRecord({"json": "text"})}),
        RecordDict({"body": ConfigRecord({"json": b"{"})}),
        to_record(HelloTask(federation=FEDERATION)),
        to_record(train_task(plan(), np.zeros(3, dtype=np.float32)), {"weights": np.zeros((3, 1), dtype=np.float32)}),
        to_record(train_task(plan(), np.zeros(3, dtype=np.float32)), {"weights": np.zeros(3)}),
        to_record(train_task(plan(), np.zeros(3, dtype=np.float32))),
    ],
)
def test_a_malformed_message_is_refused(home: Path, content: RecordDict) -> None:
    """Messages without body, with a body of another kind, and without the right arrays are malformed tasks."""
    assert (Refusal(code=RefusalCode.MALFORMED_TASK), {}) == sent(home, "train", content)


def test_a_busy_node_says_so(home: Path) -> None:
    """While another process or thread uses the folder the node is busy; who it is, it says all the same."""
    weights = base_weights(plan())
    with NodeFolder.open(home):
        task = train_task(plan(), weights, run=RUN, deadline_unix=FAR)
        assert (Refusal(code=RefusalCode.NODE_BUSY), {}) == asked(home, "train", task, {"weights": weights})
        assert isinstance(asked(home, "query.hello", HelloTask(federation=FEDERATION))[0], Hello)


def test_no_exception_text_leaves_the_node(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An unexpected error becomes the code `internal`; the node's own log names its kind and place, not its text."""
    from hospital_node import local_round

    def fail(*_: object) -> None:
        raise ValueError("glucose 123.4 of person-007")

    monkeypatch.setattr(local_round, "train", fail)
    weights = base_weights(plan())
    with caplog.at_level(logging.DEBUG):
        outcome = asked(home, "train", train_task(plan(), weights, run=RUN), {"weights": weights})

    log = (home / "reports/node.log").read_text()
    assert (Refusal(code=RefusalCode.INTERNAL), {}) == outcome
    assert "ValueError at test_client_app.py" in log
    assert "123.4" not in log + caplog.text


def test_a_tampered_book_stops_the_node(home: Path) -> None:
    """A node whose budget book was changed answers `internal` and says in its own log which file and where."""
    data = bytearray((home / "budget.db").read_bytes())
    data[5000] ^= 1
    (home / "budget.db").write_bytes(data)
    weights = base_weights(plan())

    outcome = asked(home, "train", train_task(plan(), weights, run=RUN, deadline_unix=FAR), {"weights": weights})

    assert (Refusal(code=RefusalCode.INTERNAL), {}) == outcome
    assert re.search(r"Tampered at .*budget\.db: .* at offset 4096", (home / "reports/node.log").read_text())


def test_a_missing_home_is_internal(tmp_path: Path) -> None:
    """A node started without its folder answers with a code too."""
    outcome = asked(tmp_path / "nowhere", "query.hello", HelloTask(federation=FEDERATION))

    assert (Refusal(code=RefusalCode.INTERNAL), {}) == outcome
