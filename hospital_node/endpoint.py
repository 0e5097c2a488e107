"""The forecast endpoint of a node: HTTP in, a forecast or an RFC 9457 problem out. Never a dose, never an alarm.

No answer and no log line repeats a reading. Keys are compared in constant time; bodies are bounded before parsing.
Annotations are evaluated here, not postponed: FastAPI reads those of routes, which name things local to a function.
"""

import threading
import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import PlainTextResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import AwareDatetime, Field
from starlette.exceptions import HTTPException

from data_schemas.errors import BadInput
from data_schemas.forecast import Forecast, GlucoseUnit, NoForecast
from data_schemas.frozen import Frozen
from data_schemas.units import MG_DL_PER_MMOL_L, RESEARCH_LABEL
from hospital_node.api_keys import ApiKey, KeyRing
from hospital_node.problems import (
    HTTP_TITLES,
    INVALID_DETAIL,
    PROBLEM_JSON,
    Declined,
    Problem,
    field_problem,
    no_forecast,
    problem,
)
from hospital_node.store import Store
from hospital_node.traffic import OUTCOME, BodyLimit, Counted, Traffic
from pipeline.export import LoadedModel, load_model
from pipeline.forecasting import Float32, Int64, make_forecast
from pipeline.model_card import ModelCard
from pipeline.windows import Series


class Reading(Frozen):
    """One sensor reading: its moment, with a UTC offset, and glucose in the unit of the request."""

    at: AwareDatetime
    glucose: float = Field(gt=0)


class ForecastRequest(Frozen):
    """Readings of one person. They are used for the answer and not stored."""

    readings: tuple[Reading, ...] = Field(min_length=1, max_length=2000)
    units: GlucoseUnit


class Ready(Frozen):
    """The model that answers."""

    model_version: str
    model_hash: str


@dataclass(frozen=True, slots=True)
class Running:
    """A server that answers: its address, and how to end it after the requests in hand."""

    url: str
    stop: Callable[[], None]


class _Served:
    """The model that requests share, read as soon as its folder is there."""

    def __init__(self, model_folder: Path) -> None:
        self._folder = model_folder
        self._lock = threading.Lock()
        self._model: LoadedModel | None = None

    def find_model(self) -> LoadedModel | None:
        """Return the model, or None while its folder is not there. Raises BadInput or Tampered for a wrong folder."""
        with self._lock:
            if self._model is None and self._folder.exists():
                self._model = load_model(self._folder)
            return self._model

    def model(self) -> LoadedModel:
        """Return the model or decline."""
        if model := self.find_model():
            return model
        raise Declined(NoForecast.NO_MODEL)


class _Held:
    """The node's readings in memory, read again when an import has changed the store's catalogue."""

    def __init__(self, folder: Path) -> None:
        self._store = Store(folder)
        self._catalogue = folder / "catalogue.db"
        self._lock = threading.Lock()
        self._version: tuple[int, int] | None = None
        self._series = Series((), np.zeros(1, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))

    def readings(self, pseudonym: str) -> tuple[Int64, Float32]:
        """Return one person's epoch seconds int64[N] and mg/dL float32[N], interpolated rows left out, or decline."""
        series = self._current()
        at = bisect_left(series.patients, pseudonym)
        if series.patients[at : at + 1] != (pseudonym,):
            raise Declined(NoForecast.UNKNOWN_PATIENT)
        rows = slice(series.starts[at], series.starts[at + 1])
        return series.time_s[rows], series.glucose_mg_dl[rows]

    def _current(self) -> Series:
        with self._lock:
            status = self._catalogue.stat()
            version = status.st_mtime_ns, status.st_size
            if version != self._version:
                self._series, self._version = self._store.series(), version
            return self._series


