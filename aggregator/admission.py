"""The gate for updates: what a hospital sends is checked completely before it can touch the global model.

The gate is pure and never raises on a hostile reply: it returns an AdmittedUpdate or a RejectedUpdate with one code.

Norm bound. A node runs T = steps_per_round steps of plain SGD with learning rate r. Each step adds up the gradients of
the sampled patients, each clipped to C = max_grad_norm, adds N(0, (z C)^2) to every coordinate and divides by the
expected sample q N (q = sample_rate, N = declared patients). The update is r times the sum of T such steps, so

    |update| <= r C / (q N) * ( B + z (sqrt(T D) + 8 sqrt(T)) )

where B bounds the patients sampled in all steps: B = min(T N, m + 8 sqrt(m) + 32) with m = T q N. Both terms fail with
probability below 1e-13 for an honest node (Bernstein's inequality for B; Gaussian concentration of the norm for the
noise, Laurent and Massart 2000). The bound is doubled, because the declared number is a published, rounded figure.
What passes the gate can still be wrong, but no larger than noise the plan itself allows.

The same noise bounds the norm from below: an update far quieter than its noise must be was not made by the plan, an
empty one least of all. It also makes honest updates nearly orthogonal: one that points where another hospital's
update, or the last step, points already is a copy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from data_schemas.canonical import bytes_hash, canonical_bytes, content_hash
from data_schemas.ledger import MemberEntry, RejectedUpdate
from data_schemas.messages import SignedUpdate, UpdateManifest
from data_schemas.plan import TrainingPlan
from data_schemas.units import HORIZON_MINUTES
from pipeline.commitments import is_committed
from pipeline.signing import verify

# Part of its noise's expected norm that an update must have at least.
_QUIET = 0.25
# Cosine from which two updates are one; between honest private updates it stays below 0.1 (docs/credit.md).
_COPY = 0.5


class RejectionCode(StrEnum):
    """Why an update was not admitted."""

    UNKNOWN_MEMBER = "unknown-member"
    WRONG_NODE = "wrong-node"
    BAD_SIGNATURE = "bad-signature"
    WRONG_FEDERATION = "wrong-federation"
    WRONG_RUN = "wrong-run"
    WRONG_ROUND = "wrong-round"
    WRONG_PLAN = "wrong-plan"
    WRONG_BASE_MODEL = "wrong-base-model"
    WRONG_UNIT = "wrong-unit"
    WRONG_DELTA = "wrong-delta"
    WRONG_EVENT = "wrong-event"
    WRONG_DECLARED_PATIENTS = "wrong-declared-patients"
    WRONG_BUDGET_HEAD = "wrong-budget-head"
    WRONG_DTYPE = "wrong-dtype"
    WRONG_SHAPE = "wrong-shape"
    WRONG_HASH = "wrong-hash"
    REPLAYED = "replayed"
    NOT_FINITE = "not-finite"
    NORM_TOO_LARGE = "norm-too-large"
    NOT_PRIVATE = "not-private"
    COPIED = "copied"
    WRONG_COMMITMENT = "wrong-commitment"
    WRONG_KEYS = "wrong-keys"
    WRONG_SHARES = "wrong-shares"
    # Failures before there was an update to look at.
    MALFORMED_REPLY = "malformed-reply"
    TOO_LARGE = "too-large"
    NOT_CONNECTED = "not-connected"
    NO_REPLY = "no-reply"
    NODE_RAISED = "node-raised"
    BUNDLE_REFUSED = "bundle-refused"
    EXPIRED = "expired"
    NODE_UNAVAILABLE = "node-unavailable"
    TRANSPORT_ERROR = "transport-error"
    NOT_IN_LEDGER_ROUND = "not-in-ledger-round"


@dataclass(frozen=True)
class Expectation:
    """What a reply to this round's task must agree with. `seen_hashes`: updates of earlier rounds and runs.

    earlier: vectors float32[D] that all know and nobody may send again: the last step, the last round's updates, and
    those already admitted in this round.
    """

    federation: str
    run: str
    round: int
    plan: TrainingPlan
    base_model_hash: str
    dimension: int
    seen_hashes: frozenset[str]
    earlier: tuple[NDArray[np.float32], ...] = ()


@dataclass(frozen=True)
class AdmittedUpdate:
    """An update that passed every check: its signed manifest and delta float32[D] (read-only)."""

    signed: SignedUpdate
    delta: NDArray[np.float32]

    @property
    def node(self) -> str:
        """Name of the hospital."""
        return self.signed.manifest.node

    @property
    def declared_patients(self) -> int:
        """The hospital's declared training patients: its weight in the mean."""
        return self.signed.manifest.declared_patients


def max_update_norm(plan: TrainingPlan, declared_patients: int, dimension: int) -> float:
    """Largest L2 norm an honest node's update can have; derivation and slack in the module's docstring."""
    steps, privacy = plan.local.steps_per_round, plan.privacy
    expected_sample = privacy.sample_rate * declared_patients
    sampled = steps * expected_sample
    patients = min(float(steps * declared_patients), sampled + 8 * math.sqrt(sampled) + 32)
    noise = privacy.noise_multiplier * (math.sqrt(steps * dimension) + 8 * math.sqrt(steps))
    return 2 * plan.local.learning_rate * privacy.max_grad_norm / expected_sample * (patients + noise)


def admit(
    reply: SignedUpdate,
    delta: NDArray[np.generic],
    expected: Expectation,
    members: Mapping[str, MemberEntry],
    asked: str,
) -> AdmittedUpdate | RejectedUpdate:
    """Check a reply of the node `asked`; delta should be float32[D]. The first check that fails names the code."""
    code = _identity_code(reply, expected, members, asked) or _array_code(reply.manifest, delta, expected)
    if code is None and reply.manifest.commitment is not None:
        code = RejectionCode.WRONG_COMMITMENT
    if code is not None:
        return RejectedUpdate(node=asked, update_hash=_hash_or_none(reply.manifest.update_hash), code=code)
    own = np.array(delta, dtype=np.float32)
    own.flags.writeable = False
    return AdmittedUpdate(signed=reply, delta=own)


