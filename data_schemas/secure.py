"""What crosses the hospital's firewall in a round of secure aggregation, step by step (Bonawitz et al. 2017, figure 4).

    advertise -> seal -> mask -> confirm -> unmask, then check

The aggregator sees masked vectors, and of each hospital either its own mask's seed or its key with the others, never
both. Signatures are Ed25519 by the member's key over the canonical bytes.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from data_schemas.canonical import content_hash
from data_schemas.frozen import Frozen
from data_schemas.governance import Hash, NodeName
from data_schemas.ledger import SecureSum
from data_schemas.messages import SignedUpdate, TrainTask
from data_schemas.plan import TrainingPlan

Sealed = Annotated[str, Field(pattern=r"^[0-9a-f]{296}$")]
Share = Annotated[str, Field(pattern=r"^[0-9a-f]{132}$")]
Signature = Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]


class Session(Frozen):
    """One attempt at one round: the work, which is the same in every attempt, and the attempt's random name."""

    task_id: Hash
    attempt: Hash

    @property
    def name(self) -> str:
        """What keys and signatures of this attempt are bound to."""
        return content_hash(self)


class AdvertiseTask(Frozen):
    """Asks for a node's keys of this attempt. `train`: the round it is for."""

    kind: Literal["advertise"] = "advertise"
    train: TrainTask
    attempt: Hash


class Keys(Frozen):
    """What a node signs: X25519 keys, for sealing shares and for agreeing on masks; SHA-256 of its own mask's seed."""

    session: Hash
    node: NodeName
    sealing_key: Hash
    mask_key: Hash
    seed_hash: Hash


class Advertised(Frozen):
    """Reply to AdvertiseTask."""

    kind: Literal["advertised"] = "advertised"
    keys: Keys
    signature: Signature


class SealTask(Frozen):
    """Asks for shares of the node's secrets, for each of the roster, which is all that can ever take part."""

    kind: Literal["seal"] = "seal"
    session: Session
    roster: tuple[Advertised, ...]


class SealedShares(Frozen):
    """Reply to SealTask: by receiver, a share of the mask key and one of the own mask's seed."""

    kind: Literal["sealed-shares"] = "sealed-shares"
    sealed: dict[NodeName, Sealed]


class MaskTask(Frozen):
    """Train, and answer with the masked update. peers: who has sealed shares for all. Array: weights float32[D]."""

    kind: Literal["mask"] = "mask"
    train: TrainTask
    attempt: Hash
    roster: tuple[Advertised, ...]
    peers: tuple[NodeName, ...]


class MaskedUpdate(Frozen):
    """Reply to MaskTask. Array: masked uint64[D]; masked_blinder: the commitment's blinder, masked alike, hex."""

    kind: Literal["masked-update"] = "masked-update"
    signed: SignedUpdate
    masked_blinder: Hash


class ConfirmTask(Frozen):
    """Names who is in the sum, with the hash of each commitment; a node agrees to one such list in a round, ever."""

    kind: Literal["confirm"] = "confirm"
    session: Session
    survivors: dict[NodeName, Hash]


class Confirmed(Frozen):
    """Reply to ConfirmTask: a signature over the task."""

    kind: Literal["confirmed"] = "confirmed"
    signature: Signature


class UnmaskTask(Frozen):
    """Asks for what removes the masks; `sealed`: by sender, the shares that were sealed for this node."""

    kind: Literal["unmask"] = "unmask"
    confirm: ConfirmTask
    signatures: dict[NodeName, Signature]
    roster: tuple[Advertised, ...]
    sealed: dict[NodeName, Sealed]


class Unmasked(Frozen):
    """Reply to UnmaskTask: shares of own masks' seeds of those in the sum, of mask keys of those who are not."""

    kind: Literal["unmasked"] = "unmasked"
    seeds: dict[NodeName, Share]
    mask_keys: dict[NodeName, Share]


class CheckTask(Frozen):
    """Shows a closed round's sum. Arrays: base float32[D], total int64[D], under momentum velocity float32[D]."""

    kind: Literal["check"] = "check"
    federation: str
    run: str
    round: int
    plan: TrainingPlan
    new_model_hash: Hash
    sum: SecureSum


class Checked(Frozen):
    """Reply to CheckTask: this node has found the round to be the sum of what its members committed to."""

    kind: Literal["checked"] = "checked"
    round: int
    new_model_hash: Hash


SecureTask = Annotated[
    AdvertiseTask | SealTask | ConfirmTask | UnmaskTask | CheckTask,
    Field(discriminator="kind"),
]
