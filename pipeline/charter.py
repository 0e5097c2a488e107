"""What the federation has decided: a replay of its log, the same at the aggregator, at every node and for an auditor.

One hospital, one vote. A proposal is accepted as soon as more than half of those who may vote have said yes, or, after
it has expired, when more than half have voted and more of them yes than no. Removing a member and weakening privacy
need two thirds of those who may vote; the subject of a removal may not. Proposals and votes hold for the members they
were made under: when somebody joins, leaves or changes a key, open proposals lapse.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field, fields
from datetime import datetime
from itertools import islice

from data_schemas.canonical import canonical_bytes, content_hash
from data_schemas.governance import (
    Admit,
    Attestation,
    AttestationEntry,
    Challenge,
    CreditPolicy,
    DecisionEntry,
    FoundingEntry,
    Pause,
    PrivacyPolicy,
    Promote,
    Proposal,
    ProposalEntry,
    Remove,
    RollBack,
    RotateKey,
    SetCredit,
    SetPrivacy,
    StatementCode,
    VoteEntry,
)
from data_schemas.ledger import ContestEntry, Entry, LedgerEntry, MemberEntry, ModelEntry, PlanEntry, RoundEntry
from data_schemas.plan import AggregationMode, TrainingPlan
from pipeline.signing import verify
from pipeline.terms import Challenger, ClosedRound, Terms

Code = StatementCode
_ROUNDING = 1e-9
_RUNS = 8  # that a node may be asked about; the rounds of older ones are forgotten


@dataclass
class Charter:
    """The state so far; `take` adds the next entry.

    keys: every key a hospital ever had. removed: by vote, as they were last. champions: newest last. attested: each
    hospital's newest attestation. spent: the largest training epsilon that its admitted updates told. challengers and
    authors: by hash of the plan; authors are members whose challenger won. contests: by run, whether its challenger
    won. terms: of each round that is remembered. secure: runs of which the sum alone is seen.
    """

    federation: str | None = None
    privacy: PrivacyPolicy | None = None
    credit: CreditPolicy | None = None
    members: dict[str, MemberEntry] = field(default_factory=dict)
    keys: dict[str, list[str]] = field(default_factory=dict)
    removed: dict[str, MemberEntry] = field(default_factory=dict)
    open: dict[str, Proposal] = field(default_factory=dict)
    votes: dict[str, dict[str, bool]] = field(default_factory=dict)
    decided: dict[str, bool] = field(default_factory=dict)
    plans: dict[str, str] = field(default_factory=dict)
    secure: dict[str, bool] = field(default_factory=dict)
    rounds: dict[tuple[str, int], ClosedRound] = field(default_factory=dict)
    models: dict[str, ModelEntry] = field(default_factory=dict)
    champions: list[str] = field(default_factory=list)
    paused: bool = False
    attested: dict[str, Attestation] = field(default_factory=dict)
    spent: dict[str, float] = field(default_factory=dict)
    challengers: dict[str, Challenger] = field(default_factory=dict)
    authors: dict[str, str] = field(default_factory=dict)
    contests: dict[str, bool] = field(default_factory=dict)
    terms: dict[tuple[str, int], Terms] = field(default_factory=dict)

    @property
    def founded(self) -> bool:
        """Whether a founding policy is in the log; without one there is nothing to decide and nothing to enforce."""
        return self.privacy is not None

    @property
    def member_set(self) -> str:
        """Version of the membership: hash of the members' names and keys."""
        return content_hash({name: self.members[name].public_key for name in sorted(self.members)})

    def voters(self, proposal: Proposal) -> set[str]:
        """Members who may vote on a proposal."""
        subject = {proposal.action.node} if isinstance(proposal.action, Remove) else set()
        return self.members.keys() - subject

    def needs_two_thirds(self, proposal: Proposal) -> bool:
        """Whether a proposal removes a member or weakens privacy."""
        action = proposal.action
        if isinstance(action, SetPrivacy):
            return self.privacy is not None and action.policy.weaker_than(self.privacy)
        return isinstance(action, Remove)

    def outcome(self, proposal_hash: str, at: str) -> bool | None:
        """Whether an open proposal is accepted at a time (UTC, ISO 8601); None while that is not settled."""
        proposal, votes = self.open[proposal_hash], self.votes[proposal_hash]
        if proposal.member_set != self.member_set:
            return False
        may, yes = len(self.voters(proposal)), sum(votes.values())
        no, expired = len(votes) - yes, _moment(at) > _moment(proposal.expires_at)
        if self.needs_two_thirds(proposal):
            enough, possible = 3 * yes >= 2 * may, 3 * (may - no) >= 2 * may
        else:
            enough = 2 * yes > may or (expired and 2 * len(votes) > may and yes > no)
            possible = 2 * no < may
        return True if enough else (None if possible and not expired else False)

    @property
    def champion(self) -> str | None:
        """Hash of the model that the members decided to serve."""
        return self.champions[-1] if self.champions else None

    @property
    def author(self) -> str | None:
        """Member who entered the recipe that the champion runs, if that won its contest."""
        published = self.models.get(self.champion or "")
        author = None if published is None else self.authors.get(self.plans.get(published.run, ""))
        return author if author in self.members else None

    def terms_now(self, plan_hash: str) -> Terms:
        """Return what holds for a round of this plan that closes now."""
        challenger, credit = self.challengers.get(plan_hash), self.credit
        return Terms(
            champion=self.champion,
            entrant=None if challenger is None else challenger.node,
            author=self.author,
            permille=0 if credit is None else credit.algorithm_permille,
        )

    @property
    def aggregation(self) -> AggregationMode:
        """How runs that begin now are aggregated."""
        return "plain" if self.privacy is None else self.privacy.aggregation

    def may_go_on(self, run: str) -> bool:
        """Whether a run hides as much as the policy wants by now."""
        return self.secure.get(run, False) or self.aggregation == "plain"

    def copy(self) -> Charter:
        """Return a copy for a trial: taking entries in there changes nothing here."""
        fresh = {item.name: copy(getattr(self, item.name)) for item in fields(self)}
        fresh["votes"] = {name: dict(cast) for name, cast in self.votes.items()}
        fresh["keys"] = {name: list(known) for name, known in self.keys.items()}
        return Charter(**fresh)

    def take(self, line: LedgerEntry) -> str:
        """Take the next entry in, or say what is wrong with it and leave the state as it was."""
        return take(self, line.entry, line.recorded_at)

    def take_entry(self, entry: Entry, at: str) -> str:
        """Do the same with an entry that was recorded `at` (UTC, ISO 8601)."""
        return take(self, entry, at)


