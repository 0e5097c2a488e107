"""Who may do what: API keys, tokens and browser sessions become one Caller; rates are limited per caller."""

from __future__ import annotations

import hmac
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.exceptions import HTTPException

from hospital_node.api_keys import ALL_PATIENTS, ApiKey, KeyRing
from hospital_node.rate_limit import RateLimit, TokenBuckets
from hospital_node.tokens import TokenGate

# Notes in a request's scope for the audit log: the caller, and the patient where the path does not name one.
WHO = "islet.who"
PATIENT = "islet.patient"
COOKIE = "islet_session"
SESSION_SECONDS = 8 * 3600
MOST_SESSIONS = 1000
# Wrong secrets per client address: 256 random bits are not guessed, but guessing should not cost the node either.
FAILURES = RateLimit(per_minute=10, burst=30)

NO_CREDENTIALS = "Send `Authorization: Bearer <API key or token>`; the operator of the node creates keys."


@dataclass(frozen=True, slots=True)
class Caller:
    """Somebody who showed a valid credential. scope: `all` or one pseudonym."""

    who: str
    scope: str
    reads: bool
    writes: bool
    operates: bool = False

    def allows(self, pseudonym: str) -> bool:
        """Whether this caller may see this patient."""
        return self.scope in (ALL_PATIENTS, pseudonym)


@dataclass(frozen=True, slots=True)
class _Session:
    """A browser that signed in: with which key, when, and the token that its forms must bring back."""

    key_id: str
    since: float
    form_token: str


class Guard:
    """Checks every request of one node: credential, rate, scope. Raises HTTPException 401, 403 or 429."""

    def __init__(self, node_home: Path, clock: Callable[[], float], limit: RateLimit) -> None:
        self._ring, self._gate, self._clock = KeyRing(node_home), TokenGate(node_home), clock
        self._rates, self._failures = TokenBuckets(limit), TokenBuckets(FAILURES)
        self._lock = threading.Lock()
        self._sessions: OrderedDict[str, _Session] = OrderedDict()

    def bearer(self, request: Any) -> Caller:
        """Return the caller of an API request from its Authorization header."""
        kind, _, presented = request.headers.get("authorization", "").partition(" ")
        presented = presented.strip()
        caller = self._find(presented) if kind.lower() == "bearer" and presented else None
        return self._admitted(request, caller)

    def nightscout(self, request: Any) -> Caller:
        """Return the caller of a Nightscout uploader: `api-secret` is the key, or its SHA-1 in hexadecimal."""
        presented = request.headers.get("api-secret", "")
        key = self._ring.find_nightscout(presented) if presented else None
        caller = self._admitted(request, None if key is None else _of_key(key))
        if caller.scope == ALL_PATIENTS:
            raise HTTPException(403, "A Nightscout uploader needs a key for one patient.")
        return caller

    def session(self, request: Any) -> Caller | None:
        """Return the caller of a browser with a session, or None; its key is looked up anew each time."""
        found = self._found(request)
        key = None if found is None else self._ring.by_id(found.key_id)
        return None if key is None else self._admitted(request, _of_key(key))

    def form_token(self, request: Any) -> str:
        """Return the token that the forms of this browser's pages carry; empty without a session."""
        found = self._found(request)
        return "" if found is None else found.form_token

    def form(self, request: Any, token: str) -> Caller:
        """Return the caller who sent a form of ours. Raises HTTPException 403 for a form that another site made."""
        from_here(request)
        found, caller = self._found(request), self.session(request)
        if found is None or caller is None or not hmac.compare_digest(found.form_token.encode(), token.encode()):
            raise HTTPException(403, "This form is not from the page you signed in to; open the page again.")
        return caller

    def _found(self, request: Any) -> _Session | None:
        with self._lock:
            found = self._sessions.get(request.cookies.get(COOKIE, ""))
        return found if found is not None and self._clock() - found.since <= SESSION_SECONDS else None

    def log_in(self, request: Any, presented: str) -> tuple[str, Caller]:
        """Return a new session and its caller for an API key."""
        key = self._ring.find(presented)
        caller = self._admitted(request, None if key is None else _of_key(key))
        session = secrets.token_urlsafe(32)
        with self._lock:
            self._sessions[session] = _Session(
                caller.who.removeprefix("key:"), self._clock(), secrets.token_urlsafe(32)
            )
            if len(self._sessions) > MOST_SESSIONS:
                self._sessions.popitem(last=False)
        return session, caller

    def log_out(self, cookies: Mapping[str, str]) -> None:
        """Forget a browser's session."""
        with self._lock:
            self._sessions.pop(cookies.get(COOKIE, ""), None)

    def _find(self, presented: str) -> Caller | None:
        if key := self._ring.find(presented):
            return _of_key(key)
        token = self._gate.read(presented, self._clock())
        if token is None:
            return None
        scope = ALL_PATIENTS if token.patient is None else token.patient
        return Caller(token.who, scope, "forecast.read" in token.scopes, "readings.write" in token.scopes)

    def _admitted(self, request: Any, caller: Caller | None) -> Caller:
        address = request.client.host if request.client else "unknown"
        scope: MutableMapping[str, Any] = request.scope
        if caller is None:
            scope[WHO] = "nobody"
            if wait := self._failures.take(address):
                raise _too_many(wait)
            raise HTTPException(401, NO_CREDENTIALS)
        scope[WHO] = caller.who
        if wait := self._rates.take(caller.who):
            raise _too_many(wait)
        return caller


def from_here(request: Any) -> None:
    """Refuse a form that a browser says another site sent. Raises HTTPException 403."""
    if request.headers.get("sec-fetch-site", "same-origin") not in {"same-origin", "none"}:
        raise HTTPException(403, "This form was sent from another site.")


def to_read(caller: Caller, pseudonym: str) -> None:
    """Refuse a caller that may not read this patient. Raises HTTPException 403."""
    if not caller.allows(pseudonym):
        raise HTTPException(403, "This credential is for another patient.")
    if not caller.reads:
        raise HTTPException(403, "This credential may not read.")


def to_write(caller: Caller, pseudonym: str) -> None:
    """Refuse a caller that may not add readings of this patient. Raises HTTPException 403."""
    if not caller.allows(pseudonym):
        raise HTTPException(403, "This credential is for another patient.")
    if not caller.writes:
        raise HTTPException(403, "This credential may not add readings; the operator makes keys that may.")


def _of_key(key: ApiKey) -> Caller:
    return Caller(f"key:{key.key_id}", key.scope, reads=True, writes=key.writes, operates=key.operates)


def _too_many(wait: int) -> HTTPException:
    return HTTPException(429, f"Too many requests; try again in {wait} s.", {"Retry-After": str(wait)})
