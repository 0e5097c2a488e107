"""The hospital's switch on the clinic's page: pause, resume, leave. Annotations are evaluated.

Only a key made for operators turns it, only from a form of ours (a token of the session, and what the browser says
about where the form came from), and leaving asks for the node's name first.
"""

from fastapi import FastAPI, Request, Response
from fastapi.responses import RedirectResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from data_schemas.canonical import canonical_bytes
from data_schemas.errors import BadInput
from hospital_node import participation
from hospital_node.access import Caller
from hospital_node.api_keys import ALL_PATIENTS
from hospital_node.page_routes import PAGE_HEADERS, message, page, sent
from hospital_node.services import Services
from hospital_node.settings import read_settings

_NOT_OPERATOR = "This key may look, not switch. The operator makes one that may: islet node key NODE --operator."


def add_switch_routes(app: FastAPI, services: Services) -> None:
    """Add what the forms of the section `Taking part` lead to."""

    @app.post("/participation", include_in_schema=False)
    async def turn(request: Request) -> Response:
        fields = await sent(request)
        caller = services.guard.form(request, fields.get("form_token", ""))
        if not caller.operates:
            return message("Not with this key", _NOT_OPERATOR, 403, fields["form_token"])
        move = participation.resume if fields.get("turn") == "resume" else participation.pause
        try:
            await run_in_threadpool(move, services.home, services.clock(), caller.who)
        except BadInput as error:
            return message("Not changed", f"{error.message}. {error.hint}", 409, fields["form_token"])
        return RedirectResponse("/#taking-part", 303)

    @app.get("/leave", include_in_schema=False)
    async def ask(request: Request) -> Response:
        caller = services.guard.session(request)
        if caller is None:
            return RedirectResponse("/", 303)
        token = services.guard.form_token(request)
        if not caller.operates:
            return message("Not with this key", _NOT_OPERATOR, 403, token)
        return _leave_page(token, wrong=False)

    @app.post("/leave", include_in_schema=False)
    async def leave(request: Request) -> Response:
        fields = await sent(request)
        caller = services.guard.form(request, fields.get("form_token", ""))
        if not caller.operates:
            return message("Not with this key", _NOT_OPERATOR, 403, fields["form_token"])
        if fields.get("confirm", "").strip() != read_settings(services.home / "node.toml").name:
            return _leave_page(fields["form_token"], wrong=True)
        await run_in_threadpool(participation.leave, services.home, services.clock(), caller.who)
        return RedirectResponse("/#taking-part", 303)

    @app.get("/leaving.json", include_in_schema=False)
    async def statement(request: Request) -> Response:
        caller: Caller | None = services.guard.session(request)
        if caller is None or caller.scope != ALL_PATIENTS:
            return RedirectResponse("/", 303)
        signed = participation.left_with(services.home)
        if signed is None:
            raise HTTPException(404)
        name = f'attachment; filename="{signed.leaving.node}-leaving.json"'
        headers = {**PAGE_HEADERS, "Content-Disposition": name}
        return Response(canonical_bytes(signed) + b"\n", 200, headers, media_type="application/json")

    def _leave_page(token: str, *, wrong: bool) -> Response:
        settings = read_settings(services.home / "node.toml")
        status = 422 if wrong else 200
        return page(
            "leave.html.j2",
            status,
            node=settings.name,
            federation=settings.federation,
            form_token=token,
            wrong=wrong,
        )
