"""Routes that forecast, and those that tell how the node is. Annotations are evaluated: FastAPI reads them."""

from datetime import UTC, datetime
from typing import Annotated

import numpy as np
from fastapi import FastAPI, Query, Request, Response
from fastapi.responses import PlainTextResponse
from pydantic import Field, StringConstraints
from starlette.exceptions import HTTPException

from data_schemas.forecast import Forecast, GlucoseUnit, NoForecast
from data_schemas.frozen import Frozen
from data_schemas.moment import Moment
from data_schemas.scenario import Scenario
from data_schemas.units import MG_DL_PER_MMOL_L
from hospital_node.access import to_read
from hospital_node.problems import Declined
from hospital_node.services import BEARER, Services, described, json_answer, problems, read_body
from hospital_node.task_record import task_metrics
from hospital_node.traffic import Direct
from pipeline.forecasting import Float32, Int64
from pipeline.model_card import ModelCard
from pipeline.prometheus import MEDIA_TYPE, render

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
Pseudonym = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{1,128}$")]


class Reading(Frozen, strict=True):
    """One sensor reading: its moment, with a UTC offset, and glucose in the unit of the request."""

    at: Moment
    glucose: float = Field(gt=0, le=10_000)


class ForecastRequest(Frozen, strict=True):
    """Readings of one person. They are used for the answer and not stored.

    With a scenario the answer also holds a labelled simulation of it, which is no advice.
    """

    readings: tuple[Reading, ...] = Field(min_length=1, max_length=2000)
    units: GlucoseUnit
    scenario: Scenario | None = None


class WhatIfRequest(Frozen, strict=True):
    """A plan to simulate beside the forecast from a person's stored readings; units are those of plan and answer."""

    units: GlucoseUnit
    scenario: Scenario


class Ready(Frozen):
    """The model that answers."""

    model_version: str
    model_hash: str


def add_forecast_routes(app: FastAPI, services: Services) -> None:
    """Add the forecast from sent and from stored readings."""

    @app.post(
        "/v1/forecast",
        response_model=Forecast,
        responses=problems(401, 403, 409, 413, 415, 422, 429, 503),
        operation_id="forecast",
        openapi_extra=described(ForecastRequest, BEARER),
    )
    async def forecast(request: Request) -> Response:
        """Forecast from the readings sent; nothing is stored."""
        if not services.guard.bearer(request).reads:
            raise HTTPException(403, "This credential may not read.")
        body = await read_body(request, ForecastRequest)
        return json_answer(or_declined(services.forecast(arrays(body), body.units, scenario=body.scenario)))

    app.add_middleware(Direct, path="/v1/forecast", answer=forecast, handlers=app.exception_handlers)

    @app.get(
        "/v1/patients/{pseudonym}/forecast",
        response_model=Forecast,
        responses=problems(401, 403, 404, 409, 422, 429, 503),
        operation_id="stored_forecast",
        openapi_extra=described(security=BEARER),
    )
    async def stored_forecast(
        request: Request,
        pseudonym: Pseudonym,
        units: GlucoseUnit = "mg/dL",
        as_of: Annotated[
            Moment | None,
            Query(
                description="Replay: answer as at this past moment. Later readings are hidden; the answer repeats it."
            ),
        ] = None,
        plain: Annotated[
            bool, Query(description="The model alone, without what this person's own past taught.")
        ] = False,
    ) -> Response:
        """Forecast from the readings the node holds, corrected from this person's own past."""
        to_read(services.guard.bearer(request), pseudonym)
        as_of_s = None if as_of is None else as_of.timestamp()
        if as_of_s is not None and as_of_s > services.clock():
            raise HTTPException(409, "`as_of` must not lie in the future.")
        readings = await services.stored(pseudonym)
        if plain:
            return json_answer(or_declined(services.forecast(readings, units, as_of_s=as_of_s)))
        return json_answer(or_declined(await services.personal_forecast(pseudonym, readings, units, as_of_s)))

    @app.post(
        "/v1/patients/{pseudonym}/forecast",
        response_model=Forecast,
        responses=problems(401, 403, 404, 409, 413, 415, 422, 429, 503),
        operation_id="stored_what_if",
        openapi_extra=described(WhatIfRequest, BEARER),
    )
    async def stored_what_if(request: Request, pseudonym: Pseudonym) -> Response:
        """Forecast from the readings the node holds, and the labelled simulation of a plan. Nothing is stored."""
        to_read(services.guard.bearer(request), pseudonym)
        body = await read_body(request, WhatIfRequest)
        readings = await services.stored(pseudonym)
        made = await services.personal_forecast(pseudonym, readings, body.units, scenario=body.scenario)
        return json_answer(or_declined(made))


def add_status_routes(app: FastAPI, services: Services) -> None:
    """Add what needs no credential: it tells about the node and its model, never about a person."""

    @app.get("/v1/model-card", responses=problems(503), operation_id="model_card")
    async def model_card() -> ModelCard:
        """Return the card of the model that answers: training, privacy, results, limits."""
        return services.served.model().card

    @app.get("/healthz", operation_id="healthz")
    async def healthz() -> dict[str, str]:
        """Tell that the process runs."""
        return {"status": "ok"}

    @app.get("/readyz", responses=problems(503), operation_id="readyz")
    async def readyz() -> Ready:
        """Tell that a verified model is loaded."""
        model = services.served.model()
        return Ready(model_version=model.card.version, model_hash=model.model_hash)

    @app.get("/metrics", response_class=PlainTextResponse, operation_id="metrics")
    async def metrics() -> PlainTextResponse:
        """Prometheus counters; no reading and no pseudonym is in them."""
        model = services.served.find()
        labels = None if model is None else (model.card.version, model.model_hash)
        more = {"islet_models_refused_total": services.served.refused, "islet_audit_lost_total": services.audit.lost}
        text = services.traffic.metrics(labels, more) + render(task_metrics(services.home))
        return PlainTextResponse(text, media_type=MEDIA_TYPE)


def arrays(body: ForecastRequest) -> tuple[Int64, Float32]:
    """Epoch seconds int64[N] and mg/dL float32[N]."""
    factor = 1.0 if body.units == "mg/dL" else MG_DL_PER_MMOL_L
    since = [r.at - _EPOCH for r in body.readings]
    times = np.array([gone.days * 86_400 + gone.seconds for gone in since], dtype=np.int64)
    return times, (np.array([r.glucose for r in body.readings]) * factor).astype(np.float32)


def or_declined(answer: Forecast | NoForecast) -> Forecast:
    """Return the forecast, or raise the reason against it."""
    if isinstance(answer, NoForecast):
        raise Declined(answer)
    return answer
