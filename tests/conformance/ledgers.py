"""What an aggregator may write into its ledger, rightly signed with its own key, and show to a hospital.

Each case shows a real node a ledger; the node must not cosign it. A second group goes to the credit releases of
hospitals, which the aggregator must not use.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from aggregator.epochs import release_code
from data_schemas.canonical import bytes_hash, content_hash
from data_schemas.governance import DecisionEntry, RotateKey
from data_schemas.ledger import CreditEntry, CreditLine, MemberEntry, ModelEntry, PlanEntry, RejectedUpdate, RoundEntry
from data_schemas.messages import (
    CosignTask,
    EpochRelease,
    PrivacySpend,
    Refusal,
    RefusalCode,
    ReleaseTask,
    ScoreTask,
    SignedRelease,
    SignedUpdate,
    UpdateManifest,
)
from data_schemas.plan import RELATION
from hospital_node import ledger_view, replies, scoring, witness
from hospital_node.folder import NodeFolder
from pipeline import checkpoint, merkle
from pipeline.checkpoint import Checkpoint
from pipeline.contribution import credit
from pipeline.signing import PrivateKey
from tests.conformance.case import Case
from tests.conformance.tasks import BASE, made, run_of
from tests.hospital_node.small_node import FEDERATION, NOW, plan
from tests.hospital_node.test_ledger_view import AGGREGATOR, AT, Log, founding, log_of, member

PLAN = plan()
RUN, PLAN_HASH, BASE_HASH = run_of(PLAN), content_hash(PLAN), bytes_hash(BASE.tobytes())
KEYS = {name: PrivateKey.from_seed(name.encode().ljust(32, b".")) for name in ("east", "south", "west")}
STOLEN, THIEF = "s" * 64, PrivateKey.from_seed(b"thief".ljust(32, b"."))
NEXT = "d" * 64


def show(home: Path, task: CosignTask) -> str:
    """Show a node a ledger; return the code of its refusal, or what it answered instead."""
    with NodeFolder.open(home) as node:
        reply = witness.cosign(node, task, int(NOW))
    return str(reply.code) if isinstance(reply, Refusal) else type(reply).__name__


def others() -> list[MemberEntry]:
    return [
        MemberEntry(node=name, public_key=key.public.hex, declared_training_patients=10, declared_heldout_patients=10)
        for name, key in KEYS.items()
    ]


def begun(home: Path) -> Log:
    """Return an honest log in which four hospitals have a plan."""
    return log_of(founding(), member(home), *others(), PlanEntry(run=RUN, plan_hash=PLAN_HASH))


def update(name: str, key: PrivateKey | None = None, **changes: Any) -> SignedUpdate:
    values: dict[str, Any] = {
        "federation": FEDERATION,
        "run": RUN,
        "round": 1,
        "node": name,
        "plan_hash": PLAN_HASH,
        "base_model_hash": BASE_HASH,
        "update_hash": bytes_hash(name.encode()),
        "declared_patients": 10,
        "spend": PrivacySpend(unit="patient", event=PLAN.round_event, epsilon_after=1, delta=1e-5),
        "budget_head": "0" * 64,
    }
    manifest = UpdateManifest(**{**values, **changes})
    return SignedUpdate(manifest=manifest, signature=(key or KEYS[name]).sign(manifest))


def closed(*updates: SignedUpdate, rejected: tuple[str, ...] = ("north",), **changes: Any) -> RoundEntry:
    values: dict[str, Any] = {
        "run": RUN,
        "round": 1,
        "plan_hash": PLAN_HASH,
        "base_model_hash": BASE_HASH,
        "new_model_hash": NEXT,
        "admitted": updates or tuple(update(name) for name in KEYS),
        "rejected": tuple(RejectedUpdate(node=name, update_hash=None, code="no-reply") for name in rejected),
    }
    return RoundEntry(**{**values, **changes})


def release(name: str, **changes: Any) -> SignedRelease:
    values: dict[str, Any] = {
        "federation": FEDERATION,
        "run": RUN,
        "epoch": 1,
        "node": name,
        "nodes": tuple(KEYS),
        "shapley_mg_dl": (0.1, 0.2, 0.3),
        "noise_std_mg_dl": 0.75,
        "declared_heldout_patients": 10,
        "abstained": False,
        "spend": PrivacySpend(unit="patient", event=PLAN.release_event, epsilon_after=1, delta=1e-5),
        "budget_head": "0" * 64,
    }
    body = EpochRelease(**{**values, **changes})
    return SignedRelease(release=body, signature=KEYS[name].sign(body))


def paid(**changes: Any) -> CreditEntry:
    releases = tuple(release(name) for name in KEYS)
    lines, unpaid = credit([signed.release for signed in releases], tuple(KEYS), 1000, dict.fromkeys(KEYS, 10))
    values: dict[str, Any] = {
        "run": RUN,
        "epoch": 1,
        "rounds": (1,),
        "mode": "exact-shapley-weighted-median",
        "pot_micro_credits": 1000,
        "unpaid_micro_credits": unpaid,
        "lines": lines,
        "releases": releases,
    }
    return CreditEntry(**{**values, **changes})


def favoured(line: CreditLine, more: int) -> CreditLine:
    return line.model_copy(update={"micro_credits": line.micro_credits + more})


def moved_credit() -> CreditEntry:
    """Return an epoch's credit in which one hospital gets what another earned; the pot still adds up."""
    first, *middle, last = paid().lines
    return paid(lines=(favoured(first, 5), *middle, favoured(last, -5)))


