"""The round loop: one federated run over any Flower Grid, resumable after a kill at any point.

Life of a round: asked -> admitted -> stepped -> CHECKPOINTED -> LOGGED -> scored (-> credited -> cosigned)
Before CHECKPOINTED nothing of the round is kept: it is asked again, and hospitals answer with the replies they stored.
From there on everything is repeated from the checkpoint until the ledger says it is done; docs/rounds.md has the table.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from flwr.serverapp import Grid
from numpy.typing import NDArray

from aggregator import contests, epochs
from aggregator.admission import Expectation
from aggregator.aggregation import ServerState, initial_state, model_hash, released_weights, server_step
from aggregator.assembly import Table, catch_up, sit
from aggregator.collecting import collect
from aggregator.courier import Courier
from aggregator.gathering import Gathered, as_sum, in_plain
from aggregator.governance import Federation, History, check_aggregation, check_plan
from aggregator.grid_exchange import GridExchange
from aggregator.ledger import Ledger
from aggregator.progress import Observer, RoundSummary
from aggregator.secure_round import check_task, collect_sum, show_sum
from aggregator.settings import AggregatorSettings
from aggregator.state import Checkpoint, RoundRecord, StateFolder
from data_schemas.canonical import content_hash
from data_schemas.errors import BadInput, CheckFailed
from data_schemas.ledger import CreditEntry, ModelEntry, PlanEntry, RoundEntry
from data_schemas.messages import ReleaseTask
from data_schemas.plan import RELATION, TrainingPlan
from pipeline.charter import run_name
from pipeline.checkpoint import SignedCheckpoint
from pipeline.contribution import why_unpaid

Vector = NDArray[np.float32]
Clock = Callable[[], float]
_log = logging.getLogger("islet.aggregator")


@dataclass(frozen=True)
class FederationResult:
    """A finished run. weights float32[D]: the released model, mean of the last rounds; last_weights: the last round's.

    epsilon_by_node: last reported total of each training cohort. resumed_from: the checkpoint's round, or None.
    """

    run: str
    weights: Vector
    last_weights: Vector
    model_hash: str
    rounds: tuple[RoundSummary, ...]
    epsilon_by_node: dict[str, float]
    credits: tuple[CreditEntry, ...]
    cosigned_by: tuple[str, ...]
    resumed_from: int | None


@dataclass(frozen=True)
class _Desk:
    """What every step of one run needs."""

    courier: Courier
    settings: AggregatorSettings
    plan: TrainingPlan
    run: str
    ledger: Ledger
    state: StateFolder
    observer: Observer
    clock: Clock
    table: Table
    history: History

    def now(self) -> str:
        """Time for the ledger: UTC, ISO 8601."""
        return datetime.fromtimestamp(self.clock(), UTC).isoformat(timespec="seconds")

    def federation(self) -> Federation:
        """Members and history as the ledger tells them now."""
        return self.history.follow(self.ledger)


def run_identity(federation: str, plan: TrainingPlan, initial_weights: Vector) -> str:
    """Name a run after what it is, so the same command finds its own state, ledger entries and stored replies."""
    return run_name(federation, plan, model_hash(initial_weights))


def run_federation(
    grid: Grid,
    settings: AggregatorSettings,
    plan: TrainingPlan,
    initial_weights: Vector,
    *,
    ledger: Ledger,
    state: StateFolder,
    observer: Observer,
    released: Path,
    clock: Clock = time.time,
) -> FederationResult:
    """Run a plan to its end, or go on with it where it stopped; of a finished run only the cosignatures are renewed.

    initial_weights is float32[D]. Raises IsletError when a round finds no quorum (resumable), BadInput when settings
    and members do not fit, CheckFailed when state folder and ledger contradict each other.
    """
    courier = Courier(GridExchange(grid), settings.federation, settings.hello_timeout_s)
    run = run_identity(settings.federation, plan, initial_weights)
    table = Table(courier, ledger, settings.federation, settings.cosign_timeout_s, released)
    desk = _Desk(courier, settings, plan, run, ledger, state, observer, clock, table, History())
    _check_members(desk)
    charter = desk.federation().charter
    check_plan(charter, plan)
    agreed = PlanEntry(run=run, plan_hash=content_hash(plan), aggregation=charter.aggregation)
    ledger.append_once(("plan", run), agreed, desk.now())
    _show_ledger(desk)
    server, epsilon_by_node, done = initial_state(initial_weights), dict[str, float](), 0
    checkpoint = state.newest(run)
    if checkpoint is not None:
        _check_head(desk, checkpoint.record)
        _close(desk, checkpoint)
        server, done = checkpoint.server, checkpoint.record.round
        epsilon_by_node = dict(checkpoint.record.summary.epsilon_by_node)
    for number in range(done + 1, plan.rounds + 1):
        check_plan(ledger.charter(), plan)
        check_aggregation(ledger.charter(), run)
        step = _train(desk, number, server, epsilon_by_node, checkpoint)
        state.save(step)
        _close(desk, step)
        checkpoint = step
        server, epsilon_by_node = step.server, dict(step.record.summary.epsilon_by_node)
    return _publish(desk, server, epsilon_by_node, done or None)


def _check_members(desk: _Desk) -> None:
    joined = desk.federation().members
    members, needed = len(joined), desk.settings.min_updates
    if why := why_unpaid(member.declared_heldout_patients for member in joined.values()):
        _log.warning("%s", why)
    if members < needed:
        raise BadInput(
            f"the ledger has {members} members and a round needs {needed} updates",
            "admit more hospitals, or lower min_updates in aggregator.toml",
        )


def _check_head(desk: _Desk, record: RoundRecord) -> None:
    """Stop when the ledger is shorter than the checkpoint remembers: it was cut, or restored from an old copy."""
    if desk.ledger.size < record.ledger_size:
        raise CheckFailed(
            f"the ledger has {desk.ledger.size} entries, the checkpoint of round {record.round} saw"
            f" {record.ledger_size}",
            "restore the newest copy of ledger.db; the state folder is fine",
        )


def _train(
    desk: _Desk, number: int, server: ServerState, epsilon_by_node: dict[str, float], before: Checkpoint | None
) -> Checkpoint:
    """Ask, collect, admit and step: a checkpoint that is not saved yet."""
    started, federation = time.monotonic(), desk.federation()
    if federation.charter.founded:
        catch_up(desk.table)
    expected = Expectation(
        federation=desk.settings.federation,
        run=desk.run,
        round=number,
        plan=desk.plan,
        base_model_hash=model_hash(server.weights),
        dimension=server.weights.shape[0],
        seen_hashes=federation.update_hashes(desk.run, number),
        earlier=() if before is None else (before.server.weights - before.base, *before.updates),
    )
    gathered = _gather(desk, expected, server, federation)
    stepped = server_step(server, gathered.mean, desk.plan.server)
    told, seconds = epsilon_by_node | gathered.epsilon, time.monotonic() - started
    record = _record(desk, expected, gathered, stepped, epsilon_by_node=told, seconds=seconds)
    return Checkpoint(record, stepped, server.weights, server.velocity, gathered.updates, gathered.total)


def _gather(desk: _Desk, expected: Expectation, server: ServerState, federation: Federation) -> Gathered:
    members, clock, work = federation.members, desk.clock, (desk.courier, desk.settings, expected, server.weights)
    if federation.charter.secure.get(desk.run, False):
        return as_sum(collect_sum(*work, members=members, state=desk.state, clock=clock))
    closed = federation.rounds.get((desk.run, expected.round))
    return in_plain(collect(*work, members=members, closed=closed, clock=clock), desk.plan.server.rule)


def _record(
    desk: _Desk,
    expected: Expectation,
    gathered: Gathered,
    stepped: ServerState,
    *,
    epsilon_by_node: dict[str, float],
    seconds: float,
) -> RoundRecord:
    head, new_hash = SignedCheckpoint.from_text(desk.ledger.checkpoint()).checkpoint, model_hash(stepped.weights)
    summary = RoundSummary(
        run=expected.run,
        round=expected.round,
        rounds=desk.plan.rounds,
        admitted=tuple(update.manifest.node for update in gathered.signed),
        rejected=gathered.rejected,
        update_norms=dict(gathered.norms),
        cosine_to_mean=dict(gathered.cosines),
        model_hash=new_hash,
        epsilon_by_node=epsilon_by_node,
        seconds=seconds,
    )
    return RoundRecord(
        federation=expected.federation,
        run=expected.run,
        round=expected.round,
        plan_hash=content_hash(expected.plan),
        base_model_hash=expected.base_model_hash,
        new_model_hash=new_hash,
        velocity_hash=model_hash(stepped.velocity) if desk.plan.server.momentum else None,
        admitted=gathered.signed,
        rejected=gathered.rejected,
        sum=gathered.told,
        ledger_size=head.size,
        ledger_root=head.root_hex,
        summary=summary,
    )


def _close(desk: _Desk, checkpoint: Checkpoint) -> None:
    """Do what follows the checkpoint; each part is harmless to repeat, so a resumed run does all of it again."""
    record = checkpoint.record
    entry = RoundEntry(**record.model_dump(include=set(RoundEntry.model_fields) - {"kind"}))
    desk.ledger.append_once(("round", desk.run, record.round), entry, desk.now())
    _show_ledger(desk)
    _tell(desk.observer, partial(desk.observer.round_closed, record.summary))
    epoch, federation = epochs.epoch_of(record.round, desk.plan), desk.federation()
    if (desk.run, epoch) in federation.credits:
        return
    moved = {"velocity": checkpoint.base_velocity} if desk.plan.server.momentum else {}
    name, members, timeout_s = desk.settings.federation, federation.members, desk.settings.score_timeout_s
    if entry.sum is None:
        task = epochs.score_task(entry, name, desk.plan, checkpoint.base_velocity)
        arrays = {"base": checkpoint.base, "updates": checkpoint.updates, **moved}
        epochs.score(desk.courier, task, members, arrays, timeout_s)
    else:
        shown: dict[str, Any] = {"base": checkpoint.base, "total": checkpoint.total, **moved}
        show_sum(desk.courier, check_task(entry, name, desk.plan), members, shown, timeout_s)
    if epochs.ends_epoch(record.round, desk.plan):
        weights = released_weights(checkpoint.server) if record.round == desk.plan.rounds else None
        _close_epoch(desk, epoch, federation, weights)


def _close_epoch(desk: _Desk, epoch: int, federation: Federation, released: Vector | None) -> None:
    """Pay an epoch; released float32[D] is the run's model, at the end of its last epoch."""
    timeout_s, contest = desk.settings.score_timeout_s, tuple[str, ...]()
    places = [(desk.run, number) for number in epochs.rounds_of(epoch, desk.plan)]
    closed = [federation.rounds[place] for place in places if place in federation.rounds]
    summed = any(entry.sum is not None for entry in closed)
    admitted = [entry.admitted for entry in closed]
    counts = [len(updates) for updates in admitted]
    if released is not None and not summed and not epochs.too_many(counts):
        contest = contests.hold(desk.courier, federation, desk.run, desk.plan, released, timeout_s)
    terms = [federation.charter.terms[place] for place in places if place in federation.charter.terms]
    credited = {signed.manifest.node for updates in admitted for signed in updates}
    task = ReleaseTask(
        federation=desk.settings.federation,
        run=desk.run,
        epoch=epoch,
        plan=desk.plan,
        nodes=(*sorted(credited), *contest),
        deadline_unix=desk.clock() + desk.settings.score_timeout_s,
    )
    if summed:
        entry = epochs.credit_of_sums(task, closed, terms)
    else:
        entry = epochs.collect_credit(desk.courier, task, federation.members, timeout_s, admitted=counts, terms=terms)
    desk.ledger.append_once(("credit", desk.run, epoch), entry, desk.now())
    _tell(desk.observer, partial(desk.observer.epoch_closed, entry))
    _sit(desk)


