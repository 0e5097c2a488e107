"""What every request of the endpoint passes: a bound on its body, and the counts behind /metrics. Plain ASGI."""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any, TypeAlias

from starlette.requests import Request
from starlette.responses import Response

from hospital_node.access import PATIENT, WHO
from hospital_node.audit_log import Access, AuditLog
from hospital_node.problems import PROBLEM_JSON, Problem, problem
from pipeline.prometheus import escape_label

MAX_BODY_BYTES = 256 * 1024
# The outcome that a handler notes in the request's scope, where the status alone would say too little.
OUTCOME = "islet.outcome"
# Routes that answer before FastAPI names them.
FAST_ROUTES = {"/v1/forecast": "/v1/forecast"}
# OWASP REST security cheat sheet: nothing is cached, guessed, framed or loaded from elsewhere.
SAFE_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
)

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
Answer: TypeAlias = Callable[[Request], Awaitable[Response]]


class Traffic:
    """Answered requests by route and outcome. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._outcomes: Counter[tuple[str, str]] = Counter()
        self._seconds: defaultdict[str, float] = defaultdict(float)

    def count(self, route: str, outcome: str, seconds: float) -> None:
        """Note one answered request."""
        with self._lock:
            self._outcomes[route, outcome] += 1
            self._seconds[route] += seconds

    def metrics(self, model: tuple[str, str] | None, more: Mapping[str, int]) -> str:
        """Write the Prometheus text format 0.0.4: counts only.

        model: version and hash of the one that answers; more: further counters by name.
        """
        with self._lock:
            outcomes, seconds = sorted(self._outcomes.items()), sorted(self._seconds.items())
        lines = ["# HELP islet_requests_total Answered requests.", "# TYPE islet_requests_total counter"]
        lines += [f'islet_requests_total{{route="{r}",outcome="{o}"}} {n}' for (r, o), n in outcomes]
        lines += ["# HELP islet_request_seconds Time spent answering.", "# TYPE islet_request_seconds summary"]
        for route, total in seconds:
            answered = sum(n for (r, _), n in outcomes if r == route)
            lines.append(f'islet_request_seconds_sum{{route="{route}"}} {total:.6f}')
            lines.append(f'islet_request_seconds_count{{route="{route}"}} {answered}')
        lines += ["# HELP islet_model_info The model that answers.", "# TYPE islet_model_info gauge"]
        if model is not None:
            lines.append(f'islet_model_info{{version="{escape_label(model[0])}",hash="{model[1]}"}} 1')
        for name, count in more.items():
            lines += [f"# TYPE {name} counter", f"{name} {count}"]
        return "\n".join(lines) + "\n"


class Counted:
    """ASGI, outermost: safe headers, counts by route template, and the audit log.

    The outcome is the reason against a forecast, or the status. Audited is every request that showed a credential or
    should have.
    """

    def __init__(self, app: Any, traffic: Traffic, audit: AuditLog, clock: Callable[[], float]) -> None:
        self.app, self.traffic, self.audit, self.clock = app, traffic, audit, clock

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass the request on and note how it was answered."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = list(message.get("headers", ()))
                given = {name for name, _ in headers}
                message = {**message, "headers": headers + [h for h in SAFE_HEADERS if h[0] not in given]}
            await send(message)

        try:
            await self.app(scope, receive, noting)
        finally:
            route = getattr(scope.get("route"), "path", FAST_ROUTES.get(scope["path"], "other"))
            outcome = scope.get(OUTCOME, str(status))
            self.traffic.count(route, outcome, time.perf_counter() - started)
            if WHO in scope:
                self._note(scope, route, outcome)

    def _note(self, scope: Message, route: str, outcome: str) -> None:
        patient = scope.get(PATIENT) or scope.get("path_params", {}).get("pseudonym")
        operation = f"{scope['method']} {route}"
        self.audit.write(
            Access(at=round(self.clock(), 3), who=scope[WHO], operation=operation, patient=patient, outcome=outcome)
        )


class Direct:
    """ASGI, innermost: the busiest request goes straight to its function, past routing and dependencies.

    What the function raises is answered by the application's own handlers, so nothing but the way is shorter.
    """

    def __init__(self, app: Any, path: str, answer: Answer, handlers: Mapping[Any, Any]) -> None:
        self.app, self.path, self.answer, self.handlers = app, path, answer, handlers
        kinds = [kind for kind in handlers if isinstance(kind, type) and kind is not Exception]
        self.expected: tuple[type[Exception], ...] = tuple(kinds)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a POST to the path; pass everything else on."""
        if scope["type"] != "http" or scope["path"] != self.path or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        request = Request(scope, receive)
        try:
            response = await self.answer(request)
        except self.expected as error:
            kind = next(kind for kind in type(error).__mro__ if kind in self.handlers)
            response = await self.handlers[kind](request, error)
        await response(scope, receive, send)


class BodyLimit:
    """ASGI: answer 413 to a body above MAX_BODY_BYTES, declared or streamed, before anything parses it."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Read the body up to the limit, then pass the request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body = await _read_bounded(receive)
        if body is None:
            await _send_problem(send, problem(413, "too-large", "Body too large", f"At most {MAX_BODY_BYTES} bytes."))
            return
        unread = [body]

        async def replay() -> Message:
            if unread:
                return {"type": "http.request", "body": unread.pop(), "more_body": False}
            return await receive()

        await self.app(scope, replay, send)


async def _read_bounded(receive: Receive) -> bytes | None:
    """Return the whole body, or None as soon as it exceeds the limit. A client that leaves ends the body."""
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > MAX_BODY_BYTES:
            return None
        if message["type"] != "http.request" or not message.get("more_body", False):
            return bytes(body)


async def _send_problem(send: Send, answer: Problem) -> None:
    """Answer and close: the rest of the body stays unread."""
    headers = [(b"content-type", PROBLEM_JSON.encode()), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": answer.to_bytes()})
