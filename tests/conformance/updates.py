"""What a hospital may send instead of an honest update, as Flower records on their way to the aggregator.

Each goes through a real ServerApp's path: a grid, the courier, the gate. Beside the hostile hospital there is an honest
one, which must be admitted every time.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict

from aggregator.admission import Expectation
from aggregator.aggregation import model_hash
from aggregator.collecting import collect
from aggregator.courier import Courier
from aggregator.embedded_grid import EmbeddedGrid
from aggregator.grid_exchange import GridExchange
from aggregator.settings import AggregatorSettings
from data_schemas.canonical import bytes_hash
from data_schemas.frozen import Frozen
from data_schemas.messages import Cosigned, Hello, PrivacySpend, Refusal, RefusalCode, Scored, SignedUpdate, TrainTask
from data_schemas.plan import PrivacyEvent
from pipeline.wire import to_record
from tests.aggregator import small_federation as small
from tests.conformance.case import Case

HOSTILE, HONEST = "birch", "alder"
BASE = model_hash(small.START)
TASK = TrainTask(
    federation=small.FEDERATION, run="run", round=2, plan=small.PLAN, base_model_hash=BASE, deadline_unix=0.0
)
DELTA = small.honest_delta(HOSTILE, TASK)
OLD = small.honest_delta(HOSTILE, TASK.model_copy(update={"round": 1}))
LAST_STEP = np.linspace(0.01, 0.02, small.D, dtype=np.float32)
REPLY, HELLO, COMMAND = "reply.bin", "hello.json", "command"

app = ClientApp()


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    home = Path(str(context.node_config["home"]))
    name, key = home.name, small.key_of(home.name)
    told = json.loads((home / HELLO).read_text()) if (home / HELLO).exists() else {}
    honest = Hello(
        node=name, public_key=key.public.hex, declared_training_patients=1, declared_heldout_patients=small.HELDOUT
    )
    return Message(to_record(honest.model_copy(update=told)), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    home = Path(str(context.node_config["home"]))
    command = (home / COMMAND).read_text() if (home / COMMAND).exists() else ""
    if command == "raise":
        raise ValueError("glucose of Jane Doe was 123 mg/dL")
    if command == "sleep":
        time.sleep(1.6)
    content = ProtoRecordDict.FromString((home / REPLY).read_bytes())
    return Message(recorddict_from_proto(content), reply_to=message)


def signed(delta: np.ndarray = DELTA, name: str = HOSTILE, **changes: Any) -> SignedUpdate:
    return small.signed_update(name, TASK, delta, **changes)


def record(delta: Any = DELTA, body: Frozen | None = None, **arrays: np.ndarray) -> RecordDict:
    """Return a reply whose signature and hash fit the array, unless `body` says otherwise."""
    delta = np.asarray(delta)
    return to_record(signed(delta) if body is None else body, arrays or {"update": delta})


def judged(content: RecordDict, path: Path, *, command: str = "", hello_says: dict[str, Any] | None = None) -> str:
    """Let both hospitals answer round 2 and return the code on the hostile one's record."""
    for name, reply in ((HONEST, honest_reply()), (HOSTILE, content)):
        (path / name).mkdir()
        (path / name / REPLY).write_bytes(recorddict_to_proto(reply).SerializeToString())
    (path / HOSTILE / COMMAND).write_text(command)
    if hello_says:
        (path / HOSTILE / HELLO).write_text(json.dumps(hello_says))
    settings = AggregatorSettings(
        federation=small.FEDERATION,
        min_updates=1,
        max_attempts=1,
        hello_timeout_s=20,
        round_timeout_s=1.0 if command == "sleep" else 20,
    )
    grid = EmbeddedGrid(app, {name: path / name for name in (HONEST, HOSTILE)})
    expected = Expectation(
        federation=small.FEDERATION,
        run="run",
        round=2,
        plan=small.PLAN,
        base_model_hash=BASE,
        dimension=small.D,
        seen_hashes=frozenset({bytes_hash(OLD.tobytes())}),
        earlier=(LAST_STEP,),
    )
    collected = collect(
        Courier(GridExchange(grid), small.FEDERATION, settings.hello_timeout_s),
        settings,
        expected,
        small.START,
        members={name: small.member(name) for name in (HONEST, HOSTILE)},
        closed=None,
        clock=time.time,
    )
    assert [update.node for update in collected.admitted] == [HONEST]
    (rejected,) = collected.rejected
    assert rejected.update_hash is None or len(rejected.update_hash) == 64
    return str(rejected.code)


def honest_reply() -> RecordDict:
    delta = small.honest_delta(HONEST, TASK)
    return to_record(signed(delta, HONEST), {"update": delta})


def with_value(place: int, value: float) -> np.ndarray:
    delta = DELTA.copy()
    delta[place] = value
    return delta


def with_json(change: Callable[[bytes], bytes]) -> RecordDict:
    content = record()
    content.config_records["body"]["json"] = change(bytes(content.config_records["body"]["json"]))
    return content


