"""The node's own copy of the ledger: it replays what was decided, and trains on nothing else.

The copy (hospital_node.ledger_copy) grows only by entries that obey every rule of pipeline.ledger_rules and lead to a
checkpoint which the aggregator signed; the same step cosigns it (hospital_node.witness). alarm.json is written when
what the aggregator logged cannot be true; while it is there the node trains no further.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from data_schemas.canonical import canonical_bytes, content_hash
from data_schemas.errors import BadInput, Tampered
from data_schemas.ledger import RoundEntry
from data_schemas.messages import ContestTask, RefusalCode, ReleaseTask, ScoreTask, TrainTask
from data_schemas.plan import TrainingPlan
from hospital_node import ledger_copy, own_rounds
from hospital_node.ceilings import require
from hospital_node.folder import NodeFolder
from hospital_node.ledger_copy import LedgerState
from pipeline import merkle
from pipeline.bundle import code_hash
from pipeline.charter import Charter, run_name
from pipeline.checkpoint import Checkpoint
from pipeline.frontier import Frontier
from pipeline.signing import write_durably
from pipeline.terms import hash_of_updates

ALARM = "alarm.json"


def payloads(node: NodeFolder) -> tuple[bytes, ...]:
    """Return the entries that this node holds."""
    return tuple(ledger_copy.lines(node))


def size(node: NodeFolder) -> int:
    """Return how many entries this node holds. Raises Tampered where they make no sense."""
    return ledger_copy.read(node).frontier.size


def charter_of(held: Iterable[bytes], public_key: str) -> Charter:
    """Replay entries. Raises Tampered when one is not the aggregator's or breaks the federation's rules."""
    state = LedgerState()
    for payload in held:
        state.take(payload, public_key, signatures=False)
    return state.replay.charter


def decided(node: NodeFolder, *, whole: bool = False) -> Charter:
    """Return what the node's copy decides; whole: replay it from its first entry, every signature of the aggregator.

    Raises Tampered; BadInput for a node that follows no ledger.
    """
    if node.settings.aggregator_public_key is None:
        raise BadInput(
            "this node follows no ledger", "make it with the aggregator's key: `islet node init --aggregator-key`"
        )
    return ledger_copy.read(node, whole=whole).replay.charter


def removed(node: NodeFolder) -> bool:
    """Whether the node's copy says that the members voted this hospital out. Raises Tampered."""
    return node.settings.aggregator_public_key is not None and node.settings.name in decided(node).removed


def extend(
    node: NodeFolder, seen: Checkpoint, new: Checkpoint, old_size: int, entries: tuple[str, ...]
) -> RefusalCode | None:
    """Take in the entries from old_size on, or say why not; durable when this returns.

    The whole copy must have the new checkpoint's root, and its beginning the root that this node cosigned before. What
    the new entries say in this hospital's name must carry its signature: verification relies on that.
    """
    new_lines = [entry.encode() for entry in entries]
    state = ledger_copy.read(node)
    forked = seen.size > new.size or seen.origin != new.origin or (seen.size == new.size and seen.root != new.root)
    if forked or state.frontier.size != old_size:
        return RefusalCode.LEDGER_FORK
    if not _leads_to(node, state.frontier, new_lines, {new.size: new.root, seen.size: seen.root}):
        return RefusalCode.LEDGER_FORK
    if any("\n" in entry for entry in entries):
        return RefusalCode.MALFORMED_TASK
    try:
        after = ledger_copy.followed_by(state, tuple(new_lines), str(node.settings.aggregator_public_key))
    except Tampered:
        return RefusalCode.LEDGER_BREAKS_RULES
    if after.closed and (wrong := _own_fault(node, after.closed)) is not None:
        raise_alarm(node, *wrong)
        return RefusalCode.ALARM
    if entries:
        ledger_copy.append(node, after, state.offset, new_lines)
    return None


def _leads_to(node: NodeFolder, held: Frontier, new: list[bytes], roots: dict[int, bytes]) -> bool:
    """Whether the copy with the new entries has these roots at these sizes, the largest being its own."""
    tree, expected = held, dict(roots)
    if min(roots) < held.size:  # a crash left the witness behind the copy: the whole copy tells
        tree, new = Frontier(), [*payloads(node), *new]
    for payload in [None, *new]:
        tree = tree if payload is None else tree.plus(merkle.leaf_hash(payload))
        if tree.root() != expected.pop(tree.size, tree.root()):
            return False
    return not expected and tree.size == max(roots)


def _own_fault(node: NodeFolder, rounds: list[RoundEntry]) -> tuple[RoundEntry, str] | None:
    """Hold rounds against the budget book, which a round of this node may be writing: NodeBusy, and later again."""
    with node.whole() as whole:
        return own_rounds.fault(whole, rounds)


