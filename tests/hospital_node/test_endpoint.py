"""The forecast endpoint over real HTTP semantics: a real node folder, a real exported model, no mock."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from data_schemas.canonical import bytes_hash
from data_schemas.errors import BadInput, Tampered
from data_schemas.forecast import NoForecast
from data_schemas.units import RESEARCH_LABEL
from hospital_node.api_keys import create_key
from hospital_node.endpoint import Running, create_app, serve
from hospital_node.problems import NO_FORECAST
from pipeline.export import write_model
from pipeline.model_card import CardPrivacy, ModelCard, TrainedOn
from tests.hospital_node import small_node

PLAN = small_node.plan()
PERSON = "person-001"
START = datetime(2026, 1, 1, tzinfo=UTC)  # of small_node's readings: 12 hours, every 5 minutes
LAST = START + timedelta(hours=12, minutes=-5)
NOW = (LAST + timedelta(minutes=3)).timestamp()
CANARY = 123.4567


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    weights = small_node.base_weights(PLAN)
    card = ModelCard(
        version="7",
        model_hash=bytes_hash(weights.tobytes()),
        spec=PLAN.model,
        trained_on=(TrainedOn(node="north", declared_training_patients=10, declared_heldout_patients=4),),
        privacy=CardPrivacy(unit="patient", epsilon=3.0, delta=1e-5, rounds=4, noise_source="secure"),
    )
    return write_model(tmp_path_factory.mktemp("models") / "served", weights, PLAN.model, card).folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = small_node.make_node(tmp_path_factory.mktemp("nodes") / "north")
    small_node.fill(path, patients=3)
    return path


@pytest.fixture(scope="module")
def keys(home: Path) -> dict[str, dict[str, str]]:
    """Headers of a key for everybody and of one for PERSON."""
    scopes = {"all": "all", "one": PERSON}
    return {name: {"Authorization": f"Bearer {create_key(home, scope, NOW)[1]}"} for name, scope in scopes.items()}


@pytest.fixture(scope="module")
def client(home: Path, model_folder: Path) -> Iterator[TestClient]:
    with TestClient(create_app(home, model_folder, lambda: NOW)) as open_client:
        yield open_client


def body(count: int = 24, *, age: timedelta = timedelta(minutes=2), units: str = "mg/dL") -> dict[str, Any]:
    """Make a request of gently rising readings."""
    factor = 1 if units == "mg/dL" else 18.0156
    newest = datetime.fromtimestamp(NOW, tz=UTC) - age
    times = [newest - timedelta(minutes=5 * back) for back in range(count - 1, -1, -1)]
    readings = [{"at": t.isoformat(), "glucose": (110 + n) / factor} for n, t in enumerate(times)]
    return {"readings": readings, "units": units}


def problem(answer: httpx.Response, status: int, name: str) -> dict[str, Any]:
    """Check the shape of RFC 9457 and return the problem."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    told: dict[str, Any] = answer.json()
    assert told["type"] == f"urn:islet:problem:{name}"
    assert told["status"] == status
    assert told["title"]
    assert told["detail"]
    assert told["use"] == RESEARCH_LABEL
    return told


def test_forecast_from_sent_readings(client: TestClient, keys: dict[str, dict[str, str]]) -> None:
    """Twelve points from the newest reading on, with quantiles in order, the model, its privacy and the label."""
    answer = client.post("/v1/forecast", json=body(), headers=keys["one"])
    assert answer.status_code == 200, answer.text
    told = answer.json()
    assert [p["horizon_minutes"] for p in told["points"]] == list(range(5, 65, 5))
    for point in told["points"]:
        levels = [point[name] for name in ("p05", "p25", "p50", "p75", "p95")]
        assert levels == sorted(levels)
        assert 40 <= levels[0] <= levels[-1] <= 400
    assert told["age_seconds"] == 120
    assert told["model_version"] == "7"
    assert "epsilon 3" in told["privacy_statement"]
    assert told["use"] == RESEARCH_LABEL


