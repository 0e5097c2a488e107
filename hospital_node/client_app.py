"""The message boundary: Flower ClientApp `app`. Tasks come in, replies or codes go out, nothing else.

Each message opens the node folder afresh and closes it: a ClientApp may be a new process every time, and Flower's
Context.state does not survive a restart, so everything that must last is in the folder. Flower sends the text of an
exception to the server; here none gets that far.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from pydantic import TypeAdapter, ValidationError

from data_schemas.errors import IsletError, NodeBusy
from data_schemas.frozen import Frozen
from data_schemas.messages import (
    ContestTask,
    CosignTask,
    Hello,
    HelloTask,
    ModelTask,
    Refusal,
    RefusalCode,
    ReleaseTask,
    ScoreTask,
    TrainTask,
)
from data_schemas.secure import AdvertiseTask, CheckTask, ConfirmTask, MaskTask, SealTask, SecureTask, UnmaskTask
from hospital_node import participation
from hospital_node.audit_log import Access, AuditLog
from hospital_node.ceilings import Declined
from hospital_node.folder import NodeFolder
from hospital_node.task_record import note, record
from pipeline.wire import from_record, to_record

if TYPE_CHECKING:
    from numpy.typing import NDArray

Arrays = dict[str, "NDArray[Any]"]
Answer = tuple[Frozen, Arrays]
Handler = Callable[[NodeFolder, bytes, Arrays], Answer]
Task = TypeVar("Task", bound=Frozen)
HOME = "home"
_SECURE_TASK: TypeAdapter[SecureTask] = TypeAdapter(SecureTask)

app = ClientApp()


class _Malformed(Exception):
    """A message that is not one of ours."""


@app.train()
def train(message: Message, context: Context) -> Message:
    """TrainTask with array `weights` float32[D] -> SignedUpdate with array `update` float32[D], or Refusal."""
    return _reply(message, context, _train)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """ScoreTask with arrays `base`, `updates` and, under a plan with momentum, `velocity` -> Scored or Refusal."""
    return _reply(message, context, _score)


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    """HelloTask -> Hello or Refusal."""
    return _reply(message, context, _hello, sitting=True)


@app.query("score")
def score(message: Message, context: Context) -> Message:
    """Answer like `evaluate`."""
    return _reply(message, context, _score)


@app.query("contest")
def contest(message: Message, context: Context) -> Message:
    """ContestTask with array `weights` float32[D] -> Scored or Refusal."""
    return _reply(message, context, _contest)


@app.query("release")
def release(message: Message, context: Context) -> Message:
    """ReleaseTask -> SignedRelease or Refusal."""
    return _reply(message, context, _release)


@app.query("cosign")
def cosign(message: Message, context: Context) -> Message:
    """CosignTask -> Cosigned, WitnessState or Refusal."""
    return _reply(message, context, _cosign, sitting=True)


@app.query("model")
def model(message: Message, context: Context) -> Message:
    """ModelTask with array `weights` float32[D] -> Installed or Refusal."""
    return _reply(message, context, _model, sitting=True)


@app.train("masked")
def train_masked(message: Message, context: Context) -> Message:
    """MaskTask with array `weights` float32[D] -> MaskedUpdate with array `masked` uint64[D], or Refusal."""
    return _reply(message, context, _mask)


@app.query("secure")
def secure(message: Message, context: Context) -> Message:
    """Answer the other steps of a round under secure aggregation (data_schemas.secure)."""
    return _reply(message, context, _secure)


def _reply(message: Message, context: Context, handle: Handler, *, sitting: bool = False) -> Message:
    started = time.monotonic()
    body, arrays = _answer(message, context, handle, sitting=sitting)
    if handle in _ABOUT_PATIENTS:
        _tell(_home(context), message, handle, body)
    record(_home(context), message.metadata.message_type, body, time.monotonic() - started)
    return Message(content=to_record(body, arrays), reply_to=message)


def _answer(message: Message, context: Context, handle: Handler, *, sitting: bool) -> Answer:
    """Answer, or turn whatever went wrong into a code; the node's own log says where. The node's one broad except."""
    home = _home(context)
    try:
        body, arrays = _content(message)
        if handle in _ABOUT_PATIENTS:
            participation.check(home)
        with NodeFolder.open(home, sitting=sitting) as node:
            return handle(node, body, arrays)
    except Declined as declined:
        return Refusal(code=declined.code), {}
    except _Malformed:
        return Refusal(code=RefusalCode.MALFORMED_TASK), {}
    except NodeBusy:
        return Refusal(code=RefusalCode.NODE_BUSY), {}
    except Exception as error:  # noqa: BLE001
        _log(home, error)
        return Refusal(code=RefusalCode.INTERNAL), {}


def _home(context: Context) -> Path:
    """Find the node folder: set by whoever starts the node, never by a message."""
    configured = context.node_config.get(HOME) or os.environ.get("ISLET_NODE_HOME", "")
    return Path(str(configured))


def _content(message: Message) -> tuple[bytes, Arrays]:
    try:
        return from_record(message.content)
    except (KeyError, TypeError, ValueError) as error:
        raise _Malformed from error


def _parsed(kind: type[Task], body: bytes) -> Task:
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise _Malformed from error


def _array(arrays: Arrays, name: str, dimensions: int) -> NDArray[np.float32]:
    array = arrays.get(name)
    if array is None or array.dtype != np.float32 or array.ndim != dimensions:
        raise _Malformed
    return array


def _hello(node: NodeFolder, body: bytes, _arrays: Arrays) -> Answer:
    task, settings = _parsed(HelloTask, body), node.settings
    if task.federation != settings.federation:
        return Refusal(code=RefusalCode.UNKNOWN_FEDERATION), {}
    answer = Hello(
        node=settings.name,
        public_key=node.key.public.hex,
        declared_training_patients=settings.declared_training_patients,
        declared_heldout_patients=settings.declared_heldout_patients,
    )
    return answer, {}


def _train(node: NodeFolder, body: bytes, arrays: Arrays) -> Answer:
    from hospital_node import local_round

    outcome = local_round.train(node, _parsed(TrainTask, body), _array(arrays, "weights", 1), time.time())
    if isinstance(outcome, Refusal):
        return outcome, {}
    return outcome[0], {"update": outcome[1]}


def _score(node: NodeFolder, body: bytes, arrays: Arrays) -> Answer:
    from hospital_node import scoring

    task = _parsed(ScoreTask, body)
    velocity = _array(arrays, "velocity", 1) if task.plan.server.momentum else None
    return scoring.score(node, task, _array(arrays, "base", 1), _array(arrays, "updates", 2), velocity), {}


def _contest(node: NodeFolder, body: bytes, arrays: Arrays) -> Answer:
    from hospital_node import contest

    return contest.score(node, _parsed(ContestTask, body), _array(arrays, "weights", 1)), {}


def _release(node: NodeFolder, body: bytes, _arrays: Arrays) -> Answer:
    from hospital_node.release import release as release_epoch

    return release_epoch(node, _parsed(ReleaseTask, body), time.time()), {}


def _cosign(node: NodeFolder, body: bytes, _arrays: Arrays) -> Answer:
    from hospital_node import witness

    return witness.cosign(node, _parsed(CosignTask, body), int(time.time())), {}


def _model(node: NodeFolder, body: bytes, arrays: Arrays) -> Answer:
    from hospital_node import champion

    return champion.install(node, _parsed(ModelTask, body), _array(arrays, "weights", 1)), {}


def _mask(node: NodeFolder, body: bytes, arrays: Arrays) -> Answer:
    from hospital_node import secure_round

    weights = _array(arrays, "weights", 1)
    masked, vector = secure_round.mask(node, _parsed(MaskTask, body), weights, time.time())
    return masked, {"masked": vector}


def _secure(node: NodeFolder, body: bytes, arrays: Arrays) -> Answer:
    from hospital_node import secure_round, sum_check

    try:
        task = _SECURE_TASK.validate_json(body)
    except ValidationError as error:
        raise _Malformed from error
    match task:
        case AdvertiseTask():
            return secure_round.advertise(node, task), {}
        case SealTask():
            return secure_round.seal(node, task), {}
        case ConfirmTask():
            return secure_round.confirm(node, task), {}
        case UnmaskTask():
            return secure_round.unmask(node, task), {}
        case CheckTask():
            velocity = _array(arrays, "velocity", 1) if "velocity" in arrays else None
            return sum_check.check(node, task, _array(arrays, "base", 1), _total(arrays), velocity), {}


def _total(arrays: Arrays) -> NDArray[np.int64]:
    total = arrays.get("total")
    if total is None or total.dtype != np.int64 or total.ndim != 1:
        raise _Malformed
    return total


# What uses patients' readings: the hospital's switch stops it, and reports/tasks.jsonl tells of it.
_ABOUT_PATIENTS: dict[Handler, tuple[str, str]] = {
    _train: ("train round", "round"),
    _mask: ("train round", "round"),
    _score: ("score round", "round"),
    _contest: ("score against the champion", ""),
    _release: ("release credit of epoch", "epoch"),
}


def _tell(home: Path, message: Message, handle: Handler, answer: Frozen) -> None:
    """One line in reports/tasks.jsonl: what the federation asked about patients, and how this node answered."""
    what, number = _ABOUT_PATIENTS[handle]
    try:
        told = json.loads(_content(message)[0])
        task = told.get("train", told)
        asked = f"{what} {int(task[number])} of {task['run']}" if number else f"{what}: {task['run']}"
    except (_Malformed, ValueError, KeyError, TypeError):
        asked = what
    outcome = answer.code.value if isinstance(answer, Refusal) else "answered"
    log = AuditLog(home / "reports" / "tasks.jsonl")
    log.write(Access(at=time.time(), who="federation", operation=asked, outcome=outcome))
    log.close()


def _log(home: Path, error: Exception) -> None:
    """One line in the node's own log: what kind of error, where in the code. Its text only where we wrote it.

    Texts of other libraries' errors may quote a value; ours never do.
    """
    frames = traceback.extract_tb(error.__traceback__)
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
    text = f" {error.message}" if isinstance(error, IsletError) else ""
    note(home, "error", f"{type(error).__name__} at {where}{text}")
