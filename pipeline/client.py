"""A typed client of the forecast endpoint, for researchers' programs: standard library and Islet's own types only.

    node = Client("http://127.0.0.1:8080", key)
    answer = node.forecast([(moment, 112.0), ...], "mg/dL")
    if isinstance(answer, Forecast): print(answer.points[-1].value)
    else: print(answer.reason)

The one module of this room that opens a connection, and only when it is called.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from pydantic import Field, TypeAdapter

from data_schemas.errors import BadInput
from data_schemas.forecast import Forecast, GlucoseUnit, NoForecast
from data_schemas.frozen import Frozen
from data_schemas.scenario import Scenario
from pipeline.model_card import ModelCard, read_card

TIMEOUT_SECONDS = 30.0
Rows = Iterable[tuple[datetime, float]]


class Refused(Frozen):
    """Why the node gave no forecast: its problem document. reason is None when the request itself was refused."""

    type: str
    title: str
    status: int
    detail: str
    reason: NoForecast | None = None
    retry_after_seconds: int | None = None


class Stored(Frozen):
    """The account of an upload; held: rows not accepted, each with its position and rule."""

    stored: int
    already_stored: int
    quarantined: int
    held: tuple[dict[str, Any], ...] = ()
    use: str = Field(default="")


_FORECAST: TypeAdapter[Forecast] = TypeAdapter(Forecast)


class Client:
    """One node, one key. Each call is a request of its own; safe to use from several threads."""

    def __init__(self, url: str, key: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise BadInput(
                "the node's address must start with http:// or https://", "give what `islet node serve` said"
            )
        self._secure, self._host, self._port = parts.scheme == "https", parts.hostname, parts.port
        self._base, self._key = parts.path.rstrip("/"), key

    def forecast(self, readings: Rows, units: GlucoseUnit, scenario: Scenario | None = None) -> Forecast | Refused:
        """Forecast from readings sent (moments with a UTC offset); the node stores nothing.

        With a scenario the answer's `simulation` is what the forecast would be if it happened; it is no advice.
        """
        return self._forecast("POST", "/v1/forecast", _body(readings, units, scenario))

    def stored_forecast(
        self, patient: str, units: GlucoseUnit = "mg/dL", as_of: datetime | None = None
    ) -> Forecast | Refused:
        """Forecast from the readings the node holds of a patient; as_of replays a past moment."""
        query = {"units": units} | ({} if as_of is None else {"as_of": as_of.isoformat()})
        return self._forecast("GET", f"/v1/patients/{quote(patient, safe='')}/forecast?{urlencode(query)}", None)

    def stored_what_if(self, patient: str, units: GlucoseUnit, scenario: Scenario) -> Forecast | Refused:
        """The same with the simulation of a scenario, whose moments lie in the hour after the newest reading."""
        body = json.dumps({"units": units, "scenario": _planned(scenario)}).encode()
        return self._forecast("POST", f"/v1/patients/{quote(patient, safe='')}/forecast", body)

    def add_readings(
        self, patient: str, readings: Rows, units: GlucoseUnit, idempotency_key: str | None = None
    ) -> Stored | Refused:
        """Send readings for the node to keep."""
        headers = {} if idempotency_key is None else {"Idempotency-Key": idempotency_key}
        path = f"/v1/patients/{quote(patient, safe='')}/readings"
        status, told, wait = self._ask("POST", path, _body(readings, units), headers)
        return Stored.model_validate(told) if status == 200 else _refused(told, wait)

    def model_card(self) -> ModelCard:
        """Return the card of the model that answers. Raises BadInput when the node has none."""
        return read_card(self._ask("GET", "/v1/model-card", None, {})[1])

    def events(self, patient: str, units: GlucoseUnit = "mg/dL", seen: str | None = None) -> Iterator[tuple[str, Any]]:
        """Yield (event, data) of the node's stream until it ends. seen: id of the last event of an earlier stream."""
        connection = self._connection()
        headers = self._headers() | ({} if seen is None else {"Last-Event-ID": seen})
        path = f"{self._base}/v1/stream?{urlencode({'patient': patient, 'units': units})}"
        try:
            connection.request("GET", path, headers=headers)
            answer, name = connection.getresponse(), "message"
            while line := answer.readline():
                field, _, value = line.decode().rstrip("\r\n").partition(": ")
                if field == "event":
                    name = value
                elif field == "data":
                    yield name, json.loads(value)
        finally:
            connection.close()

    def _forecast(self, method: str, path: str, body: bytes | None) -> Forecast | Refused:
        status, told, wait = self._ask(method, path, body, {})
        return _FORECAST.validate_python(told) if status == 200 else _refused(told, wait)

    def _ask(self, method: str, path: str, body: bytes | None, headers: dict[str, str]) -> tuple[int, Any, str | None]:
        connection = self._connection()
        try:
            connection.request(method, self._base + path, body, self._headers() | headers)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read()), answer.headers.get("Retry-After")
        finally:
            connection.close()

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._key}", "Content-Type": "application/json"}

    def _connection(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        return kind(self._host, self._port, timeout=TIMEOUT_SECONDS)


def _body(readings: Rows, units: GlucoseUnit, scenario: Scenario | None = None) -> bytes:
    rows = [{"at": at.isoformat(), "glucose": glucose} for at, glucose in readings]
    planned = {} if scenario is None else {"scenario": _planned(scenario)}
    return json.dumps({"readings": rows, "units": units, **planned}).encode()


def _planned(scenario: Scenario) -> dict[str, Any]:
    return scenario.model_dump(mode="json", exclude_none=True)


def _refused(told: Any, wait: str | None) -> Refused:
    fields = {name: told[name] for name in ("type", "title", "status", "detail", "reason") if name in told}
    return Refused.model_validate({**fields, "retry_after_seconds": wait})