def run_name(federation: str, plan: TrainingPlan, start_model_hash: str) -> str:
    """Name a run after what it is: its first model is thereby part of what was logged with its plan."""
    what = {"federation": federation, "plan": content_hash(plan), "model": start_model_hash}
    return f"{plan.name}-{content_hash(what)[:12]}"


def code_of(fault: str) -> StatementCode:
    """Code that a fault of `take` begins with."""
    return StatementCode(fault.partition(":")[0])


def take(charter: Charter, entry: Entry, at: str) -> str:  # noqa: PLR0911
    """Say what is wrong with an entry, code first; empty when nothing is, and then the charter has taken it in."""
    match entry:  # the frequent kinds first: each that does not fit takes half a microsecond
        case PlanEntry():
            return _plan(charter, entry)
        case RoundEntry():
            charter.rounds[entry.run, entry.round] = ClosedRound.of(entry)
            charter.terms[entry.run, entry.round] = charter.terms_now(entry.plan_hash)
            for manifest in (signed.manifest for signed in entry.admitted):
                told = manifest.spend.epsilon_after
                charter.spent[manifest.node] = max(told, charter.spent.get(manifest.node, 0.0))
        case ModelEntry():
            charter.models[entry.model_hash] = entry
        case MemberEntry():
            return _member(charter, entry)
        case FoundingEntry():
            return _founding(charter, entry)
        case ProposalEntry():
            return _proposal(charter, entry, at)
        case VoteEntry():
            return _vote(charter, entry, at)
        case DecisionEntry():
            return _decision(charter, entry, at)
        case AttestationEntry():
            return _attestation(charter, entry)
        case ContestEntry():
            return _contest(charter, entry)
        case _:
            pass
    return ""


def _member(charter: Charter, entry: MemberEntry) -> str:
    known = charter.members.get(entry.node)
    if known is None and charter.founded and (charter.plans or charter.decided):
        return f"{Code.NOT_DECIDED}: {entry.node} joins without a vote"
    if known is not None and known.public_key != entry.public_key:
        return f"{Code.NOT_DECIDED}: {entry.node} is a member with another key"
    _enter(charter, entry)
    return ""


