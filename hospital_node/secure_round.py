"""A round under secure aggregation at the hospital: keys, sealed shares, a masked update, and what removes the masks.

Bonawitz et al. 2017, figure 4, in its variant against an aggregator that does not follow the protocol: keys are signed
by members whose keys this node has from its own copy of the ledger, and masks are removed only for the one list of
survivors that more than two thirds of the roster have signed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from data_schemas.canonical import bytes_hash, canonical_bytes, content_hash
from data_schemas.messages import RefusalCode, SignedUpdate
from data_schemas.secure import (
    Advertised,
    AdvertiseTask,
    Confirmed,
    ConfirmTask,
    Keys,
    MaskedUpdate,
    MaskTask,
    SealedShares,
    SealTask,
    Session,
    Unmasked,
    UnmaskTask,
)
from hospital_node import ledger_view, local_round, masks, replies
from hospital_node.budget import BudgetExhausted
from hospital_node.ceilings import Declined, require
from hospital_node.folder import NodeFolder
from hospital_node.masks import MaskState
from pipeline import masking, shamir
from pipeline.masking import LEAST_MEMBERS, MOST_MEMBERS, threshold
from pipeline.signing import verify

Code = RefusalCode


def advertise(node: NodeFolder, task: AdvertiseTask) -> Advertised:
    """Sign this attempt's keys, after every look at the round that costs no privacy. Raises Declined."""
    local_round.check(node, node.budget(), task.train, secure=True)
    masks.forget(node, ledger_view.decided(node))
    begun = masks.begin(node, task.train, task.attempt)
    return _keys(node, masks.held(node, begun.session))


def seal(node: NodeFolder, task: SealTask) -> SealedShares:
    """Share the mask key and the own mask's seed among the roster, sealed for each. Raises Declined."""
    state = _with_roster(node, masks.held(node, task.session), task.roster)
    name, own = state.session.name, node.settings.name
    needed, count = threshold(len(task.roster)), len(task.roster)
    shares = [
        shamir.split(int.from_bytes(_secret(state, what), "big"), _polynomial(state, what, needed - 1), count)
        for what in ("mask key", "seed")
    ]
    private, found = _secret(state, "sealing key"), dict[str, str]()
    for place, other in enumerate(task.roster):
        message = b"".join(share[place].to_bytes(shamir.SHARE_BYTES, "big") for share in shares)
        key = masking.agreed(private, other.keys.sealing_key, f"share {name} {own} {other.keys.node}")
        found[other.keys.node] = masking.sealed(key, message)
    return SealedShares(sealed=found)


def mask(
    node: NodeFolder, task: MaskTask, weights: NDArray[np.float32], now_unix: float
) -> tuple[MaskedUpdate, NDArray[np.uint64]]:
    """Train as in any round, and hand out the update under its masks, uint64[D]. Raises Declined."""
    session = Session(task_id=task.train.task_id, attempt=task.attempt)
    state = _with_roster(node, masks.held(node, session), task.roster)
    own, keys = node.settings.name, {member.keys.node: member.keys.mask_key for member in task.roster}
    require(own in task.peers and task.peers == tuple(sorted(set(task.peers) & keys.keys())), Code.MALFORMED_TASK)
    require(len(task.peers) >= threshold(len(task.roster)), Code.MALFORMED_TASK)
    state = masks.settle(node, state, "peers", content_hash(list(task.peers)))
    try:
        signed, update = local_round.trained(node, task.train, weights, now_unix, secure=True)
    except BudgetExhausted as error:
        raise Declined(Code.BUDGET_EXHAUSTED) from error
    whole = masking.quantised(update, signed.manifest.declared_patients)
    others = [(name, keys[name]) for name in task.peers if name != own]
    masked = (
        masking.plain(whole, local_round.blinder(node, task.train))
        .plus(masking.expand(_secret(state, "seed"), len(whole)))
        .plus(masking.pairwise(own, _secret(state, "mask key"), others, session.name, len(whole)))
    )
    return MaskedUpdate(signed=signed, masked_blinder=f"{masked.blinder:064x}"), masked.vector


