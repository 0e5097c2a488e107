"""The report of an import as one self-contained page: counts and drawings, no network, no scripts, no reading."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from hospital_node.bar_charts import days_chart, distribution_chart, rules_chart
from hospital_node.drift import drift
from hospital_node.importing import Intake
from hospital_node.pages import HERE, render
from hospital_node.portrait import Portrait
from hospital_node.suites import Suite
from hospital_node.validation import render_report

_MOST_FILES = 200
_RANGES = (
    ("very low, below 54", "verylow", 0, 53),
    ("low, 54 to 69", "low", 54, 69),
    ("in range, 70 to 180", "target", 70, 180),
    ("high, 181 to 250", "high", 181, 250),
    ("very high, above 250", "veryhigh", 251, 400),
)


@dataclass(frozen=True, slots=True)
class RuleLine:
    """One rule's row of a table."""

    rule: str
    outcome: str
    rows: int
    people: str
    why: str


@dataclass(frozen=True, slots=True)
class FileLine:
    """One file's row of a table."""

    label: str
    rows_in: int
    accepted: int
    quarantined: int
    duplicates: int


def summary(intake: Intake) -> str:
    """Return the account in plain text, and how it compares with the past."""
    compared = drift(intake.account.portrait, intake.past)
    text = render_report(intake.account.report)
    return text if compared is None else f"{text}\ndrift: {compared.verdict}. {compared.sentence}"


def report_page(intake: Intake, suite: Suite, title: str, subtitle: str) -> str:
    """Return the page as HTML."""
    account = intake.account
    report, portrait = account.report, account.portrait
    held = [
        RuleLine(rule, "quarantined", rows, f"{account.held_people.get(rule, 0):,}", suite.explanation(rule))
        for rule, rows in sorted(report.quarantined.items(), key=lambda pair: -pair[1])
    ]
    kept = [
        RuleLine(rule, outcome, rows, "", suite.explanation(rule))
        for outcome, counts in (("dropped as duplicate", report.duplicates), ("kept, remarked", report.flagged))
        for rule, rows in sorted(counts.items(), key=lambda pair: -pair[1])
    ]
    files = _files(intake)
    values: dict[str, Any] = {
        "title": title,
        "subtitle": subtitle,
        "style": _style(),
        "report": report,
        "portrait": portrait,
        "quarantined": sum(report.quarantined.values()),
        "duplicates": sum(report.duplicates.values()),
        "drift": drift(portrait, intake.past),
        "before": intake.past.readings > 0,
        "days": days_chart(account.days),
        "most_people": max((people for _, people in account.days.values()), default=0),
        "distribution": distribution_chart(portrait, intake.past),
        "ranges": _ranges(portrait),
        "held": held,
        "kept": kept,
        "rules": rules_chart([(line.rule, line.rows) for line in held]),
        "files": files[:_MOST_FILES],
        "more_files": max(0, len(files) - _MOST_FILES),
    }
    return render("intake.html.j2", **values)


def _files(intake: Intake) -> list[FileLine]:
    """In name order; when there are many, those with most rows set aside."""
    lines = [
        FileLine(intake.labels[source], f.rows_in, f.accepted, f.quarantined, f.duplicates)
        for source, f in intake.account.files.items()
    ]
    return sorted(lines, key=lambda line: -line.quarantined) if len(lines) > _MOST_FILES else lines


def _ranges(portrait: Portrait) -> list[tuple[str, str, float]]:
    return [(name, css, portrait.share(low, high)) for name, css, low, high in _RANGES]


def _style() -> Markup:
    """The node's style sheet, inside the page."""
    own = """
main { max-width: 1100px; } section > svg { margin: 6px 0 4px; } svg text { font-size: 13px; }
rect.count, .key.count { fill: var(--accent); background: var(--accent); } rect.aside { fill: var(--warn); }
th.number + th, td.number + td { padding-left: 18px; } td.number + td.number { padding-left: 10px; }
.line { fill: none; stroke: var(--ink); stroke-width: 2; }
.key.line { height: 3px; vertical-align: middle; background: var(--ink); }
@media (max-width: 560px) { svg text { font-size: 24px; } }
.nowrap { white-space: nowrap; margin-right: 14px; }
"""
    return Markup((HERE / "static" / "islet.css").read_text(encoding="utf-8") + own)  # noqa: S704 our own style sheet
