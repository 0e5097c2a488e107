"""Entries of the credit ledger. Only hashes and already private aggregates go in: the log can never be erased."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from data_schemas.frozen import Frozen, later
from data_schemas.governance import AttestationEntry, DecisionEntry, FoundingEntry, ProposalEntry, VoteEntry
from data_schemas.messages import Hex32, SignedRelease, SignedUpdate
from data_schemas.plan import AggregationMode


class MemberEntry(Frozen):
    """A hospital joins: its name, key and declared numbers of patients."""

    kind: Literal["member"] = "member"
    node: str
    public_key: Hex32
    declared_training_patients: int
    declared_heldout_patients: int


class PlanEntry(Frozen):
    """The plan that the run's rounds follow, by hash; and whether the aggregator sees updates or their sum alone."""

    kind: Literal["plan"] = "plan"
    run: str
    plan_hash: Hex32
    aggregation: AggregationMode = later("plain")


class RejectedUpdate(Frozen):
    """An update that was not admitted, and why."""

    node: str
    update_hash: Hex32 | None
    code: str


class SecureSum(Frozen):
    """What a securely aggregated round's commitments open to.

    total_hash: SHA-256 of the sum of the weighted updates, int64[D] little endian (pipeline.masking). blinder: sum of
    the commitments' blinders. roster: how many hospitals began the round; more than two thirds of them are in the sum.
    """

    roster: int
    total_hash: Hex32
    blinder: Hex32


class RoundEntry(Frozen):
    """One closed round: what was admitted and rejected and which model came out.

    velocity_hash: of the server's velocity after the round, under a plan with momentum: nodes add up from it.
    sum: under secure aggregation, where updates are commitments.
    """

    kind: Literal["round"] = "round"
    run: str
    round: int
    plan_hash: Hex32
    base_model_hash: Hex32
    new_model_hash: Hex32
    velocity_hash: Hex32 | None = later(None)
    admitted: tuple[SignedUpdate, ...]
    rejected: tuple[RejectedUpdate, ...]
    sum: SecureSum | None = later(None)

    def patients(self) -> dict[str, int]:
        """Declared training patients of each hospital whose update was admitted."""
        return {signed.manifest.node: signed.manifest.declared_patients for signed in self.admitted}


class CreditLine(Frozen):
    """One node's credit in an epoch, with the 95% interval of the noise. Micro-credits are integers."""

    node: str
    shapley_mg_dl: float
    interval_low_mg_dl: float
    interval_high_mg_dl: float
    micro_credits: int


class RecipeShare(Frozen):
    """What a member earned because the champion runs the recipe that it entered."""

    node: str
    micro_credits: int


# How credit came about: exact where no round of the epoch had more admitted updates than every coalition is scored for.
# Under secure aggregation no coalition can be scored: credit follows declared patients, and every value is 0.
CreditMode = Literal["exact-shapley-weighted-median", "sampled-shapley-weighted-median", "declared-patients"]


class CreditEntry(Frozen):
    """Credit of one epoch and the signed releases it follows from: anyone can recompute it.

    lines, algorithm and unpaid sum to the pot. algorithm: what the champion's recipe earned, by member.
    """

    kind: Literal["credit"] = "credit"
    run: str
    epoch: int
    rounds: tuple[int, ...]
    mode: CreditMode
    pot_micro_credits: int
    unpaid_micro_credits: int
    lines: tuple[CreditLine, ...]
    releases: tuple[SignedRelease, ...]
    algorithm: tuple[RecipeShare, ...] = later(())

    def earned(self) -> dict[str, int]:
        """Micro-credits of every hospital named here, for data and for the recipe together."""
        total = {line.node: line.micro_credits for line in self.lines}
        for share in self.algorithm:
            total[share.node] = total.get(share.node, 0) + share.micro_credits
        return total


class ContestScore(Frozen):
    """How much better the challenger forecasts than the champion on one hospital's held-out people, as it released."""

    node: str
    improvement_mg_dl: float
    noise_std_mg_dl: float
    declared_heldout_patients: int


class ContestEntry(Frozen):
    """A challenger's model against the champion, scored by the others than its entrant, with the 95% noise interval.

    scores follow from the run's last credit entry; won: the interval lies above zero.
    """

    kind: Literal["contest"] = "contest"
    run: str
    entrant: str
    model_hash: Hex32
    champion_hash: Hex32
    scores: tuple[ContestScore, ...]
    improvement_mg_dl: float
    interval_low_mg_dl: float
    interval_high_mg_dl: float
    won: bool


class ModelEntry(Frozen):
    """A model version is published: its weights' hash and its privacy statement."""

    kind: Literal["model"] = "model"
    run: str
    round: int
    model_hash: Hex32
    unit: str
    relation: str
    delta: float
    epsilon_by_node: dict[str, float]


Entry = Annotated[
    MemberEntry
    | PlanEntry
    | RoundEntry
    | CreditEntry
    | ContestEntry
    | ModelEntry
    | FoundingEntry
    | ProposalEntry
    | VoteEntry
    | DecisionEntry
    | AttestationEntry,
    Field(discriminator="kind"),
]


class LedgerEntry(Frozen):
    """One line of the log: position, time (UTC ISO 8601), content, and the aggregator's signature over the rest."""

    index: int = Field(ge=0)
    recorded_at: str
    entry: Entry
    signature: str


class Receipt(Frozen):
    """Proof that an entry is in the log: leaf hash, position, tree size, RFC 6962 inclusion path, all hex."""

    index: int
    tree_size: int
    leaf_hash: Hex32
    path: tuple[Hex32, ...]


class EntryProof(Frozen):
    """An entry with all that is needed to check it offline: its logged bytes as text, the receipt, a signed note."""

    kind: Literal["islet-ledger-proof-v1"] = "islet-ledger-proof-v1"
    entry: str
    receipt: Receipt
    checkpoint: str