def _show_ledger(desk: _Desk) -> None:
    """Bring every node's copy of the ledger up to date: it trains and scores only what it finds there."""
    if desk.ledger.charter().founded:
        _sit(desk)


def _sit(desk: _Desk, *, attest: bool = False) -> tuple[str, ...]:
    """Hold a sitting of the members; returns who cosigned."""
    sitting = sit(desk.table, desk.now(), attest=attest)
    if sitting.champion is not None:
        _tell(desk.observer, partial(desk.observer.champion_decided, sitting.champion))
    return sitting.cosigned_by


def _publish(
    desk: _Desk, server: ServerState, epsilon_by_node: dict[str, float], resumed_from: int | None
) -> FederationResult:
    released = released_weights(server)
    entry = ModelEntry(
        run=desk.run,
        round=desk.plan.rounds,
        model_hash=model_hash(released),
        unit=desk.plan.privacy.unit,
        relation=RELATION,
        delta=desk.plan.privacy.delta,
        epsilon_by_node=epsilon_by_node,
    )
    desk.ledger.append_once(("model", desk.run), entry, desk.now())
    if (contest := contests.settled(desk.federation(), desk.run, entry.model_hash)) is not None:
        desk.ledger.append_once(("contest", desk.run), contest, desk.now())
    cosigned_by = _sit(desk, attest=True) or _sit(desk)  # a ledger without any witness at its end is asked for again
    credited = desk.federation().credits
    return FederationResult(
        run=desk.run,
        weights=released,
        last_weights=server.weights,
        model_hash=entry.model_hash,
        rounds=desk.state.summaries(desk.run),
        epsilon_by_node=epsilon_by_node,
        credits=tuple(credited[key] for key in sorted(credited) if key[0] == desk.run),
        cosigned_by=cosigned_by,
        resumed_from=resumed_from,
    )


def _tell(observer: Observer, call: Callable[[], object]) -> None:
    """Tell an observer; an outage of a display is reported and loses no round."""
    try:
        call()
    except Exception as error:  # noqa: BLE001
        _log.warning("observer %s failed (%s); the run goes on", type(observer).__name__, type(error).__name__)