def check_training(node: NodeFolder, task: TrainTask, *, secure: bool) -> None:
    """Raise Declined unless the federation decided this round: founded, not paused, member, plan, policy, model.

    A node that was made without the aggregator's key follows no ledger and decides by its own ceilings alone; it knows
    no member's key, so it takes no part in secure aggregation.
    """
    charter = check_decided(node, task)
    decided_secure = charter is not None and charter.secure.get(task.run, False)
    require(secure == decided_secure, RefusalCode.OTHER_AGGREGATION)
    require(charter is None or _is_logged_base(charter, task), RefusalCode.MODEL_NOT_DECIDED)


def check_decided(node: NodeFolder, task: TrainTask | ReleaseTask | ContestTask) -> Charter | None:
    """Raise Declined unless the federation decided what this task's run may cost; its charter, where there is one."""
    require(alarm(node) is None, RefusalCode.ALARM)
    if node.settings.aggregator_public_key is None:
        return None
    charter = decided(node)
    require(charter.founded and charter.federation == task.federation, RefusalCode.NOT_FOUNDED)
    require(not charter.paused, RefusalCode.FEDERATION_PAUSED)
    own = charter.members.get(node.settings.name)
    require(own is not None and own.public_key == node.key.public.hex, RefusalCode.NOT_A_MEMBER)
    plan_hash = content_hash(task.plan)
    require(charter.plans.get(task.run) == plan_hash, RefusalCode.PLAN_NOT_DECIDED)
    require(charter.may_go_on(task.run), RefusalCode.OTHER_AGGREGATION)
    challenger = charter.challengers.get(plan_hash)
    require(challenger is None or challenger.code_hash == code_hash(), RefusalCode.CODE_NOT_DECIDED)
    _check_policy(node, charter, task.plan)
    return charter


def _check_policy(node: NodeFolder, charter: Charter, plan: TrainingPlan) -> None:
    privacy, credit = charter.privacy, charter.credit
    allowed = privacy is not None and privacy.allows(plan)
    pot = plan.credit.pot_micro_credits_per_round
    require(
        allowed and credit is not None and pot <= credit.max_pot_micro_credits_per_round,
        RefusalCode.PLAN_OUTSIDE_POLICY,
    )
    enough = privacy is not None and node.settings.declared_training_patients >= privacy.min_patients
    require(enough, RefusalCode.TOO_FEW_PATIENTS)


def _is_logged_base(charter: Charter, task: TrainTask) -> bool:
    """Whether the base is the model that the log says: of this round, of the round before, or the run's first."""
    closed, before = charter.rounds.get((task.run, task.round)), charter.rounds.get((task.run, task.round - 1))
    if closed is not None:
        return closed.base_model_hash == task.base_model_hash
    if task.round == 1:
        return run_name(task.federation, task.plan, task.base_model_hash) == task.run
    return before is not None and before.new_model_hash == task.base_model_hash


def holds_with_log(
    node: NodeFolder, task: ScoreTask, new_model_hash: str, velocity_hash: str | None, still_hash: str | None
) -> bool:
    """Whether a round to score is the logged one; where it is and the logged model is not its sum, raise the alarm.

    Only the signed log can raise the alarm: a message alone, which anybody on the way could have changed, cannot.
    A node that follows no ledger, or was not shown this round, has nothing to compare with.
    velocity_hash: of the velocity after the round; still_hash: of none at all, before round 1; None without momentum.
    """
    charter = None if node.settings.aggregator_public_key is None else decided(node)
    closed = None if charter is None else charter.rounds.get((task.run, task.round))
    if charter is None or closed is None:
        return True
    before = charter.rounds.get((task.run, task.round - 1))
    logged = (
        closed.base_model_hash,
        closed.updates_hash,
        closed.plan_hash,
        still_hash if before is None else before.velocity_hash,
    )
    updates = hash_of_updates(task.nodes, task.update_hashes)
    shown = (task.base_model_hash, updates, content_hash(task.plan), task.base_velocity_hash)
    if logged != shown:
        return False
    if (closed.new_model_hash, closed.velocity_hash) != (new_model_hash, velocity_hash):
        entry = ledger_copy.round_entry(node, task.run, task.round)
        raise_alarm(node, entry, f"its model is not the sum of its updates, which is {new_model_hash}")
        return False
    return True


def raise_alarm(node: NodeFolder, entry: RoundEntry, what: str) -> None:
    """Write down what was wrong with which entry, which is the evidence."""
    told = {"run": entry.run, "round": entry.round, "what": what, "entry": entry.model_dump(mode="json")}
    write_durably(node.path / ALARM, canonical_bytes(told) + b"\n", mode=0o600)


def alarm(node: NodeFolder) -> str | None:
    """What raised the alarm, in words, or None. An unreadable alarm is one."""
    try:
        told = json.loads((node.path / ALARM).read_bytes())
        return f"round {told['round']} of run {told['run']} in the ledger: {told['what']}"
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        return "alarm.json cannot be read"
