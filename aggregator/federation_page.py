"""The federation's page at the aggregator: read-only, drawn here, without a script. Annotations are evaluated here.

GET /                  members, proposals and votes, credits over time, rounds, and whether the ledger verifies
GET /checkpoint.txt    the newest signed and cosigned checkpoint
GET /proofs/INDEX      proof that an entry is in the ledger, for `islet ledger verify-proof`

Nobody signs in: what it shows is what the ledger holds, which every member has. It listens on the loopback address
unless told otherwise; a consortium that shows it to others puts a TLS proxy in front.
"""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Response
from fastapi import Path as InPath
from fastapi.responses import HTMLResponse, PlainTextResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import Response as AnyResponse

from aggregator.ledger import CHECKPOINT_FILE
from aggregator.ledger_fsck import prove
from aggregator.page_values import page_values, verified
from aggregator.settings import AggregatorFolder
from data_schemas.canonical import canonical_bytes
from data_schemas.errors import BadInput, IsletError

HERE = Path(__file__).parent
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; img-src 'self' data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_environment = Environment(
    loader=FileSystemLoader(HERE / "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
)


class _Values:
    """The page's values, gathered and the ledger verified anew only when one of its files has changed."""

    def __init__(self, ledger: Path, public_key: str) -> None:
        self._ledger, self._public_key = ledger, public_key
        self._lock = threading.Lock()
        self._seen: object = None
        self._values: dict[str, Any] = {}

    def now(self) -> dict[str, Any]:
        """Return the values. Raises IsletError where the ledger cannot be read at all."""
        with self._lock:
            state = [_identity(self._ledger.with_name(name)) for name in (self._ledger.name, CHECKPOINT_FILE)]
            if state != self._seen:
                found = verified(self._ledger, self._public_key)
                self._values = page_values(self._ledger, self._public_key, found)
                self._seen = state
            return self._values


def _identity(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def create_app(folder: AggregatorFolder) -> FastAPI:
    """Make the page's ASGI application. Raises BadInput when the folder has no ledger yet."""
    ledger = folder.path / "ledger.db"
    if not ledger.exists():
        raise BadInput(f"{folder.path} has no ledger yet", "admit hospitals first: `islet aggregator admit`")
    values = _Values(ledger, folder.key().public.hex)
    app = FastAPI(title="Islet federation", docs_url=None, redoc_url=None, openapi_url=None)

    @app.middleware("http")
    async def safe(request: Request, answer: Callable[[Request], Any]) -> AnyResponse:
        response: AnyResponse = await answer(request)
        response.headers.update(HEADERS)
        return response

    @app.get("/")
    def page() -> HTMLResponse:
        return HTMLResponse(_environment.get_template("federation.html.j2").render(**values.now()))

    @app.get("/checkpoint.txt")
    def checkpoint() -> PlainTextResponse:
        return PlainTextResponse(values.now()["checkpoint"])

    @app.get("/proofs/{index}")
    def proof(index: Annotated[int, InPath(ge=0, lt=2**53)]) -> Response:
        return Response(canonical_bytes(prove(ledger, index)) + b"\n", media_type="application/json")

    @app.get("/static/federation.css")
    def style() -> Response:
        return Response((HERE / "static" / "federation.css").read_bytes(), media_type="text/css")

    @app.get("/favicon.ico")
    def icon() -> Response:
        return Response(status_code=204)

    @app.get("/healthz")
    def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.exception_handler(BadInput)
    async def absent(_request: Request, error: BadInput) -> PlainTextResponse:
        return PlainTextResponse(f"{error.message}\n", 404, HEADERS)

    @app.exception_handler(IsletError)
    async def broken(_request: Request, error: IsletError) -> PlainTextResponse:
        return PlainTextResponse(f"The ledger cannot be shown: {error.message}\n", 503, HEADERS)

    return app


def serve(
    folder: AggregatorFolder, host: str = "127.0.0.1", port: int = 8090, ready: Callable[[str], None] | None = None
) -> None:
    """Serve the page until stopped; port 0 takes a free one. ready hears the address. BadInput: the port is taken."""
    import uvicorn

    class _Server(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            if ready is not None and self.started:
                taken = self.servers[0].sockets[0].getsockname()[1]
                ready(f"http://{f'[{host}]' if ':' in host else host}:{taken}")

    config = uvicorn.Config(
        create_app(folder), host=host, port=port, log_level="warning", access_log=False, server_header=False
    )
    try:
        _Server(config).run()
    except KeyboardInterrupt:
        return
    except SystemExit:
        raise BadInput(f"port {port} on {host} cannot be had", "another program uses it: give another port") from None
