"""What the node's pages say: values for the templates, gathered from the node folder. No page asks another machine."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from data_schemas.forecast import Forecast, GlucoseUnit, NoForecast, Quality
from data_schemas.units import RESEARCH_LABEL
from hospital_node import charts
from hospital_node.problems import NO_FORECAST
from hospital_node.profile import ENOUGH_SHARE, Profile, profile
from hospital_node.settings import NodeSettings
from pipeline.export import LoadedModel
from pipeline.forecasting import Float32, Int64
from pipeline.model_card import privacy_statement
from pipeline.reading_rules import MAX_AGE_SECONDS

_SMALL = 0.05
HERE = Path(__file__).parent
_environment = Environment(
    loader=FileSystemLoader(HERE / "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
)
_environment.globals.update(label=RESEARCH_LABEL, node="", form_token="")


# The same in a patient's words; what only an app's developer can mend says whom to tell.
_IN_WORDS: dict[NoForecast, tuple[str, str]] = {
    NoForecast.STALE: (
        "The newest reading is too old",
        "A forecast starts from a reading of the last 12 minutes. Check that the sensor is on and near its reader.",
    ),
    NoForecast.FUTURE: ("The newest reading lies in the future", "Check the clock of the phone or reader."),
    NoForecast.TOO_LITTLE_HISTORY: (
        "There are too few readings yet",
        "A forecast needs readings over at least an hour, without a gap of half an hour at its end.",
    ),
    NoForecast.FLAT: (
        "The sensor has shown the same value for 45 minutes",
        "Real glucose moves; check the sensor.",
    ),
    NoForecast.NOISY: (
        "The sensor's values jump about",
        "The forecast comes back when the readings are calm again; check the sensor.",
    ),
    NoForecast.JUMP: (
        "Two readings differ by more than glucose can change",
        "The forecast comes back when the last hour holds no such jump. Check the sensor.",
    ),
}


_QUALITY: dict[Quality, str] = {
    Quality.AGEING: "the newest reading is over 7 minutes old",
    Quality.GAPS: "some readings are missing",
    Quality.SHORT_HISTORY: "there are few readings before it",
    Quality.SHORT_DAY: "there is less than a day of readings",
    Quality.AT_SENSOR_LIMIT: "a reading stands at the end of the sensor's range",
    Quality.JUMPS: "some readings jump",
}


def render(template: str, **values: Any) -> str:
    """Fill in a template; everything is escaped but the drawings made here."""
    return _environment.get_template(template).render(**values)


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
    title, detail = ("", "") if isinstance(made, Forecast) else _IN_WORDS.get(made, NO_FORECAST[made][1:])
    found = profile(time_s, glucose, now_s, zone)
    return {
        "patient": patient,
        "units": units,
        "zone": zone.key,
        "last": charts.shown(float(glucose[-1]), units) if len(glucose) else "",
        "age": ago(now_s - float(time_s[-1])) if len(time_s) else "",
        "at": _clock(float(time_s[-1]), now_s, zone) if len(time_s) else "",
        "old": bool(len(time_s)) and now_s - float(time_s[-1]) > MAX_AGE_SECONDS,
        "target": f"{charts.shown(70, units)} to {charts.shown(180, units)}",
        "sentence": "" if forecast is None else sentence(forecast, zone),
        "quality": "" if forecast is None else ", ".join(_QUALITY[flag] for flag in forecast.quality),
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
        "bar": charts.range_bar(found.ranges),
        "agp": charts.profile_chart(found, units),
        "ranges": [
            {
                "name": r.name,
                "css": r.css,
                "limits": limits(r.low_mg_dl, r.high_mg_dl),
                "share": percent(r.share),
                "goal": r.goal,
            }
            for r in found.ranges
        ],
        "mean": charts.shown(found.mean_mg_dl, units),
        "gmi": f"{3.31 + 0.02392 * found.mean_mg_dl:.1f}%",
        "variation": f"{found.variation_percent:.0f}%",
        "covered": f"{found.covered:.0%}",
        "too_few": found.covered < ENOUGH_SHARE,
    }


def percent(share: float) -> str:
    """A share in per cent, with a decimal where it is small: below 1% is not nothing."""
    return f"{share:.1%}" if 0 < share < _SMALL else f"{share:.0%}"


def _clock(at_s: float, now_s: float, zone: ZoneInfo) -> str:
    """A clock time, with its date where that is another day."""
    at, now = (datetime.fromtimestamp(moment, tz=zone) for moment in (at_s, now_s))
    return f"{at:%H:%M}" if at.date() == now.date() else f"{at:%H:%M on %d %B %Y}"


def ago(seconds: float) -> str:
    """How long ago something was, in words."""
    if seconds < 0:
        return "ahead of the clock"
    steps = ((90, "s", 1), (90 * 60, "min", 60), (48 * 3600, "h", 3600), (np.inf, "days", 24 * 3600))
    size, unit = next((size, unit) for limit, unit, size in steps if seconds < limit)
    return f"{int(seconds // size)} {unit} ago"
