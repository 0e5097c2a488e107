"""Pages at the node: server-rendered, no script, nothing from another machine. Annotations are evaluated."""

from typing import Annotated, Any
from urllib.parse import parse_qs

from fastapi import FastAPI, Query, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from data_schemas.forecast import Forecast, GlucoseUnit, NoForecast
from hospital_node import pages
from hospital_node.access import COOKIE, PATIENT, SESSION_SECONDS, Caller
from hospital_node.api_keys import ALL_PATIENTS
from hospital_node.forecast_routes import Pseudonym
from hospital_node.problems import Declined
from hospital_node.services import Services
from hospital_node.settings import read_settings

# No script at all; style and pictures from here; forms go nowhere else.
POLICY = (
    "default-src 'none'; style-src 'self'; img-src 'self' data:; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'"
)
PAGE_HEADERS = {"Content-Security-Policy": POLICY}
_AUDIT_LINES = 25


def add_page_routes(app: FastAPI, services: Services) -> None:
    """Add the clinic's page, patients' pages, sign-in, and the page about the API."""

    def page(template: str, status: int = 200, **values: Any) -> HTMLResponse:
        return HTMLResponse(pages.render(template, **values), status, PAGE_HEADERS)

    @app.get("/", include_in_schema=False)
    async def start(request: Request) -> Response:
        caller = services.guard.session(request)
        if caller is None:
            return page("login.html.j2", wrong=False)
        if caller.scope != ALL_PATIENTS:
            return RedirectResponse(f"/patients/{caller.scope}", 303)
        settings = read_settings(services.home / "node.toml")
        values = await run_in_threadpool(
            pages.clinic_page, services.home, settings, services.held, services.served.find(), services.clock()
        )
        return page("clinic.html.j2", **values, audit=services.audit.newest(_AUDIT_LINES), signed_in=True)

    @app.get("/patients/{pseudonym}", include_in_schema=False)
    async def patient(
        request: Request, pseudonym: Pseudonym, units: Annotated[GlucoseUnit, Query()] = "mg/dL"
    ) -> Response:
        request.scope[PATIENT] = pseudonym
        caller = services.guard.session(request)
        if caller is None:
            return RedirectResponse("/", 303)
        if not caller.allows(pseudonym):
            detail = "Your key is for another patient."
            return page("message.html.j2", 403, title="Not yours to see", detail=detail, signed_in=True)
        return await _patient(caller, pseudonym, units)

    async def _patient(caller: Caller, pseudonym: str, units: GlucoseUnit) -> Response:
        settings, now_s = read_settings(services.home / "node.toml"), services.clock()
        clinic = caller.scope == ALL_PATIENTS
        try:
            times, values = await services.stored(pseudonym)
        except Declined:
            detail = "The node holds no readings of this patient yet. Send some, or wait for the next import."
            return page("message.html.j2", 404, title="No readings", detail=detail, signed_in=True)
        model = services.served.find()
        made: Forecast | NoForecast = NoForecast.NO_MODEL
        if model is not None:
            adaptation = await services.adaptation(pseudonym, (times, values))
            made = services.forecast((times, values), units, adaptation=adaptation)
        shown = await run_in_threadpool(
            pages.patient_page, pseudonym, times, values, made, model, now_s, units, pages.zone_of(settings)
        )
        return page("patient.html.j2", **shown, clinic=clinic, node=settings.name, signed_in=True)

    @app.get("/docs", include_in_schema=False)
    async def documentation() -> Response:
        return page("docs.html.j2", **pages.api_page(app.openapi()))

    @app.get("/static/islet.css", include_in_schema=False)
    async def style() -> Response:
        return Response((pages.HERE / "static" / "islet.css").read_bytes(), media_type="text/css")

    _add_session_routes(app, services)


def _add_session_routes(app: FastAPI, services: Services) -> None:
    """Sign in and out. SameSite=Strict and the form policy keep other sites' forms away."""

    @app.post("/login", include_in_schema=False)
    async def log_in(request: Request) -> Response:
        sent = parse_qs((await request.body()).decode("ascii", "replace"), max_num_fields=5)
        try:
            session, _ = services.guard.log_in(request, sent.get("key", [""])[0].strip())
        except HTTPException as error:
            if error.status_code != 401:
                raise
            return HTMLResponse(pages.render("login.html.j2", wrong=True), 401, PAGE_HEADERS)
        answer = RedirectResponse("/", 303)
        secure = request.url.scheme == "https" or request.headers.get("x-forwarded-proto") == "https"
        answer.set_cookie(
            COOKIE, session, max_age=SESSION_SECONDS, httponly=True, samesite="strict", secure=secure, path="/"
        )
        return answer

    @app.post("/logout", include_in_schema=False)
    async def log_out(request: Request) -> Response:
        services.guard.log_out(request.cookies)
        answer = RedirectResponse("/", 303)
        answer.delete_cookie(COOKIE, path="/", httponly=True, samesite="strict")
        return answer
