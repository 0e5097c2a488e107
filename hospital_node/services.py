"""What the routes of the endpoint share, and how they read a body and write an answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from data_schemas.forecast import Forecast, GlucoseUnit, NoForecast
from data_schemas.scenario import Scenario
from hospital_node.access import Guard
from hospital_node.audit_log import AuditLog
from hospital_node.credit_proof import ProofDesk
from hospital_node.held_readings import HeldReadings
from hospital_node.own_patients import OwnPatients
from hospital_node.personal import PersonalAdaptations
from hospital_node.problems import PROBLEM_JSON
from hospital_node.published_model import PublishedModels
from hospital_node.served_model import ServedModel
from hospital_node.traffic import Traffic
from pipeline.adaptation import Adaptation
from pipeline.forecasting import Float32, Int64, make_forecast

Body = TypeVar("Body", bound=BaseModel)
Security = list[dict[str, list[str]]]
BEARER: Security = [{"bearer": []}]
API_SECRET: Security = [{"apiSecret": []}]


@dataclass(frozen=True, slots=True)
class Services:
    """Everything a route may use. clock: UTC epoch seconds; challenger: the model compared with the served one."""

    home: Path
    served: ServedModel
    published: PublishedModels
    held: HeldReadings
    personal: PersonalAdaptations
    guard: Guard
    audit: AuditLog
    traffic: Traffic
    clock: Callable[[], float]
    challenger: ServedModel | None
    proofs: ProofDesk
    own: OwnPatients

    async def stored(self, pseudonym: str) -> tuple[Int64, Float32]:
        """Return one person's readings; reading a changed store again leaves the loop to others."""
        if self.held.is_current():
            return self.held.readings(pseudonym)
        return await run_in_threadpool(self.held.readings, pseudonym)

    async def personal_forecast(
        self,
        pseudonym: str,
        readings: tuple[Int64, Float32],
        units: GlucoseUnit,
        as_of_s: float | None = None,
        scenario: Scenario | None = None,
    ) -> Forecast | NoForecast:
        """Forecast from a person's stored readings, corrected from that person's own past. May decline."""
        model, moment = self.served.model(), self.clock() if as_of_s is None else as_of_s
        adaptation = self.personal.kept(model, pseudonym, moment)
        if adaptation is None:
            adaptation = await run_in_threadpool(self.personal.learn, model, pseudonym, readings, moment)
        return self.forecast(readings, units, as_of_s=as_of_s, adaptation=adaptation, scenario=scenario)

    def forecast(
        self,
        readings: tuple[Int64, Float32],
        units: GlucoseUnit,
        *,
        as_of_s: float | None = None,
        adaptation: Adaptation | None = None,
        scenario: Scenario | None = None,
    ) -> Forecast | NoForecast:
        """Forecast with the model that answers now, or the reason against it; see make_forecast. May decline."""
        model = self.served.model()
        place = self.published.place(model.model_hash)
        return make_forecast(
            model,
            *readings,
            self.clock(),
            units,
            as_of_s=as_of_s,
            adaptation=adaptation,
            ledger_entry=place,
            scenario=scenario,
        )


async def read_body(request: Request, expected: type[Body]) -> Body:
    """Parse a JSON body straight from its bytes, which costs half of parsing it twice.

    Raises HTTPException 415 for another media type and ValidationError for what does not fit.
    """
    media = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if media != "application/json" and not media.endswith("+json"):
        raise HTTPException(415, "Send JSON: `Content-Type: application/json`.")
    return expected.model_validate_json(await request.body())


def json_answer(value: BaseModel, status: int = 200, media_type: str = "application/json") -> Response:
    """Answer with a value that was validated when it was made."""
    return Response(value.__pydantic_serializer__.to_json(value), status, media_type=media_type)


def body_errors(error: ValidationError) -> list[dict[str, Any]]:
    """What is wrong with a body, in FastAPI's shape, without the input."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    return [{**e, "loc": ("body", *(e["loc"] or (0,) * (e["type"] == "json_invalid")))} for e in found]


def described(model: type[BaseModel] | None = None, security: Security | None = None) -> dict[str, Any]:
    """OpenAPI of a route that reads its own body: its schema by name, and the credential it asks for."""
    extra: dict[str, Any] = {} if security is None else {"security": security}
    if model is not None:
        schema = {"$ref": f"#/components/schemas/{model.__name__}"}
        extra["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return extra


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI responses: a Problem under its own media type."""
    content = {PROBLEM_JSON: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {status: {"description": "Problem (RFC 9457)", "content": content} for status in statuses}
