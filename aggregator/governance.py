"""The federation as its log tells it, and how members' proposals and votes come into the log.

Nothing is kept anywhere else: who is a member, what was decided and what every run closed is a replay of the ledger.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TypeVar

from aggregator.ledger import AgainstTheRules, Ledger
from data_schemas.canonical import content_hash
from data_schemas.errors import BadInput, CheckFailed, Tampered
from data_schemas.governance import (
    Attestation,
    AttestationEntry,
    CreditPolicy,
    DecisionEntry,
    FoundingEntry,
    PrivacyPolicy,
    ProposalEntry,
    StatementCode,
    VoteEntry,
)
from data_schemas.ledger import (
    CreditEntry,
    Entry,
    LedgerEntry,
    MemberEntry,
    ModelEntry,
    PlanEntry,
    Receipt,
    RoundEntry,
)
from data_schemas.plan import TrainingPlan
from pipeline.charter import Charter
from pipeline.charter_text import proposal_text

Key = TypeVar("Key")
Value = TypeVar("Value")


@dataclass(frozen=True)
class Federation:
    """The federation as its log tells it: members by name, in the order they joined, plans, what every run closed.

    charter: what was decided, as every node derives it too.
    """

    members: Mapping[str, MemberEntry]
    plans: Mapping[str, str]
    rounds: Mapping[tuple[str, int], RoundEntry]
    credits: Mapping[tuple[str, int], CreditEntry]
    models: Mapping[str, ModelEntry]
    charter: Charter = field(default_factory=Charter)

    def update_hashes(self, run: str, before_round: int) -> frozenset[str]:
        """Hashes of every admitted update of all runs, except those of `run` from `before_round` on."""
        closed = (e for e in self.rounds.values() if e.run != run or e.round < before_round)
        return frozenset(signed.manifest.update_hash for entry in closed for signed in entry.admitted)


class History:
    """The federation of a log that grows: every entry is read once."""

    def __init__(self) -> None:
        self._charter, self._taken = Charter(), 0
        self._plans: dict[str, str] = {}
        self._rounds: dict[tuple[str, int], RoundEntry] = {}
        self._credits: dict[tuple[str, int], CreditEntry] = {}
        self._models: dict[str, ModelEntry] = {}

    def follow(self, ledger: Ledger) -> Federation:
        """Take in what has been logged since the last time. Raises Tampered like replay."""
        for line in ledger.entries(self._taken):
            self.take(line)
        return self.federation()

    def take(self, line: LedgerEntry) -> None:
        """Take the next entry in. Raises Tampered."""
        if self._charter.take(line):
            raise _disputed(line.index)
        match line.entry:
            case PlanEntry() as plan:
                _place(self._plans, plan.run, plan.plan_hash, line.index)
            case RoundEntry() as closed:
                _place(self._rounds, (closed.run, closed.round), closed, line.index)
            case CreditEntry() as credit:
                _place(self._credits, (credit.run, credit.epoch), credit, line.index)
            case ModelEntry() as model:
                _place(self._models, model.run, model, line.index)
            case _:
                pass
        self._taken += 1

    def federation(self) -> Federation:
        """Return the federation after the entries so far; later ones do not change it."""
        charter = self._charter.copy()
        return Federation(
            members=MappingProxyType(charter.members),
            plans=MappingProxyType(dict(self._plans)),
            rounds=MappingProxyType(dict(self._rounds)),
            credits=MappingProxyType(dict(self._credits)),
            models=MappingProxyType(dict(self._models)),
            charter=charter,
        )


def replay(entries: Iterable[LedgerEntry]) -> Federation:
    """Derive the federation from the log; a hospital's newest entry counts.

    Raises Tampered when an entry breaks the rules of pipeline.charter, or two claim the same plan, round, epoch, model.
    """
    history = History()
    for line in entries:
        history.take(line)
    return history.federation()


def admit_member(ledger: Ledger, member: MemberEntry, at: str) -> Receipt | None:
    """Enter a founder, or a member's new declared numbers, into the log; None when the log already says exactly this.

    Raises BadInput when the name has another key, or the key another name: one hospital, one name, one key; and when
    the federation has begun, because then its members vote on who joins.
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
    return enter(ledger, member, at)


