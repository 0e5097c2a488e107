"""A round of which the aggregator sees the sum alone: Bonawitz et al. 2017, figure 4, over any Exchange.

advertise -> seal -> mask -> SAVED -> confirm -> unmask. Before SAVED an attempt can be given up for another; from there
on the round has one list of survivors, and any two thirds of the roster's shares remove its masks, whoever is gone by
then. What comes out is checked against the hospitals' commitments before it becomes a model.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from aggregator import transcript as transcripts
from aggregator.admission import Expectation, RejectionCode, admit_masked, max_update_norm
from aggregator.collecting import WEIGHTS, Members, too_few, train_task
from aggregator.courier import MASK, SECURE, Courier, Reply
from aggregator.settings import AggregatorSettings
from aggregator.state import StateFolder
from aggregator.transcript import MaskedSum, Transcript
from data_schemas.canonical import bytes_hash, canonical_bytes
from data_schemas.errors import CheckFailed, IsletError
from data_schemas.frozen import Frozen
from data_schemas.ledger import RejectedUpdate, RoundEntry, SecureSum
from data_schemas.messages import SignedUpdate, TrainTask
from data_schemas.secure import (
    Advertised,
    AdvertiseTask,
    Checked,
    CheckTask,
    Confirmed,
    MaskedUpdate,
    MaskTask,
    SealedShares,
    SealTask,
    Session,
    Unmasked,
    UnmaskTask,
)
from pipeline import masking, shamir
from pipeline.commitments import adds_up, total_hash
from pipeline.masking import Masked, threshold
from pipeline.signing import verify

MASKED = "masked"
_log = logging.getLogger("islet.aggregator")


@dataclass(frozen=True)
class Summed:
    """A round's sum: signed commitments in node order, who is not in it and why, total int64[D], how it opens."""

    signed: tuple[SignedUpdate, ...]
    rejected: tuple[RejectedUpdate, ...]
    total: NDArray[np.int64]
    told: SecureSum

    @property
    def mean(self) -> NDArray[np.float64]:
        """Patient-weighted mean of the updates, float64[D]."""
        return masking.mean_of(self.total, sum(update.manifest.declared_patients for update in self.signed))


@dataclass(frozen=True)
class _Round:
    """What every step needs."""

    courier: Courier
    settings: AggregatorSettings
    expected: Expectation
    members: Members

    def ask(self, tasks: Mapping[str, Frozen]) -> list[Reply]:
        """Ask a step that trains nobody."""
        timeout_s, group = self.settings.cosign_timeout_s, str(self.expected.round)
        return self.courier.ask(SECURE, tasks, self.members, timeout_s=timeout_s, group=group)


def collect_sum(
    courier: Courier,
    settings: AggregatorSettings,
    expected: Expectation,
    base: NDArray[np.float32],
    *,
    members: Members,
    state: StateFolder,
    clock: Callable[[], float],
) -> Summed:
    """Have the members train, and return the sum of their updates.

    Raises IsletError when too few took part (the round can be begun again: nobody trains twice) or too few shares came
    (it goes on with the same sum); CheckFailed when the sum is not what the hospitals committed to.
    """
    here = _Round(courier, settings, expected, members)
    held = transcripts.load(state, expected.run, expected.round)
    if held is None:
        held = _gathered(here, base, clock)
        transcripts.save(state, expected.run, expected.round, held)
    return _checked(here, held, _unmasked(here, held))


def _gathered(here: _Round, base: NDArray[np.float32], clock: Callable[[], float]) -> MaskedSum:
    settings, missing = here.settings, dict[str, str]()
    got = needed = 0
    for attempt in range(settings.max_attempts):
        if attempt:
            time.sleep(settings.retry_pause_s)
        here.courier.wait_for(here.members, max(settings.min_updates, masking.LEAST_MEMBERS))
        train = train_task(here.expected, clock() + settings.round_timeout_s)
        missing = {}
        roster = _roster(here, train, missing)
        needed = max(settings.min_updates, threshold(len(roster)))
        got = len(roster)
        if got >= needed:
            outcome = _masked(here, train, roster, base, missing, needed)
            if isinstance(outcome, MaskedSum):
                return outcome
            got = outcome
    rejected = {name: RejectedUpdate(node=name, update_hash=None, code=code) for name, code in missing.items()}
    raise too_few(here.expected.round, got, needed, set(missing), rejected)


@dataclass(frozen=True)
class _Roster:
    """Who began an attempt."""

    session: Session
    attempt: str
    said: tuple[Advertised, ...]

    def __len__(self) -> int:
        return len(self.said)


