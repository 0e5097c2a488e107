"""The report of a run: one HTML file that needs nothing else, and its main table for the terminal.

The file holds its style and its pictures, loads nothing, runs no script, and follows the reader's light or dark
setting.
"""

from __future__ import annotations

import html
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_schemas.plan import RELATION, PrivacyUnit
from data_schemas.units import DELTA, RESEARCH_LABEL
from pipeline.evaluation import Evaluation
from pipeline.plots import Picture
from pipeline.signing import write_durably

PUBLIC_DATA_NOTE = (
    "Exact per-hospital figures are shown because this data is public; in a federation only noised, accounted "
    "figures leave a node."
)
LEAVES = (
    "a clipped, noised model update of each round, with its signature",
    "one clipped, noised vector of contribution scores per credit epoch",
    "the hospital's name, public key and declared (published, not computed) numbers of patients",
    "what each release cost in privacy: its event and the cohort's total epsilon",
    "a refusal code when it declines, and cosignatures of ledger checkpoints",
)
NEVER_LEAVES = (
    "a reading, a patient's name, pseudonym, birth date or serial number",
    "an exact count, average or error of its patients",
    "a gradient before clipping and noise",
    "quarantined rows, validation results, error messages or logs",
    "its private keys",
)


_CELL = 14  # columns of the terminal table per model: two values of five characters, each with its mark


@dataclass(frozen=True, slots=True)
class ModelColumn:
    """A model of the results table; note says what it is. A label of up to 11 characters fits a terminal."""

    label: str
    note: str
    is_ours: bool = False


@dataclass(frozen=True, slots=True)
class ResultRow:
    """RMSE in mg/dL at 30 and at 60 minutes, one value per model column, None where there is no such model here.

    summary: the row is about all hospitals together.
    """

    name: str
    people: int
    rmse_30: tuple[float | None, ...]
    rmse_60: tuple[float | None, ...]
    summary: bool = False


@dataclass(frozen=True, slots=True)
class PrivacyLine:
    """What one hospital's patients have spent: training cohort and, where it has one, held-out cohort."""

    node: str
    training_patients: int
    epsilon: float
    ceiling: float
    heldout_patients: int
    heldout_epsilon: float | None


@dataclass(frozen=True, slots=True)
class IntakeLine:
    """Rows of one hospital's exports: rows_in = accepted + quarantined + duplicates."""

    node: str
    rows_in: int
    accepted: int
    quarantined: int
    duplicates: int
    patients: int

    def __post_init__(self) -> None:
        if self.rows_in != self.accepted + self.quarantined + self.duplicates:
            raise ValueError("an intake line must account for every row")


@dataclass(frozen=True, slots=True)
class CreditRow:
    """Credit of one hospital: summed Shapley value in mg/dL with the 95% interval of its noise, and micro-credits."""

    node: str
    shapley_mg_dl: float
    interval_low_mg_dl: float
    interval_high_mg_dl: float
    micro_credits: int


@dataclass(frozen=True, slots=True)
class LedgerStatus:
    """State of the ledger; root_hash is the Merkle root, hex; problem is empty when everything was verified."""

    entries: int
    root_hash: str
    cosigned_by: tuple[str, ...]
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Illustration:
    """A picture with what it shows."""

    title: str
    caption: str
    picture: Picture


@dataclass(frozen=True, slots=True)
class ReportData:
    """Everything a report says. columns and rows make the results table; the last row is the pooled one."""

    run: str
    generated_at: str
    model_hash: str
    rounds: int
    headline: str
    columns: tuple[ModelColumn, ...]
    rows: tuple[ResultRow, ...]
    detail: Evaluation | None
    privacy: tuple[PrivacyLine, ...]
    intake: tuple[IntakeLine, ...]
    credit: tuple[CreditRow, ...]
    ledger: LedgerStatus
    illustrations: tuple[Illustration, ...]
    unit: PrivacyUnit = "patient"
    relation: str = RELATION
    delta: float = DELTA
    note: str = PUBLIC_DATA_NOTE

    def __post_init__(self) -> None:
        if any(len(values) != len(self.columns) for row in self.rows for values in (row.rmse_30, row.rmse_60)):
            raise ValueError("every result row needs one value per model column")


