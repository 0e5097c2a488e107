"""What Schemathesis cannot know: who the node holds, and what a forecast can be made of. Half of the cases get it."""

from __future__ import annotations

import json
import zlib
from datetime import timedelta
from typing import Any

import schemathesis

from hospital_node.forecast_routes import ForecastRequest, WhatIfRequest
from tests.hospital_node.contract import NEWEST, PATIENT, good_readings

SOON = (NEWEST + timedelta(minutes=10)).isoformat()


def _chosen(value: object) -> bool:
    return zlib.crc32(repr(value).encode()) % 2 == 0


@schemathesis.hook
def map_path_parameters(context: Any, path_parameters: Any) -> Any:
    """Ask about somebody the node holds."""
    if path_parameters and "pseudonym" in path_parameters and _chosen(path_parameters):
        path_parameters["pseudonym"] = PATIENT
    return path_parameters


@schemathesis.hook
def map_query(context: Any, query: Any) -> Any:
    """Ask about somebody the node holds."""
    if query and isinstance(query.get("patient"), str) and _chosen(query):
        query["patient"] = PATIENT
    return query


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    """Send readings and a plan that a forecast can be made of in place of others that are as valid."""
    if _fits(ForecastRequest, body) and _chosen(body):
        return body | {"units": "mg/dL", "readings": good_readings()} | _near_plan(body)
    if _fits(WhatIfRequest, body) and _chosen(body):
        return body | _near_plan(body)
    return body


def _fits(request: type[ForecastRequest | WhatIfRequest], body: object) -> bool:
    try:
        request.model_validate_json(json.dumps(body))
    except (TypeError, ValueError):
        return False
    return True


def _near_plan(body: dict[str, Any]) -> dict[str, Any]:
    """The body's plan, if any, moved into the hour after the newest reading, for a person whose numbers are known."""
    if body.get("scenario") is None:
        return {}
    planned = [event | {"at": SOON} for event in body["scenario"]["planned"]]
    known = {"insulin_sensitivity": 40, "carbohydrate_ratio": 10}
    return {"scenario": body["scenario"] | known | {"planned": planned}}