def _roster(here: _Round, train: TrainTask, missing: dict[str, str]) -> _Roster:
    """Step 0: keys, each signed by a member for this attempt."""
    attempt = secrets.token_hex(32)
    session, said = Session(task_id=train.task_id, attempt=attempt), dict[str, Advertised]()
    task = AdvertiseTask(train=train, attempt=attempt)
    for reply in here.ask(dict.fromkeys(here.members, task)):
        body = reply.body
        if isinstance(body, Advertised):
            key = here.members[reply.node].public_key
            good = (body.keys.node, body.keys.session) == (reply.node, session.name)
            if good and verify(key, canonical_bytes(body.keys), body.signature):
                said[reply.node] = body
                continue
        missing[reply.node] = _why(reply, RejectionCode.WRONG_KEYS)
    return _Roster(session, attempt, tuple(said[name] for name in sorted(said)))


def _masked(
    here: _Round,
    train: TrainTask,
    roster: _Roster,
    base: NDArray[np.float32],
    missing: dict[str, str],
    needed: int,
) -> MaskedSum | int:
    """Steps 1 and 2: sealed shares, then masked updates; how many there were, where that is too few."""
    names = [said.keys.node for said in roster.said]
    sealed: dict[str, dict[str, str]] = {}
    for reply in here.ask(dict.fromkeys(names, SealTask(session=roster.session, roster=roster.said))):
        if isinstance(reply.body, SealedShares) and sorted(reply.body.sealed) == names:
            sealed[reply.node] = reply.body.sealed
        else:
            missing[reply.node] = _why(reply, RejectionCode.WRONG_SHARES)
    peers = tuple(sorted(sealed))
    if len(peers) < needed:
        return len(peers)
    task = MaskTask(train=train, attempt=roster.attempt, roster=roster.said, peers=peers)
    replies = here.courier.ask(
        MASK,
        dict.fromkeys(peers, task),
        here.members,
        timeout_s=here.settings.round_timeout_s,
        arrays={WEIGHTS: base},
        group=str(here.expected.round),
    )
    signed, total = _added(here, replies, missing)
    if len(signed) < needed:
        return len(signed)
    out = [RejectedUpdate(node=name, update_hash=None, code=missing[name]) for name in sorted(missing)]
    transcript = Transcript(
        session=roster.session,
        roster=roster.said,
        sealed=sealed,
        survivors=signed,
        rejected=tuple(rejected for rejected in out if rejected.node not in {u.manifest.node for u in signed}),
        masked_blinder=f"{total.blinder:064x}",
    )
    return MaskedSum(transcript, total)


def _added(here: _Round, replies: Iterable[Reply], missing: dict[str, str]) -> tuple[tuple[SignedUpdate, ...], Masked]:
    signed: dict[str, SignedUpdate] = {}
    total = masking.plain(np.zeros(here.expected.dimension, dtype=np.int64), 0)
    for reply in replies:
        if not isinstance(reply.body, MaskedUpdate) or set(reply.arrays) != {MASKED}:
            missing[reply.node] = _why(reply, RejectionCode.MALFORMED_REPLY)
            continue
        vector = reply.arrays[MASKED]
        outcome = admit_masked(reply.body.signed, vector, here.expected, here.members, reply.node)
        if isinstance(outcome, RejectedUpdate):
            missing[reply.node] = outcome.code
        elif reply.node not in signed:
            signed[reply.node] = outcome
            total = total.plus(Masked(vector, int(reply.body.masked_blinder, 16)))
    return tuple(signed[name] for name in sorted(signed)), total


def _unmasked(here: _Round, held: MaskedSum) -> Masked:
    """Steps 3 and 4: agreement on the survivors, then the shares that remove the masks. Raises IsletError."""
    told, needed = held.transcript, threshold(len(held.transcript.roster))
    places = {said.keys.node: place for place, said in enumerate(told.roster, start=1)}
    shares: dict[str, dict[int, int]] = {}
    for attempt in range(here.settings.max_attempts):
        if attempt:
            time.sleep(here.settings.retry_pause_s)
        here.courier.wait_for(here.members, needed)
        signatures = _agreed(here, told)
        if len(signatures) < needed:
            continue
        tasks = {name: _unmask_task(told, name, signatures) for name in signatures}
        for reply in here.ask(tasks):
            if isinstance(reply.body, Unmasked):
                for sender, share in {**reply.body.seeds, **reply.body.mask_keys}.items():
                    shares.setdefault(sender, {}).setdefault(places[reply.node], int(share, 16))
        if all(len(shares.get(sender, {})) >= needed for sender in told.sealed):
            return _without_masks(held, shares, needed)
    raise IsletError(
        f"round {here.expected.round} cannot be unmasked: fewer than {needed} hospitals answer for it",
        "mend their nodes and run the same command again: the run goes on with this round's sum, nobody trains again",
    )


