"""Pages at the node: server-rendered, nothing from another machine. Annotations are evaluated."""

import base64
import hashlib
import re
from typing import Annotated, Any
from urllib.parse import parse_qs

from fastapi import FastAPI, Query, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from data_schemas.forecast import Forecast, GlucoseUnit, NoForecast
from hospital_node import clinic, pages
from hospital_node.access import COOKIE, PATIENT, SESSION_SECONDS, Caller, from_here
from hospital_node.api_keys import ALL_PATIENTS
from hospital_node.folder import NodeFolder
from hospital_node.forecast_routes import Pseudonym
from hospital_node.problems import Declined
from hospital_node.services import Services
from hospital_node.settings import NodeSettings, read_settings

# One script of ours, which keeps a page fresh and which no page needs; forms go nowhere else; nobody may frame us.
POLICY = (
    "default-src 'none'; script-src 'self'; connect-src 'self'; style-src 'self'; img-src 'self' data:; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
PAGE_HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_STATIC = {"islet.css": "text/css", "islet.js": "text/javascript"}
_AUDIT_LINES = 15
_STYLES = re.compile(r"<style>(.*?)</style>", re.DOTALL)


def page(template: str, status: int = 200, **values: Any) -> HTMLResponse:
    """Answer with a page."""
    return HTMLResponse(pages.render(template, **values), status, PAGE_HEADERS)


def message(title: str, detail: str, status: int, form_token: str = "") -> HTMLResponse:
    """Answer with a page that says one thing."""
    return page("message.html.j2", status, title=title, detail=detail, form_token=form_token)


def report_policy(text: str) -> str:
    """Policy of a report: its own style sheet, which it carries inside, and pictures that it carries inside."""
    sheets = (base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in _STYLES.findall(text))
    allowed = " ".join(f"'sha256-{sheet}'" for sheet in sheets) or "'none'"
    return f"default-src 'none'; style-src {allowed}; img-src data:; base-uri 'none'; frame-ancestors 'none'"


def add_page_routes(app: FastAPI, services: Services) -> None:
    """Add the clinic's page, patients' pages, sign-in, and the page about the API."""

    @app.get("/", include_in_schema=False)
    async def start(request: Request) -> Response:
        caller = services.guard.session(request)
        if caller is None:
            return page("login.html.j2", wrong=False)
        if caller.scope != ALL_PATIENTS:
            return RedirectResponse(f"/patients/{caller.scope}", 303)
        settings = read_settings(services.home / "node.toml")
        values = await run_in_threadpool(_clinic, services, settings)
        audit = clinic.audit_lines(services.audit.newest(_AUDIT_LINES), pages.zone_of(settings))
        token = services.guard.form_token(request)
        return page("clinic.html.j2", **values, audit=audit, form_token=token, operates=caller.operates)

    @app.get("/patients/{pseudonym}", include_in_schema=False)
    async def patient(
        request: Request, pseudonym: Pseudonym, units: Annotated[GlucoseUnit, Query()] = "mg/dL"
    ) -> Response:
        request.scope[PATIENT] = pseudonym
        caller = services.guard.session(request)
        if caller is None:
            return RedirectResponse("/", 303)
        token = services.guard.form_token(request)
        if not caller.allows(pseudonym):
            return message("Not yours to see", "Your key is for another patient.", 403, token)
        return await _patient(caller, pseudonym, units, token)

    async def _patient(caller: Caller, pseudonym: str, units: GlucoseUnit, token: str) -> Response:
        settings, now_s = read_settings(services.home / "node.toml"), services.clock()
        clinic_staff = caller.scope == ALL_PATIENTS
        try:
            times, values = await services.stored(pseudonym)
        except Declined:
            detail = "The node holds no readings of this patient yet. Send some, or wait for the next import."
            return message("No readings", detail, 404, token)
        model = services.served.find()
        made: Forecast | NoForecast = NoForecast.NO_MODEL
        if model is not None:
            made = await services.personal_forecast(pseudonym, (times, values), units)
        shown = await run_in_threadpool(
            pages.patient_page, pseudonym, times, values, made, model, now_s, units, pages.zone_of(settings)
        )
        return page("patient.html.j2", **shown, clinic=clinic_staff, node=settings.name, form_token=token)

    _add_file_routes(app, services)
    _add_session_routes(app, services)


def _clinic(services: Services, settings: NodeSettings) -> dict[str, Any]:
    """Values of the clinic's page; what takes longer is done in threads of its own and shown when it is there."""
    model = services.served.find()
    challenger = None if services.challenger is None else services.challenger.find()
    compared = services.own.comparison(NodeFolder(services.home, settings), model, challenger)
    proof = services.proofs.proof(settings)
    return clinic.clinic_page(services.home, settings, services.held, model, services.clock(), proof, compared)


def _add_file_routes(app: FastAPI, services: Services) -> None:
    """Reports, the page about the API, style and script."""

    @app.get("/reports/{name}", include_in_schema=False)
    async def report(request: Request, name: str) -> Response:
        caller = services.guard.session(request)
        if caller is None or caller.scope != ALL_PATIENTS:
            return RedirectResponse("/", 303)
        if name not in clinic.reports(services.home):
            return message("No such report", "It may have been moved away.", 404, services.guard.form_token(request))
        text = (services.home / "reports" / f"{name}.html").read_text(encoding="utf-8")
        return HTMLResponse(text, 200, PAGE_HEADERS | {"Content-Security-Policy": report_policy(text)})

    @app.get("/docs", include_in_schema=False)
    async def documentation() -> Response:
        return page("docs.html.j2", **pages.api_page(app.openapi()))

    @app.get("/static/{name}", include_in_schema=False)
    async def static(name: str) -> Response:
        if name not in _STATIC:
            raise HTTPException(404)
        headers = {"X-Content-Type-Options": "nosniff"}
        return Response((pages.HERE / "static" / name).read_bytes(), 200, headers, media_type=_STATIC[name])


def _add_session_routes(app: FastAPI, services: Services) -> None:
    """Sign in and out."""

    @app.post("/login", include_in_schema=False)
    async def log_in(request: Request) -> Response:
        from_here(request)
        try:
            session, _ = services.guard.log_in(request, (await sent(request)).get("key", "").strip())
        except HTTPException as error:
            if error.status_code != 401:
                raise
            return page("login.html.j2", 401, wrong=True)
        answer = RedirectResponse("/", 303)
        secure = request.url.scheme == "https" or request.headers.get("x-forwarded-proto") == "https"
        answer.set_cookie(
            COOKIE, session, max_age=SESSION_SECONDS, httponly=True, samesite="strict", secure=secure, path="/"
        )
        return answer

    @app.post("/logout", include_in_schema=False)
    async def log_out(request: Request) -> Response:
        services.guard.form(request, (await sent(request)).get("form_token", ""))
        services.guard.log_out(request.cookies)
        answer = RedirectResponse("/", 303)
        answer.delete_cookie(COOKIE, path="/", httponly=True, samesite="strict")
        return answer


async def sent(request: Request) -> dict[str, str]:
    """Fields of a form, the first of each name."""
    fields = parse_qs((await request.body()).decode("ascii", "replace"), max_num_fields=5)
    return {name: values[0] for name, values in fields.items()}
