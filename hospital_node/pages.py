"""What the node's pages say: values for the templates, gathered from the node folder. No page asks another machine."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from data_schemas.errors import IsletError
from data_schemas.forecast import Forecast, GlucoseUnit, NoForecast
from data_schemas.units import DELTA, RESEARCH_LABEL
from hospital_node import charts
from hospital_node.budget import COHORTS, MOST_ROUNDS, BudgetBook, Cohort
from hospital_node.folder import NodeFolder
from hospital_node.held_readings import HeldReadings
from hospital_node.problems import NO_FORECAST
from hospital_node.profile import ENOUGH_SHARE, Profile, profile
from hospital_node.settings import NodeSettings, read_settings
from pipeline.export import LoadedModel
from pipeline.forecasting import Float32, Int64
from pipeline.model_card import privacy_statement

HERE = Path(__file__).parent
MOST_PATIENTS = 200
_environment = Environment(
    loader=FileSystemLoader(HERE / "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
)
_environment.globals.update(label=RESEARCH_LABEL, node="", signed_in=False)


def render(template: str, **values: Any) -> str:
    """Fill in a template; everything is escaped but the drawings made here."""
    return _environment.get_template(template).render(**values)


@dataclass(frozen=True, slots=True)
class BudgetLine:
    """One cohort's budget, ready to show."""

    name: str
    spent: str
    ceiling: str
    left: str
    what: str
    gauge: Markup


def patient_page(
    patient: str,
    time_s: Int64,
    glucose: Float32,
    made: Forecast | NoForecast,
    model: LoadedModel | None,
    now_s: float,
    units: GlucoseUnit,
    zone: ZoneInfo,
) -> dict[str, Any]:
    """Values of patient.html.j2: newest reading, forecast or reason, drawing, and the last 14 days."""
    forecast = made if isinstance(made, Forecast) else None
    _, title, detail = ("", "", "") if isinstance(made, Forecast) else NO_FORECAST[made]
    found = profile(time_s, glucose, now_s, zone)
    return {
        "patient": patient,
        "units": units,
        "zone": zone.key,
        "last": charts.shown(float(glucose[-1]), units) if len(glucose) else "",
        "age": _ago(now_s - float(time_s[-1])) if len(time_s) else "",
        "sentence": "" if forecast is None else sentence(forecast, zone),
        "reason_title": title,
        "reason_detail": detail,
        "chart": charts.forecast_chart(time_s, glucose, forecast, now_s, units, zone),
        "profile": found is not None,
        "model": model,
        "privacy": "" if model is None else privacy_statement(model.card),
        **({} if found is None else _profile_values(found, units)),
    }


def sentence(made: Forecast, zone: ZoneInfo) -> str:
    """The forecast half an hour ahead in one sentence: where it lies in 8 of 10 such forecasts."""
    point = next(p for p in made.points if p.horizon_minutes == 30)
    digits = 0 if made.units == "mg/dL" else 1
    low, high = (f"{value:.{digits}f}" for value in (point.p10, point.p90))
    return f"Likely {low} to {high} {made.units} at {point.at.astimezone(zone):%H:%M}, 8 in 10."


def clinic_page(
    home: Path, settings: NodeSettings, held: HeldReadings, model: LoadedModel | None, now_s: float
) -> dict[str, Any]:
    """Values of clinic.html.j2. Reads the store, so it takes as long as that does."""
    people = [(name, _newest(held, name)) for name in held.patients()]
    people.sort(key=lambda pair: -pair[1])
    quarantined = held.store.quarantined()["rule"].value_counts()
    book = _book(home)
    last = None if book is None else next((r for r in reversed(book.rows()) if r.cohort == "training"), None)
    return {
        "node": settings.name,
        "federation": settings.federation,
        "now": f"{datetime.fromtimestamp(now_s, tz=UTC):%d %B %Y, %H:%M} UTC",
        "round": "" if last is None else f"{datetime.fromisoformat(last.at):%d %b %H:%M}",
        "asked_by": "" if last is None else last.asked_by,
        "model": model,
        "privacy": "" if model is None else privacy_statement(model.card),
        "freshest": _ago(now_s - people[0][1]) if people else "",
        "recent": sum(now_s - newest < 24 * 3600 for _, newest in people),
        "patients": [{"name": name, "when": _ago(now_s - newest)} for name, newest in people[:MOST_PATIENTS]],
        "more": max(0, len(people) - MOST_PATIENTS),
        "counts": held.store.counts(),
        "waiting": len(held.journal),
        "rules": [(str(rule), int(rows)) for rule, rows in quarantined.items()],
        "sources": _sources(settings, held, now_s),
        "budget": [] if book is None else [_budget_line(book, cohort, settings) for cohort in COHORTS],
        "delta": f"{DELTA:g}",
        "credit": _credit(home),
    }


def zone_of(settings: NodeSettings) -> ZoneInfo:
    """The zone of the node's clock times: that of its first source, else UTC."""
    return next((source.tz for source in settings.sources if source.tz is not None), ZoneInfo("UTC"))


