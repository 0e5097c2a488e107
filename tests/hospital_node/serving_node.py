"""A node with readings, a model and keys, served in process for the tests of the endpoint."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from fastapi.testclient import TestClient

from data_schemas.canonical import bytes_hash
from hospital_node.api_keys import create_key
from hospital_node.endpoint import create_app
from hospital_node.rate_limit import RateLimit
from pipeline.export import write_model
from pipeline.model_card import CardPrivacy, ModelCard, TrainedOn
from tests.hospital_node import small_node

PERSON, OTHER = "person-001", "person-002"
START = datetime(2026, 1, 1, tzinfo=UTC)
LAST = START + timedelta(hours=12, minutes=-5)
NOW = (LAST + timedelta(minutes=3)).timestamp()


@dataclass
class Served:
    """An open client, the node's folder, and the secrets of its keys by name."""

    client: TestClient
    home: Path
    secrets: dict[str, str]

    def key(self, name: str) -> dict[str, str]:
        """Return the Authorization header of a key."""
        return {"Authorization": f"Bearer {self.secrets[name]}"}


def export_model(folder: Path, version: str = "7", seed: int = 0) -> Path:
    """Write a small model folder."""
    plan = small_node.plan()
    weights = small_node.base_weights(plan, seed)
    card = ModelCard(
        version=version,
        model_hash=bytes_hash(weights.tobytes()),
        spec=plan.model,
        trained_on=(TrainedOn(node="north", declared_training_patients=10, declared_heldout_patients=4),),
        privacy=CardPrivacy(unit="patient", epsilon=3.0, delta=1e-5, rounds=4, noise_source="secure"),
    )
    return write_model(folder, weights, plan.model, card).folder


_PLACE = tempfile.TemporaryDirectory()


@functools.cache
def shared_model() -> Path:
    """Return one model folder for all tests of a run: exporting takes seconds."""
    return export_model(Path(_PLACE.name) / "model")


def make(
    place: Path, *, patients: int = 3, hours: int = 12, now: float = NOW, limit: RateLimit | None = None
) -> Served:
    """Make a node with keys `all`, `operator`, `one` (PERSON, reads), `writer` (PERSON), `collector` (all, writes)."""
    home = small_node.make_node(place / "node")
    small_node.fill(home, patients=patients, hours=hours)
    secrets = {
        "all": create_key(home, "all", now)[1],
        "one": create_key(home, PERSON, now)[1],
        "writer": create_key(home, PERSON, now, writes=True)[1],
        "operator": create_key(home, "all", now, operates=True)[1],
        "collector": create_key(home, "all", now, writes=True)[1],
    }
    app = create_app(home, shared_model(), lambda: now, limit or RateLimit(10**6, 10**6))
    return Served(TestClient(app), home, secrets)


def upload(count: int = 3, start: datetime = LAST, value: float = 120.0) -> dict[str, Any]:
    """Readings every 5 minutes after `start`, all but equal."""
    rows = [
        {"at": (start + timedelta(minutes=5 * (n + 1))).isoformat(), "glucose": value + n % 5} for n in range(count)
    ]
    return {"readings": rows, "units": "mg/dL"}