def confirm(node: NodeFolder, task: ConfirmTask) -> Confirmed:
    """Agree to who is in the sum: enough of the roster, and this node with its own commitment, if at all."""
    state = masks.held(node, task.session)
    require(state.roster is not None, Code.SESSION_MISMATCH)
    named = task.survivors.get(node.settings.name)
    require(named is None or named == _committed(node, task.session), Code.SESSION_MISMATCH)
    masks.settle(node, state, "confirmed", content_hash(task))
    return Confirmed(signature=node.key.sign(task))


def unmask(node: NodeFolder, task: UnmaskTask) -> Unmasked:
    """Hand out one share for each member: of its seed if it is in the sum, of its mask key if not. Raises Declined."""
    agreed = task.confirm
    state = _with_roster(node, masks.held(node, agreed.session), task.roster)
    require(state.confirmed == content_hash(agreed), Code.SESSION_MISMATCH)
    keys = {member.keys.node: member.keys for member in task.roster}
    require(keys.keys() >= agreed.survivors.keys() | task.sealed.keys(), Code.MALFORMED_TASK)
    require(len(agreed.survivors) >= threshold(len(keys)), Code.MALFORMED_TASK)
    members, message = ledger_view.decided(node).members, canonical_bytes(agreed)
    agreeing = [
        name
        for name, signature in task.signatures.items()
        if name in keys and name in members and verify(members[name].public_key, message, signature)
    ]
    require(len(agreeing) >= threshold(len(keys)), Code.SESSION_MISMATCH)
    own, private, name = node.settings.name, _secret(state, "sealing key"), agreed.session.name
    seeds, mask_keys = dict[str, str](), dict[str, str]()
    for sender, text in task.sealed.items():
        key = masking.agreed(private, keys[sender].sealing_key, f"share {name} {sender} {own}")
        message = masking.unsealed(key, text)
        if sender in agreed.survivors:
            seeds[sender] = message[shamir.SHARE_BYTES :].hex()
        else:
            mask_keys[sender] = message[: shamir.SHARE_BYTES].hex()
    return Unmasked(seeds=seeds, mask_keys=mask_keys)


def _secret(state: MaskState, what: str) -> bytes:
    return masking.derived(bytes.fromhex(state.seed), f"{what} {state.session.name}")


def _polynomial(state: MaskState, what: str, count: int) -> list[int]:
    return masking.coefficients(bytes.fromhex(state.seed), f"polynomial {what} {state.session.name}", count)


def _keys(node: NodeFolder, state: MaskState) -> Advertised:
    keys = Keys(
        session=state.session.name,
        node=node.settings.name,
        sealing_key=masking.public_of(_secret(state, "sealing key")),
        mask_key=masking.public_of(_secret(state, "mask key")),
        seed_hash=bytes_hash(_secret(state, "seed")),
    )
    return Advertised(keys=keys, signature=node.key.sign(keys))


def _with_roster(node: NodeFolder, state: MaskState, roster: Sequence[Advertised]) -> MaskState:
    """Agree to who can take part: members, each once, in order, with keys that they signed for this very attempt."""
    value = content_hash([member.model_dump(mode="json") for member in roster])
    if state.roster == value:
        return state
    members, names = ledger_view.decided(node).members, [member.keys.node for member in roster]
    require(names == sorted(set(names)) and LEAST_MEMBERS <= len(names) <= MOST_MEMBERS, Code.MALFORMED_TASK)
    require(_keys(node, state).keys in [member.keys for member in roster], Code.SESSION_MISMATCH)
    for said in roster:
        known = members.get(said.keys.node)
        good = known is not None and verify(known.public_key, canonical_bytes(said.keys), said.signature)
        require(good and said.keys.session == state.session.name, Code.SESSION_MISMATCH)
    return masks.settle(node, state, "roster", value)


def _committed(node: NodeFolder, session: Session) -> str | None:
    """Hash of the commitment that this node made for the round."""
    reply = node.budget().stored_reply(session.task_id)
    return None if reply is None else replies.unpack(SignedUpdate, reply)[0].manifest.update_hash
