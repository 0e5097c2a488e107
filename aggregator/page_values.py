"""What the federation's page says, read from the ledger alone: nothing on it has another source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from aggregator.governance import Federation, replay
from aggregator.ledger import CHECKPOINT_FILE, read_entries
from aggregator.page_chart import credit_chart
from aggregator.verification import VerifyReport, verify_ledger
from data_schemas.canonical import content_hash
from data_schemas.errors import IsletError, Tampered
from data_schemas.governance import DecisionEntry, Proposal, ProposalEntry
from data_schemas.ledger import ContestEntry, CreditEntry, LedgerEntry, RoundEntry
from pipeline.charter import Charter
from pipeline.charter_text import contest_text, proposal_text

_MOST_ROUNDS, _MOST_DECIDED = 20, 20


@dataclass(frozen=True)
class Verified:
    """The outcome of a whole verification of the ledger: a report, or what was found wrong."""

    report: VerifyReport | None
    wrong: str
    at: datetime


def verified(ledger: Path, public_key: str) -> Verified:
    """Verify a ledger file from its bytes."""
    now = datetime.now(UTC)
    try:
        return Verified(verify_ledger(ledger, public_key), "", now)
    except IsletError as error:
        return Verified(None, error.message, now)


def page_values(ledger: Path, public_key: str, found: Verified) -> dict[str, Any]:
    """Return the values of federation.html.j2; of a ledger that makes no sense only what is wrong with it."""
    entries, state = _read(ledger)
    charter, now = state.charter, datetime.now(UTC).isoformat(timespec="seconds")
    report = found.report
    cosigners = () if report is None else report.cosigned_by
    earned = _earned(state)
    return {
        "federation": charter.federation or "not founded yet",
        "paused": charter.paused,
        "now": _time(now),
        "policy": charter.privacy,
        "credit_policy": charter.credit,
        "champion": charter.champion,
        "author": charter.author,
        "contests": [contest_text(e.entry) for e in entries if isinstance(e.entry, ContestEntry)][::-1],
        "champions": [(name, charter.models[name]) for name in reversed(charter.champions)][:10],
        "members": _members(charter, earned, cosigners),
        "open": [_open(charter, name, proposal, now) for name, proposal in charter.open.items()],
        "decided": _decided(entries)[:_MOST_DECIDED],
        "chart": credit_chart(*_series(state)) if state.credits else "",
        "credits": [_epoch(entry) for entry in state.credits.values()],
        "names": list(earned),
        "rounds": [_round(entry) for entry in reversed([*state.rounds.values()][-_MOST_ROUNDS:])],
        "round_count": len(state.rounds),
        "paid": f"{sum(earned.values()):.2f}",
        "report": report,
        "wrong": found.wrong,
        "verified_at": _time(found.at.isoformat(timespec="seconds")),
        "public_key": public_key,
        "entries": len(entries),
        "newest": _time(entries[-1].recorded_at) if entries else "",
        "checkpoint": _checkpoint(ledger),
    }


def _read(ledger: Path) -> tuple[tuple[LedgerEntry, ...], Federation]:
    try:
        entries = read_entries(ledger)
        return entries, replay(entries)
    except Tampered:
        return (), replay(())


def _members(charter: Charter, earned: dict[str, float], cosigners: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "key": member.public_key,
            "training": member.declared_training_patients,
            "heldout": member.declared_heldout_patients,
            "attested": charter.attested.get(name),
            "cosigned": name in cosigners,
            "credits": f"{earned.get(name, 0.0):.2f}",
        }
        for name, member in charter.members.items()
    ]


def _open(charter: Charter, name: str, proposal: Proposal, now: str) -> dict[str, Any]:
    votes, may = charter.votes[name], sorted(charter.voters(proposal))
    lapsed = proposal.member_set != charter.member_set
    return {
        "hash": name,
        "text": proposal_text(proposal),
        "yes": [voter for voter in may if votes.get(voter) is True],
        "no": [voter for voter in may if votes.get(voter) is False],
        "silent": [voter for voter in may if voter not in votes],
        "need": "two thirds" if charter.needs_two_thirds(proposal) else "more than half",
        "until": _time(proposal.expires_at),
        "settled": lapsed or charter.outcome(name, now) is not None,
    }


def _decided(entries: Sequence[LedgerEntry]) -> list[dict[str, Any]]:
    made = {content_hash(e.entry.proposal): e.entry.proposal for e in entries if isinstance(e.entry, ProposalEntry)}
    decisions = [(e, e.entry) for e in entries if isinstance(e.entry, DecisionEntry)]
    return [
        {
            "hash": decision.proposal_hash,
            "text": proposal_text(made[decision.proposal_hash]),
            "accepted": decision.accepted,
            "when": _time(line.recorded_at),
            "index": line.index,
        }
        for line, decision in reversed(decisions)
    ]


def _earned(state: Federation) -> dict[str, float]:
    earned = dict.fromkeys(state.members, 0.0)
    for entry in state.credits.values():
        for node, micro_credits in entry.earned().items():
            earned[node] = earned.get(node, 0.0) + micro_credits / 1e6
    return earned


def _epoch(entry: CreditEntry) -> tuple[str, dict[str, float], float]:
    by_node = {node: micro_credits / 1e6 for node, micro_credits in entry.earned().items()}
    return f"{entry.run} epoch {entry.epoch}", by_node, entry.unpaid_micro_credits / 1e6


def _series(state: Federation) -> tuple[list[str], dict[str, list[float]]]:
    """Labels of the epochs, in the order of the log, and every hospital's credits so far."""
    so_far = dict.fromkeys(_earned(state), 0.0)
    lines: dict[str, list[float]] = {name: [] for name in so_far}
    for entry in state.credits.values():
        for node, micro_credits in entry.earned().items():
            so_far[node] += micro_credits / 1e6
        for name, value in so_far.items():
            lines[name].append(value)
    return [str(number + 1) for number in range(len(state.credits))], lines


def _round(entry: RoundEntry) -> dict[str, Any]:
    return {
        "run": entry.run,
        "round": entry.round,
        "admitted": [signed.manifest.node for signed in entry.admitted],
        "rejected": [f"{update.node}: {update.code}" for update in entry.rejected],
        "model": entry.new_model_hash[:12],
    }


def _checkpoint(ledger: Path) -> str:
    path = ledger.with_name(CHECKPOINT_FILE)
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _time(iso: str) -> str:
    return f"{datetime.fromisoformat(iso).astimezone(UTC):%d %b %Y, %H:%M} UTC"
