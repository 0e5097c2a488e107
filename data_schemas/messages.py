"""What crosses the hospital's firewall, field by field.

Each message is one JSON body plus, where named, float32 arrays. Nothing else ever leaves a node; docs/privacy.md lists
sensitivity, mechanism and cost of every field.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pydantic import Field

from data_schemas.canonical import content_hash
from data_schemas.frozen import Frozen, later
from data_schemas.governance import Statement, StatementCode
from data_schemas.plan import PrivacyEvent, PrivacyUnit, TrainingPlan

Hex32 = str  # 64 lower-case hex digits: a SHA-256 or an Ed25519 public key


_CONTEST = "contest: "


class RefusalCode(StrEnum):
    """Why a node did not do what it was asked. Codes only: no exception text leaves a hospital."""

    UNKNOWN_FEDERATION = "unknown-federation"
    PLAN_MISMATCH = "plan-mismatch"
    PLAN_EXCEEDS_CEILING = "plan-exceeds-ceiling"
    BUDGET_EXHAUSTED = "budget-exhausted"
    TOO_FEW_PATIENTS = "too-few-patients"
    DEADLINE_TOO_CLOSE = "deadline-too-close"
    MODEL_MISMATCH = "model-mismatch"
    LEDGER_FORK = "ledger-fork"
    NODE_BUSY = "node-busy"
    MALFORMED_TASK = "malformed-task"
    INTERNAL = "internal"
    LEDGER_BREAKS_RULES = "ledger-breaks-rules"
    ALARM = "alarm"
    NOT_FOUNDED = "not-founded"
    FEDERATION_PAUSED = "federation-paused"
    NOT_A_MEMBER = "not-a-member"
    PLAN_NOT_DECIDED = "plan-not-decided"
    PLAN_OUTSIDE_POLICY = "plan-outside-policy"
    MODEL_NOT_DECIDED = "model-not-decided"
    NODE_PAUSED = "node-paused"
    NODE_LEFT = "node-left"
    CODE_NOT_DECIDED = "code-not-decided"
    OTHER_AGGREGATION = "other-aggregation"
    SESSION_MISMATCH = "session-mismatch"
    SUM_CONFIRMED = "sum-confirmed"


class Refusal(Frozen):
    """A node's answer when it declines a task."""

    kind: Literal["refusal"] = "refusal"
    code: RefusalCode


class HelloTask(Frozen):
    """Asks a node who it is."""

    federation: str


class Hello(Frozen):
    """A node's identity and its declared (published, not computed) numbers of patients."""

    kind: Literal["hello"] = "hello"
    node: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")
    public_key: Hex32
    declared_training_patients: int = Field(ge=1)
    declared_heldout_patients: int = Field(ge=0)


class TrainTask(Frozen):
    """Train one round from the base model. Array: base weights float32[D]."""

    federation: str
    run: str
    round: int = Field(ge=1)
    plan: TrainingPlan
    base_model_hash: Hex32
    deadline_unix: float

    @property
    def task_id(self) -> Hex32:
        """Identity of the work: the same for a replay, whatever its deadline."""
        return content_hash(self.model_dump(mode="json", exclude={"deadline_unix"}))


class PrivacySpend(Frozen):
    """What a release cost: the event, the unit, and the cohort's total epsilon after it."""

    unit: PrivacyUnit
    event: PrivacyEvent
    epsilon_after: float = Field(ge=0)
    delta: float


class UpdateManifest(Frozen):
    """What a node signs about its update. The update is a difference: new weights minus base weights.

    commitment: under secure aggregation, the Pedersen commitment to the weighted update (pipeline.pedersen); the
    update's hash is then that of the commitment, so that it tells nothing of the update.
    """

    federation: str
    run: str
    round: int
    node: str
    plan_hash: Hex32
    base_model_hash: Hex32
    update_hash: Hex32
    declared_patients: int
    spend: PrivacySpend
    budget_head: Hex32
    commitment: Hex32 | None = later(None)


class SignedUpdate(Frozen):
    """Reply to TrainTask. Array: update float32[D]; signature is Ed25519 over the manifest's canonical bytes, hex."""

    kind: Literal["update"] = "update"
    manifest: UpdateManifest
    signature: str


