"""The ten risks of the OWASP API Security Top 10 (2023), a test each, and tokens, limits and the audit log."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import jwt
import pytest
from fastapi.routing import APIRoute
from jwt.algorithms import ECAlgorithm, OKPAlgorithm

from data_schemas.errors import BadInput
from hospital_node.access import FAILURES
from hospital_node.audit_log import AuditLog
from hospital_node.rate_limit import RateLimit, TokenBuckets
from hospital_node.tokens import TokenGate
from tests.hospital_node import serving_node
from tests.hospital_node.serving_node import LAST, NOW, OTHER, PERSON, Served, upload

ISSUER, AUDIENCE = "https://idp.example", "islet-node"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    made = serving_node.make(tmp_path)
    with made.client:
        yield made


class Provider:
    """A hospital's identity provider: real keys of both kinds, and the JWK Set it publishes."""

    def __init__(self, home: Path) -> None:
        from cryptography.hazmat.primitives.asymmetric import ec, ed25519

        self.ec = ec.generate_private_key(ec.SECP256R1())
        self.ed = ed25519.Ed25519PrivateKey.generate()
        self.keys = [
            {**ECAlgorithm.to_jwk(self.ec.public_key(), as_dict=True), "kid": "ec"},
            {**OKPAlgorithm.to_jwk(self.ed.public_key(), as_dict=True), "kid": "ed"},
        ]
        document = {"issuer": ISSUER, "audience": AUDIENCE, "keys": self.keys}
        (home / "keys" / "jwks.json").write_text(json.dumps(document))

    def token(self, kid: str = "ed", **changes: Any) -> dict[str, str]:
        """Return an Authorization header; a change of None leaves the claim out."""
        claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": "dr-who", "exp": NOW + 60, "scope": "forecast.read"}
        claims = {k: v for k, v in {**claims, "patient": PERSON, **changes}.items() if v is not None}
        key, algorithm = {"ed": (self.ed, "EdDSA"), "ec": (self.ec, "ES256")}[kid]
        return {"Authorization": "Bearer " + jwt.encode(claims, key, algorithm, {"kid": kid})}


def paths_about(patient: str) -> list[tuple[str, dict[str, str]]]:
    """Every way to ask about a patient."""
    return [
        (f"/v1/patients/{patient}/forecast", {}),
        ("/v1/nightscout/devicestatus.json", {"patient": patient}),
        ("/fhir/R4/Observation", {"patient": patient}),
        ("/fhir/R4/Observation", {"patient": patient, "code": "glucose-forecast"}),
        ("/v1/stream", {"patient": patient}),
    ]


def test_api1_another_patients_objects_are_out_of_reach(served: Served) -> None:
    """API1 broken object level authorisation: one patient's credential gets 403 for any other, held or not."""
    for other in (OTHER, "nobody"):
        for path, query in paths_about(other):
            assert served.client.get(path, params=query, headers=served.key("one")).status_code == 403, path
        url = f"/v1/patients/{other}/readings"
        assert served.client.post(url, json=upload(), headers=served.key("writer")).status_code == 403


def test_api2_forged_and_expired_tokens_are_refused(served: Served) -> None:
    """API2 broken authentication: only an unexpired ES256 or EdDSA token of this issuer for this audience counts."""
    provider = Provider(served.home)
    url = f"/v1/patients/{PERSON}/forecast"
    for kid in ("ed", "ec"):
        assert served.client.get(url, headers=provider.token(kid)).status_code == 200
    bad = [
        provider.token(exp=NOW - 31),
        provider.token(exp=None),
        provider.token(exp="tomorrow"),
        provider.token(nbf=NOW + 120),
        provider.token(iss="https://elsewhere.example"),
        provider.token(aud="another"),
        provider.token(sub=None),
        provider.token(patient="all"),
        provider.token(patient=["a"]),
        provider.token(patient=None),
    ]
    claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": "x", "exp": NOW + 60, "scope": "forecast.read", "patient": PERSON}
    bad.append({"Authorization": "Bearer " + jwt.encode(claims, None, "none", {"kid": "ed"})})
    # The public key as a shared secret: the classic confusion of algorithms.
    confused = jwt.encode(claims, secrets.token_bytes(32), "HS256", {"kid": "ed"})
    bad.append({"Authorization": "Bearer " + confused})
    good = provider.token()["Authorization"]
    bad += [{"Authorization": good[:-6] + "AAAAAA"}, {"Authorization": good.replace("Bearer ", "Bearer a.")}]
    for headers in bad:
        answer = served.client.get(url, headers=headers)
        assert answer.status_code == 401, jwt.decode(headers["Authorization"][7:], options={"verify_signature": False})
        assert answer.headers["www-authenticate"] == "Bearer"
    everybody = provider.token(patient=None, scope="forecast.read patients.all")
    assert served.client.get(f"/v1/patients/{OTHER}/forecast", headers=everybody).status_code == 200


