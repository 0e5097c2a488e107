"""What members decide together, as they sign it: proposals, votes, and the decisions that follow from them.

One hospital, one vote. Every signed value binds the federation, the members at the time and, for a vote, the hash of
the proposal, so none can be used again elsewhere or later. Signatures are Ed25519 over the RFC 8785 bytes.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field

from data_schemas.frozen import Frozen, later
from data_schemas.plan import AggregationMode, PrivacyUnit, TrainingPlan

Hex32 = str
NodeName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class StatementCode(StrEnum):
    """Why a proposal, vote, attestation or decision does not come into the log."""

    NOT_FOUNDED = "not-founded"
    OTHER_FEDERATION = "other-federation"
    OTHER_MEMBERS = "other-members"
    NOT_A_MEMBER = "not-a-member"
    BAD_SIGNATURE = "bad-signature"
    MADE_BEFORE = "made-before"
    EXPIRED = "expired"
    NO_EFFECT = "no-effect"
    NO_SUCH_PROPOSAL = "no-such-proposal"
    VOTED_BEFORE = "voted-before"
    MAY_NOT_VOTE = "may-not-vote"
    NOT_DECIDED = "not-decided"
    ATTESTS_LESS = "attests-less"


class PrivacyPolicy(Frozen):
    """The most that any plan may cost a patient, the fewest declared training patients a node trains on, who sees what.

    aggregation: of runs that begin under this policy. Under "secure" the aggregator sees the sum of updates alone.
    """

    max_epsilon_training: float = Field(gt=0)
    max_epsilon_heldout: float = Field(gt=0)
    unit: PrivacyUnit = "patient"
    min_patients: int = Field(ge=1)
    aggregation: AggregationMode = later("plain")

    def weaker_than(self, other: PrivacyPolicy) -> bool:
        """Whether this protects less than the other in any respect."""
        return (
            self.max_epsilon_training > other.max_epsilon_training
            or self.max_epsilon_heldout > other.max_epsilon_heldout
            or self.min_patients < other.min_patients
            or self.unit not in {other.unit, "patient"}
            or self.aggregation not in {other.aggregation, "secure"}
        )

    def allows(self, plan: TrainingPlan) -> bool:
        """Whether a plan stays inside."""
        return (
            plan.privacy.epsilon <= self.max_epsilon_training
            and plan.credit.epsilon <= self.max_epsilon_heldout
            and plan.privacy.unit in ("patient", self.unit)
            and (self.aggregation == "plain" or plan.server.rule == "patient-weighted-mean")
        )


class CreditPolicy(Frozen):
    """What a round may pay, in micro-credits; how many thousandths of it are for the recipe that the champion runs."""

    max_pot_micro_credits_per_round: int = Field(ge=1, lt=2**53)
    algorithm_permille: int = later(0, ge=0, le=1000)


class Admit(Frozen):
    """A hospital joins."""

    action: Literal["admit"] = "admit"
    node: NodeName
    public_key: Hash
    declared_training_patients: int = Field(ge=1)
    declared_heldout_patients: int = Field(ge=0)


class Remove(Frozen):
    """A hospital leaves; it does not vote on this."""

    action: Literal["remove"] = "remove"
    node: NodeName


class RotateKey(Frozen):
    """A hospital gets another key."""

    action: Literal["rotate-key"] = "rotate-key"
    node: NodeName
    public_key: Hash


class SetPrivacy(Frozen):
    """Another privacy policy."""

    action: Literal["privacy-policy"] = "privacy-policy"
    policy: PrivacyPolicy


class SetCredit(Frozen):
    """Another credit policy."""

    action: Literal["credit-policy"] = "credit-policy"
    policy: CreditPolicy


class Promote(Frozen):
    """A published model becomes the champion."""

    action: Literal["promote"] = "promote"
    model_hash: Hash


class RollBack(Frozen):
    """An earlier champion is the champion again."""

    action: Literal["roll-back"] = "roll-back"
    model_hash: Hash


class Pause(Frozen):
    """Training stops, or goes on."""

    action: Literal["pause"] = "pause"
    paused: bool


class Challenge(Frozen):
    """The proposing member enters a challenger: an architecture and a training recipe, and the code that runs it.

    code_hash: of what a wheel installs at a node (pipeline.bundle.code_hash).
    """

    action: Literal["challenge"] = "challenge"
    plan: TrainingPlan
    code_hash: Hash


Action = Annotated[
    Admit | Remove | RotateKey | SetPrivacy | SetCredit | Promote | RollBack | Pause | Challenge,
    Field(discriminator="action"),
]


class Proposal(Frozen):
    """What a member signs to propose. member_set: hash of the members' names and keys; expires_at: UTC, ISO 8601."""

    federation: str
    action: Action
    proposed_by: NodeName
    member_set: Hash
    expires_at: str


class Vote(Frozen):
    """What a member signs to vote."""

    federation: str
    proposal_hash: Hash
    node: NodeName
    member_set: Hash
    approve: bool


class FoundingEntry(Frozen):
    """The policy that the founders start with; every node holds it against its own ceilings before it trains."""

    kind: Literal["founding"] = "founding"
    federation: str
    privacy: PrivacyPolicy
    credit: CreditPolicy


class ProposalEntry(Frozen):
    """A member's signed proposal."""

    kind: Literal["proposal"] = "proposal"
    proposal: Proposal
    signature: str


class VoteEntry(Frozen):
    """A member's signed vote."""

    kind: Literal["vote"] = "vote"
    vote: Vote
    signature: str


class DecisionEntry(Frozen):
    """The outcome of a proposal; it follows from the votes before it and takes effect here."""

    kind: Literal["decision"] = "decision"
    proposal_hash: Hash
    accepted: bool


class Attestation(Frozen):
    """What a member signs about its privacy budget book: number of releases, the book's head, both cohorts' totals.

    None of these ever falls, so an attestation cannot be used twice and an older copy of a book shows.
    """

    federation: str
    node: NodeName
    releases: int = Field(ge=0)
    budget_head: Hash
    epsilon_training: float = Field(ge=0)
    epsilon_heldout: float = Field(ge=0)


class AttestationEntry(Frozen):
    """A member's signed budget attestation."""

    kind: Literal["attestation"] = "attestation"
    attestation: Attestation
    signature: str


# What a member signs at home and the aggregator enters, or refuses with a code.
Statement = Annotated[ProposalEntry | VoteEntry | AttestationEntry, Field(discriminator="kind")]
