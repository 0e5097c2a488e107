"""Sittings over the network: hospitals sign at home, and their endpoints serve what was decided. `make deployment`."""

from __future__ import annotations

import json
import logging
import time
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from aggregator.settings import open_folder
from data_schemas.canonical import bytes_hash
from data_schemas.ledger import ModelEntry
from data_schemas.plan import RELATION
from pipeline.export import write_model
from pipeline.model_card import CardPrivacy, ModelCard, TrainedOn
from tests.deployment.real_federation import RealFederation, free_ports, islet
from tests.hospital_node import small_node

pytestmark = [pytest.mark.deployment, pytest.mark.timeout(1500)]
NAMES = ("duke", "madrid")
_log = logging.getLogger("islet.tests")


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[RealFederation]:
    """Two hospitals that have joined and run their nodes, with endpoints."""
    running = RealFederation(tmp_path)
    running.found(rounds=2)
    for name in NAMES:
        running.join(name)
    yield running
    running.stop()


def publish(federation: RealFederation, seed: int) -> str:
    """Release a model as a finished run does; its hash."""
    plan = small_node.plan()
    weights = small_node.base_weights(plan, seed)
    digest = bytes_hash(weights.tobytes())
    card = ModelCard(
        version=f"run-{seed}",
        model_hash=digest,
        spec=plan.model,
        trained_on=(TrainedOn(node="duke", declared_training_patients=10, declared_heldout_patients=3),),
        privacy=CardPrivacy(unit="patient", epsilon=3.0, delta=1e-5, rounds=4, noise_source="seeded"),
    )
    folder = open_folder(federation.path / "hub")
    folder.released.mkdir(exist_ok=True)
    write_model(folder.released / digest[:12], weights, plan.model, card)
    told = {"unit": "patient", "relation": RELATION, "delta": 1e-5, "epsilon_by_node": {"duke": 3.0}}
    book = folder.open_ledger()
    book.append(ModelEntry(run=f"run-{seed}", round=4, model_hash=digest, **told), datetime.now(UTC).isoformat())
    book.close()
    return digest


def served(port: int) -> str | None:
    """Hash of the model that an endpoint answers with."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=10) as reply:
            return str(json.loads(reply.read())["model_hash"])
    except OSError:  # no endpoint yet, or no model
        return None


def wait_until(what: str, done: object, seconds: float = 300) -> float:
    """Wait for a condition; how long it took."""
    started = time.monotonic()
    while not done():  # type: ignore[operator]
        assert time.monotonic() - started < seconds, what
        time.sleep(0.5)
    return time.monotonic() - started


def decide(federation: RealFederation, action: str, model_hash: str, ports: dict[str, int]) -> float:
    """Propose at one hospital, vote at both; seconds from the last vote until every endpoint serves the model."""
    path, values = federation.path, json.dumps({"model_hash": model_hash})
    code, text = islet(path, "federation", "propose", "duke", action, "--values", values)
    assert code == 0, text
    name = Path(text.split()[-1]).stem

    def arrived() -> bool:
        code, text = islet(path, "federation", "status", "madrid")
        return code == 0 and f"{action} (model hash {model_hash[:12]}) by duke" in text and "open" in text

    wait_until(f"the proposal {name} is at the other hospital", arrived)
    proposal = next(
        line.split()[1]
        for line in islet(path, "federation", "status", "madrid")[1].splitlines()
        if line.strip().startswith("proposal") and action in line
    )
    for hospital in NAMES:
        code, text = islet(path, "federation", "vote", hospital, proposal, "--yes")
        assert code == 0, text
    return wait_until(f"{action} is in effect", lambda: all(served(port) == model_hash for port in ports.values()))


def test_votes_travel_and_a_roll_back_reaches_every_endpoint(federation: RealFederation) -> None:
    """With a standing run, nothing but commands at home moves both hospitals' endpoints to a model and back."""
    one, two = publish(federation, 1), publish(federation, 2)
    ports = {name: free_ports() for name in NAMES}
    for name, port in ports.items():
        federation.start(name, "node", "run", name, "--port", str(port))
    code, text = islet(federation.path, "federation", "sit", "hub", "--every", "10")
    assert code == 0, text
    wait_until("nodes hold the ledger", lambda: all((federation.path / n / "ledger.jsonl").exists() for n in NAMES))
    took = {
        "promote one": decide(federation, "promote", one, ports),
        "promote two": decide(federation, "promote", two, ports),
        "roll back": decide(federation, "roll-back", one, ports),
    }
    _log.warning("seconds from the last vote to every endpoint: %s", took)