def test_jwks_with_a_private_key_is_refused(tmp_path: Path) -> None:
    """A key file that holds a private or symmetric key, or none that fits, is named as unusable."""
    (tmp_path / "keys").mkdir()
    path = tmp_path / "keys" / "jwks.json"
    for keys in (
        [{"kty": "oct", "k": "AA", "kid": "1"}],
        [{"kty": "OKP", "crv": "Ed25519", "d": "AA", "kid": "1"}],
        [{}],
    ):
        path.write_text(json.dumps({"issuer": "i", "audience": "a", "keys": keys}))
        with pytest.raises(BadInput, match=r"jwks\.json"):
            TokenGate(tmp_path).read("a.b.c", NOW)
    path.unlink()
    assert TokenGate(tmp_path).read("a.b.c", NOW) is None


def test_api3_no_property_beyond_the_contract(served: Served) -> None:
    """API3 broken object property level authorisation: unknown fields are refused, and none comes back unasked."""
    sent = upload() | {"scope": "all"}
    assert (
        served.client.post(f"/v1/patients/{PERSON}/readings", json=sent, headers=served.key("writer")).status_code
        == 422
    )
    sent = upload()
    sent["readings"][0]["patient"] = OTHER
    assert (
        served.client.post(f"/v1/patients/{PERSON}/readings", json=sent, headers=served.key("writer")).status_code
        == 422
    )
    told = served.client.get(f"/v1/patients/{PERSON}/forecast", headers=served.key("one")).json()
    schema = served.client.get("/openapi.json").json()["components"]["schemas"]
    assert set(told) == set(schema["Forecast"]["properties"])
    assert set(told["points"][0]) == set(schema["ForecastPoint"]["properties"])


def test_api4_requests_of_one_caller_are_bounded(tmp_path: Path) -> None:
    """API4 unrestricted resource consumption: above its rate a caller gets 429 and Retry-After; others go on."""
    served = serving_node.make(tmp_path, limit=RateLimit(per_minute=60, burst=3))
    url = f"/v1/patients/{PERSON}/forecast"
    with served.client:
        answers = [served.client.get(url, headers=served.key("one")) for _ in range(4)]
        assert [a.status_code for a in answers] == [200, 200, 200, 429]
        assert int(answers[3].headers["retry-after"]) >= 1
        assert answers[3].json()["type"] == "urn:islet:problem:rate-limited"
        assert served.client.get(url, headers=served.key("all")).status_code == 200
        too_many = {"readings": [{"at": "2026-01-01T00:00:00Z", "glucose": 100}] * 2001, "units": "mg/dL"}
        answer = served.client.post("/v1/forecast", json=too_many, headers=served.key("all"))
        assert answer.status_code == 422
        query = {"patient": PERSON, "_count": 1001}
        assert served.client.get("/fhir/R4/Observation", params=query, headers=served.key("writer")).status_code == 422


def test_token_buckets_refill_and_forget() -> None:
    """Tokens come back with time, and memory stays bounded however many callers there are."""
    now = [0.0]
    buckets = TokenBuckets(RateLimit(per_minute=60, burst=2), lambda: now[0])
    assert [buckets.take("a") for _ in range(3)] == [0, 0, 1]
    now[0] = 1.0
    assert buckets.take("a") == 0
    for n in range(10_050):
        buckets.take(f"caller-{n}")
    assert len(buckets._buckets) == 10_000