def create_app(node_home: Path, model_folder: Path, clock: Callable[[], float] = time.time) -> FastAPI:
    """Make the endpoint's ASGI application. clock: UTC epoch seconds.

    While model_folder is absent it answers 503; a folder that is no sound model folder raises BadInput or Tampered.
    """
    if not (node_home / "node.toml").exists():
        raise BadInput(f"{node_home} is not a node folder", "make one with `islet node init`")
    served, held, ring = _Served(model_folder), _Held(node_home / "store"), KeyRing(node_home)
    served.find_model()
    traffic = Traffic()
    app = FastAPI(
        title="Islet forecast endpoint",
        version="1",
        summary=RESEARCH_LABEL,
        description="Glucose 5 to 60 minutes ahead, with quantiles, or the reason why there is no forecast.",
        docs_url=None,
        redoc_url=None,
    )
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    _add_problem_handlers(app)
    _add_forecast_routes(app, served, held, ring, clock)
    _add_status_routes(app, served, traffic)
    app.add_middleware(BodyLimit)
    app.add_middleware(Counted, traffic=traffic)
    return app


def serve(
    node_home: Path,
    model_folder: Path,
    host: str = "127.0.0.1",
    port: int = 8080,
    ready: Callable[[Running], None] | None = None,
) -> None:
    """Serve until stopped (SIGINT, SIGTERM, or Running.stop); requests in hand are finished. port 0 takes a free one.

    ready is called once the port answers. There is no access log. Raises BadInput when the port cannot be had.
    """
    import uvicorn

    class _Server(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            if ready is not None and self.started:
                taken = self.servers[0].sockets[0].getsockname()[1]
                ready(Running(f"http://{_in_url(host)}:{taken}", self._stop))

        def _stop(self) -> None:
            self.should_exit = True

    config = uvicorn.Config(
        create_app(node_home, model_folder),
        host=host,
        port=port,
        workers=1,
        access_log=False,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=10,
    )
    server = _Server(config)
    try:
        server.run()
    except KeyboardInterrupt:
        return  # uvicorn has finished the requests in hand and passes the signal on
    except SystemExit:
        raise BadInput(f"port {port} on {host} cannot be had", "another program uses it: give another port") from None


def _add_forecast_routes(app: FastAPI, served: _Served, held: _Held, ring: KeyRing, clock: Callable[[], float]) -> None:
    bearer = HTTPBearer(auto_error=False, description="An API key of this node.")

    def known_key(given: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]) -> ApiKey:
        key = ring.find(given.credentials) if given is not None else None
        if key is None:
            raise HTTPException(401, "Send `Authorization: Bearer <API key>`; the operator of the node creates keys.")
        return key

    @app.post("/v1/forecast", responses=_problems(401, 409, 413, 422, 503), operation_id="forecast")
    def forecast(body: ForecastRequest, _key: Annotated[ApiKey, Depends(known_key)]) -> Forecast:
        """Forecast from the readings sent; nothing is stored."""
        time_s, glucose = _arrays(body)
        return _or_declined(make_forecast(served.model(), time_s, glucose, clock(), body.units))

    @app.get(
        "/v1/patients/{pseudonym}/forecast",
        responses=_problems(401, 403, 404, 409, 422, 503),
        operation_id="stored_forecast",
    )
    def stored_forecast(
        pseudonym: str,
        key: Annotated[ApiKey, Depends(known_key)],
        units: GlucoseUnit = "mg/dL",
        as_of: Annotated[
            AwareDatetime | None,
            Query(
                description="Replay: answer as at this past moment. Later readings are hidden; the answer repeats it."
            ),
        ] = None,
    ) -> Forecast:
        """Forecast from the readings the node holds."""
        if not key.allows(pseudonym):
            raise HTTPException(403, "This API key is for another patient.")
        model, now_s = served.model(), clock()
        as_of_s = None if as_of is None else as_of.timestamp()
        if as_of_s is not None and as_of_s > now_s:
            raise HTTPException(422, "`as_of` must not lie in the future.")
        time_s, glucose = held.readings(pseudonym)
        return _or_declined(make_forecast(model, time_s, glucose, now_s, units, as_of_s=as_of_s))