def shown(path: Path, *entries: Any, old: int | None = None) -> str:
    """Let a node cosign an honest beginning, then show it these entries too."""
    home = made(path)
    log = begun(home)
    assert show(home, log.task(0)) == "Cosigned"
    size = len(log.lines)
    for entry in entries:
        log.add(entry)
    code = show(home, log.task(size if old is None else old))
    with NodeFolder.open(home) as node:
        assert len(ledger_view.payloads(node)) == size
    return code


def rewritten(path: Path, change: Callable[[Log], None]) -> str:
    """Let a node cosign a ledger with a round, then show it a changed history of the same length or longer."""
    home = made(path)
    log = begun(home)
    log.add(closed())
    assert show(home, log.task(0)) == "Cosigned"
    size = len(log.lines)
    change(log)
    return show(home, log.task(size))


def other_history(log: Log) -> None:
    lines, log.lines = log.lines[:-1], []
    log.lines.extend(lines)
    log.add(closed(new_model_hash="e" * 64))
    log.add(closed(update("east", round=2, base_model_hash="e" * 64), round=2, base_model_hash="e" * 64))


def cut(log: Log) -> None:
    del log.lines[-1]


def swapped(log: Log) -> None:
    log.lines[1], log.lines[2] = log.lines[2], log.lines[1]


def noted(path: Path, key: PrivateKey = AGGREGATOR, origin: str = "ledger/one", note: str = "", **changes: Any) -> str:
    """Show a node a checkpoint of another signer, another log, or a note that is none."""
    home = made(path)
    log = begun(home)
    assert show(home, log.task(0)) == "Cosigned"
    log.add(closed())
    tree = merkle.Tree(merkle.leaf_hash(line) for line in log.lines)
    signed = checkpoint.sign(Checkpoint(origin, tree.size, tree.root().hex()), key)
    return show(home, log.task(len(log.lines) - 1).model_copy(update={"checkpoint": note or signed, **changes}))


def foreign_line(path: Path) -> str:
    """Show a node an entry that the aggregator's key did not sign, under a checkpoint that it did."""
    home = made(path)
    log = begun(home)
    log.add(closed())
    log.lines[-1] = log.lines[-1].replace(b'"no-reply"', b'"not-finite"')
    return show(home, log.task(0))


def committed(home: Path) -> SignedUpdate:
    """Put an update of round 1 into the node's budget book, as training does, and return it."""
    with NodeFolder.open(home) as node:
        book = node.budget()
        told = {"asked_by": FEDERATION, "run": RUN, "at": AT, "ceiling_epsilon": 8.0, "noise": "secure"}
        reservation = book.reserve("t" * 64, "training", "patient", PLAN.round_event, **told)
        assert not isinstance(reservation, bytes)
        own = update("north", node.key, budget_head=reservation.head)
        book.commit("t" * 64, replies.pack(own, BASE))
    return own


def after_training(path: Path, entry: Callable[[Path, SignedUpdate], RoundEntry]) -> str:
    """Let the node make an update, show it the round, and check that the alarm stays when the code was `alarm`."""
    home = made(path)
    own = committed(home)
    log = begun(home)
    assert show(home, log.task(0)) == "Cosigned"
    size = len(log.lines)
    log.add(entry(home, own))
    code = show(home, log.task(size))
    with NodeFolder.open(home) as node:
        assert (ledger_view.alarm(node) is not None) == (code == RefusalCode.ALARM)
    return code