def test_api5_functions_need_their_right(served: Served) -> None:
    """API5 broken function level authorisation: a credential that reads may not write, and the other way round."""
    provider = Provider(served.home)
    url = f"/v1/patients/{PERSON}/readings"
    assert served.client.post(url, json=upload(), headers=served.key("one")).status_code == 403
    assert served.client.post(url, json=upload(), headers=provider.token()).status_code == 403
    writes = provider.token(scope="readings.write")
    assert served.client.get(f"/v1/patients/{PERSON}/forecast", headers=writes).status_code == 403
    assert served.client.post("/v1/forecast", json=upload(), headers=writes).status_code == 403
    for method in ("PUT", "DELETE", "PATCH"):
        assert served.client.request(method, url, headers=served.key("writer")).status_code == 405


def test_api6_guessing_keys_is_slowed_down(served: Served) -> None:
    """API6 unrestricted access to sensitive flows: wrong secrets from one address end in 429, right ones go on."""
    url = f"/v1/patients/{PERSON}/forecast"
    answers = [
        served.client.get(url, headers={"Authorization": f"Bearer islet_{n}"}) for n in range(FAILURES.burst + 1)
    ]
    assert {a.status_code for a in answers[: FAILURES.burst]} == {401}
    assert answers[-1].status_code == 429
    assert served.client.get(url, headers=served.key("one")).status_code == 200


def test_api7_nothing_that_is_sent_is_fetched(served: Served) -> None:
    """API7 server side request forgery: a token's own key address is ignored; tests forbid sockets, so a try fails."""
    provider = Provider(served.home)
    claims = jwt.decode(provider.token()["Authorization"][7:], options={"verify_signature": False})
    header = {"kid": "other", "jku": "http://198.51.100.1/keys", "x5u": "http://198.51.100.1/cert"}
    forged = jwt.encode(claims, provider.ed, "EdDSA", header)
    answer = served.client.get(f"/v1/patients/{PERSON}/forecast", headers={"Authorization": f"Bearer {forged}"})
    assert answer.status_code == 401


def test_api8_answers_carry_safe_headers(served: Served) -> None:
    """API8 security misconfiguration: no caching, sniffing, framing, cross-origin grant, or word about the software."""
    for path in ("/healthz", "/nothing", f"/v1/patients/{PERSON}/forecast", "/openapi.json"):
        answer = served.client.get(path, headers={"Origin": "https://elsewhere.example"})
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert not [h for h in answer.headers if h.startswith("access-control-") or h in {"server", "x-powered-by"}]


def test_api9_every_route_is_documented(served: Served) -> None:
    """API9 improper inventory management: what answers programs is in the OpenAPI document; beside it are the pages."""
    documented = set(served.client.get("/openapi.json").json()["paths"])
    app: Any = served.client.app
    routes = {r.path for r in app.routes if isinstance(r, APIRoute) and r.include_in_schema}
    assert routes == documented
    others = {r.path for r in app.routes if not isinstance(r, APIRoute) or not r.include_in_schema}
    pages = {"/", "/patients/{pseudonym}", "/docs", "/login", "/logout", "/static/{name}"}
    pages |= {"/reports/{name}", "/participation", "/leave", "/leaving.json"}
    assert others == {"/openapi.json"} | pages


@pytest.mark.parametrize(
    "body",
    [
        b"null",
        b"[null]",
        b'[{"date": 1e400}]',
        b'[{"date": -1, "sgv": 100}]',
        b'{"sgv": 100}',
        b"[" * 50_000,
        b"\xff\xfe",
    ],
)
def test_api10_hostile_uploads_are_bounded(served: Served, body: bytes) -> None:
    """API10 unsafe consumption of APIs: what another program sends is parsed strictly and never a 500."""
    headers = {"api-secret": served.secrets["writer"]}
    assert served.client.post("/api/v1/entries", content=body, headers=headers).status_code == 422


