"""The rules that a ledger's entries obey, in order: what each may say, given the entries before it."""

from __future__ import annotations

import gc
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field, fields

from data_schemas.errors import BadInput
from data_schemas.ledger import ContestEntry, CreditEntry, Entry, MemberEntry, ModelEntry, PlanEntry, RoundEntry
from data_schemas.messages import SignedRelease, SignedUpdate, contest_name, is_contest
from pipeline.charter import Charter
from pipeline.commitments import sum_fault
from pipeline.contest import contest_entry, recipe_shares
from pipeline.contribution import credit, credit_by_patients, mode_of
from pipeline.inclusion import said_by, signed_parts
from pipeline.signing import verify


@dataclass
class Replay:
    """What the entries so far have established; fault() takes the next one in.

    members: all there ever were. last_round: of each run, its number and its model's hash. rounds: how many updates
    each admitted. signatures: whether those of members inside the next entry are checked; set it off for what was
    checked before. vouched: members whose signatures need no check there, because they cosigned it. contested: releases
    with a contest's value, by its name, until it is settled.
    """

    charter: Charter = field(default_factory=Charter)
    signatures: bool = True
    vouched: Collection[str] = frozenset()
    members: dict[str, MemberEntry] = field(default_factory=dict)
    plans: dict[str, str] = field(default_factory=dict)
    last_round: dict[str, tuple[int, str]] = field(default_factory=dict)
    epochs: set[tuple[str, int]] = field(default_factory=set)
    paid_rounds: set[tuple[str, int]] = field(default_factory=set)
    rounds: dict[tuple[str, int], int] = field(default_factory=dict)
    federation: str | None = None
    counts: dict[str, int] = field(default_factory=dict)
    micro_credits: dict[str, int] = field(default_factory=dict)
    unpaid: int = 0
    contested: dict[str, tuple[SignedRelease, ...]] = field(default_factory=dict)

    def copy(self) -> Replay:
        """Return a copy that takes entries in and changes nothing here."""
        return Replay(
            **{item.name: copy(getattr(self, item.name)) for item in fields(self)} | {"charter": self.charter.copy()}
        )


