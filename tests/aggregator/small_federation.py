"""A small real federation for the tests: three hospitals with keys, a ClientApp that signs, and vectors of 16 numbers.

A hospital misbehaves as the file `behaviour` in its home says. Everything a hospital answers follows from the task, as
stored replies do, so a run that was killed and resumed must end with the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from aggregator import governance, ledger, rounds, settings, state
from aggregator.embedded_grid import EmbeddedGrid
from aggregator.progress import Observer, RoundSummary
from data_schemas.canonical import bytes_hash, content_hash
from data_schemas.frozen import Frozen
from data_schemas.ledger import CreditEntry, MemberEntry
from data_schemas.messages import (
    Cosigned,
    CosignTask,
    EpochRelease,
    Hello,
    PrivacySpend,
    Refusal,
    RefusalCode,
    ReleaseTask,
    Scored,
    ScoreTask,
    SignedRelease,
    SignedUpdate,
    TrainTask,
    UpdateManifest,
    WitnessState,
)
from data_schemas.plan import TrainingPlan
from pipeline import checkpoint, merkle
from pipeline.signing import PrivateKey, write_durably
from pipeline.wire import from_record, to_record

D = 16
NAMES = ("alder", "birch", "cedar")
PATIENTS = {"alder": 30, "birch": 20, "cedar": 50}
HELDOUT = 10
FEDERATION = "test/consortium"
START = np.linspace(-1, 1, D, dtype=np.float32)
PLAN = TrainingPlan.model_validate(
    {
        "name": "tiny",
        "model": {"history_minutes": 60, "hidden_size": 4},
        "rounds": 3,
        "local": {"steps_per_round": 5, "windows_per_patient": 2, "learning_rate": 0.1, "trainable": "all"},
        "server": {"learning_rate": 1.0, "momentum": 0.5, "average_last_rounds": 2},
        "privacy": {"epsilon": 4.0, "max_grad_norm": 1.0, "sample_rate": 0.5, "noise_multiplier": 1.0},
        "credit": {
            "rounds_per_epoch": 2,
            "windows_per_patient": 4,
            "clip_mg_dl": 1.0,
            "noise_multiplier": 5.0,
            "epsilon": 2.0,
            "pot_micro_credits_per_round": 1_000_000,
        },
        "seed": 7,
    }
)


def key_of(name: str) -> PrivateKey:
    return PrivateKey.from_seed(hashlib.sha256(name.encode()).digest())


def member(name: str) -> MemberEntry:
    return MemberEntry(
        node=name,
        public_key=key_of(name).public.hex,
        declared_training_patients=PATIENTS[name],
        declared_heldout_patients=HELDOUT,
    )


def spend(event: Any) -> PrivacySpend:
    return PrivacySpend(unit="patient", event=event, epsilon_after=1.5, delta=1e-5)


def signed_update(name: str, task: TrainTask, delta: np.ndarray, **changes: Any) -> SignedUpdate:
    manifest = UpdateManifest(
        federation=task.federation,
        run=task.run,
        round=task.round,
        node=name,
        plan_hash=content_hash(task.plan),
        base_model_hash=task.base_model_hash,
        update_hash=bytes_hash(delta.tobytes()),
        declared_patients=PATIENTS[name],
        spend=spend(task.plan.round_event),
        budget_head="0" * 64,
    ).model_copy(update=changes)
    return SignedUpdate(manifest=manifest, signature=key_of(name).sign(manifest))


def honest_delta(name: str, task: TrainTask) -> np.ndarray:
    seed = hashlib.sha256(f"{name} {task.round} {task.base_model_hash}".encode()).digest()
    draws = np.random.default_rng(list(seed)).normal(0, 0.01, D)
    return draws.astype(np.float32)


def _nothing(_what: str) -> None:
    pass


# Every hospital's answer passes here; a test may put a function that kills the process.
on_event: Callable[[str], None] = _nothing
app = ClientApp()


def _home(context: Context) -> Path:
    return Path(str(context.node_config["home"]))


def _note(home: Path, line: str) -> None:
    with (home / "diary").open("a") as diary:
        diary.write(line + "\n")


def _reply(message: Message, body: Frozen, **arrays: np.ndarray) -> Message:
    return Message(to_record(body, arrays), reply_to=message)


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    name = _home(context).name
    on_event(f"hello {name}")
    if behaviour(_home(context)) == "impostor":
        return _reply(message, _hello("alder", key_of(name)))
    return _reply(message, _hello(name, key_of(name)))


def _hello(name: str, key: PrivateKey) -> Hello:
    return Hello(
        node=name,
        public_key=key.public.hex,
        declared_training_patients=PATIENTS[name],
        declared_heldout_patients=HELDOUT,
    )


def behaviour(home: Path) -> str:
    return (home / "behaviour").read_text() if (home / "behaviour").exists() else "honest"


@app.train()
def train(message: Message, context: Context) -> Message:  # noqa: PLR0911, PLR0912
    body, arrays = from_record(message.content)
    task, home = TrainTask.model_validate_json(body), _home(context)
    name, delta = home.name, honest_delta(home.name, task)
    _note(home, f"train {task.round}")
    on_event(f"train {task.round} {name}")
    assert bytes_hash(arrays["weights"].tobytes()) == task.base_model_hash
    match behaviour(home):
        case "nan":
            delta[3] = np.nan
        case "shape":
            delta = delta[:-1]
        case "float64":
            wide = delta.astype(np.float64)
            return _reply(message, signed_update(name, task, wide), update=wide)
        case "huge":
            delta *= np.float32(1e6)
        case "overflow":
            delta[:] = np.finfo(np.float32).max
        case "copy":
            delta = honest_delta("alder", task)
        case "stale":
            delta = np.full(D, 0.01, dtype=np.float32)
        case "declared":
            return _reply(message, signed_update(name, task, delta, declared_patients=10**9), update=delta)
        case "forged":
            honest = signed_update(name, task, delta)
            return _reply(
                message, honest.model_copy(update={"signature": key_of("x").sign(honest.manifest)}), update=delta
            )
        case "extra-array":
            return _reply(message, signed_update(name, task, delta), update=delta, readings=delta)
        case "not-json":
            record = to_record(signed_update(name, task, delta), {"update": delta})
            record.config_records["body"]["json"] = b"{"
            return Message(record, reply_to=message)
        case "endless-integer":
            record = to_record(signed_update(name, task, delta), {"update": delta})
            body = bytes(record.config_records["body"]["json"])
            record.config_records["body"]["json"] = body.replace(b'"round":', b'"round":9' + b"0" * 30)
            return Message(record, reply_to=message)
        case "refuse":
            return _reply(message, Refusal(code=RefusalCode.BUDGET_EXHAUSTED))
        case "refuse-once" if (home / "diary").read_text().count("\n") == 1:
            return _reply(message, Refusal(code=RefusalCode.NODE_BUSY))
        case "raise":
            raise ValueError("glucose of Jane Doe was 123 mg/dL")
        case "slow" if task.round == 1:
            time.sleep(1.5)
    return _reply(message, signed_update(name, task, delta), update=delta)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    body, arrays = from_record(message.content)
    task, home = ScoreTask.model_validate_json(body), _home(context)
    on_event(f"score {task.round} {home.name}")
    assert bytes_hash(arrays["base"].tobytes()) == task.base_model_hash
    assert tuple(bytes_hash(update.tobytes()) for update in arrays["updates"]) == task.update_hashes
    _note(home, f"score {task.round}")
    if behaviour(home) == "score-busy" and (home / "diary").read_text().count(f"score {task.round}\n") == 1:
        return _reply(message, Refusal(code=RefusalCode.NODE_BUSY))
    return _reply(message, Scored(round=task.round, new_model_hash=task.new_model_hash))


# Releases that are rightly signed and nevertheless cannot be used.
LIES: dict[str, dict[str, Any]] = {
    "boast": {"shapley_mg_dl": (1e300, -1e300, -1e300)},
    "less-noise": {"noise_std_mg_dl": 0.01},
    "other-epoch": {"epoch": 9},
    "more-people": {"declared_heldout_patients": 10**6},
    "abstain-and-vote": {"abstained": True},
    "short": {"shapley_mg_dl": (1.0,)},
    "free": {"spend": None},
    "free-text": {"budget_head": "Jane Doe, 123 mg/dL"},
}


@app.query("release")
def release(message: Message, context: Context) -> Message:
    task, home = ReleaseTask.model_validate_json(from_record(message.content)[0]), _home(context)
    name = home.name
    on_event(f"release {task.epoch} {name}")
    values = tuple(0.1 * len(node) + 0.1 * node.count("e") for node in task.nodes)
    released = EpochRelease(
        federation=task.federation,
        run=task.run,
        epoch=task.epoch,
        node=name,
        nodes=task.nodes,
        shapley_mg_dl=values,
        noise_std_mg_dl=0.5,
        declared_heldout_patients=HELDOUT,
        abstained=False,
        spend=spend(task.plan.release_event),
        budget_head="0" * 64,
    )
    released = released.model_copy(update=LIES.get(behaviour(home), {}))
    signer = key_of("x") if behaviour(home) == "forged-release" else key_of(name)
    return _reply(message, SignedRelease(release=released, signature=signer.sign(released)))


@app.query("cosign")
def cosign(message: Message, context: Context) -> Message:
    task, home = CosignTask.model_validate_json(from_record(message.content)[0]), _home(context)
    on_event(f"cosign {home.name}")
    if behaviour(home) == "no-cosign":
        return _reply(message, Refusal(code=RefusalCode.LEDGER_FORK))
    new = checkpoint.SignedCheckpoint.from_text(task.checkpoint).checkpoint
    seen = json.loads((home / "witness.json").read_text()) if (home / "witness.json").exists() else []
    if len(seen) != task.old_size:
        return _reply(message, WitnessState(size=len(seen)))
    tree = merkle.Tree(merkle.leaf_hash(line.encode()) for line in (*seen, *task.entries))
    if (tree.size, tree.root()) != (new.size, new.root):
        return _reply(message, Refusal(code=RefusalCode.LEDGER_FORK))
    write_durably(home / "witness.json", json.dumps([*seen, *task.entries]).encode())
    return _reply(message, Cosigned(cosignature=checkpoint.cosign(new, key_of(home.name), home.name, 1_700_000_000)))


@dataclass
class Watcher:
    """An observer that keeps what it was told."""

    summaries: list[RoundSummary] = field(default_factory=list)
    credits: list[CreditEntry] = field(default_factory=list)
    champions: list[str] = field(default_factory=list)

    def round_closed(self, summary: RoundSummary) -> None:
        """Keep it."""
        self.summaries.append(summary)

    def epoch_closed(self, credit: CreditEntry) -> None:
        """Keep it."""
        self.credits.append(credit)

    def champion_decided(self, model_hash: str) -> None:
        """Keep it."""
        self.champions.append(model_hash)


def build(
    path: Path, behaviours: dict[str, str] | None = None, members: tuple[str, ...] = NAMES, **changes: Any
) -> settings.AggregatorFolder:
    """Make an aggregator folder with a plan and members in its ledger, and the hospitals' homes beside it."""
    given = {"federation": FEDERATION, "plan": "plan.json", "initial_weights": "start.npz", "retry_pause_s": 0.0}
    folder = settings.create(path / "aggregator", settings.AggregatorSettings(**{**given, **changes}), seed=1)
    (folder.path / "plan.json").write_text(PLAN.model_dump_json())
    np.savez(folder.path / "start.npz", weights=START)
    book = folder.open_ledger()
    for name in members:
        governance.admit_member(book, member(name), "2026-01-01T00:00:00+00:00")
    book.close()
    for name in NAMES:
        (path / name).mkdir()
        if name in (behaviours or {}):
            (path / name / "behaviour").write_text(behaviours[name])
    return folder