def test_units_of_request_and_answer(client: TestClient, keys: dict[str, dict[str, str]]) -> None:
    """The same readings in mmol/L give the same forecast in mmol/L."""
    in_mg, in_mmol = (
        client.post("/v1/forecast", json=body(units=units), headers=keys["all"]).json() for units in ("mg/dL", "mmol/L")
    )
    assert in_mmol["units"] == "mmol/L"
    for ours, theirs in zip(in_mmol["points"], in_mg["points"], strict=True):
        assert ours["value"] == pytest.approx(theirs["value"] / 18.0156, abs=0.01)


def test_forecast_from_stored_readings(client: TestClient, keys: dict[str, dict[str, str]]) -> None:
    """The node's own readings answer for a patient whose key or whose clinic asks."""
    for key in keys.values():
        told = client.get(f"/v1/patients/{PERSON}/forecast", headers=key).json()
        assert datetime.fromisoformat(told["last_reading_at"]) == LAST
        assert told["as_of"] is None


def test_a_stored_forecast_is_personal_and_can_be_plain(client: TestClient, keys: dict[str, dict[str, str]]) -> None:
    """The answer tells whether this person's own past corrected it; `plain` asks for the model alone."""
    url = f"/v1/patients/{PERSON}/forecast"
    personal = client.get(url, headers=keys["one"]).json()
    plain = client.get(url, params={"plain": True}, headers=keys["one"]).json()

    assert personal["personal"] is True
    assert plain["personal"] is False
    assert personal["points"] != plain["points"]


def test_replay_of_a_past_moment(client: TestClient, keys: dict[str, dict[str, str]]) -> None:
    """as_of hides later readings and is repeated in the answer; a moment to come is refused."""
    moment = START + timedelta(hours=6, minutes=2)
    url = f"/v1/patients/{PERSON}/forecast"
    told = client.get(url, params={"as_of": moment.isoformat()}, headers=keys["one"]).json()
    assert datetime.fromisoformat(told["as_of"]) == moment
    assert datetime.fromisoformat(told["last_reading_at"]) == START + timedelta(hours=6)
    later = datetime.fromtimestamp(NOW + 60, tz=UTC).isoformat()
    refused = client.get(url, params={"as_of": later}, headers=keys["one"])
    assert "future" in problem(refused, 409, "conflict")["detail"]


def test_every_reason_has_its_problem(client: TestClient, keys: dict[str, dict[str, str]]) -> None:
    """Each refusal that readings can cause is a problem of its own type, with the reason as a field."""

    def changed(at: int, value: float) -> dict[str, Any]:
        request = body()
        request["readings"][at]["glucose"] = value
        return request

    flat = body()
    for reading in flat["readings"][-10:]:
        reading["glucose"] = 120
    noisy = body()
    for number, reading in enumerate(noisy["readings"][-7:]):
        reading["glucose"] = 120 + 15 * (number % 2)
    requests = {
        NoForecast.STALE: body(age=timedelta(minutes=13)),
        NoForecast.FUTURE: body(age=timedelta(minutes=-6)),
        NoForecast.TOO_LITTLE_HISTORY: body(5),
        NoForecast.FLAT: flat,
        NoForecast.NOISY: noisy,
        NoForecast.JUMP: changed(-2, 260),
        NoForecast.OUT_OF_RANGE: changed(-2, 601),
        NoForecast.UNIT_SUSPECT: body(units="mmol/L") | {"units": "mg/dL"},
    }
    for reason, request in requests.items():
        answer = client.post("/v1/forecast", json=request, headers=keys["all"])
        assert problem(answer, NO_FORECAST[reason][0], reason.value)["reason"] == reason.value
    answer = client.get("/v1/patients/nobody/forecast", headers=keys["all"])
    assert problem(answer, 404, "unknown-patient")["reason"] == "unknown-patient"
    untested = set(NoForecast) - set(requests) - {NoForecast.UNKNOWN_PATIENT}
    assert untested == {NoForecast.NO_MODEL}  # test_node_without_a_model_says_so
    assert set(NO_FORECAST) == set(NoForecast)