def _plan(charter: Charter, entry: PlanEntry) -> str:
    if entry.run not in charter.plans and entry.aggregation != charter.aggregation:
        return f"{Code.NOT_DECIDED}: its aggregation is not what the members decided"
    charter.plans.setdefault(entry.run, entry.plan_hash)
    charter.secure.setdefault(entry.run, entry.aggregation == "secure")
    remembered = set(islice(reversed(charter.plans), _RUNS))
    charter.rounds = {place: closed for place, closed in charter.rounds.items() if place[0] in remembered}
    charter.terms = {place: held for place, held in charter.terms.items() if place[0] in remembered}
    return ""


def _enter(charter: Charter, member: MemberEntry) -> None:
    charter.members[member.node] = member
    charter.removed.pop(member.node, None)
    keys = charter.keys.setdefault(member.node, [])
    if member.public_key not in keys:
        keys.append(member.public_key)


def _founding(charter: Charter, entry: FoundingEntry) -> str:
    if charter.founded:
        return f"{Code.MADE_BEFORE}: the federation was founded before"
    charter.federation, charter.privacy, charter.credit = entry.federation, entry.privacy, entry.credit
    return ""


def _proposal(charter: Charter, entry: ProposalEntry, at: str) -> str:
    proposal, name = entry.proposal, content_hash(entry.proposal)
    if not charter.founded:
        return f"{Code.NOT_FOUNDED}: there is no federation yet"
    if proposal.federation != charter.federation:
        return f"{Code.OTHER_FEDERATION}: it is made for another federation"
    if name in charter.open or name in charter.decided:
        return f"{Code.MADE_BEFORE}: it was made before"
    if proposal.member_set != charter.member_set:
        return f"{Code.OTHER_MEMBERS}: it is made for other members"
    if not _is_moment(proposal.expires_at) or _moment(proposal.expires_at) <= _moment(at):
        return f"{Code.EXPIRED}: it has expired"
    wrong = _signed_by_member(charter, proposal.proposed_by, proposal, entry.signature) or _senseless(charter, proposal)
    if not wrong:
        charter.open[name], charter.votes[name] = proposal, {}
    return wrong


def _senseless(charter: Charter, proposal: Proposal) -> str:
    """Say why a proposal could not take effect."""
    action, members, none = proposal.action, charter.members, Code.NO_EFFECT
    taken = {key for known in charter.keys.values() for key in known}
    match action:
        case Admit():
            return f"{none}: name or key is taken" if action.node in members or action.public_key in taken else ""
        case RotateKey() if action.public_key in taken:
            return f"{none}: the key is taken"
        case Remove() | RotateKey():
            return "" if action.node in members else f"{none}: {action.node} is not a member"
        case Promote() | RollBack():
            published = isinstance(action, Promote)
            known = charter.models if published else charter.champions
            lacks = "is not in the ledger" if published else "was never the champion"
            return "" if action.model_hash in known else f"{none}: the model {lacks}"
        case Challenge():
            return _idle_challenge(charter, action)
        case _:
            return ""


def _idle_challenge(charter: Charter, action: Challenge) -> str:
    """Say why a challenger could not compete: nobody may claim a recipe that another entered, or that was in use."""
    name, none = content_hash(action.plan), Code.NO_EFFECT
    waiting = [p.action.plan for p in charter.open.values() if isinstance(p.action, Challenge)]
    if name in charter.challengers or name in charter.plans.values() or action.plan in waiting:
        return f"{none}: the plan was entered or run before"
    privacy, credit = charter.privacy, charter.credit
    pot = action.plan.credit.pot_micro_credits_per_round
    if privacy is None or credit is None or pot > credit.max_pot_micro_credits_per_round:
        return f"{none}: the plan pays more than the credit policy allows"
    return "" if privacy.allows(action.plan) else f"{none}: the plan costs more than the privacy policy allows"


def _vote(charter: Charter, entry: VoteEntry, at: str) -> str:
    vote = entry.vote
    proposal = charter.open.get(vote.proposal_hash)
    if proposal is None:
        return f"{Code.NO_SUCH_PROPOSAL}: there is no such open proposal"
    if vote.federation != charter.federation:
        return f"{Code.OTHER_FEDERATION}: it is made for another federation"
    if {vote.member_set, proposal.member_set} != {charter.member_set}:
        return f"{Code.OTHER_MEMBERS}: it is made for other members"
    if _moment(at) > _moment(proposal.expires_at):
        return f"{Code.EXPIRED}: the proposal has expired"
    if vote.node in charter.votes[vote.proposal_hash]:
        return f"{Code.VOTED_BEFORE}: {vote.node} has voted before"
    wrong = _signed_by_member(charter, vote.node, vote, entry.signature)
    if not wrong and vote.node not in charter.voters(proposal):
        wrong = f"{Code.MAY_NOT_VOTE}: {vote.node} is the subject and does not vote"
    if not wrong:
        charter.votes[vote.proposal_hash][vote.node] = vote.approve
    return wrong


