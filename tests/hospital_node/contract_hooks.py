"""What Schemathesis cannot know: who the node holds, and what a forecast can be made of. Half of the cases get it."""

from __future__ import annotations

import json
import zlib
from typing import Any

import schemathesis

from hospital_node.forecast_routes import ForecastRequest
from tests.hospital_node.contract import PATIENT, good_readings


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
    """Send readings that a forecast can be made of in place of others that are as valid."""
    try:
        ForecastRequest.model_validate_json(json.dumps(body))
    except (TypeError, ValueError):
        return body
    return {**body, "units": "mg/dL", "readings": good_readings()} if _chosen(body) else body
