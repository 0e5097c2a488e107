"""The forecast endpoint of a node: HTTP in, a forecast or an RFC 9457 problem out. Never a dose, never an alarm.

No answer and no log line repeats a reading. Keys are compared in constant time; bodies are bounded before parsing.
Annotations are evaluated here, not postponed: FastAPI reads those of routes, which name things local to a function.
"""

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.routing import Route

from data_schemas.errors import BadInput, StorageFailed
from data_schemas.frozen import Frozen
from data_schemas.units import RESEARCH_LABEL
from hospital_node import champion
from hospital_node.access import Guard
from hospital_node.audit_log import AuditLog
from hospital_node.credit_proof import ProofDesk
from hospital_node.exchange_routes import add_fhir_routes, add_nightscout_routes
from hospital_node.forecast_routes import ForecastRequest, WhatIfRequest, add_forecast_routes, add_status_routes
from hospital_node.held_readings import HeldReadings
from hospital_node.own_patients import OwnPatients
from hospital_node.page_routes import add_page_routes
from hospital_node.personal import PersonalAdaptations
from hospital_node.problems import (
    HTTP_TITLES,
    INVALID_DETAIL,
    PROBLEM_JSON,
    Declined,
    Problem,
    field_problem,
    no_forecast,
    problem,
    unusable_scenario,
)
from hospital_node.published_model import PublishedModels
from hospital_node.rate_limit import RateLimit
from hospital_node.reading_routes import ReadingsUpload, add_reading_routes
from hospital_node.served_model import ServedModel
from hospital_node.services import Services, body_errors
from hospital_node.switch_routes import add_switch_routes
from hospital_node.traffic import OUTCOME, BodyLimit, Counted, Traffic
from pipeline.what_if import UnusableScenario

_BODIES: tuple[type[Frozen], ...] = (ForecastRequest, WhatIfRequest, ReadingsUpload)
# Containers made before the garbage collector looks at the young ones again: about twenty answers' worth.
GC_OBJECTS = 20_000
# The journal is folded into the store at this many readings, and after this long at the latest.
FOLD_ROWS, FOLD_SECONDS, FOLD_LOOK_SECONDS = 20_000, 3600.0, 5.0
_SECURITY = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "An API key of this node, or a token (JWT)."},
    "apiSecret": {
        "type": "apiKey",
        "in": "header",
        "name": "api-secret",
        "description": "A key for one patient, or its SHA-1 in hexadecimal, as Nightscout uploaders send it.",
    },
}


@dataclass(frozen=True, slots=True)
class Running:
    """A server that answers: its address, and how to end it after the requests in hand."""

    url: str
    stop: Callable[[], None]


def create_app(
    node_home: Path,
    model_folder: Path | None = None,
    clock: Callable[[], float] = time.time,
    limit: RateLimit = RateLimit(),  # noqa: B008 a frozen value
    challenger: Path | None = None,
) -> FastAPI:
    """Make the endpoint's ASGI application. clock: UTC epoch seconds; limit: requests of one caller.

    model_folder: for a node that follows no ledger; one that does serves the champion that the members decided. While
    there is none the answer is 503; a folder that is not sound, or was not decided, raises BadInput or CheckFailed.
    challenger: folder of the model that the clinic's page compares with the one that answers.
    """
    if not (node_home / "node.toml").exists():
        raise BadInput(f"{node_home} is not a node folder", "make one with `islet node init`")
    services = Services(
        home=node_home,
        published=PublishedModels(node_home),
        served=ServedModel(
            champion.folder_to_serve(node_home, model_folder), decided=partial(champion.is_champion, node_home)
        ),
        held=HeldReadings(node_home / "store"),
        personal=PersonalAdaptations(),
        guard=Guard(node_home, clock, limit),
        audit=AuditLog(node_home / "reports" / "access.jsonl"),
        traffic=Traffic(),
        clock=clock,
        challenger=None if challenger is None else ServedModel(challenger),
        proofs=ProofDesk(node_home),
        own=OwnPatients(),
    )
    services.served.find()
    app = FastAPI(
        title="Islet forecast endpoint",
        version="1",
        summary=RESEARCH_LABEL,
        description="Glucose 5 to 60 minutes ahead, with quantiles, or the reason why there is no forecast.",
        docs_url=None,
        redoc_url=None,
        lifespan=lambda _app: _folding(services),
    )
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    _add_problem_handlers(app)
    add_forecast_routes(app, services)
    add_reading_routes(app, services)
    add_nightscout_routes(app, services)
    add_fhir_routes(app, services)
    add_page_routes(app, services)
    add_switch_routes(app, services)
    add_status_routes(app, services)
    app.add_middleware(BodyLimit)
    app.add_middleware(Counted, traffic=services.traffic, audit=services.audit, clock=clock)
    return app