def with_fields(**changes: Any) -> RecordDict:
    def change(body: bytes) -> bytes:
        value = json.loads(body)
        for name, new in changes.items():
            where, _, field = name.rpartition("__")
            target = value["manifest"] if where == "manifest" else value["manifest"]["spend"] if where else value
            target[field] = new
        return json.dumps(value).encode()

    return with_json(change)


def with_bytes(data: bytes) -> RecordDict:
    content = record()
    content.array_records["arrays"]["update"] = Array(
        dtype="float32", shape=(small.D,), stype="numpy.ndarray", data=data
    )
    return content


def npy(delta: np.ndarray = DELTA) -> bytes:
    return bytes(to_record(signed(), {"update": delta}).array_records["arrays"]["update"].data)


def archive() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, update=DELTA)
    return buffer.getvalue()


def bomb() -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": (9 * 10**12,)})
    return buffer.getvalue() + b"\x00" * 64


def pickled() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"run": "os.system"}], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def spending(**changes: Any) -> RecordDict:
    spend = PrivacySpend.model_validate(small.spend(small.PLAN.round_event).model_dump() | changes)
    return record(body=signed(spend=spend))


def other_bytes_signed() -> SignedUpdate:
    return signed().model_copy(update={"signature": small.key_of(HOSTILE).sign(signed(round=1).manifest)})


COPY = (small.honest_delta(HONEST, TASK) * np.float32(1.1)).astype(np.float32)
HUGE_INTEGER = partial(bytes.replace, *(b'"round":2', b'"round":' + b"9" * 30))
QUIET = (DELTA * np.float32(0.01)).astype(np.float32)

