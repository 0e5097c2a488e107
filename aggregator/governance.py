"""Who is a member, with which key: derived by replaying the ledger, never kept anywhere else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeVar

from aggregator.ledger import Ledger
from data_schemas.errors import BadInput, Tampered
from data_schemas.ledger import (
    CreditEntry,
    LedgerEntry,
    MemberEntry,
    ModelEntry,
    PlanEntry,
    Receipt,
    RoundEntry,
)

Key = TypeVar("Key")
Value = TypeVar("Value")


@dataclass(frozen=True)
class Federation:
    """The federation as its log tells it: members by name, plan hash by run, and what every run closed."""

    members: Mapping[str, MemberEntry]
    plans: Mapping[str, str]
    rounds: Mapping[tuple[str, int], RoundEntry]
    credits: Mapping[tuple[str, int], CreditEntry]
    models: Mapping[str, ModelEntry]

    def update_hashes(self, run: str, before_round: int) -> frozenset[str]:
        """Hashes of every admitted update of all runs, except those of `run` from `before_round` on."""
        closed = (e for e in self.rounds.values() if e.run != run or e.round < before_round)
        return frozenset(signed.manifest.update_hash for entry in closed for signed in entry.admitted)


def replay(entries: Iterable[LedgerEntry]) -> Federation:
    """Derive the federation from the log; a hospital's newest entry counts.

    Raises Tampered when a member's key changes or two entries claim the same plan, round, epoch or model.
    """
    members: dict[str, MemberEntry] = {}
    plans: dict[str, str] = {}
    rounds: dict[tuple[str, int], RoundEntry] = {}
    credited: dict[tuple[str, int], CreditEntry] = {}
    models: dict[str, ModelEntry] = {}
    for line in entries:
        match line.entry:
            case MemberEntry() as member:
                if members.get(member.node, member).public_key != member.public_key:
                    raise _disputed(line.index)
                members[member.node] = member
            case PlanEntry() as plan:
                _place(plans, plan.run, plan.plan_hash, line.index)
            case RoundEntry() as closed:
                _place(rounds, (closed.run, closed.round), closed, line.index)
            case CreditEntry() as credit:
                _place(credited, (credit.run, credit.epoch), credit, line.index)
            case ModelEntry() as model:
                _place(models, model.run, model, line.index)
    return Federation(
        members=MappingProxyType(dict(sorted(members.items()))),
        plans=MappingProxyType(plans),
        rounds=MappingProxyType(rounds),
        credits=MappingProxyType(credited),
        models=MappingProxyType(models),
    )


def admit_member(ledger: Ledger, member: MemberEntry, at: str) -> Receipt | None:
    """Enter a hospital, or its new declared numbers, into the log; None when the log already says exactly this.

    Raises BadInput when the name has another key, or the key another name: one hospital, one name, one key.
    """
    members = replay(ledger.entries()).members
    if members.get(member.node) == member:
        return None
    for known in members.values():
        same_name, same_key = known.node == member.node, known.public_key == member.public_key
        if same_name != same_key:
            raise BadInput(
                f"{member.node}: this {'name' if same_name else 'key'} already belongs to a member",
                "use the hospital's own name with its own key; a hospital that lost its key takes a new name",
            )
    return ledger.append(member, at)


def _place(known: dict[Key, Value], key: Key, value: Value, index: int) -> None:
    if key in known:
        raise _disputed(index)
    known[key] = value


def _disputed(index: int) -> Tampered:
    return Tampered("ledger", index, "an entry contradicts an earlier one", "run `islet ledger verify`")
