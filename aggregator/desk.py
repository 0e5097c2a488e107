"""The joining desk: where an invited hospital says who it is, over TLS, on the loopback address.

For the operator of this machine it has /healthz and /metrics too; a proxy passes neither.
Run as `python -m aggregator.desk FOLDER` by the supervisor. Annotations are evaluated here: FastAPI reads them.
"""

import asyncio
import logging
import sys
from datetime import UTC, datetime
from pathlib import Path

from fastapi import FastAPI, Request, Response
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool

from aggregator.invitations import redeem
from aggregator.metrics import federation_metrics
from aggregator.settings import AggregatorFolder, open_folder
from data_schemas.canonical import canonical_bytes
from data_schemas.errors import CheckFailed, IsletError
from data_schemas.frozen import Frozen
from data_schemas.invitation import SignedJoin
from pipeline.log_lines import JsonLines
from pipeline.prometheus import MEDIA_TYPE, render

MAX_BODY_BYTES = 16 * 1024
_log = logging.getLogger("islet.aggregator")


class Refused(Frozen):
    """Why a request was refused, and what to do; no word of another hospital."""

    message: str
    hint: str


def create_app(folder: AggregatorFolder) -> FastAPI:
    """Make the desk's ASGI application. Requests are taken one at a time: each may write to the ledger."""
    app = FastAPI(title="Islet joining desk", version="1", docs_url=None, redoc_url=None, openapi_url=None)
    one_at_a_time = asyncio.Lock()

    @app.post("/v1/join")
    async def join(request: Request) -> Response:
        body = await _bounded(request)
        try:
            signed = SignedJoin.model_validate_json(body)
        except ValidationError:
            return _refusal(422, "this is no request to join", "join with `islet node join`")
        async with one_at_a_time:
            try:
                answer = await run_in_threadpool(redeem, folder, signed, datetime.now(UTC))
            except IsletError as error:
                _log.warning("%s may not join: %s", signed.request.node, error.message)
                return _refusal(403 if isinstance(error, CheckFailed) else 409, error.message, error.hint)
        _log.info("%s joined: %s", answer.node, answer.standing)
        return Response(canonical_bytes(answer), media_type="application/json")

    @app.get("/healthz")
    async def healthz(response: Response) -> dict[str, str]:
        if await _answers(folder.settings.port):
            return {"status": "ok"}
        response.status_code = 503
        return {"status": "the SuperLink does not answer"}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(render(await run_in_threadpool(federation_metrics, folder)), media_type=MEDIA_TYPE)

    return app


def serve(folder: AggregatorFolder) -> None:
    """Serve the desk until stopped."""
    import uvicorn

    tls = folder.path / "tls"
    uvicorn.run(
        create_app(folder),
        host="127.0.0.1",
        port=folder.settings.port + 1,
        ssl_certfile=str(tls / "server.crt"),
        ssl_keyfile=str(tls / "server.key"),
        log_level="warning",
        access_log=False,
        server_header=False,
    )


async def _answers(port: int) -> bool:
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection("127.0.0.1", port), 3)
    except (OSError, TimeoutError):
        return False
    writer.close()
    return True


async def _bounded(request: Request) -> bytes:
    """Body of a request, cut off after the limit: what was cut does not parse."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            return b""
    return bytes(body)


def _refusal(status: int, message: str, hint: str) -> Response:
    return Response(canonical_bytes(Refused(message=message, hint=hint)), status, media_type="application/json")


if __name__ == "__main__":
    _log.addHandler(JsonLines("desk"))
    _log.setLevel(logging.INFO)
    serve(open_folder(Path(sys.argv[1])))
