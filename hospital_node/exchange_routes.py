"""Routes in other systems' languages: Nightscout and FHIR R4. Annotations are evaluated: FastAPI reads them."""

from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from data_schemas.forecast import Forecast, NoForecast
from hospital_node import fhir_out, nightscout
from hospital_node.access import PATIENT, Caller, to_read, to_write
from hospital_node.api_keys import ALL_PATIENTS
from hospital_node.forecast_routes import Pseudonym, or_declined
from hospital_node.journal import STORED
from hospital_node.problems import Declined
from hospital_node.reading_routes import keep
from hospital_node.services import API_SECRET, BEARER, Services, described, problems
from hospital_node.store import ALREADY_STORED

FHIR_BASE = "/fhir/R4"


class FhirResponse(JSONResponse):
    """JSON under FHIR's own media type."""

    media_type = fhir_out.FHIR_JSON


Count = Annotated[int, Query(ge=1, le=nightscout.MOST_ENTRIES)]


def add_nightscout_routes(app: FastAPI, services: Services) -> None:
    """Add what a Nightscout uploader and a Nightscout display need."""

    async def upload(request: Request) -> Response:
        """Store the sensor readings among the entries; answer with those that are stored."""
        caller = services.guard.nightscout(request)
        request.scope[PATIENT] = caller.scope
        to_write(caller, caller.scope)
        entries = nightscout.read_entries(await request.body())
        if len(entries) > nightscout.MOST_ENTRIES:
            raise HTTPException(413, f"At most {nightscout.MOST_ENTRIES} entries at once.")
        rows = nightscout.sensor_rows(entries)
        outcome = await run_in_threadpool(keep, services, caller.scope, rows)
        kept = zip(rows, outcome.rows, strict=True)
        told = [
            nightscout.entry(caller.scope, int(at), value)
            for (at, value), what in kept
            if what in (STORED, ALREADY_STORED)
        ]
        return JSONResponse(told)

    async def listed(request: Request, count: Count = 10) -> Response:
        """The newest stored readings, newest first."""
        caller = services.guard.nightscout(request)
        request.scope[PATIENT] = caller.scope
        try:
            times, values = await services.stored(caller.scope)
        except Declined:
            return JSONResponse([])
        return JSONResponse(nightscout.newest_entries(caller.scope, times, values, count))

    extra = described(security=API_SECRET)
    one_or_many = {"schema": {"anyOf": [{"type": "array", "items": _ENTRY_SCHEMA}, _ENTRY_SCHEMA]}}
    sent: dict[str, Any] = {**extra, "requestBody": {"required": True, "content": {"application/json": one_or_many}}}
    refusals = problems(401, 403, 413, 422, 429, 503)
    for path, name in (("/api/v1/entries", "entries"), ("/api/v1/entries.json", "entries_json")):
        app.post(path, responses=refusals, operation_id=f"upload_{name}", openapi_extra=sent)(upload)
        app.get(path, responses=problems(401, 403, 422, 429), operation_id=name, openapi_extra=extra)(listed)

    @app.get("/api/v1/status.json", operation_id="nightscout_status")
    async def status() -> JSONResponse:
        """What an uploader asks before it sends."""
        return JSONResponse(nightscout.status_document(app.version, services.clock()))

    @app.get(
        "/v1/nightscout/devicestatus.json",
        responses=problems(401, 403, 404, 422, 429, 503),
        operation_id="devicestatus",
        openapi_extra=described(security=[*BEARER, *API_SECRET]),
    )
    async def devicestatus(request: Request, patient: Pseudonym | None = None) -> Response:
        """Forecast in the shape that Nightscout draws, or why there is none."""
        has_secret = "api-secret" in request.headers
        caller = services.guard.nightscout(request) if has_secret else services.guard.bearer(request)
        who = _patient(request, caller, patient)
        times, values = await services.stored(who)
        try:
            made: Forecast | NoForecast = await services.personal_forecast(who, (times, values), "mg/dL")
        except Declined as error:
            made = error.reason
        return JSONResponse(nightscout.device_status(made, float(values[-1]), services.clock()))


def add_fhir_routes(app: FastAPI, services: Services) -> None:
    """Add the FHIR R4 read of readings and forecast."""

    @app.get(f"{FHIR_BASE}/metadata", response_class=FhirResponse, operation_id="fhir_metadata")
    async def metadata(request: Request) -> JSONResponse:
        """Return the capability statement."""
        document = fhir_out.capability(_base(request), services.clock())
        return FhirResponse(document)

    @app.get(
        f"{FHIR_BASE}/Observation",
        response_class=FhirResponse,
        responses=problems(401, 403, 404, 409, 422, 429, 503),
        operation_id="fhir_observations",
        openapi_extra=described(security=BEARER),
    )
    async def observations(
        request: Request,
        patient: Pseudonym,
        code: Annotated[
            str,
            Query(
                pattern=fhir_out.CODES, description="99504-3 (readings) or glucose-forecast, after `system|` or bare."
            ),
        ] = fhir_out.READING_CODE,
        count: Annotated[int, Query(alias="_count", ge=1, le=nightscout.MOST_ENTRIES)] = 50,
    ) -> Response:
        """Search one patient's readings, newest first, or the present forecast."""
        request.scope[PATIENT] = patient
        to_read(services.guard.bearer(request), patient)
        times, values = await services.stored(patient)
        if code.rpartition("|")[2] == fhir_out.READING_CODE:
            found = fhir_out.newest(patient, times, values, count)
        else:
            made = or_declined(await services.personal_forecast(patient, (times, values), "mg/dL"))
            found = [fhir_out.forecast(patient, made)]
        return FhirResponse(fhir_out.bundle(found, _base(request)))


_ENTRY_SCHEMA: dict[str, Any] = nightscout.Entry.model_json_schema()


def _patient(request: Request, caller: Caller, asked: str | None) -> str:
    """The patient a request is about: the one asked for, or the one the credential is for."""
    who = asked or caller.scope
    if who == ALL_PATIENTS:
        raise HTTPException(422, "Name the `patient`: this credential is for all of them.")
    request.scope[PATIENT] = who
    to_read(caller, who)
    return who


def _base(request: Request) -> str:
    return str(request.base_url).rstrip("/") + FHIR_BASE