def test_key_is_needed_and_scoped(client: TestClient, keys: dict[str, dict[str, str]]) -> None:
    """No key or a wrong one is 401 with a challenge; another patient's key is 403, also for patients not held."""
    for headers in ({}, {"Authorization": "Bearer islet_wrong"}, {"Authorization": "Basic abc"}):
        for answer in (
            client.post("/v1/forecast", json=body(), headers=headers),
            client.get(f"/v1/patients/{PERSON}/forecast", headers=headers),
        ):
            problem(answer, 401, "unauthorised")
            assert answer.headers["www-authenticate"] == "Bearer"
    for other in ("person-002", "nobody"):
        problem(client.get(f"/v1/patients/{other}/forecast", headers=keys["one"]), 403, "forbidden")


def test_invalid_request_points_at_the_field_and_repeats_no_value(
    client: TestClient, keys: dict[str, dict[str, str]]
) -> None:
    """Validation errors name the place, and neither values nor unknown names of the sender come back."""
    wrong = body()
    wrong["readings"][0] = {"at": "2026-01-01T00:00:00", "glucose": CANARY}
    wrong["readings"][1]["glucose"] = -CANARY
    wrong["readings"][2][f"note-{CANARY}"] = CANARY
    wrong["units"] = f"{CANARY}"
    answer = client.post("/v1/forecast", json=wrong, headers=keys["all"])
    pointers = {e["pointer"] for e in problem(answer, 422, "invalid-request")["errors"]}
    assert {"/body/readings/0/at", "/body/readings/1/glucose", "/body/readings/2", "/body/units"} <= pointers
    assert "123" not in answer.text
    headers = keys["all"] | {"Content-Type": "application/json"}
    for at in ("0", '"0"', '"1700000000"', '"2026-01-01"'):
        text = f'{{"readings": [{{"at": {at}, "glucose": 100}}], "units": "mg/dL"}}'
        told = problem(client.post("/v1/forecast", content=text, headers=headers), 422, "invalid-request")
        assert told["errors"][0]["pointer"] == "/body/readings/0/at"
    for text in (f'{{"readings": [{CANARY}', f'{{"readings": {CANARY}, "units": NaN}}', ""):
        answer = client.post("/v1/forecast", content=text, headers=headers)
        problem(answer, 422, "invalid-request")
        assert "123" not in answer.text


def test_body_is_bounded(client: TestClient, keys: dict[str, dict[str, str]]) -> None:
    """More than 256 KiB is 413, whether its length was declared or the body was streamed."""
    problem(client.post("/v1/forecast", content=b" " * (256 * 1024 + 1), headers=keys["all"]), 413, "too-large")

    def pieces() -> Iterator[bytes]:
        for _ in range(300):
            yield b" " * 1024

    problem(client.post("/v1/forecast", content=pieces(), headers=keys["all"]), 413, "too-large")
    fits = json.dumps(body()).encode().ljust(256 * 1024)
    headers = keys["all"] | {"Content-Type": "application/json"}
    assert client.post("/v1/forecast", content=fits, headers=headers).status_code == 200


def test_unknown_paths_and_methods_are_problems_too(client: TestClient) -> None:
    """404 and 405 have the same shape, and FastAPI's own pages, which load scripts from elsewhere, are not there."""
    for path in ("/nothing", "/redoc", "/docs/oauth2-redirect"):
        problem(client.get(path), 404, "not-found")
    problem(client.get("/v1/forecast"), 405, "method-not-allowed")
    both = client.delete("/api/v1/entries")
    problem(both, 405, "method-not-allowed")
    assert both.headers["allow"] == "GET, POST"