@contextmanager
def without_collector() -> Iterator[None]:
    """Pause Python's collector of cycles: a replay makes millions of objects without one, and would pay it a third."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


def fault(entry: Entry, so_far: Replay, payload: bytes = b"", at: str = "") -> str:  # noqa: PLR0911
    """Say what is wrong with the next entry; empty when nothing is, and then `so_far` has taken it in.

    `payload` is the entry as logged: what members signed is cut out of it instead of being written anew.
    """
    so_far.counts[entry.kind] = so_far.counts.get(entry.kind, 0) + 1
    if wrong := so_far.charter.take_entry(entry, at):
        return wrong
    so_far.members.update(so_far.charter.members)
    match entry:
        case PlanEntry():
            return _plan_fault(entry, so_far)
        case ModelEntry():
            return _model_fault(entry, so_far)
        case RoundEntry():
            wrong = sum_fault(entry, secure=so_far.charter.secure.get(entry.run, False))
            return wrong or _round_fault(entry, so_far) or _signature_fault(entry.admitted, so_far, payload)
        case CreditEntry():
            return _credit_fault(entry, so_far) or _signature_fault(entry.releases, so_far, payload)
        case ContestEntry():
            return _contest_fault(entry, so_far)
        case _:
            return ""


def _plan_fault(entry: PlanEntry, so_far: Replay) -> str:
    if entry.run in so_far.last_round and so_far.plans.get(entry.run) != entry.plan_hash:
        return "the plan changes after the run's first round"
    so_far.plans[entry.run] = entry.plan_hash
    return ""


def _round_fault(entry: RoundEntry, so_far: Replay) -> str:
    previous = so_far.last_round.get(entry.run)
    if previous and entry.round <= previous[0]:
        return f"round {entry.round} of run {entry.run} follows round {previous[0]}"
    if previous and entry.base_model_hash != previous[1]:
        return "its base model is not the model of the round before"
    if so_far.plans.get(entry.run, entry.plan_hash) != entry.plan_hash:
        return "it does not follow the run's plan"
    if len({u.manifest.node for u in entry.admitted}) != len(entry.admitted):
        return "a node is admitted twice"
    for update in entry.admitted:
        if wrong := _update_fault(update, entry, so_far):
            return f"update of {update.manifest.node}: {wrong}"
    so_far.last_round[entry.run] = entry.round, entry.new_model_hash
    so_far.rounds[entry.run, entry.round] = len(entry.admitted)
    return ""


def _update_fault(update: SignedUpdate, entry: RoundEntry, so_far: Replay) -> str:
    m, member = update.manifest, so_far.members.get(update.manifest.node)
    if member is None:
        return "not a member"
    if (m.run, m.round) != (entry.run, entry.round):
        return f"made for round {m.round} of run {m.run}"
    if (m.plan_hash, m.base_model_hash) != (entry.plan_hash, entry.base_model_hash):
        return "made with another plan or base model"
    if m.declared_patients != member.declared_training_patients:
        return "declares another number of patients than the member entry"
    return _federation_fault(m.federation, so_far)


def _release_fault(signed: SignedRelease, entry: CreditEntry, so_far: Replay) -> str:
    release, member = signed.release, so_far.members.get(signed.release.node)
    if member is None:
        return "not a member"
    if (release.run, release.epoch) != (entry.run, entry.epoch):
        return f"made for epoch {release.epoch} of run {release.run}"
    if release.declared_heldout_patients != member.declared_heldout_patients:
        return "declares another number of held-out patients than the member entry"
    return _federation_fault(release.federation, so_far)


def _federation_fault(federation: str, so_far: Replay) -> str:
    if federation != (so_far.federation or federation):
        return "made for another federation"
    so_far.federation = federation
    return ""


def _signature_fault(parts: Sequence[SignedUpdate | SignedRelease], so_far: Replay, payload: bytes) -> str:
    if not so_far.signatures or all(said_by(part) in so_far.vouched for part in parts):
        return ""
    for part, message in zip(parts, signed_parts(parts, payload), strict=True):
        name, what = said_by(part), "update" if isinstance(part, SignedUpdate) else "release"
        if name not in so_far.vouched and not verify(so_far.members[name].public_key, message, part.signature):
            return f"{what} of {name}: the member's signature is wrong"
    return ""


def _credit_fault(entry: CreditEntry, so_far: Replay) -> str:
    rounds = {(entry.run, r) for r in entry.rounds}
    wrong = _epoch_fault(entry, rounds, so_far)
    for signed in entry.releases:
        found = _release_fault(signed, entry, so_far)
        wrong = wrong or (found and f"release of {signed.release.node}: {found}")
    wrong = wrong or _sum_fault(entry, so_far)
    if wrong:
        return wrong
    so_far.epochs.add((entry.run, entry.epoch))
    so_far.paid_rounds |= rounds
    so_far.unpaid += entry.unpaid_micro_credits
    for node, micro_credits in entry.earned().items():
        so_far.micro_credits[node] = so_far.micro_credits.get(node, 0) + micro_credits
    so_far.contested |= {name: entry.releases for s in entry.releases for name in s.release.nodes if is_contest(name)}
    return ""


def _contest_fault(entry: ContestEntry, so_far: Replay) -> str:
    released = so_far.contested.pop(contest_name(entry.model_hash, entry.champion_hash), ())
    releases = [signed.release for signed in released]
    expected = contest_entry(entry.run, entry.entrant, entry.model_hash, entry.champion_hash, releases)
    return "" if entry == expected else "its scores or its result do not follow from the releases"


def _epoch_fault(entry: CreditEntry, rounds: set[tuple[str, int]], so_far: Replay) -> str:
    if (entry.run, entry.epoch) in so_far.epochs:
        return "the epoch was credited before"
    if not all(place in so_far.rounds for place in rounds):
        return "it credits a round that is not in the ledger"
    if rounds & so_far.paid_rounds or len(rounds) != len(entry.rounds):
        return "it credits a round twice"
    if strangers := sorted({line.node for line in entry.lines} - so_far.members.keys()):
        return f"it credits {strangers[0]}, not a member"
    secure = so_far.charter.secure.get(entry.run, False)
    mode = "declared-patients" if secure else mode_of(so_far.rounds[place] for place in rounds)
    return "" if entry.mode == mode else f"its rounds are scored as {mode}"


def _sum_fault(entry: CreditEntry, so_far: Replay) -> str:
    if sum(entry.earned().values()) + entry.unpaid_micro_credits != entry.pot_micro_credits:
        return "credits and unpaid do not sum to the pot"
    terms = so_far.charter.terms
    closed = [terms[place] for number in entry.rounds if (place := (entry.run, number)) in terms]
    if entry.algorithm != recipe_shares(closed, entry.pot_micro_credits // max(len(entry.rounds), 1)):
        return "what the recipe earns does not follow from the policy"
    try:
        declared = {name: member.declared_training_patients for name, member in so_far.members.items()}
        releases, nodes = [s.release for s in entry.releases], [line.node for line in entry.lines]
        for_data = entry.pot_micro_credits - sum(share.micro_credits for share in entry.algorithm)
        if entry.mode == "declared-patients":
            lines, unpaid = credit_by_patients(
                [so_far.charter.rounds[entry.run, n].patients for n in entry.rounds], for_data
            )
        else:
            lines, unpaid = credit(releases, nodes, for_data, declared)
    except BadInput as error:
        return error.message
    return "" if (lines, unpaid) == (entry.lines, entry.unpaid_micro_credits) else "credits do not follow from releases"


def _model_fault(entry: ModelEntry, so_far: Replay) -> str:
    if strangers := sorted(entry.epsilon_by_node.keys() - so_far.members.keys()):
        return f"it names {strangers[0]}, not a member"
    return ""


def nickname(entry: Entry) -> str:
    """Return what an entry is called in a finding, such as "round 4"."""
    match entry:
        case RoundEntry():
            return f"round {entry.round}"
        case CreditEntry():
            return f"credit of epoch {entry.epoch}"
        case ContestEntry():
            return f"contest of {entry.run}"
        case _:
            return str(entry.kind)