class ScoreTask(Frozen):
    """Score a round's coalitions on held-out patients; the result stays at the node until the epoch's release.

    Arrays: base weights float32[D]; updates float32[n, D] in the order of `nodes`; under a plan with momentum the
    server's velocity before the round, float32[D]. Coalition model of S:
    base + server_learning_rate * sum over S of share_i * update_i, with share_i = declared_i / sum of all declared.
    """

    federation: str
    run: str
    round: int
    epoch: int
    plan: TrainingPlan
    nodes: tuple[str, ...]
    shares: tuple[float, ...]
    update_hashes: tuple[Hex32, ...]
    base_model_hash: Hex32
    new_model_hash: Hex32
    base_velocity_hash: Hex32 | None = later(None)


class Scored(Frozen):
    """Reply to ScoreTask: an acknowledgement without any figure."""

    kind: Literal["scored"] = "scored"
    round: int
    new_model_hash: Hex32


class ContestTask(Frozen):
    """Score a challenger's model against the champion on held-out patients; the result stays at the node.

    Array: the challenger's weights float32[D]; the champion is the one that the node keeps. What is scored becomes one
    more value of the run's last release.
    """

    federation: str
    run: str
    plan: TrainingPlan
    model_hash: Hex32
    champion_hash: Hex32

    @property
    def value_name(self) -> str:
        """Name of the release's value."""
        return contest_name(self.model_hash, self.champion_hash)


def contest_name(model_hash: str, champion_hash: str) -> str:
    """Name of a release's value that says how much a model improves on the champion; no hospital has such a name."""
    return f"{_CONTEST}{model_hash} over {champion_hash}"


def is_contest(name: str) -> bool:
    """Whether a value of a release is about two models and not about a hospital."""
    return name.startswith(_CONTEST)


class ReleaseTask(Frozen):
    """Release the epoch's one noised vector. `nodes` fixes the order of its values: hospitals, then a contest."""

    federation: str
    run: str
    epoch: int
    plan: TrainingPlan
    nodes: tuple[str, ...]
    deadline_unix: float

    @property
    def task_id(self) -> Hex32:
        """Identity of the work: the same for a replay, whatever its deadline."""
        return content_hash(self.model_dump(mode="json", exclude={"deadline_unix"}))


class EpochRelease(Frozen):
    """What a node signs about an epoch: per-node Shapley values in mg/dL, noised, or an abstention.

    `shapley_mg_dl` is empty when the node abstains: its noise would exceed any score a patient can produce.
    `noise_std_mg_dl` is the standard deviation of the noise on each value.
    """

    federation: str
    run: str
    epoch: int
    node: str
    nodes: tuple[str, ...]
    shapley_mg_dl: tuple[float, ...]
    noise_std_mg_dl: float
    declared_heldout_patients: int
    abstained: bool
    spend: PrivacySpend | None
    budget_head: Hex32


class SignedRelease(Frozen):
    """Reply to ReleaseTask; signature is Ed25519 over the release's canonical bytes, hex."""

    kind: Literal["release"] = "release"
    release: EpochRelease
    signature: str


class CosignTask(Frozen):
    """Ask a witness to cosign a checkpoint that extends the one it last cosigned.

    `entries`: the canonical text of the entries from old_size on. The witness keeps its own copy of the ledger, makes
    the tree itself, and sees what is said in its name; a consistency proof would show neither.
    `refused`: statements of this node that did not come into the log, by content hash. `attest`: a run has ended, and
    the node is asked to attest its budget book.
    """

    federation: str
    checkpoint: str
    old_size: int = Field(ge=0)
    entries: tuple[str, ...]
    refused: dict[Hex32, StatementCode] = Field(default_factory=dict)
    attest: bool = False


class WitnessState(Frozen):
    """Reply when the proof does not start where the witness stands: the size it last cosigned."""

    kind: Literal["witness-state"] = "witness-state"
    size: int


class Cosigned(Frozen):
    """Reply to CosignTask: one C2SP cosignature line, what the hospital has signed for the log, the model it serves."""

    kind: Literal["cosigned"] = "cosigned"
    cosignature: str
    statements: tuple[Statement, ...] = ()
    champion: Hex32 | None = None


class ModelTask(Frozen):
    """Hands over the champion that the members decided. Array: weights float32[D]. card: canonical JSON of its card."""

    federation: str
    card: str


class Installed(Frozen):
    """Reply to ModelTask: the model that the node's endpoint serves from now on."""

    kind: Literal["installed"] = "installed"
    model_hash: Hex32