def test_node_without_a_model_says_so(home: Path, model_folder: Path, tmp_path: Path) -> None:
    """While the model folder is absent the node lives but is not ready; once it appears, it answers."""
    folder = tmp_path / "later"
    with TestClient(create_app(home, folder, lambda: NOW)) as client:
        assert client.get("/healthz").json() == {"status": "ok"}
        assert problem(client.get("/readyz"), 503, "no-model")["reason"] == "no-model"
        folder.symlink_to(model_folder)
        assert client.get("/readyz").json()["model_version"] == "7"


def test_damaged_model_or_wrong_home_does_not_start(home: Path, model_folder: Path, tmp_path: Path) -> None:
    """A model with a flipped bit and a folder that is no node are refused before anything is served."""
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in model_folder.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    data = bytearray((broken / "model.onnx").read_bytes())
    data[-1] ^= 1
    (broken / "model.onnx").write_bytes(data)
    with pytest.raises(Tampered, match=r"model\.onnx"):
        create_app(home, broken)
    with pytest.raises(BadInput, match="not a node folder"):
        create_app(tmp_path, model_folder)


def test_metrics_count_outcomes_without_names(home: Path, model_folder: Path, keys: dict[str, dict[str, str]]) -> None:
    """Counters name the route template and the reason, never a pseudonym."""
    with TestClient(create_app(home, model_folder, lambda: NOW)) as client:
        client.get(f"/v1/patients/{PERSON}/forecast", headers=keys["all"])
        client.post("/v1/forecast", json=body(3), headers=keys["all"])
        client.get("/elsewhere/123")
        text = client.get("/metrics").text
    assert 'islet_requests_total{route="/v1/patients/{pseudonym}/forecast",outcome="200"} 1' in text
    assert 'islet_requests_total{route="/v1/forecast",outcome="insufficient-history"} 1' in text
    assert 'islet_requests_total{route="other",outcome="404"} 1' in text
    assert 'islet_model_info{version="7"' in text
    assert PERSON not in text


def test_model_card_is_served(client: TestClient) -> None:
    """Anybody may read the card of the model that answers."""
    told = client.get("/v1/model-card").json()
    assert told["privacy"]["unit"] == "patient"
    assert told["use"] == RESEARCH_LABEL


def test_every_refusal_is_described_as_a_problem(client: TestClient) -> None:
    """OpenAPI 3.1 describes every answer, each refusal under the media type of RFC 9457."""
    document = client.get("/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    for path in document["paths"].values():
        for operation in path.values():
            for status, answer in operation["responses"].items():
                if int(status) >= 400:
                    assert list(answer["content"]) == ["application/problem+json"], (status, operation["operationId"])


def test_new_readings_are_served_without_restart(
    model_folder: Path, tmp_path: Path, keys: dict[str, dict[str, str]]
) -> None:
    """An import while the endpoint runs changes its answers."""
    home = small_node.make_node(tmp_path / "south")
    _, secret = create_key(home, "all", NOW)
    headers = {"Authorization": f"Bearer {secret}"}
    with TestClient(create_app(home, model_folder, lambda: NOW)) as client:
        problem(client.get(f"/v1/patients/{PERSON}/forecast", headers=headers), 404, "unknown-patient")
        small_node.fill(home, patients=2)
        assert client.get(f"/v1/patients/{PERSON}/forecast", headers=headers).status_code == 200


def test_served_over_a_real_socket_until_stopped(home: Path, model_folder: Path) -> None:
    """serve() answers on a loopback port, calls back when ready, and ends when told to; a taken port is bad input."""
    running: list[Running] = []
    ready = threading.Event()

    def note(server: Running) -> None:
        running.append(server)
        ready.set()

    thread = threading.Thread(target=serve, args=(home, model_folder, "127.0.0.1", 0, note))
    thread.start()
    assert ready.wait(30)
    answer = httpx.get(f"{running[0].url}/readyz")
    assert answer.status_code == 200
    assert "server" not in answer.headers
    port = int(running[0].url.rsplit(":", 1)[1])
    with pytest.raises(BadInput, match="cannot be had"):
        serve(home, model_folder, "127.0.0.1", port)
    running[0].stop()
    thread.join(30)
    assert not thread.is_alive()