def admit_masked(
    reply: SignedUpdate,
    masked: NDArray[np.generic],
    expected: Expectation,
    members: Mapping[str, MemberEntry],
    asked: str,
) -> SignedUpdate | RejectedUpdate:
    """Check a masked update, which should be uint64[D]: what is said of it, and nothing of what is under the mask."""
    code = _identity_code(reply, expected, members, asked)
    if code is None and not is_committed(reply):
        code = RejectionCode.WRONG_COMMITMENT
    if code is None and masked.dtype != np.dtype("<u8"):
        code = RejectionCode.WRONG_DTYPE
    if code is None and masked.shape != (expected.dimension,):
        code = RejectionCode.WRONG_SHAPE
    if code is None:
        return reply
    return RejectedUpdate(node=asked, update_hash=_hash_or_none(reply.manifest.update_hash), code=code)


def _identity_code(
    reply: SignedUpdate, expected: Expectation, members: Mapping[str, MemberEntry], asked: str
) -> RejectionCode | None:
    manifest, member = reply.manifest, members.get(asked)
    if member is None:
        return RejectionCode.UNKNOWN_MEMBER
    if manifest.node != asked:
        return RejectionCode.WRONG_NODE
    if not verify(member.public_key, canonical_bytes(manifest), reply.signature):
        return RejectionCode.BAD_SIGNATURE
    return _manifest_code(manifest, expected, member)


def _manifest_code(manifest: UpdateManifest, expected: Expectation, member: MemberEntry) -> RejectionCode | None:
    plan, spend = expected.plan, manifest.spend
    checks = (
        (manifest.federation == expected.federation, RejectionCode.WRONG_FEDERATION),
        (manifest.run == expected.run, RejectionCode.WRONG_RUN),
        (manifest.round == expected.round, RejectionCode.WRONG_ROUND),
        (manifest.plan_hash == content_hash(plan), RejectionCode.WRONG_PLAN),
        (manifest.base_model_hash == expected.base_model_hash, RejectionCode.WRONG_BASE_MODEL),
        (spend.unit == "patient" == plan.privacy.unit, RejectionCode.WRONG_UNIT),
        (spend.delta == plan.privacy.delta, RejectionCode.WRONG_DELTA),
        (spend.event == plan.round_event, RejectionCode.WRONG_EVENT),
        (
            manifest.declared_patients == member.declared_training_patients,
            RejectionCode.WRONG_DECLARED_PATIENTS,
        ),
        (is_hash(manifest.budget_head), RejectionCode.WRONG_BUDGET_HEAD),
        (manifest.update_hash not in expected.seen_hashes, RejectionCode.REPLAYED),
    )
    return next((code for passed, code in checks if not passed), None)


def _array_code(manifest: UpdateManifest, delta: NDArray[np.generic], expected: Expectation) -> RejectionCode | None:
    if delta.dtype != np.dtype("<f4"):
        return RejectionCode.WRONG_DTYPE
    if delta.shape != (expected.dimension,):
        return RejectionCode.WRONG_SHAPE
    if bytes_hash(np.ascontiguousarray(delta).tobytes()) != manifest.update_hash:
        return RejectionCode.WRONG_HASH
    if not np.isfinite(delta).all():
        return RejectionCode.NOT_FINITE
    # float64 before squaring: a finite float32 vector can have an infinite float32 norm.
    limit = max_update_norm(expected.plan, manifest.declared_patients, expected.dimension)
    if float(np.linalg.norm(delta.astype(np.float64))) > limit:
        return RejectionCode.NORM_TOO_LARGE
    return originality_code(delta, expected.plan, manifest.declared_patients, expected.earlier)


def originality_code(
    delta: NDArray[np.generic], plan: TrainingPlan, declared_patients: int, earlier: Sequence[NDArray[np.float32]]
) -> RejectionCode | None:
    """Say whether an update float32[D] is too quiet to hold its noise, or a copy of an earlier vector."""
    vector = delta.astype(np.float64)
    # noise that was projected on a few curves fills that share of the coordinates it touches
    share = plan.local.horizon_curves / len(HORIZON_MINUTES)
    norm, touched = float(np.linalg.norm(vector)), max(1.0, share * np.count_nonzero(vector))
    privacy, steps = plan.privacy, plan.local.steps_per_round
    per_step = plan.local.learning_rate * privacy.max_grad_norm * privacy.noise_multiplier
    if norm < _QUIET * per_step / (privacy.sample_rate * declared_patients) * math.sqrt(steps * touched):
        return RejectionCode.NOT_PRIVATE
    # Chance gives random vectors of few coordinates a large cosine too: eight standard deviations of it are no proof.
    limit = min(0.999, max(_COPY, 8 / math.sqrt(touched)))
    direction = (vector / norm).astype(np.float32)
    for known in earlier:  # as many as hospitals, for each hospital: in the precision it comes in
        known_norm = float(np.linalg.norm(known))
        if known_norm > 0 and float(direction @ known) >= limit * known_norm:
            return RejectionCode.COPIED
    return None


def _hash_or_none(text: str) -> str | None:
    """Put on record only what has the shape of a hash: a hostile manifest may hold any text here."""
    return text if is_hash(text) else None


def is_hash(text: str) -> bool:
    """Whether a text is 64 lower-case hex digits; nothing else that a hospital chose freely may enter the ledger."""
    return len(text) == 64 and set(text) <= set("0123456789abcdef")
