"""JSON Web Tokens of the hospital's own identity provider (RFC 7519, verified as RFC 8725 advises).

keys/jwks.json holds the provider's public keys, a JWK Set (RFC 7517) with two more members: `issuer` and `audience`.
The operator puts it there; the node fetches nothing, whatever a token's header says. Only ES256 and EdDSA are
accepted, each only for a key of its own type, so a public key can never serve as a shared secret.

Claims: iss, aud, exp and sub are required. `scope` holds `forecast.read`, `readings.write`, or both; `patient` is the
pseudonym the token is for. A token for every patient has no `patient` and the scope `patients.all`.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_schemas.errors import BadInput

ALGORITHMS = ("ES256", "EdDSA")
LEEWAY_SECONDS = 30
_PSEUDONYM = re.compile(r"[A-Za-z0-9._-]{1,128}")


@dataclass(frozen=True, slots=True)
class Token:
    """What a valid token allows. who: a hash of its subject, for the audit log; patient: None for everybody."""

    who: str
    patient: str | None
    scopes: frozenset[str]


@dataclass(frozen=True, slots=True)
class _Provider:
    issuer: str
    audience: str
    keys: dict[str, tuple[str, Any]]


class TokenGate:
    """Verifies tokens against keys/jwks.json, read again whenever the file changes; without it no token is valid."""

    def __init__(self, node_home: Path) -> None:
        self._path = node_home / "keys" / "jwks.json"
        self._seen: tuple[tuple[int, int] | None, _Provider | None] = (None, None)

    def read(self, presented: str, now_s: float) -> Token | None:
        """Return what the token allows at this moment, or None when it is not valid. Raises BadInput (jwks.json)."""
        provider = self._provider()
        if provider is None or presented.count(".") != 2:
            return None
        claims = _verified(presented, provider)
        return None if claims is None else _token(claims, now_s)

    def _provider(self) -> _Provider | None:
        try:
            status = self._path.stat()
        except FileNotFoundError:
            return None
        version = status.st_ino, status.st_mtime_ns
        if version != self._seen[0]:
            self._seen = version, _read_provider(self._path)
        return self._seen[1]


def _read_provider(path: Path) -> _Provider:
    import jwt

    try:
        document = json.loads(path.read_bytes())
        keys = {
            str(entry["kid"]): (_algorithm(entry), jwt.PyJWK(entry, algorithm=_algorithm(entry)).key)
            for entry in document["keys"]
        }
        return _Provider(str(document["issuer"]), str(document["audience"]), keys)
    except (OSError, ValueError, KeyError, TypeError, jwt.PyJWTError):
        raise BadInput(
            "keys/jwks.json cannot be used",
            "it needs `issuer`, `audience` and `keys`: public P-256 or Ed25519 JWKs, each with a `kid`",
        ) from None


def _algorithm(entry: dict[str, Any]) -> str:
    """The one algorithm of a public key's type; a private or symmetric key has no place here."""
    if "d" in entry or "k" in entry:
        raise ValueError("only public keys belong here")
    return {("EC", "P-256"): "ES256", ("OKP", "Ed25519"): "EdDSA"}[entry["kty"], entry["crv"]]


def _verified(presented: str, provider: _Provider) -> dict[str, Any] | None:
    import jwt

    try:
        algorithm, key = provider.keys[str(jwt.get_unverified_header(presented).get("kid"))]
        claims: dict[str, Any] = jwt.decode(
            presented,
            key,
            algorithms=[algorithm],
            audience=provider.audience,
            issuer=provider.issuer,
            options={"require": ["exp", "iss", "aud", "sub"], "verify_exp": False, "verify_nbf": False,
                     "verify_iat": False},
        )  # fmt: skip
    except (jwt.PyJWTError, KeyError, ValueError):
        return None
    return claims


def _token(claims: dict[str, Any], now_s: float) -> Token | None:
    """Check the times against the node's own clock, and read what the claims allow."""
    expires, begins = claims["exp"], claims.get("nbf", 0)
    if not all(isinstance(moment, int | float) for moment in (expires, begins)):
        return None
    if not begins - LEEWAY_SECONDS <= now_s < expires + LEEWAY_SECONDS:
        return None
    scope, patient = claims.get("scope", ""), claims.get("patient")
    scopes = frozenset(scope.split()) if isinstance(scope, str) else frozenset[str]()
    if patient is None:
        if "patients.all" not in scopes:
            return None
    elif not isinstance(patient, str) or not _PSEUDONYM.fullmatch(patient) or patient == "all":
        return None
    subject = hashlib.sha256(str(claims["sub"]).encode()).hexdigest()[:12]
    return Token(f"token:{subject}", patient, scopes)
