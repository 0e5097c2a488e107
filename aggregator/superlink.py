"""Flower's programs at the aggregator: what is started, with which files, and how its commands are used.

Beside what aggregator.settings makes, the folder holds:

    tls/ca.crt, tls/ca.key           the federation's certificate authority            key 0600
    tls/server.crt, tls/server.key   certificate of SuperLink and joining desk         key 0600
    keys/superexec.secret            between SuperLink and SuperExec, on this machine  0600
    flower/                          Flower's own home: SuperLink's database, connection file

SuperLink and desk listen on the loopback address only: whoever reaches the SuperLink's port may submit code, so
hospitals come through a reverse proxy that passes the Fleet API and the desk (deploy/nginx.conf).
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from aggregator.settings import AggregatorFolder
from data_schemas.errors import BadInput, CheckFailed
from pipeline.bundle import BUNDLE
from pipeline.certificates import Credentials, make_authority, make_server_certificate
from pipeline.signing import write_durably
from pipeline.supervisor import Program

CONNECTION = "islet"
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_SECRET = "keys/superexec.secret"  # noqa: S105 a path
# Flower's commands answer in seconds; a SuperLink that is gone makes them wait.
_COMMAND_S, _POLL_S, _LONGEST_POLL_S = 90.0, 5.0, 30.0
_REGISTERED = "Public key already in use"


def prepare(folder: AggregatorFolder) -> None:
    """Make authority, server certificate, secret and Flower's home where they are missing; nothing is overwritten."""
    tls, now = folder.path / "tls", datetime.now(UTC)
    for path in (tls, folder.path / "flower"):
        path.mkdir(mode=0o700, exist_ok=True)
    if not (tls / "ca.key").exists():
        _write(tls / "ca", make_authority(folder.settings.federation, now))
    if not (tls / "server.key").exists():
        renew_certificate(folder)
    if not (folder.path / _SECRET).exists():
        write_durably(folder.path / _SECRET, secrets.token_hex(32).encode(), mode=0o600)
    lines = (
        "[superlink]",
        f'default = "{CONNECTION}"',
        f"[superlink.{CONNECTION}]",
        f'address = "{_superlink(folder)}"',
        f"root-certificates = {json.dumps(str((tls / 'ca.crt').resolve()))}",
    )
    write_durably(folder.path / "flower" / "config.toml", "\n".join((*lines, "")).encode())


def renew_certificate(folder: AggregatorFolder) -> None:
    """Make a new server certificate for the present addresses; hospitals trust the authority, so nothing changes there.

    Restart the programs afterwards.
    """
    tls = folder.path / "tls"
    try:
        authority = Credentials((tls / "ca.crt").read_bytes(), (tls / "ca.key").read_bytes())
    except OSError as error:
        raise BadInput(
            "tls/ca.crt and tls/ca.key are not there", "restore them, or run `islet aggregator init`"
        ) from error
    hosts = dict.fromkeys((host_of(folder.settings.fleet_address), host_of(folder.settings.desk_address), *_LOOPBACK))
    _write(tls / "server", make_server_certificate(authority, tuple(hosts), datetime.now(UTC)))


def host_of(address: str) -> str:
    """Host of HOST:PORT; an IPv6 address loses its brackets."""
    return address.rpartition(":")[0].strip("[]")


def programs(folder: AggregatorFolder) -> tuple[Program, ...]:
    """SuperLink, SuperExec and joining desk of a prepared folder.

    SuperExec is a program of its own, so a SuperLink that dies and comes back ends no run.
    """
    tls, secret, path = folder.path / "tls", str(folder.path / _SECRET), str(folder.path)
    environment = _environment(folder)
    superlink = (
        *(_binary("flower-superlink"), "--host", "127.0.0.1", "--port", str(folder.settings.port)),
        *("--ssl-certfile", str(tls / "server.crt"), "--ssl-keyfile", str(tls / "server.key")),
        *("--ssl-ca-certfile", str(tls / "ca.crt"), "--enable-supernode-auth"),
        *("--isolation", "process", "--superexec-auth-secret-file", secret),
        *("--database", str(folder.path / "flower" / "superlink.db"), "--disable-runtime-dependency-installation"),
    )
    superexec = (
        *(_binary("flower-superexec"), "--runtime-api-address", _superlink(folder)),
        *("--root-certificates", str(tls / "ca.crt"), "--superexec-auth-secret-file", secret),
    )
    desk = (sys.executable, "-m", "aggregator.desk", path)
    return (
        Program("superlink", superlink, environment),
        Program("superexec", superexec, environment),
        Program("desk", desk, environment),
    )