def _agreed(here: _Round, told: Transcript) -> dict[str, str]:
    """Signatures of hospitals that agree to the survivors."""
    message, found = canonical_bytes(told.confirm), dict[str, str]()
    for reply in here.ask({name: told.confirm for name in sorted(told.sealed) if name in here.members}):
        good = isinstance(reply.body, Confirmed) and verify(
            here.members[reply.node].public_key, message, reply.body.signature
        )
        if good and isinstance(reply.body, Confirmed):
            found[reply.node] = reply.body.signature
        else:
            _log.info(
                "%s does not agree to the survivors of round %d: %s", reply.node, here.expected.round, reply.failure
            )
    return found


def _unmask_task(told: Transcript, name: str, signatures: Mapping[str, str]) -> UnmaskTask:
    return UnmaskTask(
        confirm=told.confirm,
        signatures=dict(signatures),
        roster=told.roster,
        sealed={sender: by[name] for sender, by in told.sealed.items()},
    )


def _without_masks(held: MaskedSum, shares: Mapping[str, Mapping[int, int]], needed: int) -> Masked:
    told, total = held.transcript, held.masked
    keys = {said.keys.node: said.keys for said in told.roster}
    survivors = [update.manifest.node for update in told.survivors]
    for sender in told.sealed:
        places = sorted(shares[sender])[:needed]
        number = shamir.secret_of({place: shares[sender][place] for place in places})
        secret = number.to_bytes(shamir.SHARE_BYTES, "big")[-masking.KEY_BYTES :]
        if sender in survivors:
            fits, dimension = bytes_hash(secret) == keys[sender].seed_hash, len(total.vector)
            total = total.minus(masking.expand(secret, dimension)) if fits else total
        else:
            fits = masking.public_of(secret) == keys[sender].mask_key
            others = [(name, keys[name].mask_key) for name in survivors]
            total = total.plus(masking.pairwise(sender, secret, others, told.session.name, len(total.vector)))
        if not fits:
            raise CheckFailed(
                f"the shares for {sender} do not give its secret: a hospital handed out a false one",
                "secure aggregation cannot say which; see docs/secure-aggregation.md",
            )
    return total


def _checked(here: _Round, held: MaskedSum, unmasked: Masked) -> Summed:
    """Hold the sum against the commitments, and its norm against the sum of what honest updates can have."""
    signed, total = held.transcript.survivors, masking.signed(unmasked)
    told = SecureSum(
        roster=len(held.transcript.roster), total_hash=total_hash(total), blinder=f"{unmasked.blinder:064x}"
    )
    summed = Summed(signed, held.transcript.rejected, total, told)
    if not adds_up(signed, total, told):
        raise CheckFailed(
            f"the sum of round {here.expected.round} is not what its hospitals committed to: one of them is lying",
            "secure aggregation cannot say which; see docs/secure-aggregation.md",
        )
    patients = [update.manifest.declared_patients for update in signed]
    limit = sum(n * max_update_norm(here.expected.plan, n, here.expected.dimension) for n in patients) / sum(patients)
    if float(np.linalg.norm(summed.mean)) > limit:
        raise CheckFailed(
            f"the sum of round {here.expected.round} is larger than honest updates can make it",
            "secure aggregation cannot say who is behind it; see docs/secure-aggregation.md",
        )
    return summed


def show_sum(
    courier: Courier, task: CheckTask, members: Members, arrays: Mapping[str, NDArray[np.generic]], timeout_s: float
) -> tuple[str, ...]:
    """Show every hospital a closed round's sum; returns who has checked it."""
    tasks = dict.fromkeys(members, task)
    replies = courier.ask(SECURE, tasks, members, timeout_s=timeout_s, arrays=arrays, group=str(task.round))
    return tuple(sorted(reply.node for reply in replies if isinstance(reply.body, Checked)))


def check_task(entry: RoundEntry, federation: str, plan: object) -> CheckTask:
    """Build the task that shows a closed round's sum."""
    told = {"run": entry.run, "round": entry.round, "new_model_hash": entry.new_model_hash, "sum": entry.sum}
    return CheckTask.model_validate({"federation": federation, "plan": plan, **told})


def _why(reply: Reply, otherwise: RejectionCode) -> str:
    return str(reply.failure or otherwise)
