"""What the federation has decided, in words: the same at the aggregator and at a node."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from data_schemas.canonical import content_hash
from data_schemas.governance import Challenge, Proposal
from data_schemas.ledger import ContestEntry
from pipeline.charter import Charter


def render(charter: Charter, now: str) -> str:
    """Write members, policy, champion and proposals as lines for a terminal. now: UTC, ISO 8601."""
    if charter.privacy is None or charter.credit is None:
        return "no founding policy: the federation has not begun"
    privacy = charter.privacy
    lines = [
        f"federation {charter.federation}" + ("  PAUSED" if charter.paused else ""),
        f"  members   {', '.join(charter.members)} (set {charter.member_set[:12]})",
        *([f"  removed   {', '.join(charter.removed)}, by vote"] if charter.removed else []),
        f"  privacy   epsilon at most {privacy.max_epsilon_training:g} training, {privacy.max_epsilon_heldout:g}"
        f" held-out, per {privacy.unit}; at least {privacy.min_patients} patients; {privacy.aggregation} aggregation",
        f"  credit    at most {charter.credit.max_pot_micro_credits_per_round} micro-credits a round"
        + _recipe_text(charter, charter.credit.algorithm_permille),
        f"  champion  {charter.champions[-1][:12] if charter.champions else 'none voted'}",
    ]
    for name, proposal in charter.open.items():
        votes, may = charter.votes[name], charter.voters(proposal)
        yes = sum(votes.values())
        need = "two thirds" if charter.needs_two_thirds(proposal) else "more than half"
        outcome = {None: "open", True: "accepted", False: "rejected"}[charter.outcome(name, now)]
        lines.append(
            f"  proposal  {name[:12]} {proposal_text(proposal)}: {yes} yes, {len(votes) - yes} no"
            f" of {len(may)}; needs {need}; {outcome}; until {proposal.expires_at}"
        )
    lines += [
        f"  challenger plan {plan[:12]}, code {entered.code_hash[:12]}, entered by {entered.node}"
        + (": won" if plan in charter.authors else "")
        for plan, entered in charter.challengers.items()
    ]
    lines += [f"  decided   {name[:12]} {'accepted' if yes else 'rejected'}" for name, yes in charter.decided.items()]
    return "\n".join(lines)


def proposal_text(proposal: Proposal) -> str:
    """Write what a proposal wants."""
    action = proposal.action
    if isinstance(action, Challenge):
        named = f"plan {action.plan.name} {content_hash(action.plan)[:12]}, code {action.code_hash[:12]}"
        return f"challenge ({named}) by {proposal.proposed_by}"
    told = ", ".join(_told(action.model_dump(mode="json", exclude={"action"})))
    return f"{proposal.action.action} ({told}) by {proposal.proposed_by}"


def contest_text(entry: ContestEntry) -> str:
    """Write how a challenger did against the champion."""
    low, high = entry.interval_low_mg_dl, entry.interval_high_mg_dl
    return (
        f"{entry.entrant}'s {entry.model_hash[:8]} {'beats' if entry.won else 'does not beat'} the champion"
        f" {entry.champion_hash[:8]} by {entry.improvement_mg_dl:.3f} mg/dL ({low:.3f} to {high:.3f}),"
        f" scored by {', '.join(score.node for score in entry.scores) or 'nobody'}"
    )


def _recipe_text(charter: Charter, permille: int) -> str:
    if not permille:
        return ""
    return f", {permille / 10:g}% of it for the champion's recipe ({charter.author or 'nobody: all is for data'})"


def _told(values: Mapping[str, Any]) -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _told(value)
        else:
            said = value[:12] if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else value
            yield f"{key.replace('_', ' ')} {said}"
