"""What the endpoint says when it has no forecast to give: RFC 9457 problem details, one type per reason."""

from __future__ import annotations

import json
from typing import Any

from data_schemas.forecast import NoForecast
from data_schemas.frozen import Frozen
from data_schemas.units import RESEARCH_LABEL

PROBLEM_JSON = "application/problem+json"
PROBLEM_TYPE = "urn:islet:problem:"

# Reason -> (status, title, what to do).
NO_FORECAST: dict[NoForecast, tuple[int, str, str]] = {
    NoForecast.STALE: (409, "The newest reading is too old", "Send a reading of the last 12 minutes."),
    NoForecast.FUTURE: (409, "The newest reading lies in the future", "Check the clock and the UTC offset of the app."),
    NoForecast.TOO_LITTLE_HISTORY: (
        409,
        "Too little history",
        "Needed: readings over at least 60 minutes, the last two at most 30 minutes apart.",
    ),
    NoForecast.FLAT: (409, "The sensor has not changed for 45 minutes", "Check the sensor."),
    NoForecast.NOISY: (
        409,
        "The readings swing up and down as glucose cannot",
        "Check the sensor, and that only one sensor's readings are sent.",
    ),
    NoForecast.JUMP: (
        409,
        "Two readings differ by more than glucose can",
        "Wait until the last hour holds no such jump, and check the sensor.",
    ),
    NoForecast.OUT_OF_RANGE: (
        422,
        "A reading is outside 10 to 600 mg/dL",
        "Leave out sensor error codes; they are not glucose.",
    ),
    NoForecast.UNIT_SUSPECT: (
        422,
        "The readings do not look like the unit that was named",
        "Check `units`: mg/dL and mmol/L differ by a factor of 18.",
    ),
    NoForecast.NO_MODEL: (503, "This node has no model yet", "Ask the operator to export a model to the model folder."),
    NoForecast.UNKNOWN_PATIENT: (404, "The node holds no readings of this patient", "Check the pseudonym."),
}


INVALID_DETAIL = "See `errors`; values are not repeated."
HTTP_TITLES = {
    401: "Unauthorised",
    403: "Forbidden",
    404: "Not found",
    405: "Method not allowed",
    409: "Conflict",
    415: "Unsupported media type",
    422: "Request refused",
    429: "Rate limited",
}


class FieldProblem(Frozen):
    """Where a request is wrong: a JSON pointer, and what is expected there."""

    pointer: str
    expected: str


class Problem(Frozen):
    """RFC 9457 problem details. `reason` is set when there is no forecast; `use` is the standing label."""

    type: str
    title: str
    status: int
    detail: str
    reason: NoForecast | None = None
    errors: tuple[FieldProblem, ...] = ()
    use: str = RESEARCH_LABEL

    def to_bytes(self) -> bytes:
        """JSON of the fields that are set, and of the label."""
        return json.dumps(self.model_dump(mode="json", exclude_defaults=True) | {"use": self.use}).encode()


class Declined(Exception):
    """There is no forecast, and this is why."""

    def __init__(self, reason: NoForecast) -> None:
        super().__init__(reason.value)
        self.reason = reason


def field_problem(error: dict[str, Any]) -> FieldProblem:
    """Where and what, without the value; a name that we did not define is the sender's text and is left out too."""
    location = [str(part) for part in error["loc"]]
    if error["type"] in ("extra_forbidden", "json_invalid"):
        location = location[:-1]
    expected = "no other field" if error["type"] == "extra_forbidden" else str(error["msg"])
    return FieldProblem(pointer="/" + "/".join(location), expected=expected)


def problem(status: int, name: str, title: str, detail: str, **more: Any) -> Problem:
    """Make a problem of one of our types; more: `reason` or `errors`."""
    return Problem(type=PROBLEM_TYPE + name, title=title, status=status, detail=detail, **more)


def unusable_scenario(pointer: str, expected: str) -> Problem:
    """Make the problem of a scenario that fits no simulation now: not the newest reading's hour, or not this model.

    pointer: within the scenario.
    """
    found = (FieldProblem(pointer=f"/body/scenario{pointer}", expected=expected),)
    detail = "See `errors`; without `scenario` the same request is a plain forecast."
    return problem(409, "scenario-unusable", "This scenario cannot be simulated", detail, errors=found)


def no_forecast(reason: NoForecast) -> Problem:
    """Make the problem that a reason against a forecast is answered with."""
    status, title, detail = NO_FORECAST[reason]
    return problem(status, reason.value, title, detail, reason=reason)
