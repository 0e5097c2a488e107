"""`islet review`: MLflow on this machine, opened at the runs with the columns that a reviewer looks at first."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import webbrowser
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from data_schemas.errors import BadInput
from pipeline.cli_node import say

START_SECONDS = 120
# No telemetry, no job runners: a reviewer looks, and nothing leaves the machine.
_QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


def register(app: typer.Typer) -> None:
    """Add the command to `islet`."""
    app.command("review")(review_command)


def review_command(
    root: Annotated[Path, typer.Argument(help="Folder that holds mlruns/: where the run was started.")] = Path(),
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of 127.0.0.1 for MLflow.")] = 5000,
) -> None:
    """Open the runs in MLflow, with the columns that a reviewer looks at first; runs until Ctrl-C."""
    # Also where a shell started this with Ctrl-C ignored, and for SIGTERM: MLflow must not stay behind.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        review(root, port, _tell)
    except KeyboardInterrupt:
        say("stopped")


def review(root: Path, port: int, ready: Callable[[str], None]) -> None:
    """Serve a folder's MLflow store on 127.0.0.1 and call `ready` with the address once it answers; until it ends.

    Raises BadInput: no store, no run of Islet in it, the port is taken, or MLflow does not start.
    """
    from aggregator.registry_store import DATABASE, review_path

    address = f"http://127.0.0.1:{port}/{review_path(root)}"
    if _answers(port):
        raise BadInput(f"port {port} is taken", "give another --port")
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{DATABASE}"]
    # A session of its own, because MLflow starts further processes: they end together.
    quiet: dict[str, Any] = {"env": {**os.environ, **_QUIET}, "stdout": subprocess.DEVNULL, "start_new_session": True}
    with subprocess.Popen(command, cwd=root, **quiet) as server:  # noqa: S603
        try:
            _wait(server, port)
            ready(address)
            server.wait()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGTERM)


def _wait(server: subprocess.Popen[bytes], port: int) -> None:
    for _ in range(START_SECONDS * 2):
        if _answers(port):
            return
        try:
            server.wait(0.5)
        except subprocess.TimeoutExpired:
            continue
        raise BadInput("MLflow did not start", "its message is above")
    raise BadInput(f"MLflow did not answer within {START_SECONDS} seconds", "the machine is busy: try again")


def _tell(address: str) -> None:
    say(f"MLflow answers; stop with Ctrl-C\n{address}")
    if sys.stdout.isatty():
        webbrowser.open(address)


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0
