"""The table of artefacts in docs/reliability.md, made from the cases themselves."""

from __future__ import annotations

from pathlib import Path

from tests.conformance import ledgers, tasks, updates
from tests.conformance.case import Case

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
START, END = "<!-- artefacts -->", "<!-- /artefacts -->"
GROUPS: tuple[tuple[str, tuple[Case, ...]], ...] = (
    ("A hospital to the aggregator: updates", updates.CASES),
    ("An aggregator to a hospital: tasks", tasks.CASES),
    ("An aggregator to a hospital: its ledger; a hospital to the aggregator: credit", ledgers.CASES),
)
ALL = tuple(case for _, cases in GROUPS for case in cases)


def with_table(page: str) -> str:
    """Return the page with the table between its marks."""
    before, _, rest = page.partition(START)
    after = rest.partition(END)[2]
    return f"{before}{START}\n{_table()}{END}{after}"


def _table() -> str:
    lines: list[str] = []
    for title, cases in GROUPS:
        lines += [f"### {title} ({len(cases)})", "", "| artefact | what it tries | code |", "|---|---|---|"]
        lines += [f"| {case.name} | {case.tries} | `{case.code}` |" for case in cases]
        lines.append("")
    return "\n".join(lines)