def grid(path: Path, names: tuple[str, ...] = NAMES) -> EmbeddedGrid:
    return EmbeddedGrid(app, {name: path / name for name in names})


def run(path: Path, observer: Observer | None = None, names: tuple[str, ...] = NAMES) -> rounds.FederationResult:
    """Run, or resume, the federation under `path`."""
    from aggregator.server_app import run_folder

    return run_folder(grid(path, names), settings.open_folder(path / "aggregator"), observer or Watcher())


def entries(path: Path) -> list[Any]:
    return [line.entry for line in ledger.read_entries(path / "aggregator" / "ledger.db")]


def run_until(path: Path, deadly: int) -> None:
    """Run the federation and die by SIGKILL at the deadly-th event: a message, an entry, a file."""
    count_events(lambda number: os.kill(os.getpid(), signal.SIGKILL) if number == deadly else None)
    run(path)


def count_events(on_number: Callable[[int], None]) -> list[str]:
    """Count this process's events: a message at a hospital; before and after a durable write and an entry."""
    global on_event  # noqa: PLW0603
    seen: list[str] = []
    lock = threading.Lock()

    def event(what: str) -> None:
        with lock:
            seen.append(what)
            on_number(len(seen))

    def around(function: Callable[..., Any], what: str) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            event(f"before {what}")
            result = function(*args, **kwargs)
            event(f"after {what}")
            return result

        return wrapped

    on_event = event
    ledger.Ledger.append_once = around(ledger.Ledger.append_once, "entry")  # type: ignore[method-assign]
    state.write_durably = around(state.write_durably, "file")  # type: ignore[attr-defined]
    return seen