def founding_of(federation: str, plan: TrainingPlan) -> FoundingEntry:
    """Return the policy that a first plan stands for: no plan may cost a patient more unless members vote for it."""
    return FoundingEntry(
        federation=federation,
        privacy=PrivacyPolicy(
            max_epsilon_training=plan.privacy.epsilon,
            max_epsilon_heldout=plan.credit.epsilon,
            unit=plan.privacy.unit,
            min_patients=1,
        ),
        credit=CreditPolicy(max_pot_micro_credits_per_round=plan.credit.pot_micro_credits_per_round),
    )


def found_federation(ledger: Ledger, founding: FoundingEntry, at: str) -> bool:
    """Enter the founding policy unless the log has one; whether it was entered now."""
    if ledger.charter().founded:
        return False
    enter(ledger, founding, at)
    return True


def enter(ledger: Ledger, entry: Entry, at: str) -> Receipt:
    """Log an entry if the rules of pipeline.charter allow it now. Raises AgainstTheRules saying why they do not."""
    return ledger.append(entry, at, by_rules=True)


def decide(ledger: Ledger, at: str) -> tuple[DecisionEntry, ...]:
    """Log the outcome of every open proposal that is settled now: by votes, by expiry, or because members changed."""
    made: list[DecisionEntry] = []
    while True:
        charter = ledger.charter()
        settled = ((name, charter.outcome(name, at)) for name in charter.open)
        found = next(((name, accepted) for name, accepted in settled if accepted is not None), None)
        if found is None:
            return tuple(made)
        decision = DecisionEntry(proposal_hash=found[0], accepted=found[1])
        try:
            enter(ledger, decision, at)
        except AgainstTheRules as error:
            if error.code is not StatementCode.NO_SUCH_PROPOSAL:
                raise
        else:
            made.append(decision)


def check_plan(charter: Charter, plan: TrainingPlan) -> None:
    """Raise CheckFailed when the federation has not decided what a run of this plan needs."""
    if charter.privacy is None or charter.credit is None:
        return
    if charter.paused:
        raise CheckFailed("the members have paused the federation", "propose to go on: islet federation propose")
    pot = plan.credit.pot_micro_credits_per_round
    if not charter.privacy.allows(plan) or pot > charter.credit.max_pot_micro_credits_per_round:
        raise CheckFailed(
            "the plan goes beyond the policy that the members decided",
            "change the plan, or propose another policy: islet federation propose",
        )


def check_aggregation(charter: Charter, run: str) -> None:
    """Raise CheckFailed when members decided, after this run began, that only sums are seen."""
    if not charter.may_go_on(run):
        raise CheckFailed(
            "the members decided secure aggregation after this run began",
            "give the plan another name: it is then a new run, under what was decided",
        )


def governance_summary(entry: Entry) -> str:
    """Write an entry of the members' decisions as a line."""
    match entry:
        case FoundingEntry():
            return (
                f"{entry.federation}: epsilon at most {entry.privacy.max_epsilon_training:g} per {entry.privacy.unit}"
            )
        case ProposalEntry():
            return f"{content_hash(entry.proposal)[:12]} {proposal_text(entry.proposal)}"
        case VoteEntry():
            return f"{entry.vote.node} {'for' if entry.vote.approve else 'against'} {entry.vote.proposal_hash[:12]}"
        case DecisionEntry():
            return f"{entry.proposal_hash[:12]} {'accepted' if entry.accepted else 'rejected'}"
        case AttestationEntry():
            return _attested(entry.attestation)
        case _:
            return ""


def _attested(said: Attestation) -> str:
    spent = f"{said.epsilon_training:.2f} training, {said.epsilon_heldout:.2f} held-out"
    return f"{said.node}: spent epsilon per patient {spent}"


def _place(known: dict[Key, Value], key: Key, value: Value, index: int) -> None:
    if key in known:
        raise _disputed(index)
    known[key] = value


def _disputed(index: int) -> Tampered:
    return Tampered("ledger", index, "an entry contradicts an earlier one", "run `islet ledger verify`")