def _add_status_routes(app: FastAPI, served: _Served, traffic: Traffic) -> None:
    @app.get("/v1/model-card", responses=_problems(503), operation_id="model_card")
    def model_card() -> ModelCard:
        """Return the card of the model that answers: training, privacy, results, limits."""
        return served.model().card

    @app.get("/healthz", operation_id="healthz")
    def healthz() -> dict[str, str]:
        """Tell that the process runs."""
        return {"status": "ok"}

    @app.get("/readyz", responses=_problems(503), operation_id="readyz")
    def readyz() -> Ready:
        """Tell that a verified model is loaded."""
        model = served.model()
        return Ready(model_version=model.card.version, model_hash=model.model_hash)

    @app.get("/metrics", response_class=PlainTextResponse, operation_id="metrics")
    def metrics() -> PlainTextResponse:
        """Prometheus counters; no reading and no pseudonym is in them."""
        model = served.find_model()
        labels = None if model is None else (model.card.version, model.model_hash)
        return PlainTextResponse(traffic.metrics(labels), media_type="text/plain; version=0.0.4")


def _add_problem_handlers(app: FastAPI) -> None:
    @app.exception_handler(Declined)
    def declined(request: Request, error: Declined) -> Response:
        request.scope[OUTCOME] = error.reason.value
        return _answer(no_forecast(error.reason))

    @app.exception_handler(HTTPException)
    def refused(_request: Request, error: HTTPException) -> Response:
        title = HTTP_TITLES.get(error.status_code, "Request refused")
        name = title.lower().replace(" ", "-")
        challenge = {"WWW-Authenticate": "Bearer"} if error.status_code == 401 else {}
        headers = {**(error.headers or {}), **challenge}
        return _answer(problem(error.status_code, name, title, str(error.detail)), headers)

    @app.exception_handler(RequestValidationError)
    def invalid(_request: Request, error: RequestValidationError) -> Response:
        errors = tuple(field_problem(e) for e in error.errors()[:20])
        return _answer(problem(422, "invalid-request", "Invalid request", INVALID_DETAIL, errors=errors))

    @app.exception_handler(Exception)
    def failed(_request: Request, _error: Exception) -> Response:
        return _answer(problem(500, "internal", "Internal error", "The node's log has the cause."))


def _answer(told: Problem, headers: dict[str, str] | None = None) -> Response:
    return Response(told.to_bytes(), told.status, headers, media_type=PROBLEM_JSON)


def _arrays(body: ForecastRequest) -> tuple[Int64, Float32]:
    """Epoch seconds int64[N] and mg/dL float32[N]."""
    factor = 1.0 if body.units == "mg/dL" else MG_DL_PER_MMOL_L
    time_s = np.array([int(r.at.timestamp()) for r in body.readings], dtype=np.int64)
    return time_s, np.array([r.glucose * factor for r in body.readings], dtype=np.float32)


def _or_declined(answer: Forecast | NoForecast) -> Forecast:
    if isinstance(answer, NoForecast):
        raise Declined(answer)
    return answer


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI responses: a Problem under its own media type."""
    content = {PROBLEM_JSON: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {status: {"description": "Problem (RFC 9457)", "content": content} for status in statuses}


def _openapi(app: FastAPI) -> dict[str, Any]:
    """OpenAPI 3.1 with the Problem schema that no route returns by type."""
    if not app.openapi_schema:
        schema = get_openapi(
            title=app.title, version=app.version, summary=app.summary, description=app.description, routes=app.routes
        )
        problem = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas = schema["components"]["schemas"]
        schemas |= problem.pop("$defs", {}) | {"Problem": problem}
        for unused in ("HTTPValidationError", "ValidationError"):
            schemas.pop(unused, None)
        app.openapi_schema = schema
    return app.openapi_schema


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host