def register(folder: AggregatorFolder, node: str, transport_key: str) -> None:
    """Let a hospital's SuperNode connect; a key that is registered already is left as it is.

    Raises CheckFailed when the SuperLink refuses or is not there.
    """
    key = folder.path / "flower" / f"{node}.pub"
    write_durably(key, transport_key.encode())
    try:
        _flwr(folder, "supernode", "register", str(key), CONNECTION, "--name", node, "--format", "json")
    except CheckFailed as error:
        if _REGISTERED not in error.message:
            raise
    finally:
        key.unlink(missing_ok=True)


def submit(folder: AggregatorFolder, sit_every_s: float = 0.0) -> str:
    """Start a run of the installed bundle; its Flower id. Raises CheckFailed.

    With sit_every_s it trains nothing: it holds a sitting of the members every so many seconds until it is stopped.
    """
    config = ("--run-config", f"sit-every-s={sit_every_s:.1f}") if sit_every_s else ()
    started = _flwr(folder, "run", str(BUNDLE), CONNECTION, *config, "--format", "json")
    return str(started["run-id"])


def follow(folder: AggregatorFolder, flower_run: str) -> Iterator[Mapping[str, str]]:
    """Yield the run's {status, details} as the SuperLink tells it, until it is finished; an outage is waited for."""
    started = time.monotonic()
    while True:
        try:
            listed = _flwr(folder, "list", CONNECTION, "--run-id", flower_run, "--format", "json")
        except CheckFailed:
            yield {"status": "unknown", "details": "the SuperLink does not answer"}
        else:
            run = listed["runs"][0]
            told = {"status": str(run["status"]), "details": str(run.get("status-details") or "")}
            yield told
            if told["status"].startswith("finished"):
                return
        # each question starts flwr's command, two seconds of processor time: a long run is asked about less often
        time.sleep(min(_LONGEST_POLL_S, _POLL_S + 0.1 * (time.monotonic() - started)))


def _write(stem: Path, credentials: Credentials) -> None:
    write_durably(stem.with_suffix(".key"), credentials.key, mode=0o600)
    write_durably(stem.with_suffix(".crt"), credentials.certificate)


def _superlink(folder: AggregatorFolder) -> str:
    return f"127.0.0.1:{folder.settings.port}"


def _binary(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def _environment(folder: AggregatorFolder) -> dict[str, str]:
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}",
        "FLWR_HOME": str(folder.path / "flower"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "NO_COLOR": "1",
        "ISLET_AGGREGATOR_HOME": str(folder.path.resolve()),
    }


def _flwr(folder: AggregatorFolder, *arguments: str) -> dict[str, Any]:
    """Run one of Flower's commands and read its JSON answer. Raises CheckFailed with what Flower said."""
    try:
        done = subprocess.run(  # noqa: S603
            (_binary("flwr"), *arguments),
            env=_environment(folder),
            capture_output=True,
            text=True,
            check=False,
            timeout=_COMMAND_S,
        )
    except subprocess.TimeoutExpired as error:
        raise CheckFailed(f"flwr {arguments[0]} did not answer", "is `islet aggregator up` running?") from error
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        answer = {}
    if done.returncode or not isinstance(answer, dict) or not answer.get("success"):
        said = str(answer.get("error-message", "")).split() if isinstance(answer, dict) else []
        raise CheckFailed(
            f"flwr {arguments[0]} failed: {' '.join(said) or 'no answer'}", "is `islet aggregator up` running?"
        )
    return answer
