"""SuperLink, SuperExecs and SuperNodes as real processes over TLS: `make deployment`."""

import fcntl
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from flwr.common.constant import ErrorCode

from aggregator.governance import replay
from aggregator.ledger import read_entries
from hospital_node.store import Store
from pipeline.bundle import BUNDLE
from tests.deployment.real_federation import ENVIRONMENT, HOSPITALS, RealFederation, islet

pytestmark = [pytest.mark.deployment, pytest.mark.timeout(3000, func_only=True)]


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealFederation]:
    """Three hospitals that have joined; the third allows less than the plan asks for. Nothing has been trained."""
    running = RealFederation(tmp_path_factory.mktemp("trial"))
    running.found(rounds=2)
    for hospital in ("duke", "madrid", "manchester"):
        running.join(hospital)
    running.set("manchester", max_epsilon_training=0.5)
    running.copy("embedded")
    for hospital in ("duke", "madrid", "manchester"):
        running.run_node(hospital)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def finished(federation: RealFederation) -> tuple[int, str]:
    """Exit code and output of the run."""
    return islet(federation.path, "aggregator", "run", "hub", "--out", "model", timeout=2400)


def test_the_run_over_the_network_succeeds_and_tells_who_was_refused(
    federation: RealFederation, finished: tuple[int, str]
) -> None:
    """Two rounds are closed, exit code 0; the ceiling in one hospital's own settings held."""
    code, text = finished

    assert code == 0, text + (federation.path / "hub.log").read_text()[-3000:]
    assert "round 2/2: 2 updates admitted  manchester: plan-exceeds-ceiling" in text
    assert "finished:completed" in text


def test_the_model_is_the_embedded_runs_model(federation: RealFederation, finished: tuple[int, str]) -> None:
    """Copies of the same folders, run in one process without any network, end with the same weights."""
    assert finished[0] == 0, finished[1]
    folder = federation.path / "embedded"
    nodes = [option for name in HOSPITALS for option in ("--node", name)]
    code, text = islet(folder, "aggregator", "run", "hub", *nodes, "--out", "model")
    assert code == 0, text
    ours, theirs = (replay(read_entries(at / "hub" / "ledger.db")) for at in (federation.path, folder))

    assert ours.models == theirs.models
    assert {key: entry.new_model_hash for key, entry in ours.rounds.items()} == {
        key: entry.new_model_hash for key, entry in theirs.rounds.items()
    }
    assert (federation.path / "model" / "weights.npz").read_bytes() == (folder / "model" / "weights.npz").read_bytes()


def test_the_run_is_in_mlflow_and_the_ledger_verifies(federation: RealFederation, finished: tuple[int, str]) -> None:
    """Rounds are logged, the model is registered, and a hospital's cosigned checkpoint holds."""
    from aggregator.registry import load_exported
    from pipeline.export import load_model

    assert finished[0] == 0, finished[1]
    code, text = islet(federation.path, "ledger", "verify", "hub", "--witness", "duke")

    assert code == 0, text
    registered = load_model(load_exported("models:/islet-forecaster@challenger", federation.path / "hub"))
    assert registered.model_hash == load_model(federation.path / "model").model_hash


def test_an_unapproved_bundle_is_refused_before_it_is_imported(federation: RealFederation, tmp_path: Path) -> None:
    """A bundle of other bytes gets a code from every node; nothing of it is unpacked or runs there."""
    marker, told = tmp_path / "imported", tmp_path / "codes"
    hostile = tmp_path / "hostile"
    shutil.copytree(BUNDLE, hostile)
    (hostile / "islet" / "client.py").write_text(
        f"open({str(marker)!r}, 'w').close()\nimport hospital_node.client_app\napp = hospital_node.client_app.app\n"
    )
    (hostile / "islet" / "server.py").write_text(_ASKING.replace("TOLD", repr(str(told))))
    environment = {**ENVIRONMENT, "FLWR_HOME": str(federation.path / "hub" / "flower"), "FLWR_TELEMETRY_ENABLED": "0"}
    flwr = Path(sys.executable).parent / "flwr"
    command = (flwr, "run", hostile, "islet", "--format", "json")
    started = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(started.stdout)["success"]
    end = time.monotonic() + 600
    while not told.exists() and time.monotonic() < end:
        time.sleep(0.5)

    answers = json.loads(told.read_text())
    assert [answer["code"] for answer in answers] == [ErrorCode.LOAD_CLIENT_APP_EXCEPTION] * 3
    assert {answer["reason"] for answer in answers} == {"An exception was raised when attempting to load `ClientApp`"}
    assert not marker.exists()
    assert "refused bundle" in (federation.path / "duke" / "reports" / "node.log").read_text()
    assert not (federation.path / "duke" / "link" / "flower" / "apps").exists()