def serve(
    node_home: Path,
    model_folder: Path | None = None,
    host: str = "127.0.0.1",
    port: int = 8080,
    ready: Callable[[Running], None] | None = None,
    limit: RateLimit = RateLimit(),  # noqa: B008 a frozen value
    challenger: Path | None = None,
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
        create_app(node_home, model_folder, limit=limit, challenger=challenger),
        host=host,
        port=port,
        workers=1,
        access_log=False,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=10,
    )
    server = _Server(config)
    # What is loaded by now stays, and an answer makes a thousand objects that die with it: the collector need not walk
    # through the former again and again, nor look twice within each request.
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_OBJECTS)
    try:
        server.run()
    except KeyboardInterrupt:
        return  # uvicorn has finished the requests in hand and passes the signal on
    except SystemExit:
        raise BadInput(f"port {port} on {host} cannot be had", "another program uses it: give another port") from None


@asynccontextmanager
async def _folding(services: Services) -> AsyncIterator[None]:
    """While the endpoint runs, move what apps sent into the store: when enough has gathered, hourly, and at the end."""
    over = asyncio.Event()

    async def fold() -> None:
        since = time.monotonic()
        while not over.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), FOLD_LOOK_SECONDS)
            late = time.monotonic() - since >= FOLD_SECONDS
            if over.is_set() or late or len(services.held.journal) >= FOLD_ROWS:
                since = time.monotonic()
                with suppress(StorageFailed):  # what waits is safe in the journal; the next turn tries again
                    await run_in_threadpool(services.held.fold)

    task = asyncio.create_task(fold())
    yield
    over.set()
    await task
    services.audit.close()


def _add_problem_handlers(app: FastAPI) -> None:
    @app.exception_handler(Declined)
    async def declined(request: Request, error: Declined) -> Response:
        request.scope[OUTCOME] = error.reason.value
        return _answer(no_forecast(error.reason))

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        title = HTTP_TITLES.get(error.status_code, "Request refused")
        name = title.lower().replace(" ", "-")
        challenge = {"WWW-Authenticate": "Bearer"} if error.status_code == 401 else {}
        allow = {"Allow": _methods(app, request.url.path)} if error.status_code == 405 else {}
        headers = {**(error.headers or {}), **challenge, **allow}
        return _answer(problem(error.status_code, name, title, str(error.detail)), headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> Response:
        return _invalid(error.errors())

    @app.exception_handler(ValidationError)
    async def invalid_body(_request: Request, error: ValidationError) -> Response:
        return _invalid(body_errors(error))

    @app.exception_handler(UnusableScenario)
    async def unusable(_request: Request, error: UnusableScenario) -> Response:
        return _answer(unusable_scenario(error.pointer, error.expected))

    @app.exception_handler(StorageFailed)
    async def full(_request: Request, _error: StorageFailed) -> Response:
        return _answer(problem(503, "storage-failed", "Nothing was stored", "The node's disk refused; send it again."))

    @app.exception_handler(Exception)
    async def failed(_request: Request, _error: Exception) -> Response:
        return _answer(problem(500, "internal", "Internal error", "The node's log has the cause."))


def _methods(app: FastAPI, path: str) -> str:
    """Every method of a path, as RFC 9110 (15.5.6) wants; a router knows those of its first match only."""
    routes = [route for route in app.routes if isinstance(route, Route) and route.path_regex.match(path)]
    return ", ".join(sorted({method for route in routes for method in route.methods or ()}))


def _answer(told: Problem, headers: dict[str, str] | None = None) -> Response:
    return Response(told.to_bytes(), told.status, headers, media_type=PROBLEM_JSON)


def _invalid(errors: Any) -> Response:
    found = tuple(field_problem(e) for e in errors[:20])
    return _answer(problem(422, "invalid-request", "Invalid request", INVALID_DETAIL, errors=found))


def _openapi(app: FastAPI) -> dict[str, Any]:
    """OpenAPI 3.1 with the Problem schema that no route returns by type."""
    if not app.openapi_schema:
        schema = get_openapi(
            title=app.title, version=app.version, summary=app.summary, description=app.description, routes=app.routes
        )
        schemas = schema["components"]["schemas"]
        models: tuple[type[Frozen], ...] = (Problem, *_BODIES)
        for model in models:
            own = model.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas |= own.pop("$defs", {}) | {model.__name__: own}
        for unused in ("HTTPValidationError", "ValidationError"):
            schemas.pop(unused, None)
        schema["components"]["securitySchemes"] = _SECURITY
        schema["components"]["schemas"] = dict(sorted(schemas.items()))
        app.openapi_schema = schema
    return app.openapi_schema


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host