def under_my_name(home: Path, _own: SignedUpdate) -> RoundEntry:
    with NodeFolder.open(home) as node:
        return closed(update("north", node.key, update_hash="c" * 64), rejected=tuple(KEYS))


def false_sum(path: Path) -> str:
    """Log a model that is not the sum of its updates and have the round scored: the node trains no further."""
    home = made(path)
    log = begun(home)
    delta = np.full_like(BASE, 0.01)
    entry = closed(update("east", update_hash=bytes_hash(delta.tobytes())), rejected=("north", "south", "west"))
    log.add(entry)
    assert show(home, log.task(0)) == "Cosigned"
    task = ScoreTask(
        federation=FEDERATION,
        run=RUN,
        round=1,
        epoch=1,
        plan=PLAN,
        nodes=("east",),
        shares=(1.0,),
        update_hashes=(bytes_hash(delta.tobytes()),),
        base_model_hash=BASE_HASH,
        new_model_hash=NEXT,
    )
    with NodeFolder.open(home) as node:
        assert scoring.score(node, task, BASE, delta[None]) == Refusal(code=RefusalCode.MODEL_MISMATCH)
        assert ledger_view.alarm(node) is not None
    from pipeline.wire import to_record
    from tests.conformance.tasks import answer, train_task

    return answer(home, "train", to_record(train_task(PLAN), {"weights": BASE}))


def judged(**changes: Any) -> str:
    """Give the aggregator a hospital's release of an epoch; return why it cannot be used."""
    name = "east"
    signed = release(name, **{k: v for k, v in changes.items() if k != "signature"})
    if "signature" in changes:
        signed = signed.model_copy(update={"signature": changes["signature"]})
    task = ReleaseTask(federation=FEDERATION, run=RUN, epoch=1, plan=PLAN, nodes=tuple(KEYS), deadline_unix=NOW)
    return str(release_code(signed, task, name, others()[0]))


ROTATED = RotateKey(node="south", public_key=THIEF.public.hex)
BROKEN, FORK, ALARM = "ledger-breaks-rules", "ledger-fork", "alarm"
_SHOWN: tuple[tuple[str, str, str, tuple[Any, ...]], ...] = (
    (
        "member-without-vote",
        "a hospital joins that nobody voted for",
        BROKEN,
        (others()[0].model_copy(update={"node": "new", "public_key": THIEF.public.hex}),),
    ),
    (
        "key-without-vote",
        "a member's key changes without a vote",
        BROKEN,
        (others()[0].model_copy(update={"public_key": THIEF.public.hex}),),
    ),
    ("second-founding", "a new policy without a vote", BROKEN, (founding(max_epsilon_training=100),)),
    (
        "decision-without-votes",
        "an outcome without a proposal",
        BROKEN,
        (DecisionEntry(proposal_hash="1" * 64, accepted=True),),
    ),
    ("update-nobody-signed", "an update with a made-up signature", BROKEN, (closed(update("east", THIEF)),)),
    ("update-of-a-stranger", "an update of a hospital that is no member", BROKEN, (closed(update("new", THIEF)),)),
    (
        "two-models",
        "hospitals that trained from different models in one round",
        BROKEN,
        (closed(update("east"), update("south", base_model_hash="a" * 64)),),
    ),
    ("other-plan-admitted", "an update made with another plan", BROKEN, (closed(update("east", plan_hash="a" * 64)),)),
    ("other-round-admitted", "an update of another round", BROKEN, (closed(update("east", round=2)),)),
    (
        "inflated-count",
        "a hospital that weighs more than it declared",
        BROKEN,
        (closed(update("east", declared_patients=10**6)),),
    ),
    ("admitted-twice", "one hospital counted twice", BROKEN, (closed(update("east"), update("east")),)),
    (
        "broken-chain",
        "a round that starts from another model than the last one ended with",
        BROKEN,
        (closed(), closed(update("east", round=2, base_model_hash="a" * 64), round=2, base_model_hash="a" * 64)),
    ),
    ("round-again", "a round that was closed before", BROKEN, (closed(), closed())),
    (
        "changed-run-plan",
        "another plan for a run that has begun",
        BROKEN,
        (closed(), PlanEntry(run=RUN, plan_hash="a" * 64)),
    ),
    ("moved-credit", "credit moved from one hospital to another", BROKEN, (closed(), moved_credit())),
    ("withheld-credit", "credit that does not add up to the pot", BROKEN, (closed(), paid(unpaid_micro_credits=999))),
    ("credit-twice", "an epoch paid twice", BROKEN, (closed(), paid(), paid())),
    ("credit-for-nothing", "credit for a round that is not in the ledger", BROKEN, (paid(),)),
    ("credit-without-releases", "credit that nobody scored", BROKEN, (closed(), paid(releases=()))),
    (
        "forged-score",
        "a release with a made-up signature",
        BROKEN,
        (closed(), paid(releases=tuple(release(n).model_copy(update={"signature": "0" * 128}) for n in KEYS))),
    ),
    (
        "model-of-a-stranger",
        "a published model that names who is no member",
        BROKEN,
        (
            ModelEntry(
                run=RUN,
                round=4,
                model_hash=NEXT,
                unit="patient",
                relation=RELATION,
                delta=1e-5,
                epsilon_by_node={"new": 1.0},
            ),
        ),
    ),
)