_RECORDS: tuple[tuple[str, str, str, Callable[[], RecordDict]], ...] = (
    ("nan", "one weight is not a number", "not-finite", lambda: record(with_value(3, np.nan))),
    ("infinity", "one weight is infinite", "not-finite", lambda: record(with_value(3, np.inf))),
    ("minus-infinity", "one weight is minus infinite", "not-finite", lambda: record(with_value(0, -np.inf))),
    (
        "poisoned",
        "a reversed update a million times as long",
        "norm-too-large",
        lambda: record(DELTA * np.float32(-1e6)),
    ),
    ("overflow", "weights whose norm overflows float32", "norm-too-large", lambda: record(np.full_like(DELTA, 3e38))),
    ("spike", "one weight decides everything", "norm-too-large", lambda: record(with_value(7, 1e8))),
    ("nothing", "a free rider's zeros", "not-private", lambda: record(np.zeros_like(DELTA))),
    ("quiet", "an update with too little noise in it", "not-private", lambda: record(QUIET)),
    ("copied", "a colleague's update, a tenth longer", "copied", lambda: record(COPY)),
    ("echoed", "the last step of the global model again", "copied", lambda: record(LAST_STEP * np.float32(0.9))),
    ("one-short", "a weight is missing", "wrong-shape", lambda: record(DELTA[:-1])),
    ("one-more", "a weight too many", "wrong-shape", lambda: record(np.append(DELTA, np.float32(0)))),
    ("matrix", "the weights as a matrix", "wrong-shape", lambda: record(DELTA[None, :])),
    ("scalar", "one number for all weights", "wrong-shape", lambda: record(np.float32(0.01))),
    ("empty", "no weight at all", "wrong-shape", lambda: record(DELTA[:0])),
    ("float64", "wider numbers than agreed", "wrong-dtype", lambda: record(DELTA.astype(np.float64))),
    ("float16", "narrower numbers than agreed", "wrong-dtype", lambda: record(DELTA.astype(np.float16))),
    ("big-endian", "bytes in the other order", "wrong-dtype", lambda: record(DELTA.astype(">f4"))),
    ("integers", "whole numbers", "wrong-dtype", lambda: record(np.ones(small.D, dtype=np.int32))),
    ("complex", "complex numbers", "wrong-dtype", lambda: record(DELTA.astype(np.complex64))),
    ("pickle", "a Python object that runs code when read", "malformed-reply", lambda: with_bytes(pickled())),
    ("archive", "a zip archive in place of an array", "malformed-reply", lambda: with_bytes(archive())),
    ("truncated-array", "an array cut in the middle", "malformed-reply", lambda: with_bytes(npy()[:-9])),
    ("header-bomb", "64 bytes that claim to be 36 terabytes", "malformed-reply", lambda: with_bytes(bomb())),
    ("garbage-array", "bytes that are no array", "malformed-reply", lambda: with_bytes(b"\x00" * 64)),
    ("oversized-array", "an array of 17 MiB", "too-large", lambda: record(np.zeros(17 * 2**18, dtype=np.float32))),
    ("oversized-body", "a text of 17 MiB", "too-large", lambda: with_json(lambda b: b + b" " * 17 * 2**20)),
    ("no-array", "a manifest without its update", "malformed-reply", lambda: to_record(signed())),
    ("second-array", "an array nobody asked for", "malformed-reply", lambda: record(update=DELTA, readings=DELTA)),
    ("renamed-array", "the update under another name", "malformed-reply", lambda: record(weights=DELTA)),
    ("not-json", "a body that is not JSON", "malformed-reply", lambda: with_json(lambda b: b[:-1])),
    ("not-text", "a body that is not UTF-8", "malformed-reply", lambda: with_json(lambda b: b"\xff\xfe" + b)),
    ("nested", "a body nested 100,000 deep", "malformed-reply", lambda: with_json(lambda _: b"[" * 100_000)),
    ("huge-integer", "an integer of 30 digits", "malformed-reply", lambda: with_json(HUGE_INTEGER)),
    (
        "nan-epsilon",
        "epsilon that is not a number",
        "malformed-reply",
        lambda: with_fields(spend__epsilon_after=float("nan")),
    ),
    ("negative-epsilon", "epsilon below zero", "malformed-reply", lambda: with_fields(spend__epsilon_after=-1.0)),
    ("unknown-field", "a field nobody knows", "malformed-reply", lambda: with_fields(manifest__readings=[123])),
    (
        "missing-field",
        "a manifest without signature",
        "malformed-reply",
        lambda: with_json(lambda b: b.replace(b"signature", b"sign")),
    ),
    ("unknown-kind", "a kind of message nobody knows", "malformed-reply", lambda: with_fields(kind="order")),
    (
        "wrong-kind",
        "an acknowledgement in place of an update",
        "malformed-reply",
        lambda: record(body=Scored(round=2, new_model_hash=BASE)),
    ),
    (
        "cosignature",
        "a cosignature in place of an update",
        "malformed-reply",
        lambda: record(body=Cosigned(cosignature="x")),
    ),
    ("replayed-round", "last round's signed update", "wrong-round", lambda: record(body=signed(round=1))),
    ("replayed-run", "another run's signed update", "wrong-run", lambda: record(body=signed(run="before"))),
    (
        "replayed-federation",
        "another federation's signed update",
        "wrong-federation",
        lambda: record(body=signed(federation="x")),
    ),
    ("replayed-bytes", "last round's numbers, signed anew", "replayed", lambda: record(OLD)),
    ("swapped-node", "a colleague's signed reply passed on", "wrong-node", honest_reply),
    (
        "foreign-key",
        "signed with a colleague's key",
        "bad-signature",
        lambda: record(body=signed().model_copy(update={"signature": small.key_of(HONEST).sign(signed().manifest)})),
    ),
    ("other-bytes", "a right signature over other bytes", "bad-signature", lambda: record(body=other_bytes_signed())),
    (
        "short-signature",
        "half a signature",
        "bad-signature",
        lambda: record(body=signed().model_copy(update={"signature": signed().signature[:64]})),
    ),
    (
        "no-signature",
        "an empty signature",
        "bad-signature",
        lambda: record(body=signed().model_copy(update={"signature": ""})),
    ),
    (
        "forged-count",
        "a billion patients to weigh more",
        "wrong-declared-patients",
        lambda: record(body=signed(declared_patients=10**9)),
    ),
    ("wrong-plan", "made with a plan of its own", "wrong-plan", lambda: record(body=signed(plan_hash="1" * 64))),
    (
        "wrong-base",
        "made from another model",
        "wrong-base-model",
        lambda: record(body=signed(base_model_hash="1" * 64)),
    ),
    ("wrong-hash", "other numbers than were signed", "wrong-hash", lambda: record(body=signed(update_hash="1" * 64))),
    (
        "text-for-hash",
        "a patient's name in place of a hash",
        "wrong-hash",
        lambda: record(body=signed(update_hash="Jane Doe")),
    ),
    (
        "text-for-head",
        "a reading in place of the book's head",
        "wrong-budget-head",
        lambda: record(body=signed(budget_head="123 mg/dL")),
    ),
    (
        "weaker-unit",
        "noise for windows, not for patients",
        "wrong-unit",
        lambda: spending(unit="window (weaker than patient)"),
    ),
    ("larger-delta", "a larger delta than planned", "wrong-delta", lambda: spending(delta=1e-3)),
    (
        "less-noise",
        "less noise than planned",
        "wrong-event",
        lambda: spending(event=PrivacyEvent(sample_rate=0.5, noise_multiplier=0.1, steps=5)),
    ),
    (
        "refusal",
        "a refusal is on record with its code",
        "budget-exhausted",
        lambda: to_record(Refusal(code=RefusalCode.BUDGET_EXHAUSTED)),
    ),
)

CASES: tuple[Case, ...] = (
    *(Case(name, tries, code, lambda path, make=make: judged(make(), path)) for name, tries, code, make in _RECORDS),
    Case(
        "raises",
        "the ClientApp fails; its text stays there",
        "node-raised",
        lambda p: judged(record(), p, command="raise"),
    ),
    Case("late", "an answer after its time", "expired", lambda p: judged(record(), p, command="sleep")),
    Case(
        "impostor",
        "says it is a member, with its own key",
        "not-connected",
        lambda p: judged(record(), p, hello_says={"node": HONEST}),
    ),
    Case(
        "new-key",
        "a member's name with a key not in the ledger",
        "not-connected",
        lambda p: judged(record(), p, hello_says={"public_key": small.key_of("x").public.hex}),
    ),
)
