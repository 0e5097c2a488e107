"""The Python client and the JavaScript example against a real endpoint on a loopback port."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from data_schemas.errors import BadInput
from data_schemas.forecast import Forecast, NoForecast
from data_schemas.units import RESEARCH_LABEL
from hospital_node.api_keys import create_key
from hospital_node.endpoint import Running, serve
from pipeline.client import Client, Refused, Stored
from tests.hospital_node import serving_node, small_node

ROOT = Path(__file__).parents[2]


@dataclass
class Live:
    """Where a running endpoint answers, and a key that reads and writes."""

    url: str
    key: str


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    home = small_node.make_node(tmp_path_factory.mktemp("live") / "node")
    key = create_key(home, "all", time.time(), writes=True)[1]
    running: list[Running] = []
    ready = threading.Event()

    def note(server: Running) -> None:
        running.append(server)
        ready.set()

    thread = threading.Thread(target=serve, args=(home, serving_node.shared_model(), "127.0.0.1", 0, note))
    thread.start()
    assert ready.wait(60)
    yield Live(running[0].url, key)
    running[0].stop()
    thread.join(60)


def rows(count: int = 24, age_minutes: int = 2) -> list[tuple[datetime, float]]:
    newest = datetime.now(UTC).replace(microsecond=0) - timedelta(minutes=age_minutes)
    return [(newest - timedelta(minutes=5 * (count - 1 - n)), 110.0 + n) for n in range(count)]


def test_client_returns_types(live: Live) -> None:
    """A forecast is a Forecast, a refusal a Refused with its reason, a card a ModelCard."""
    client = Client(live.url, live.key)
    made = client.forecast(rows(), "mg/dL")
    assert isinstance(made, Forecast)
    assert made.use == RESEARCH_LABEL
    stale = client.forecast(rows(age_minutes=20), "mg/dL")
    assert isinstance(stale, Refused)
    assert stale.reason is NoForecast.STALE
    assert client.model_card().version == "7"
    wrong = Client(live.url, "islet_wrong").forecast(rows(), "mg/dL")
    assert isinstance(wrong, Refused)
    assert (wrong.status, wrong.reason) == (401, None)
    with pytest.raises(BadInput, match="http"):
        Client("ftp://node", "key")


def test_stream_follows_uploads(live: Live) -> None:
    """The stream tells the forecast at once and again with each new reading, never the same twice."""
    client, sent = Client(live.url, live.key), rows(24)
    kept = client.add_readings("anna", sent[:-1], "mg/dL", idempotency_key="first")
    assert isinstance(kept, Stored)
    assert kept.stored == 23
    assert isinstance(client.stored_forecast("anna"), Forecast)
    stream = client.events("anna")
    name, data = next(stream)
    assert (name, data["use"]) == ("forecast", RESEARCH_LABEL)
    assert datetime.fromisoformat(data["last_reading_at"]) == sent[-2][0]
    client.add_readings("anna", sent[-1:], "mg/dL")
    name, data = next(stream)
    assert name == "forecast"
    assert datetime.fromisoformat(data["last_reading_at"]) == sent[-1][0]
    stream.close()


def test_stream_tells_why_there_is_no_forecast(live: Live) -> None:
    """A patient whose newest reading is old gets `stale`, with its time and the label."""
    client = Client(live.url, live.key)
    client.add_readings("old", rows(24, age_minutes=40), "mg/dL")
    name, data = next(client.events("old"))
    assert (name, data["reason"]) == ("stale", "stale-data")
    assert data["use"] == RESEARCH_LABEL


@pytest.mark.skipif(shutil.which("node") is None, reason="node, which runs the JavaScript example, is not installed")
def test_javascript_example_runs(live: Live) -> None:
    """docs/examples/forecast.mjs prints two likely ranges and the label, or the reason against a forecast."""

    def run(age_minutes: int) -> str:
        readings = [{"at": at.isoformat(), "glucose": glucose} for at, glucose in rows(24, age_minutes)]
        command = ["node", str(ROOT / "docs" / "examples" / "forecast.mjs"), live.url, live.key]
        body = json.dumps({"units": "mg/dL", "readings": readings})
        return subprocess.run(command, input=body, capture_output=True, text=True, check=True, timeout=60).stdout

    told = run(2).splitlines()
    assert len(told) == 3
    assert "8 in 10" in told[1]
    assert told[2] == RESEARCH_LABEL
    assert "stale-data" in run(30)