def api_page(document: dict[str, Any]) -> dict[str, Any]:
    """Values of docs.html.j2 from the OpenAPI document."""
    operations = [
        _operation(method, path, o) for path, methods in document["paths"].items() for method, o in methods.items()
    ]
    shapes = [
        {
            "name": name,
            "description": schema.get("description", ""),
            "fields": [
                {"name": field, "type": _type(value), "required": field in schema.get("required", ())}
                for field, value in schema["properties"].items()
            ],
        }
        for name, schema in document["components"]["schemas"].items()
        if "properties" in schema
    ]
    return {"document": document, "operations": operations, "shapes": shapes}


def _operation(method: str, path: str, operation: dict[str, Any]) -> dict[str, Any]:
    credentials = [name for option in operation.get("security", ()) for name in option]
    words = {"bearer": "API key or token", "apiSecret": "api-secret header"}
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
    return {
        "method": method.upper(),
        "path": path,
        "description": operation.get("description", ""),
        "credential": " or ".join(words[name] for name in credentials) or "none",
        "body": _type(body) if body else "",
        "parameters": [
            {
                "name": p["name"],
                "where": p["in"],
                "required": p.get("required", False),
                "description": p.get("description", ""),
            }
            for p in operation.get("parameters", ())
        ],
        "statuses": list(operation["responses"]),
    }


def _type(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "anyOf" in schema:
        return " or ".join(_type(option) for option in schema["anyOf"])
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    if "enum" in schema:
        return " or ".join(json.dumps(value) for value in schema["enum"])
    return str(schema.get("format") or schema.get("type") or schema.get("title") or "any")


def _profile_values(found: Profile, units: GlucoseUnit) -> dict[str, Any]:
    def limits(low: float | None, high: float | None) -> str:
        if low is None or high is None:
            edge = charts.shown(low if high is None and low is not None else high or 0.0, units)
            return f"{'above' if high is None else 'below'} {edge}"
        return f"{charts.shown(low, units)} to {charts.shown(high, units)}"

    return {
        "bar": charts.range_bar(found),
        "agp": charts.profile_chart(found, units),
        "ranges": [
            {
                "name": r.name,
                "css": r.css,
                "limits": limits(r.low_mg_dl, r.high_mg_dl),
                "share": f"{r.share:.0%}",
                "goal": r.goal,
            }
            for r in found.ranges
        ],
        "mean": charts.shown(found.mean_mg_dl, units),
        "variation": f"{found.variation_percent:.0f}%",
        "covered": f"{found.covered:.0%}",
        "too_few": found.covered < ENOUGH_SHARE,
    }


def _book(home: Path) -> BudgetBook | None:
    """The budget book, or None while it cannot be read whole: a round may be writing its next row."""
    try:
        return NodeFolder(home, read_settings(home / "node.toml")).budget()
    except IsletError:
        return None


def _budget_line(book: BudgetBook, cohort: Cohort, settings: NodeSettings) -> BudgetLine:
    ceiling = settings.max_epsilon_training if cohort == "training" else settings.max_epsilon_heldout
    last = next((row for row in reversed(book.rows()) if row.cohort == cohort), None)
    spent = 0.0 if last is None else last.epsilon_after
    left = -1 if last is None else book.rounds_left(cohort, last.event, ceiling)
    name = "Training patients" if cohort == "training" else "Held-out patients"
    words = f"{name}: epsilon {spent:.2f} of {ceiling:g} spent"
    more = "" if left < 0 else f"{left:,}" + (" or more" if left == MOST_ROUNDS else "")
    what = "rounds" if cohort == "training" else "releases"
    return BudgetLine(name, f"{spent:.2f}", f"{ceiling:g}", more, what, charts.gauge(spent / ceiling, words))


def _sources(settings: NodeSettings, held: HeldReadings, now_s: float) -> list[tuple[str, str]]:
    """Newest reading from exports and from apps; the store keeps hashes of files, not their names."""
    exports = int(held.newest_stored())
    apps = max((int(held.journal.readings(name)[0][-1]) for name in held.journal.patients()), default=0)
    layouts = ", ".join(sorted({source.layout for source in settings.sources})) or "none configured"
    return [
        (f"store (exports: {layouts})", _ago(now_s - exports) if exports else "none"),
        ("apps, since the last batch", _ago(now_s - apps) if apps else "none"),
    ]


def _credit(home: Path) -> str:
    """What the node itself knows: the last checkpoint it cosigned; credits are in the ledger."""
    try:
        seen = json.loads((home / "witness.json").read_bytes())
        return (
            f"This node cosigned the ledger up to entry {int(seen['size']):,}. Credit is in the ledger itself: "
            "`islet ledger show` lists it, `islet ledger verify` proves it."
        )
    except (OSError, ValueError, KeyError, TypeError):
        return "Not known here yet: this node has cosigned no checkpoint of the ledger."


def _newest(held: HeldReadings, patient: str) -> int:
    return int(held.readings(patient)[0][-1])


def _ago(seconds: float) -> str:
    if seconds < 0:
        return "ahead of the clock"
    steps = ((90, "s", 1), (90 * 60, "min", 60), (48 * 3600, "h", 3600), (np.inf, "days", 24 * 3600))
    size, unit = next((size, unit) for limit, unit, size in steps if seconds < limit)
    return f"{int(seconds // size)} {unit} ago"
