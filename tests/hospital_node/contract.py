"""Property-based requests by Schemathesis against a real endpoint: `python -m tests.hospital_node.contract [CASES]`.

Every operation of the OpenAPI document gets CASES requests (1,000 unless told otherwise), fitting and unfitting ones;
each answer is held against the document: no 5xx, no undescribed status, media type, header or shape. The node's clock
stands still, so that its readings never grow stale while the drill runs.
"""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from hospital_node.rate_limit import RateLimit
from tests.hospital_node import serving_node, small_node

PATIENT = "person-000"
NEWEST = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(hours=26, minutes=-5)
NO_LIMIT = RateLimit(10**9, 10**9)
CASES = 1000


@contextmanager
def endpoint(place: Path) -> Iterator[tuple[str, tuple[str, str]]]:
    """Serve a node with readings on loopback; yield its address, and the headers of keys that may write."""
    import uvicorn

    from hospital_node.api_keys import create_key
    from hospital_node.endpoint import create_app

    home = small_node.make_node(place / "node")
    small_node.fill(home, patients=2, hours=26)
    now = (NEWEST + timedelta(minutes=3)).timestamp()
    key, secret = (create_key(home, scope, now, writes=True)[1] for scope in ("all", PATIENT))
    with socket.socket() as taken, patient_server():
        app = create_app(home, serving_node.shared_model(), lambda: now, NO_LIMIT)
        taken.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, access_log=False, log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]})
        thread.start()
        try:
            yield (
                f"http://127.0.0.1:{taken.getsockname()[1]}",
                (f"Authorization: Bearer {key}", f"api-secret: {secret}"),
            )
        finally:
            server.should_exit = True
            thread.join(30)


@contextmanager
def patient_server() -> Iterator[None]:
    """Let a server bear thousands of wrong keys, and streams that each tell one event and end."""
    from hospital_node import access, stream

    before = access.FAILURES, stream.LONGEST_SECONDS, stream.LOOK_SECONDS
    access.FAILURES, stream.LONGEST_SECONDS, stream.LOOK_SECONDS = NO_LIMIT, 1e-3, 1e-3
    try:
        yield
    finally:
        access.FAILURES, stream.LONGEST_SECONDS, stream.LOOK_SECONDS = before


def good_readings() -> list[dict[str, Any]]:
    """Two hours of readings that are fresh by the drill's clock."""
    times = [NEWEST + timedelta(minutes=1) - timedelta(minutes=5 * back) for back in range(24)]
    return [{"at": at.isoformat(), "glucose": 120 + n} for n, at in enumerate(times)]


def run(url: str, headers: tuple[str, ...], cases: int, seed: int, phases: str = "examples,coverage,fuzzing") -> int:
    """Run Schemathesis; return its exit code: 0 when every answer kept the contract."""
    command = [str(Path(sys.executable).parent / "schemathesis"), "run", f"{url}/openapi.json", "--seed", str(seed)]
    command += ["--phases", phases, "--max-examples", str(cases), "--checks", "all"]
    command += [*(part for header in headers for part in ("--header", header)), "--continue-on-failure", "--no-shrink"]
    hooks = {"SCHEMATHESIS_HOOKS": "tests.hospital_node.contract_hooks", "PYTHONPATH": str(Path.cwd())}
    with tempfile.TemporaryDirectory() as quiet:  # its example database and reports
        return subprocess.run(command, cwd=quiet, env=os.environ | hooks, check=False).returncode


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as where, endpoint(Path(where)) as (address, keys):
        seed = secrets.randbelow(2**32)
        code = run(address, keys, int(sys.argv[1]) if len(sys.argv) > 1 else CASES, seed)
        sys.stdout.write(f"seed {seed}\n")
    raise SystemExit(code)
