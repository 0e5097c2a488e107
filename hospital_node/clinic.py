"""What the clinic's page says: the node's state, from its own folder alone. No page asks another machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from markupsafe import Markup

from data_schemas.errors import IsletError
from data_schemas.ledger import LedgerEntry, RoundEntry
from data_schemas.units import DELTA
from hospital_node import charts
from hospital_node.audit_log import Access, AuditLog
from hospital_node.budget import COHORTS, MOST_ROUNDS, BudgetBook, Cohort, Reservation
from hospital_node.credit_proof import LedgerProof
from hospital_node.folder import NodeFolder
from hospital_node.held_readings import HeldReadings
from hospital_node.incoming import APPS
from hospital_node.ledger_view import alarm
from hospital_node.own_patients import OwnComparison
from hospital_node.pages import ago, percent, zone_of
from hospital_node.participation import participation
from hospital_node.profile import DAY_SECONDS, DAYS, times_in_ranges
from hospital_node.settings import NodeSettings
from hospital_node.suites import suite_of
from pipeline.export import LoadedModel
from pipeline.model_card import privacy_statement

MOST_PATIENTS = 200
_LINES = 12
_REPORTS = 3
_COHORTS = {"training": "Training patients", "heldout": "Held-out patients"}


@dataclass(frozen=True, slots=True)
class BudgetLine:
    """One cohort's budget, ready to show. left: rounds, or releases, that still fit; empty before the first."""

    name: str
    spent: str
    ceiling: str
    left: str
    what: str
    gauge: Markup


def clinic_page(
    home: Path,
    settings: NodeSettings,
    held: HeldReadings,
    model: LoadedModel | None,
    now_s: float,
    proof: LedgerProof | None,
    compared: OwnComparison | None,
) -> dict[str, Any]:
    """Values of clinic.html.j2. Reads the store, so it takes as long as that does."""
    zone, book = zone_of(settings), _book(home, settings)
    people = sorted(((name, int(held.readings(name)[0][-1])) for name in held.patients()), key=lambda pair: -pair[1])
    return {
        "node": settings.name,
        "federation": settings.federation,
        "now": f"{datetime.fromtimestamp(now_s, tz=zone):%A %d %B %Y, %H:%M}",
        "zone": zone.key,
        "alarm": alarm(NodeFolder(home, settings)),
        "switch": (switch := participation(home)),
        "since": _moment(switch.since, zone) if switch.since else "",
        **_federation(proof, settings.name),
        "round": _round(proof, settings.name, zone),
        "model": model,
        "in_ledger": model is not None
        and proof is not None
        and model.model_hash in {m.model_hash for m in proof.models},
        "privacy": "" if model is None else privacy_statement(model.card),
        "compared": compared,
        "freshest": ago(now_s - people[0][1]) if people else "",
        "recent": sum(now_s - newest < DAY_SECONDS for _, newest in people),
        "patients": [_patient(held, name, newest, now_s) for name, newest in people[:MOST_PATIENTS]],
        "people": len(people),
        "counts": held.store.counts(),
        "waiting": len(held.journal),
        "rules": _rules(home, held),
        "sources": _sources(settings, held, now_s),
        "reports": reports(home)[:_REPORTS],
        "budget": [] if book is None else [_budget_line(book, cohort, settings) for cohort in COHORTS],
        "releases": [] if book is None else [_release(row, zone) for row in book.rows()[: -_LINES - 1 : -1]],
        "delta": f"{DELTA:g}",
        "proof": proof,
        "credits": [] if proof is None else [_epoch(proof, at) for at in range(len(proof.epochs))][::-1],
        "tasks": [_line(line, zone) for line in AuditLog(home / "reports" / "tasks.jsonl").newest(_LINES)],
    }


def reports(home: Path) -> list[str]:
    """Names of the reports about imports and validations, the newest first."""
    found = [*(home / "reports").glob("import-*.html"), *(home / "reports").glob("validation-*.html")]
    return [path.stem for path in sorted(found, key=lambda path: -path.stat().st_mtime_ns)]


def audit_lines(lines: Sequence[Access], zone: ZoneInfo) -> list[dict[str, str]]:
    """Lines of the audit log, ready to show."""
    return [_line(line, zone) for line in lines]


def _line(line: Access, zone: ZoneInfo) -> dict[str, str]:
    return {
        "when": f"{line.moment.astimezone(zone):%d %b %H:%M:%S}",
        "who": line.who,
        "what": line.operation,
        "about": line.patient or "",
        "outcome": line.outcome,
    }


def _moment(iso: str, zone: ZoneInfo) -> str:
    return f"{datetime.fromisoformat(iso).astimezone(zone):%d %b %H:%M}"


def _federation(proof: LedgerProof | None, name: str) -> dict[str, Any]:
    """Who is in, what they agreed on, how much waits for a vote, and whether this hospital was removed."""
    charter = None if proof is None else proof.charter
    if charter is None or charter.privacy is None:
        return {"members": [], "policy": "", "open": 0, "removed": False}
    most, heldout = charter.privacy.max_epsilon_training, charter.privacy.max_epsilon_heldout
    paused = "; training is paused by vote" if charter.paused else ""
    policy = f"ε at most {most:g} for training, {heldout:g} for held-out patients{paused}"
    told: dict[str, Any] = {"members": sorted(charter.members), "policy": policy, "open": len(charter.open)}
    return {**told, "removed": name in charter.removed}


