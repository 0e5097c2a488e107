"""Secure aggregation over a real SuperLink: voted at home, trained, and the hub's files hold the sum alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from aggregator.ledger import read_entries
from data_schemas.ledger import RoundEntry
from data_schemas.messages import SignedUpdate
from hospital_node import ledger_view, own_rounds
from hospital_node.folder import NodeFolder
from pipeline import masking
from pipeline.commitments import total_hash
from tests.deployment.real_federation import HOSPITALS, RealFederation, islet
from tests.deployment.test_standing_sittings import wait_until

pytestmark = [pytest.mark.deployment, pytest.mark.timeout(3000, func_only=True)]
ROUNDS = 2
POLICY = {"max_epsilon_training": 8, "max_epsilon_heldout": 8, "min_patients": 10, "aggregation": "secure"}


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[RealFederation]:
    """Three hospitals that have joined and run their nodes."""
    running = RealFederation(tmp_path)
    running.found(rounds=ROUNDS)
    for name in HOSPITALS:
        running.join(name)
        running.run_node(name)
    yield running
    running.stop()


def done(federation: RealFederation, *arguments: str) -> str:
    """Run a command that must succeed; its output."""
    code, text = islet(federation.path, *arguments)
    assert code == 0, text
    return text


def status(federation: RealFederation, word: str) -> list[str]:
    """Lines of a hospital's own view of the federation that hold a word; none before it has a copy of the ledger."""
    code, text = islet(federation.path, "federation", "status", "madrid")
    return [line.strip() for line in text.splitlines() if word in line] if code == 0 else []


def vote(federation: RealFederation) -> None:
    """Propose the policy at one hospital and accept it at two."""
    done(federation, "federation", "sit", "hub", "--every", "5")
    wait_until("a hospital holds the ledger", (federation.path / "duke" / "ledger.jsonl").exists)
    values = json.dumps({"policy": POLICY})
    done(federation, "federation", "propose", "duke", "privacy-policy", "--values", values)
    wait_until("the proposal is at the others", lambda: bool(status(federation, "proposal")))
    (proposal,) = status(federation, "proposal")
    for name in ("duke", "madrid"):
        done(federation, "federation", "vote", name, proposal.split()[1], "--yes")
    wait_until("it is decided", lambda: bool(status(federation, "; secure aggregation")))


def at_home(path: Path) -> list[tuple[SignedUpdate, np.ndarray]]:
    """What a hospital trained, in clear, from its own budget book."""
    with NodeFolder.open(path) as node:
        assert ledger_view.alarm(node) is None
        return [*own_rounds.updates(node.budget())]


def test_the_hub_gets_the_sum_alone(federation: RealFederation) -> None:
    """Two rounds over TLS: each logged sum is that of the updates at home, none of which is in the hub's files."""
    vote(federation)
    code, told = islet(federation.path, "aggregator", "run", "hub", "--out", "model", timeout=2400)
    assert code == 0, told
    assert "finished:completed" in told
    done(federation, "ledger", "verify", "hub", "--witness", "duke")
    assert set(federation.stop().values()) == {0}

    trained = [pair for name in HOSPITALS for pair in at_home(federation.path / name)]
    lines = [line.entry for line in read_entries(federation.path / "hub" / "ledger.db")]
    closed = [entry for entry in lines if isinstance(entry, RoundEntry)]
    held = b"".join(path.read_bytes() for path in (federation.path / "hub").rglob("*") if path.is_file())
    assert [(entry.round, len(entry.admitted)) for entry in closed] == [(1, 3), (2, 3)]
    for entry in closed:
        inside = [(signed, update) for signed, update in trained if signed in entry.admitted]
        whole = [masking.quantised(update, signed.manifest.declared_patients) for signed, update in inside]
        assert entry.sum is not None
        assert len(whole) == 3
        assert total_hash(np.sum(whole, axis=0)) == entry.sum.total_hash
        for (_, update), numbers in zip(inside, whole, strict=True):
            for secret in (update.tobytes(), numbers.tobytes(), total_hash(numbers).encode()):
                assert secret not in held
