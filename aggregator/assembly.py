"""A sitting of the members: the ledger is shown and cosigned, what members signed is entered, votes are counted.

A hospital signs at home; its statements come with its next cosignature and enter the log, or are refused with a code
that it is told. At the end every node is handed the champion that the members decided and that it does not serve yet.
Nothing here can end a run: a hospital that does not answer hears all of it at the next sitting.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from aggregator.courier import COSIGN, MODEL, Courier, Reply, by_name
from aggregator.epochs import report
from aggregator.governance import decide, enter
from aggregator.ledger import AgainstTheRules, Ledger
from aggregator.release import find_release
from data_schemas.canonical import content_hash
from data_schemas.errors import BadInput, CheckFailed
from data_schemas.governance import DecisionEntry, StatementCode
from data_schemas.ledger import MemberEntry
from data_schemas.messages import Cosigned, CosignTask, Installed, ModelTask, WitnessState
from pipeline.checkpoint import NoteSignature, SignedCheckpoint

_log = logging.getLogger("islet.aggregator")


@dataclass(frozen=True)
class Table:
    """Where members meet. released: folder of models to hand over; witness_sizes: what each node was seen to hold.

    dismissed: removed hospitals that have been shown so.
    """

    courier: Courier
    ledger: Ledger
    federation: str
    timeout_s: float
    released: Path
    witness_sizes: dict[str, int] = field(default_factory=dict)
    dismissed: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Sitting:
    """What came of a sitting. refused: code by node and statement hash; installed: who was handed the champion."""

    cosigned_by: tuple[str, ...]
    entered: int
    refused: Mapping[str, Mapping[str, StatementCode]]
    decided: tuple[DecisionEntry, ...]
    champion: str | None
    installed: tuple[str, ...]


def sit(table: Table, now: str, *, attest: bool = False) -> Sitting:
    """Hold one sitting at `now` (UTC, ISO 8601). attest: ask every node to attest its budget book."""
    heard = _show(table, attest=attest)
    entered, refused = _enter_all(table.ledger, heard, now)
    decided = decide(table.ledger, now)
    if entered or decided or refused:
        heard = _show(table, refused=refused)
    _dismiss(table)
    champion = table.ledger.charter().champion
    lacking = [name for name, said in heard.items() if champion is not None and said.champion != champion]
    installed = _hand_over(table, champion, lacking) if champion is not None and lacking else ()
    return Sitting(tuple(sorted(heard)), entered, refused, decided, champion, installed)


def catch_up(table: Table) -> None:
    """Show the ledger to members who missed the last sitting: they would refuse a task that they do not find there."""
    size = table.ledger.size
    behind = {name for name in table.ledger.members() if table.witness_sizes.get(name, 0) < size}
    if behind:
        _show(table, only=behind)


def _show(
    table: Table,
    *,
    only: Collection[str] | None = None,
    refused: Mapping[str, Mapping[str, StatementCode]] | None = None,
    attest: bool = False,
) -> dict[str, Cosigned]:
    """Have members, or `only` some, cosign the ledger's present checkpoint; returns the cosigners' replies.

    A witness that stands elsewhere answers with its size and is asked once more with the proof from there. A witness
    ahead of this ledger has seen entries that are missing here: reported, never overridden.
    """
    note = table.ledger.checkpoint()
    table.courier.former_keys = table.ledger.charter().keys
    size, members = SignedCheckpoint.from_text(note).checkpoint.size, table.ledger.members()
    members = members if only is None else {name: members[name] for name in members if name in only}
    replies = _present(table, note, members, refused=refused, attest=attest)
    heard = {r.node: r.body for r in replies if isinstance(r.body, Cosigned) and _accepted(r, table.ledger)}
    table.ledger.publish()  # once: each member's line beside all others' would be the square of their number
    table.witness_sizes.update(dict.fromkeys(heard, size))
    report("cosigned", size, replies, heard.keys())
    return heard


def _dismiss(table: Table) -> None:
    """Show hospitals that were removed the ledger once more: a node believes that from the log alone."""
    removed = {name: gone for name, gone in table.ledger.charter().removed.items() if name not in table.dismissed}
    if removed:
        replies = _present(table, table.ledger.checkpoint(), removed)
        table.dismissed.update(reply.node for reply in replies if isinstance(reply.body, Cosigned))


def _present(
    table: Table,
    note: str,
    members: Mapping[str, MemberEntry],
    *,
    refused: Mapping[str, Mapping[str, StatementCode]] | None = None,
    attest: bool = False,
) -> list[Reply]:
    """Ask hospitals to cosign a checkpoint; the last reply of each."""
    size = SignedCheckpoint.from_text(note).checkpoint.size
    asked = {name: min(table.witness_sizes.get(name, 0), size) for name in members}
    told = {name: dict(codes) for name, codes in (refused or {}).items()}
    last: dict[str, list[Reply]] = {}
    while asked:
        by_size = {old: _cosign_task(table, note, old, attest=attest) for old in set(asked.values())}
        tasks = {
            name: by_size[old].model_copy(update={"refused": told[name]}) if name in told else by_size[old]
            for name, old in asked.items()
        }
        retry = not last
        replies = table.courier.ask(COSIGN, tasks, members, timeout_s=table.timeout_s, group="cosign")
        last |= by_name(replies)
        asked = {reply.node: reply.body.size for reply in replies if isinstance(reply.body, WitnessState)}
        asked = {name: old for name, old in asked.items() if retry and _provable(name, old, size)}
    return [reply for name in sorted(last) for reply in last[name]]


def _cosign_task(table: Table, note: str, old_size: int, *, attest: bool) -> CosignTask:
    size = SignedCheckpoint.from_text(note).checkpoint.size
    return CosignTask(
        federation=table.federation,
        checkpoint=note,
        old_size=old_size,
        entries=table.ledger.payloads(old_size)[: size - old_size],
        attest=attest,
    )


def _provable(node: str, witness_size: int, size: int) -> bool:
    if 0 <= witness_size <= size:
        return True
    _log.error("%s has cosigned %d entries, this ledger has %d: entries are missing here", node, witness_size, size)
    return False


def _accepted(reply: Reply, ledger: Ledger) -> bool:
    if not isinstance(reply.body, Cosigned):
        return False
    try:
        if NoteSignature.from_text(reply.body.cosignature).name != reply.node:
            return False
        ledger.add_cosignature(reply.body.cosignature)
    except (BadInput, CheckFailed) as error:
        _log.warning("cosignature of %s not used: %s", reply.node, type(error).__name__)
        return False
    return True


def _enter_all(
    ledger: Ledger, heard: Mapping[str, Cosigned], now: str
) -> tuple[int, dict[str, dict[str, StatementCode]]]:
    """Enter what members signed, proposals first: a vote may have come before the proposal it is on."""
    entered, refused = 0, dict[str, dict[str, StatementCode]]()
    said = [(name, statement) for name, reply in sorted(heard.items()) for statement in reply.statements]
    for name, statement in sorted(said, key=lambda pair: pair[1].kind != "proposal"):
        try:
            enter(ledger, statement, now)
            entered += 1
        except AgainstTheRules as error:
            refused.setdefault(name, {})[content_hash(statement)] = error.code
            _log.warning("a %s that %s handed over is refused: %s", statement.kind, name, error.code)
    return entered, refused


def _hand_over(table: Table, champion: str, nodes: list[str]) -> tuple[str, ...]:
    model = find_release(table.released, champion)
    if model is None:
        _log.error("the champion %s is not among the released models: nobody can be handed it", champion[:12])
        return ()
    task = ModelTask(federation=table.federation, card=model.card)
    replies = table.courier.ask(
        MODEL,
        dict.fromkeys(nodes, task),
        table.ledger.members(),
        timeout_s=table.timeout_s,
        arrays={"weights": model.weights},
        group="model",
    )
    done = {r.node for r in replies if isinstance(r.body, Installed) and r.body.model_hash == champion}
    report("handed the champion", len(nodes), replies, done)
    return tuple(sorted(done))