def _published(proof: LedgerProof | None) -> set[str]:
    return set() if proof is None else {entry.model_hash for entry in proof.models}


def _round(proof: LedgerProof | None, name: str, zone: ZoneInfo) -> dict[str, Any] | None:
    """The newest round of the federation, as this node's copy of the ledger has it."""
    line: LedgerEntry | None = None if proof is None else proof.last_round
    if line is None or not isinstance(line.entry, RoundEntry):
        return None
    entry = line.entry
    refused = {update.node: update.code for update in entry.rejected}
    took = any(update.manifest.node == name for update in entry.admitted)
    absent = f"without this hospital: {refused.get(name, 'not asked')}"
    return {
        "number": entry.round,
        "run": entry.run,
        "when": _moment(line.recorded_at, zone),
        "hospitals": len(entry.admitted),
        "ours": "this hospital's update is in it" if took else absent,
    }


def _patient(held: HeldReadings, name: str, newest: int, now_s: float) -> dict[str, Any]:
    times, glucose = held.readings(name)
    recent = (times > now_s - DAYS * DAY_SECONDS) & (times <= now_s)
    ranges = times_in_ranges(glucose[recent]) if recent.any() else ()
    target = next((part.share for part in ranges if part.css == "target"), None)
    return {
        "name": name,
        "when": ago(now_s - newest),
        "target": "" if target is None else percent(target),
        "bar": charts.range_bar(ranges, height=20) if ranges else "",
    }


def _rules(home: Path, held: HeldReadings) -> list[tuple[str, int, str]]:
    """Quarantined rows by rule, the most first, with the reason for the rule."""
    suite = suite_of(home)
    counts = held.store.quarantined()["rule"].value_counts()
    return [(str(rule), int(rows), suite.explanation(str(rule))) for rule, rows in counts.items()]


def _sources(settings: NodeSettings, held: HeldReadings, now_s: float) -> list[dict[str, str]]:
    """Newest reading, last import and files of each source; what is in the journal counts as from apps."""
    found = held.store.freshness()
    live = max((int(held.journal.readings(name)[0][-1]) for name in held.journal.patients()), default=0)
    rows = [(f"{Path(s.path).name} ({s.layout})", found.pop(s.path, None), 0) for s in settings.sources]
    rows.append(("apps", found.pop(APPS, None), live))
    rows += [(f"{Path(origin).name or 'before'} (no longer a source)", fresh, 0) for origin, fresh in found.items()]
    return [
        {
            "name": name,
            "newest": ago(now_s - newest) if (newest := max(live_s, fresh.newest_s if fresh else 0)) else "none",
            "imported": ago(now_s - fresh.imported_s) if fresh else ("waiting" if live_s else "never"),
            "files": f"{fresh.files:,}" if fresh else "",
        }
        for name, fresh, live_s in rows
    ]


def _book(home: Path, settings: NodeSettings) -> BudgetBook | None:
    """The budget book, or None while it cannot be read whole: a round may be writing its next row."""
    try:
        return NodeFolder(home, settings).budget()
    except IsletError:
        return None


def _budget_line(book: BudgetBook, cohort: Cohort, settings: NodeSettings) -> BudgetLine:
    ceiling = settings.max_epsilon_training if cohort == "training" else settings.max_epsilon_heldout
    last = next((row for row in reversed(book.rows()) if row.cohort == cohort), None)
    spent = 0.0 if last is None else last.epsilon_after
    left = -1 if last is None else book.rounds_left(cohort, last.event, ceiling)
    name, what = _COHORTS[cohort], "rounds" if cohort == "training" else "releases"
    words = f"{name}: epsilon {spent:.2f} of {ceiling:g} spent per patient"
    more = "" if left < 0 else f"{left:,}" + (" or more" if left == MOST_ROUNDS else "")
    drawn = charts.gauge(spent / ceiling, words, f"ε {spent:.2f}", f"of {ceiling:g} per patient")
    return BudgetLine(name, f"{spent:.2f}", f"{ceiling:g}", more, what, drawn)


def _release(row: Reservation, zone: ZoneInfo) -> dict[str, str]:
    return {
        "when": _moment(row.at, zone),
        "run": row.run,
        "who": row.asked_by,
        "cohort": _COHORTS[row.cohort],
        "after": f"{row.epsilon_after:.2f}",
    }


def _epoch(proof: LedgerProof, at: int) -> dict[str, Any]:
    epoch = proof.epochs[at]
    share = epoch.micro_credits / epoch.pot_micro_credits if epoch.pot_micro_credits else 0.0
    return {
        "epoch": epoch.epoch,
        "run": epoch.run,
        "rounds": f"{min(epoch.rounds)} to {max(epoch.rounds)}" if epoch.rounds else "",
        "credits": f"{epoch.micro_credits / 1e6:,.2f}",
        "share": f"{share:.0%}",
        "bar": charts.share_bar(share, f"{share:.0%} of the epoch's pot"),
        "score": f"{epoch.shapley_mg_dl:+.3f}",
        "interval": f"{epoch.low_mg_dl:+.3f} to {epoch.high_mg_dl:+.3f}",
    }