def _decision(charter: Charter, entry: DecisionEntry, at: str) -> str:
    if entry.proposal_hash not in charter.open:
        return f"{Code.NO_SUCH_PROPOSAL}: there is no such open proposal"
    if charter.outcome(entry.proposal_hash, at) is not entry.accepted:
        return f"{Code.NOT_DECIDED}: it does not follow from the votes"
    proposal = charter.open.pop(entry.proposal_hash)
    charter.decided[entry.proposal_hash] = entry.accepted
    if entry.accepted:
        _apply(charter, proposal)
    return ""


def _apply(charter: Charter, proposal: Proposal) -> None:
    match proposal.action:
        case Admit() as new:
            _enter(charter, MemberEntry(**new.model_dump(exclude={"action"})))
        case Remove() as gone:
            charter.removed[gone.node] = charter.members.pop(gone.node)
        case RotateKey() as rotated:
            known = charter.members[rotated.node]
            _enter(charter, known.model_copy(update={"public_key": rotated.public_key}))
        case SetPrivacy() as privacy:
            charter.privacy = privacy.policy
        case SetCredit() as credit:
            charter.credit = credit.policy
        case Promote() | RollBack() as model:
            charter.champions.append(model.model_hash)
        case Pause() as pause:
            charter.paused = pause.paused
        case Challenge() as new:
            charter.challengers[content_hash(new.plan)] = Challenger(node=proposal.proposed_by, code_hash=new.code_hash)


def _contest(charter: Charter, entry: ContestEntry) -> str:
    """Who fought whom: a published model of an entered plan, and the champion when the run's last round closed."""
    published, none = charter.models.get(entry.model_hash), Code.NOT_DECIDED
    if published is None or published.run != entry.run:
        return f"{none}: the challenger is not the run's published model"
    terms = charter.terms.get((entry.run, published.round))
    if terms is None or None in (terms.entrant, terms.champion):
        return f"{none}: there was no challenger, or nobody to challenge"
    if (terms.entrant, terms.champion) != (entry.entrant, entry.champion_hash):
        return f"{none}: it names another entrant or champion"
    if entry.run in charter.contests:
        return f"{Code.MADE_BEFORE}: the run's contest was settled before"
    charter.contests[entry.run] = entry.won
    if entry.won:
        charter.authors.setdefault(charter.plans[entry.run], entry.entrant)
    return ""


def _attestation(charter: Charter, entry: AttestationEntry) -> str:
    said = entry.attestation
    if said.federation != charter.federation:
        return f"{Code.OTHER_FEDERATION}: it is made for another federation"
    if wrong := _signed_by_member(charter, said.node, said, entry.signature):
        return wrong
    before = charter.attested.get(said.node)
    if before is not None and said.releases <= before.releases:
        return f"{Code.MADE_BEFORE}: {said.node} has attested so many releases before"
    heldout = 0.0 if before is None else before.epsilon_heldout
    least = max(charter.spent.get(said.node, 0.0), 0.0 if before is None else before.epsilon_training)
    if said.epsilon_training < least - _ROUNDING or said.epsilon_heldout < heldout - _ROUNDING:
        return f"{Code.ATTESTS_LESS}: {said.node} attests less than its own signed messages told"
    charter.attested[said.node] = said
    return ""


def _signed_by_member(charter: Charter, node: str, value: object, signature: str) -> str:
    member = charter.members.get(node)
    if member is None:
        return f"{Code.NOT_A_MEMBER}: {node} is not a member"
    good = verify(member.public_key, canonical_bytes(value), signature)
    return "" if good else f"{Code.BAD_SIGNATURE}: the signature of {node} is wrong"


def _is_moment(text: str) -> bool:
    try:
        return datetime.fromisoformat(text).tzinfo is not None
    except ValueError:
        return False


def _moment(text: str) -> datetime:
    return datetime.fromisoformat(text)