# Asks every node who it is, and writes down how it failed.
_ASKING = """
import json, os
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp
app = ServerApp()

@app.main()
def main(grid, context):
    nodes = sorted(grid.get_node_ids())
    content = lambda: RecordDict({"body": ConfigRecord({"json": b"{}"})})
    replies = grid.send_and_receive([Message(content(), n, "query.hello", ttl=240.0) for n in nodes], timeout=240)
    told = [{"code": r.error.code, "reason": r.error.reason} if r.has_error() else {"code": 0} for r in replies]
    open(TOLD + ".new", "w").write(json.dumps(told))
    os.rename(TOLD + ".new", TOLD)
"""


def test_a_run_that_fails_says_so_in_its_exit_code(federation: RealFederation, finished: tuple[int, str]) -> None:
    """While another aggregator holds the state, a run ends with 1 and the reason; Flower's own command would say 0."""
    assert finished[0] == 0, finished[1]
    with (federation.path / "hub" / "state" / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, text = islet(federation.path, "aggregator", "run", "hub", "--out", "other")

    assert code == 1, text
    assert "finished:failed" in text
    assert not (federation.path / "other").exists()


def test_an_invitation_works_once(federation: RealFederation, tmp_path: Path) -> None:
    """The same keys may ask again; other keys may not, nor may another name or an altered invitation."""
    again, _ = islet(federation.path, "node", "join", "duke.invite", "duke")
    invite = (federation.path / "duke.invite").read_text()
    (tmp_path / "other.invite").write_text(invite.replace('"duke"', '"other"'))
    numbers = ("--training", "10", "--heldout", "3")
    stolen = islet(tmp_path, "node", "join", str(federation.path / "duke.invite"), "thief", *numbers)
    renamed = islet(tmp_path, "node", "join", "other.invite", "other", *numbers)

    assert again == 0
    assert (stolen[0], renamed[0]) == (1, 1)
    assert "was used already" in stolen[1]
    assert "is not valid" in renamed[1]


def test_no_secret_of_one_party_is_in_anothers_files(federation: RealFederation) -> None:
    """A hospital's private keys are in its own folder only; of a token the aggregator keeps a hash."""
    outside = [federation.path / "hub", *federation.path.glob("*.log"), *federation.path.glob("*.invite")]
    texts = [f.read_bytes() for top in outside for f in (top, *top.rglob("*")) if f.is_file()]
    for hospital in HOSPITALS:
        folder = federation.path / hospital
        for secret in (
            folder / "keys" / "node.ed25519",
            folder / "keys" / "pseudonym.key",
            folder / "link/transport.key",
        ):
            assert secret.stat().st_mode & 0o077 == 0
            assert not any(secret.read_bytes().splitlines()[-2:][0] in text for text in texts)
        logs = b"".join(f.read_bytes() for f in [*federation.path.glob("*.log"), *(folder / "reports").glob("*.log")])
        assert not any(name.encode() in logs for name in Store(folder / "store").patients())
    token = json.loads((federation.path / "duke.invite").read_text())["token"].encode()
    assert [f for f in (federation.path / "hub").rglob("*") if f.is_file() and token in f.read_bytes()] == []


def test_everything_stops_cleanly(federation: RealFederation) -> None:
    """After SIGTERM every command has ended with 0, and no process of it is left."""
    assert set(federation.stop().values()) == {0}
    assert federation.left_over() == []
