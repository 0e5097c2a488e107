"""A scorecard as people and programs read it: tables for a terminal, JSON, one HTML page, PNG pictures."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from data_schemas.units import HORIZON_MINUTES
from pipeline.error_grids import ZONE_NAMES
from pipeline.evaluation import SCORED_MINUTES
from pipeline.plots import Example, Picture, calibration, error_grid, forecast_examples, rmse_by_horizon, rmse_by_range
from pipeline.scorecard import Scorecard
from pipeline.scored import ALARM_PROBABILITY, coverage_curve

Table: TypeAlias = tuple[str, list[str], list[list[str]]]
_STYLE = (
    ":root{--ink:#1b2430;--muted:#5d6875;--line:#d5dbe2;--paper:#fff}"
    "@media(prefers-color-scheme:dark){:root{--ink:#e8ecf1;--muted:#a3aebb;--line:#35404c;--paper:#1a212a}}"
    "body{margin:0 auto;max-width:1120px;padding:24px 18px;background:var(--paper);color:var(--ink);"
    "font:16px/1.5 system-ui,sans-serif}h1{font-size:1.6rem}h2{font-size:1.1rem;margin-top:2rem}"
    ".wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.86rem}"
    "th,td{padding:4px 9px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}"
    "th:first-child{text-align:left;position:sticky;left:0;background:var(--paper)}thead th{color:var(--muted)}"
    "figure{margin:0;max-width:620px}figure svg{width:100%;height:auto}.figures{display:grid;gap:24px;"
    "grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr))}.muted{color:var(--muted)}"
)


def as_json(card: Scorecard, about: Mapping[str, Any]) -> str:
    """Every number of every model; NaN becomes null."""
    body = {"about": dict(about), "models": {label: asdict(c) for label, c in card.cards.items()}}
    return json.dumps(_finite(body), indent=1, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def tables(card: Scorecard) -> list[Table]:
    """(title, column names, rows) of each table, numbers as text."""
    return [
        _errors(card),
        *_groups(card),
        _people(card),
        _zone_table(card),
        _interval_table(card),
        _point_table(card),
        _episode_table(card),
        _range_table(card),
    ]


def _errors(card: Scorecard) -> Table:
    columns = [f"{name}@{m}" for m in SCORED_MINUTES for name in ("RMSE", "MAE", "MARD%", "bias", "skill%", "lag")]
    rows = []
    for label, c in card.cards.items():
        lags = {lag.horizon_minutes: lag.lag_minutes for lag in c.evaluation.lags}
        cells = []
        for m in SCORED_MINUTES:
            h = c.evaluation.pooled.at(m)
            cells += [_n(h.rmse), _n(h.mae), _n(h.mard_percent), _n(h.bias), _n(100 * h.skill, 1), _n(lags[m], 0)]
        rows.append([label, *cells])
    return "All people pooled (RMSE, MAE, bias in mg/dL; lag in minutes)", ["model", *columns], rows


def _groups(card: Scorecard) -> list[Table]:
    first = next(iter(card.cards.values())).evaluation
    found = []
    for title, kind in (("by site", "sites"), ("by sensor interval", "sensors")):
        names = [f"{g.name} ({g.people})@{m}" for g in getattr(first, kind) for m in (30, 60)]
        rows = [
            [label, *(_n(g.at(m).rmse) for g in getattr(c.evaluation, kind) for m in (30, 60))]
            for label, c in card.cards.items()
        ]
        found.append((f"RMSE {title} (people), mg/dL", ["model", *names], rows))
    return found


def _people(card: Scorecard) -> Table:
    rows = []
    for label, c in card.cards.items():
        cells = [f"{_n(m.rmse)} [{_n(m.rmse_low)}, {_n(m.rmse_high)}]" for m in c.evaluation.mean_over_people]
        rows.append([label, *cells])
    people = next(iter(card.cards.values())).evaluation.mean_over_people[0].groups
    title = f"RMSE as mean over {people} people [95% bootstrap interval over people], mg/dL"
    return title, ["model", *(f"@{m}" for m in SCORED_MINUTES)], rows


def _zone_table(card: Scorecard) -> Table:
    rows = [
        [label, *(_n(100 * z, 2) for g in c.evaluation.pooled.grids for z in (*g.clarke, *g.parkes))]
        for label, c in card.cards.items()
    ]
    names = [f"{grid} {z}@{m}" for m in (30, 60) for grid in ("Clarke", "Parkes") for z in ZONE_NAMES]
    return "Error grid zones, % of pairs", ["model", *names], rows


def _interval_table(card: Scorecard) -> Table:
    rows = [
        [
            f"{label} {100 * i.nominal:.0f}%@{i.horizon_minutes} {g.name}",
            _n(100 * i.coverage, 1),
            _n(i.width, 1),
            _n(i.pinball),
        ]
        for label, c in card.cards.items()
        for g in (c.evaluation.pooled, *c.evaluation.sites)
        for i in g.intervals
        if i.horizon_minutes in {30, 60}
    ]
    return "Intervals", ["interval", "coverage %", "width mg/dL", "pinball"], rows


def _episode_table(card: Scorecard) -> Table:
    names = ["model, alarm, event", "episodes", "recall %", "precision %", "F1 %", "false alarms/day", "lead min"]
    rows = [
        [
            f"{label}, {rule}, {e.name}",
            str(e.episodes),
            *(_n(100 * share, 1) for share in (e.recall, e.precision, e.f1)),
            _n(e.false_alarms_per_day),
            _n(e.median_lead_minutes, 0),
        ]
        for label, c in card.cards.items()
        for rule, found in (
            ("point", c.alarms_by_forecast),
            (f"P>={ALARM_PROBABILITY:g}", c.alarms_by_probability),
        )
        for e in found
    ]
    return "Episodes of at least 15 minutes, announced up to 30 minutes before", names, rows


def _point_table(card: Scorecard) -> Table:
    names = [
        "model, alarm, event",
        "events",
        "recall %",
        "precision %",
        "F1 %",
        "new events",
        "recall %",
        "precision %",
    ]
    rows = [
        [
            f"{label}, {rule}, {e.name}",
            str(e.events),
            *(_n(100 * share, 1) for share in (e.recall, e.precision, e.f1)),
            str(e.onset_events),
            *(_n(100 * share, 1) for share in (e.onset_recall, e.onset_precision)),
        ]
        for label, c in card.cards.items()
        for rule, found in (
            ("point", c.evaluation.pooled.events),
            (f"P>={ALARM_PROBABILITY:g}", c.evaluation.pooled.events_by_probability),
        )
        for e in found
    ]
    return "Lows (< 70) and highs (> 180) within 30 minutes, over issue points", names, rows


def _range_table(card: Scorecard) -> Table:
    rows = [
        [f"{label}, {r.name}@{r.horizon_minutes}", str(r.pairs), _n(r.rmse), _n(r.mae), _n(r.mard_percent), _n(r.bias)]
        for label, c in card.cards.items()
        for r in c.evaluation.ranges
    ]
    return "By what glucose turned out to be", ["model, range", "pairs", "RMSE", "MAE", "MARD%", "bias"], rows


def as_text(found: Sequence[Table]) -> str:
    """Tables for a terminal; wide ones are cut into blocks of columns."""
    return "\n".join(_text(*table) for table in found)


def _text(title: str, columns: list[str], rows: list[list[str]], width: int = 118) -> str:
    sizes = [max(len(c), *(len(r[i]) for r in rows)) if rows else len(c) for i, c in enumerate(columns)]
    lines, at = [title], 1
    while at < len(columns):
        stop, used = at, sizes[0]
        while stop < len(columns) and (stop == at or used + sizes[stop] + 2 <= width):
            used += sizes[stop] + 2
            stop += 1
        lines += [
            row[0].ljust(sizes[0]) + "".join("  " + row[i].rjust(sizes[i]) for i in range(at, stop))
            for row in (columns, *rows)
        ]
        lines.append("")
        at = stop
    return "\n".join(lines)


def _n(value: float, digits: int = 2) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "-"


def pictures(card: Scorecard, ours: str) -> tuple[Picture, ...]:
    """Error grids, error by horizon and range, calibration and examples; of one model where one is drawn."""
    scored, cards = card.scored[ours], card.cards
    seen = scored.mask[:, HORIZON_MINUTES.index(30)]
    truth, forecast = (v[seen, HORIZON_MINUTES.index(30)] for v in (scored.truth, scored.forecast))
    by_model = {k: [(m, c.evaluation.pooled.at(m).rmse) for m in SCORED_MINUTES] for k, c in cards.items()}
    by_range = {k: [(r.name, r.rmse) for r in c.evaluation.ranges if r.horizon_minutes == 30] for k, c in cards.items()}
    drawn = [
        error_grid(truth, forecast, kind="clarke", horizon_minutes=30),
        error_grid(truth, forecast, kind="parkes", horizon_minutes=30),
        rmse_by_horizon(by_model),
        rmse_by_range(by_range),
    ]
    if scored.quantiles is not None:
        curves = {f"{m} min": coverage_curve(scored, m) for m in (30, 60)}
        drawn += [forecast_examples(_examples(card, ours)), calibration(curves)]
    return tuple(drawn)


def _examples(card: Scorecard, ours: str) -> list[Example]:
    """Up to three issue points, picked by position: the middle one of each of the first sites."""
    scored = card.scored[ours]
    assert scored.quantiles is not None  # noqa: S101
    assert scored.time_s is not None  # noqa: S101
    found = []
    for index in range(min(3, len(scored.sites))):
        rows = np.flatnonzero(scored.site == index)
        fullest = rows[scored.mask[rows].sum(axis=1) == scored.mask[rows].sum(axis=1).max()] if len(rows) else rows
        if not len(fullest):
            continue
        row = int(fullest[len(fullest) // 2])
        series = dict(card.series)[scored.sites[index]]
        mine = slice(int(series.starts[scored.patient[row]]), int(series.starts[scored.patient[row] + 1]))
        minutes = (series.time_s[mine] - scored.time_s[row]) / 60.0
        near = (minutes >= -180) & (minutes <= 0)
        history = list(zip(minutes[near].tolist(), series.glucose_mg_dl[mine][near].tolist(), strict=True))
        pairs = zip(HORIZON_MINUTES, scored.truth[row], scored.mask[row], strict=True)
        truth = [(float(h), float(y)) for h, y, seen in pairs if seen]
        found.append(Example(history, truth, scored.forecast[row], scored.quantiles[row]))
    return found


def files(card: Scorecard, about: Mapping[str, Any], ours: str) -> dict[str, bytes]:
    """scores.json, scores.html and one PNG a picture, by name."""
    drawn = pictures(card, ours)
    found = {f"{picture.name}.png": picture.png() for picture in drawn}
    found["scores.json"] = as_json(card, about).encode()
    return found | {"scores.html": _page(tables(card), drawn, about).encode()}


def write(card: Scorecard, out: Path, about: Mapping[str, Any], ours: str) -> None:
    """Write the files of a scorecard into the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    for name, data in files(card, about, ours).items():
        (out / name).write_bytes(data)