CASES: tuple[Case, ...] = (
    *(Case(name, tries, code, lambda p, entries=entries: shown(p, *entries)) for name, tries, code, entries in _SHOWN),
    Case(
        "rewritten-ledger",
        "the last round rewritten and the log continued",
        FORK,
        partial(rewritten, change=other_history),
    ),
    Case("swapped-entries", "two entries in another order", FORK, partial(rewritten, change=swapped)),
    Case("cut-ledger", "the last round removed again", FORK, partial(rewritten, change=cut)),
    Case("other-log", "a checkpoint of another log, same key", FORK, partial(noted, origin="ledger/two")),
    Case("foreign-checkpoint", "a checkpoint signed with another key", FORK, partial(noted, key=THIEF)),
    Case("no-checkpoint", "a note that is no checkpoint", "malformed-task", partial(noted, note="trust me")),
    Case(
        "other-ledger-federation",
        "another federation's ledger",
        "unknown-federation",
        partial(noted, federation="other"),
    ),
    Case("hidden-entries", "a checkpoint whose entries are not shown", FORK, partial(noted, entries=())),
    Case("unsigned-entry", "an entry changed after it was signed", BROKEN, foreign_line),
    Case(
        "skipped-member",
        "a round that leaves out what this hospital sent",
        ALARM,
        partial(after_training, entry=lambda _h, _o: closed(rejected=())),
    ),
    Case(
        "stolen-key",
        "an update under this hospital's name that it never made",
        ALARM,
        partial(after_training, entry=under_my_name),
    ),
    Case("false-sum", "a model that is not the sum of the logged updates", ALARM, false_sum),
    Case(
        "release-boast",
        "a score no patients can produce",
        "out-of-range",
        lambda _: judged(shapley_mg_dl=(1e300, -1e300, 0.0)),
    ),
    Case(
        "release-less-noise",
        "claims less noise than the plan adds",
        "wrong-noise",
        lambda _: judged(noise_std_mg_dl=0.01),
    ),
    Case("release-other-epoch", "another epoch's release", "wrong-release", lambda _: judged(epoch=2)),
    Case("release-other-federation", "another federation's release", "wrong-release", lambda _: judged(federation="x")),
    Case(
        "release-more-people",
        "more held-out people than declared",
        "wrong-release",
        lambda _: judged(declared_heldout_patients=10**6),
    ),
    Case(
        "release-other-order", "values in another order", "wrong-release", lambda _: judged(nodes=tuple(reversed(KEYS)))
    ),
    Case("release-short", "one value for three hospitals", "wrong-shape", lambda _: judged(shapley_mg_dl=(1.0,))),
    Case("release-free", "values that cost nothing", "wrong-spend", lambda _: judged(spend=None)),
    Case(
        "release-cheap",
        "another event than the plan's",
        "wrong-event",
        lambda _: judged(spend=PrivacySpend(unit="patient", event=PLAN.round_event, epsilon_after=1, delta=1e-5)),
    ),
    Case("release-abstain-and-vote", "abstains and votes", "wrong-abstention", lambda _: judged(abstained=True)),
    Case("release-forged", "a signature of nobody", "bad-signature", lambda _: judged(signature="0" * 128)),
    Case(
        "release-text",
        "a reading in place of the book's head",
        "wrong-release",
        lambda _: judged(budget_head="123 mg/dL"),
    ),
)