def test_audit_log_tells_who_asked_and_no_reading(served: Served) -> None:
    """Each request with a credential, or without the one it needs, leaves a line; no reading and no secret is in it."""
    served.client.get(f"/v1/patients/{PERSON}/forecast", headers=served.key("one"))
    served.client.get(f"/v1/patients/{OTHER}/forecast", headers=served.key("one"))
    served.client.get(f"/v1/patients/{PERSON}/forecast")
    served.client.post("/v1/forecast", json=upload(20, value=123.25), headers=served.key("all"))
    served.client.get("/healthz")
    path = served.home / "reports" / "access.jsonl"
    assert path.stat().st_mode & 0o777 == 0o600
    lines = AuditLog(path).newest(10)
    assert [(a.operation, a.patient, a.outcome) for a in reversed(lines)] == [
        ("GET /v1/patients/{pseudonym}/forecast", PERSON, "200"),
        ("GET /v1/patients/{pseudonym}/forecast", OTHER, "403"),
        ("GET /v1/patients/{pseudonym}/forecast", PERSON, "401"),
        ("POST /v1/forecast", None, "future-data"),
    ]
    assert lines[-1].who.startswith("key:")
    text = path.read_text()
    assert "123.2" not in text
    assert not any(secret in text for secret in served.secrets.values())


def test_planted_markers_stay_out_of_logs_and_counts(
    served: Served, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Readings, scenario numbers, keys and tokens that are sent everywhere are in no log, count, output or refusal."""
    caplog.set_level("DEBUG")
    planted = ("117.3125", "31.4375", "47.5625", "9.1875")
    token = Provider(served.home).token()
    writer, reader = served.key("writer"), served.key("one")
    good = upload(20, start=LAST - timedelta(minutes=100), value=117.3125)
    planned = [{"at": LAST.isoformat(), "carbs_g": 31.4375}]
    plan = {"planned": planned, "insulin_sensitivity": 47.5625, "carbohydrate_ratio": 9.1875}
    bad = {"units": "mg/dL", "readings": [{"at": "117.3125", "glucose": "117.3125"}], "117.3125": 31.4375}
    entry = {"type": "sgv", "date": LAST.timestamp() * 1000, "sgv": 117.3125}
    own, api_secret = f"/v1/patients/{PERSON}/readings", {"api-secret": served.secrets["writer"]}
    answers = [
        served.client.post("/v1/forecast", json=good | {"scenario": plan}, headers=token),
        served.client.post("/v1/forecast", json=good | {"scenario": {"planned": planned}}, headers=reader),
        served.client.post("/v1/forecast", json=bad, headers=reader),
        served.client.post(own, json=good, headers=writer | {"Idempotency-Key": "117.3125"}),
        served.client.post(own, json=bad, headers=writer),
        served.client.post("/api/v1/entries", json=[entry], headers=api_secret),
        served.client.post("/api/v1/entries", json=[entry | {"date": "at 117.3125"}], headers=api_secret),
        served.client.post("/v1/forecast?glucose=117.3125", content=b"117.3125", headers=reader),
        served.client.get("/117.3125", headers=token),
    ]
    assert [a.status_code for a in answers] == [200, 409, 422, 200, 422, 200, 422, 422, 404]
    refusals = "".join(answer.text for answer in answers if answer.status_code >= 400)
    ours = [record.getMessage() for record in caplog.records if not record.name.startswith(("httpx", "httpcore"))]
    told = "".join([refusals, served.client.get("/metrics").text, *ours, *capfd.readouterr()])
    told += "".join(file.read_text() for file in (served.home / "reports").rglob("*") if file.is_file())
    assert "POST /v1/forecast" in told
    secret = [*served.secrets.values(), token["Authorization"].removeprefix("Bearer "), "dr-who"]
    assert not [marker for marker in (*planted, *secret) if marker in told]


def test_audit_log_turns_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full file is turned over, four old ones are kept, and a disk that refuses is counted, not fatal."""
    from hospital_node import audit_log
    from hospital_node.audit_log import Access

    monkeypatch.setattr(audit_log, "MOST_BYTES", 500)
    log = AuditLog(tmp_path / "access.jsonl")
    for n in range(60):
        log.write(Access(at=NOW + n, who="key:1", operation="GET /", outcome="200"))
    log.close()
    assert len(list(tmp_path.iterdir())) == 5
    assert log.newest(1)[0].at == NOW + 59
    refused = AuditLog(tmp_path / "absent" / "access.jsonl")
    refused.write(Access(at=NOW, who="key:1", operation="GET /", outcome="200"))
    assert refused.lost == 1
