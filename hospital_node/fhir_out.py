"""FHIR R4: stored readings as HL7 CGM IG observations, and a forecast that nobody can mistake for one.

A reading is LOINC 99504-3 (glucose in interstitial fluid, mass per volume), status final. A forecast has a code of
Islet's own, status preliminary, the readings it follows from in derivedFrom, and the research label as a note.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from data_schemas.forecast import Forecast
from data_schemas.units import RESEARCH_LABEL
from pipeline.forecasting import Float32, Int64

FHIR_JSON = "application/fhir+json"
READING_CODE, FORECAST_CODE = "99504-3", "glucose-forecast"
CODES = rf"^([!-{{}}~]*\|)?({READING_CODE}|{FORECAST_CODE})$"
FORECAST_SYSTEM = "urn:islet:code-system:observation"
_READING_PROFILE = "http://hl7.org/fhir/uv/cgm/StructureDefinition/cgm-sensor-reading-mass-per-volume"
_QUANTILES = ("p05", "p25", "p50", "p75", "p95")


def reading(patient: str, time_s: int, glucose_mg_dl: float) -> dict[str, Any]:
    """Return one stored reading."""
    return {
        "resourceType": "Observation",
        "id": _reading_id(time_s),
        "meta": {"profile": [_READING_PROFILE]},
        "status": "final",
        "code": {
            "coding": [
                {
                    "system": "http://loinc.org",
                    "code": READING_CODE,
                    "display": "Glucose [Mass/volume] in Interstitial fluid",
                }
            ]
        },
        "subject": {"reference": f"Patient/{patient}"},
        "effectiveDateTime": _iso(time_s),
        "valueQuantity": _mg_dl(glucose_mg_dl),
    }


def forecast(patient: str, made: Forecast) -> dict[str, Any]:
    """Return a forecast in mg/dL: one component per quantile, each with its twelve values 5 minutes apart."""
    first, last = made.points[0].at, made.points[-1].at
    return {
        "resourceType": "Observation",
        "id": f"forecast-{int(made.last_reading_at.timestamp())}-{made.model_hash[:8]}",
        "status": "preliminary",
        "code": {
            "coding": [{"system": FORECAST_SYSTEM, "code": FORECAST_CODE, "display": "Forecast of glucose"}],
            "text": "Forecast of glucose, not a measurement",
        },
        "subject": {"reference": f"Patient/{patient}"},
        "effectivePeriod": {"start": _iso(first.timestamp()), "end": _iso(last.timestamp())},
        "issued": _iso(made.generated_at.timestamp()),
        "note": [{"text": RESEARCH_LABEL}, {"text": made.privacy_statement}],
        "derivedFrom": [{"reference": f"Observation/{_reading_id(int(made.last_reading_at.timestamp()))}"}],
        "component": [_component(made, name) for name in _QUANTILES],
    }


def bundle(resources: Sequence[dict[str, Any]], base: str) -> dict[str, Any]:
    """Return a searchset of observations."""
    entries = [
        {"fullUrl": f"{base}/Observation/{resource['id']}", "resource": resource, "search": {"mode": "match"}}
        for resource in resources
    ]
    return {"resourceType": "Bundle", "type": "searchset", "total": len(entries), "entry": entries}


def newest(patient: str, time_s: Int64, glucose_mg_dl: Float32, count: int) -> list[dict[str, Any]]:
    """The newest readings, newest first."""
    pairs = list(zip(time_s.tolist(), glucose_mg_dl.tolist(), strict=True))[-count:]
    return [reading(patient, at, value) for at, value in reversed(pairs)]


def capability(base: str, now_s: float) -> dict[str, Any]:
    """Return what this server can do: search observations of one patient."""
    search = [{"name": "patient", "type": "reference"}, {"name": "code", "type": "token"}]
    resource = {"type": "Observation", "interaction": [{"code": "search-type"}], "searchParam": search}
    return {
        "resourceType": "CapabilityStatement",
        "status": "active",
        "date": _iso(now_s),
        "kind": "instance",
        "implementation": {"description": f"Islet node. {RESEARCH_LABEL}", "url": base},
        "fhirVersion": "4.0.1",
        "format": ["json"],
        "rest": [{"mode": "server", "resource": [resource]}],
    }


def _component(made: Forecast, name: str) -> dict[str, Any]:
    values = " ".join(f"{getattr(point, name):g}" for point in made.points)
    return {
        "code": {"coding": [{"system": FORECAST_SYSTEM, "code": f"{FORECAST_CODE}-{name}"}], "text": name},
        "valueSampledData": {
            "origin": _mg_dl(0.0),
            "period": made.interval_minutes * 60_000,
            "dimensions": 1,
            "data": values,
        },
    }


def _mg_dl(value: float) -> dict[str, Any]:
    return {"value": round(value, 1), "unit": "mg/dl", "system": "http://unitsofmeasure.org", "code": "mg/dL"}


def _reading_id(time_s: int) -> str:
    return f"reading-{time_s}"


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, tz=UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
