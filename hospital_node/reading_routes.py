"""Routes that take readings in and stream what follows from them. Annotations are evaluated: FastAPI reads them."""

import hashlib
from collections.abc import AsyncIterator, Sequence
from typing import Annotated

from fastapi import FastAPI, Header, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from data_schemas.forecast import GlucoseUnit
from data_schemas.frozen import Frozen
from data_schemas.units import MG_DL_PER_MMOL_L, RESEARCH_LABEL
from hospital_node.access import PATIENT, to_read, to_write
from hospital_node.forecast_routes import Pseudonym, Reading
from hospital_node.journal import STORED, KeyReused, Outcome
from hospital_node.services import BEARER, Services, described, json_answer, problems, read_body
from hospital_node.store import ALREADY_STORED
from hospital_node.stream import events


class ReadingsUpload(Frozen, strict=True):
    """Readings of one person, to be kept by the node."""

    readings: tuple[Reading, ...] = Field(min_length=1, max_length=2000)
    units: GlucoseUnit


class RowHeld(Frozen):
    """A row that was not accepted: its position in the request, from 0, and the rule it broke."""

    row: int
    rule: str


class ReadingsKept(Frozen):
    """The account of one upload: stored + already_stored + quarantined = rows sent."""

    stored: int
    already_stored: int
    quarantined: int
    held: tuple[RowHeld, ...] = ()
    use: str = RESEARCH_LABEL


def add_reading_routes(app: FastAPI, services: Services) -> None:
    """Add the upload of readings and the stream of forecasts."""

    @app.post(
        "/v1/patients/{pseudonym}/readings",
        response_model=ReadingsKept,
        responses=problems(401, 403, 409, 413, 415, 422, 429, 503),
        operation_id="add_readings",
        openapi_extra=described(ReadingsUpload, BEARER),
    )
    async def add_readings(
        request: Request,
        pseudonym: Pseudonym,
        idempotency_key: Annotated[str | None, Header(min_length=1, max_length=200)] = None,
    ) -> Response:
        """Store readings. Sending the same again changes nothing; an Idempotency-Key repeats the answer too."""
        caller = services.guard.bearer(request)
        to_write(caller, pseudonym)
        body = await read_body(request, ReadingsUpload)
        digest = hashlib.sha256(pseudonym.encode() + b"\0" + await request.body()).hexdigest()
        key = None if idempotency_key is None else f"{caller.who} {idempotency_key}"
        kept = await run_in_threadpool(_keep_once, services, pseudonym, body, key, digest)
        return Response(kept, media_type="application/json")

    @app.get(
        "/v1/stream",
        response_class=StreamingResponse,
        responses={
            **problems(401, 403, 404, 422, 429),
            200: {"description": "Server-sent events", "content": {"text/event-stream": {}}},
        },
        operation_id="stream",
        openapi_extra=described(security=BEARER),
    )
    async def stream(
        request: Request,
        patient: Annotated[Pseudonym, Query(description="Pseudonym; the credential must be for this patient.")],
        units: GlucoseUnit = "mg/dL",
        last_event_id: Annotated[str | None, Header(max_length=200)] = None,
    ) -> StreamingResponse:
        """Stream events: `forecast` with each new reading, `stale` when none came, `model` when another answers."""
        request.scope[PATIENT] = patient
        to_read(services.guard.bearer(request), patient)
        await services.stored(patient)
        body: AsyncIterator[str] = events(services, patient, units, last_event_id)
        return StreamingResponse(body, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})


def keep(services: Services, pseudonym: str, readings: Sequence[tuple[float, float]]) -> Outcome:
    """Store (epoch seconds, mg/dL) of one person."""
    rows = [(int(at), glucose) for at, glucose in readings]
    return services.held.add(pseudonym, rows, services.clock())


def _keep_once(services: Services, pseudonym: str, body: ReadingsUpload, key: str | None, digest: str) -> bytes:
    """Keep an upload, or repeat the answer that its Idempotency-Key got before."""
    journal = services.held.journal
    if key is not None:
        try:
            earlier = journal.replayed(key, digest)
        except KeyReused:
            raise HTTPException(409, "This Idempotency-Key came before with another body.") from None
        if earlier is not None:
            return earlier
    factor = 1.0 if body.units == "mg/dL" else MG_DL_PER_MMOL_L
    told = account(keep(services, pseudonym, [(r.at.timestamp(), r.glucose * factor) for r in body.readings]))
    reply = bytes(json_answer(told).body)
    if key is not None:
        journal.remember(key, digest, reply, services.clock())
    return reply


def account(outcome: Outcome) -> ReadingsKept:
    """Count what became of the rows."""
    held = tuple(
        RowHeld(row=n, rule=what) for n, what in enumerate(outcome.rows) if what not in (STORED, ALREADY_STORED)
    )
    return ReadingsKept(
        stored=outcome.count(STORED),
        already_stored=outcome.count(ALREADY_STORED),
        quarantined=len(held),
        held=held,
    )
