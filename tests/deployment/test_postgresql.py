"""MLflow's records in a real PostgreSQL server, on the loopback interface: `make postgresql`."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from aggregator.recorder import Recorder
from aggregator.registry import Registry
from aggregator.settings import AggregatorSettings, open_folder
from pipeline.export import load_model
from tests.aggregator.small_federation import build, run
from tests.aggregator.test_registry import MEMBERS, PLAN, credit, model_folder, publish, summary

pytestmark = [pytest.mark.postgresql, pytest.mark.timeout(600)]
PASSWORD = "planted-password-5150"


def postgres_folder() -> Path:
    """Folder of PostgreSQL's programs."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    found = shutil.which("initdb")
    assert folders or found, "PostgreSQL is not installed: on Debian, apt-get install postgresql"
    return folders[-1] if folders else Path(str(found)).parent


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start a server with password authentication; the URL of an empty database, without the password."""
    home, programs = tmp_path_factory.mktemp("pg"), postgres_folder()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # PostgreSQL refuses to run as root.
    account = pwd.getpwnam("postgres") if os.getuid() == 0 else pwd.getpwuid(os.getuid())
    (home / "password").write_text(PASSWORD + "\n")
    for folder in (home, *list(home.parents)[:2]):
        folder.chmod(0o755)
    if os.getuid() == 0:
        os.chown(home, account.pw_uid, account.pw_gid)

    def ask(program: str, *arguments: str) -> None:
        command = [programs / program, *arguments]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run(command, user=account.pw_uid, group=account.pw_gid, cwd=home, check=True, timeout=300, **quiet)

    data = str(home / "data")
    ask("initdb", "-D", data, "-U", "islet", "--auth=scram-sha-256", f"--pwfile={home / 'password'}", "-E", "UTF8")
    ask("pg_ctl", "-D", data, "-w", "-t", "200", "-o", f"-h 127.0.0.1 -p {port} -k {home}", "start")
    passwords = home / "pgpass"
    passwords.write_text(f"127.0.0.1:{port}:*:islet:{PASSWORD}\n")
    passwords.chmod(0o600)
    before = os.environ.get("PGPASSFILE")
    os.environ["PGPASSFILE"] = str(passwords)
    try:
        subprocess.run(
            [programs / "createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "islet", "mlflow"],
            check=True,
            timeout=120,
        )
        yield f"postgresql+psycopg://islet@127.0.0.1:{port}/mlflow"
    finally:
        ask("pg_ctl", "-D", data, "-m", "fast", "-t", "250", "stop")
        os.environ.pop("PGPASSFILE")
        if before is not None:
            os.environ["PGPASSFILE"] = before


def test_a_run_and_its_model_are_recorded_in_postgresql(server: str, tmp_path: Path) -> None:
    """Series, registered model and its folder are found again by a second client; no SQLite file is made."""
    folder = build(tmp_path, mlflow_database=server)
    assert open_folder(folder.path).settings.mlflow_database == server
    told: list[str] = []
    recorder = Recorder.start(folder.path, folder, told.append)
    result = run(tmp_path, recorder)

    client = Registry(folder.path, server)._client
    logged = client.get_metric_history(recorder.run_id, "round/admitted")
    assert [metric.step for metric in logged] == [summary.round for summary in result.rounds]
    assert not (folder.path / "mlruns" / "mlflow.db").exists()
    assert told == []


def test_a_model_is_registered_once_and_crowned(server: str, tmp_path: Path) -> None:
    """What the registry's own tests ask of SQLite: found again, published once, champion by its hash."""
    store, folder = Registry(tmp_path, server), model_folder(tmp_path, 1)
    run_id = store.start_run("run-1", "trial", PLAN, MEMBERS)
    store.log_round(run_id, summary(1))
    store.log_credit(run_id, credit())
    published = publish(store, run_id, folder)
    again = Registry(tmp_path, server)

    assert again.start_run("run-1", "trial", PLAN, MEMBERS) == run_id
    assert publish(again, run_id, folder).version == published.version
    assert again.crown(load_model(folder).model_hash) is not None
    assert load_model(again.exported("models:/islet-forecaster@champion")).model_hash == load_model(folder).model_hash


def test_an_outage_loses_no_round_and_tells_no_password(server: str, tmp_path: Path) -> None:
    """A server that is not there is reported and survived; the password is in no setting, error or file of ours."""
    gone = server.replace("/mlflow", "/nothing-of-this-name")
    folder, told = build(tmp_path, mlflow_database=gone), list[str]()
    result = run(tmp_path, Recorder.start(folder.path, folder, told.append))

    assert len(result.rounds) == 3
    assert "MLflow is out of order" in told[0]
    texts = [f.read_bytes() for f in folder.path.rglob("*") if f.is_file()]
    assert PASSWORD not in "".join(told)
    assert not any(PASSWORD.encode() in text for text in texts)


def test_a_password_in_the_url_is_refused(tmp_path: Path) -> None:
    """It would lie in aggregator.toml, which is no key file."""
    with pytest.raises(ValueError, match="mlflow_database"):
        AggregatorSettings(federation="x", mlflow_database="postgresql+psycopg://islet:secret@127.0.0.1/mlflow")


def test_the_superlink_keeps_to_sqlite(server: str) -> None:
    """The open-source Flower refuses this server; once it does not, docs/deployment.md has another story to tell."""
    program = str(Path(sys.executable).parent / "flower-superlink")
    command = [program, "--insecure", "--host", "127.0.0.1", "--database", server]
    quiet = {**os.environ, "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    done = subprocess.run(command, env=quiet, capture_output=True, text=True, timeout=120, check=False)

    assert done.returncode != 0
    assert "Unsupported value for `--database`" in done.stdout + done.stderr