def write_report(data: ReportData, out: Path) -> None:
    """Write the report as one HTML file, complete or not at all. Raises StorageFailed."""
    write_durably(out, render_html(data).encode())


def render_html(data: ReportData) -> str:
    """Make the whole page as text."""
    import jinja2
    from markupsafe import Markup

    folder = Path(__file__).parent / "templates"
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=_number, percent=_percent, count=_count, credits=_credits)
    drawings = [
        (i, Markup(i.picture.svg().replace("<svg ", f'<svg aria-label="{html.escape(i.title)}" ', 1)))  # noqa: S704
        for i in data.illustrations
    ]
    return environment.get_template("report.html.j2").render(
        data=data,
        results=_results(data),
        detail=_detail(data.detail),
        drawings=drawings,
        leaves=LEAVES,
        never=NEVER_LEAVES,
        label=RESEARCH_LABEL,
    )


def render_table(data: ReportData) -> str:
    """Set the results table for a terminal of 114 columns; * marks the lowest of a row."""
    names = ["hospital (n)", *(f"{row.name} ({row.people})" for row in data.rows)]
    first = min(max(map(len, names)), 114 - _CELL * len(data.columns))
    heads = [f"{'hospital (n)':<{first}.{first}}", *(f"{c.label:>{_CELL}.{_CELL - 1}}" for c in data.columns)]
    units = [" " * first, *(f"{'30     60 ':>{_CELL}}" for _ in data.columns)]
    lines = ["RMSE in mg/dL at 30 and 60 minutes, lower is better; * is the lowest of its row", "".join(heads)]
    lines += ["".join(units), "-" * len(lines[1])]
    for before, row, name in zip([None, *data.rows], data.rows, names[1:], strict=False):
        if before is not None and row.summary and not before.summary:
            lines.append("-" * len(lines[1]))
        pairs = zip(_marked(row.rmse_30), _marked(row.rmse_60), strict=True)
        lines.append(
            "".join([f"{name:<{first}.{first}}", *(f"{_short(a)} {_short(b)}".rjust(_CELL) for a, b in pairs)])
        )
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _marked(values: tuple[float | None, ...]) -> list[tuple[float | None, bool]]:
    """Each value with whether it is the lowest of its row, to the decimals that are shown."""
    known = [round(v, 2) for v in values if v is not None and math.isfinite(v)]
    return [(v, v is not None and bool(known) and round(v, 2) == min(known)) for v in values]


def _short(marked: tuple[float | None, bool]) -> str:
    value, best = marked
    return f"{_number(value, 2):>5}{'*' if best else ' '}"


def _results(data: ReportData) -> list[dict[str, Any]]:
    """Rows of the HTML table: per model the two values and whether each is the lowest of its row."""
    return [
        {
            "name": row.name,
            "people": row.people,
            "summary": row.summary,
            "cells": list(zip(_marked(row.rmse_30), _marked(row.rmse_60), strict=True)),
        }
        for row in data.rows
    ]


def _detail(detail: Evaluation | None) -> list[dict[str, Any]]:
    """One line per scored horizon of our model, pooled; grids only where they are computed."""
    if detail is None:
        return []
    pooled = detail.pooled
    grids = {g.horizon_minutes: g for g in pooled.grids}
    bands = {(i.horizon_minutes, i.nominal): i for i in pooled.intervals}
    return [
        {
            "score": h,
            "grid": grids.get(h.horizon_minutes),
            "band90": bands.get((h.horizon_minutes, 0.9)),
            "band50": bands.get((h.horizon_minutes, 0.5)),
        }
        for h in pooled.horizons
    ]


def _number(value: float | None, digits: int = 1) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.{digits}f}".replace("-", "−")


def _percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None or not math.isfinite(value) else _number(100 * value, digits) + "%"


def _count(value: int) -> str:
    return f"{value:,}".replace(",", "\u202f")


def _credits(micro: int) -> str:
    return f"{micro // 1_000_000:,}.{micro % 1_000_000 // 1000:03d}".replace(",", "\u202f")