def metrics(card: Scorecard) -> dict[str, float]:
    """The main numbers of every model under names such as rmse_30/pooled/ridge; scores.json has them all.

    Errors pooled and RMSE by site at every scored horizon, means over people with their bootstrap interval,
    coverage, and alarms for lows and highs. What is undefined is left out.
    """
    found: dict[str, float] = {}
    for label, c in card.cards.items():
        for m in SCORED_MINUTES:
            score = c.evaluation.pooled.at(m)
            for name in ("rmse", "mae", "mard_percent", "bias", "skill"):
                found[f"{name}_{m}/pooled/{label}"] = getattr(score, name)
            found |= {f"rmse_{m}/{g.name}/{label}": g.at(m).rmse for g in (*c.evaluation.sites, *c.evaluation.sensors)}
        found |= {f"lag_minutes_{s.horizon_minutes}/pooled/{label}": s.lag_minutes for s in c.evaluation.lags}
        for mean in c.evaluation.mean_over_people:
            for end in ("rmse", "rmse_low", "rmse_high"):
                found[f"{end}_{mean.horizon_minutes}/people/{label}"] = getattr(mean, end)
        for i in c.evaluation.pooled.intervals:
            found[f"coverage{100 * i.nominal:.0f}_{i.horizon_minutes}/pooled/{label}"] = i.coverage
        for rule, alarms in (("point", c.alarms_by_forecast), ("chance", c.alarms_by_probability)):
            for e in alarms:
                for name in ("recall", "precision", "f1", "false_alarms_per_day", "median_lead_minutes"):
                    found[f"{name} {e.name} by {rule}/pooled/{label}"] = getattr(e, name)
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _page(found: Sequence[Table], drawn: Sequence[Picture], about: Mapping[str, Any]) -> str:
    facts = " · ".join(html.escape(f"{k}: {v}") for k, v in about.items())
    figures = "".join(f"<figure>{p.svg()}</figure>" for p in drawn)
    body = "".join(_html_table(*table) for table in found)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width, initial-scale=1"><title>Islet evaluation</title><style>{_STYLE}</style></head>'
        f'<body><h1>Evaluation</h1><p class="muted">{facts}</p><div class="figures">{figures}</div>{body}</body></html>'
    )


def _html_table(title: str, columns: list[str], rows: list[list[str]]) -> str:
    head = "".join(f'<th scope="col">{html.escape(c)}</th>' for c in columns)
    lines = "".join(
        f'<tr><th scope="row">{html.escape(r[0])}</th>' + "".join(f"<td>{html.escape(c)}</td>" for c in r[1:]) + "</tr>"
        for r in rows
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"
    return f'<h2>{html.escape(title)}</h2><div class="wide">{table}</div>'
