"""Three hospitals' containers and the aggregator's federate through the proxy: `make containers`."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deployment.real_federation import EXPORTS, HOSPITALS, write_plan

pytestmark = [pytest.mark.containers, pytest.mark.timeout(3600, func_only=True)]
HARDENED = (
    *("--read-only", "--cap-drop=all", "--security-opt", "no-new-privileges", "--pids-limit", "512", "--memory", "3g"),
    *("--tmpfs", "/tmp:mode=1777"),  # noqa: S108
)


def podman(*arguments: str, check: bool = True) -> str:
    done = subprocess.run(["podman", *arguments], capture_output=True, text=True, check=False, timeout=1800)
    assert done.returncode == 0 or not check, f"podman {arguments}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A hub, its proxy, and three nodes that have joined and run; torn down afterwards, volumes included."""
    path = tmp_path_factory.mktemp("containers")
    write_plan(path / "plan.toml", 1, seeded=False)  # the nodes draw noise of their own, and refuse to repeat it
    names = ["drill-proxy", "drill-hub", *(f"drill-{name}" for name in HOSPITALS)]

    def clear() -> None:
        podman("rm", "--force", "--time", "20", "--ignore", *names, check=False)
        podman("volume", "rm", "--force", *names[1:], check=False)
        podman("network", "rm", "--force", "drill", check=False)

    clear()
    podman("network", "create", "drill")
    try:
        plan = ("-v", f"{path / 'plan.toml'}:/mnt/plan.toml:ro", "-v", "drill-hub:/hub")
        found = ("aggregator", "init", "/hub", "--federation", "trial", "--plan", "/mnt/plan.toml")
        podman("run", "--rm", *HARDENED, *plan, "islet-aggregator", *found, "--address", "drill-hub:8443")
        patient = ("-i", "s/^\\(hello\\|cosign\\)_timeout_s = .*/\\1_timeout_s = 400.0/", "/hub/aggregator.toml")
        podman("run", "--rm", *HARDENED, *plan, "--entrypoint", "sed", "islet-aggregator", *patient)
        volume = ("-v", "drill-hub:/hub", "--name", "drill-hub", "--network", "drill")
        podman("run", "--detach", *HARDENED, *volume, "islet-aggregator")
        inside = ("--network", "container:drill-hub", "-v", "drill-hub:/hub:ro", "--name", "drill-proxy")
        podman("run", "--detach", *HARDENED, *inside, "islet-proxy")
        for hospital, (zone, training, heldout) in HOSPITALS.items():
            podman("exec", "drill-hub", "islet", "aggregator", "invite", "/hub", hospital, "--out", "/hub/invite")
            (path / "invite").write_text(podman("exec", "drill-hub", "cat", "/hub/invite"))
            (path / "invite").chmod(0o644)
            common = (
                *("--network", "drill", "-v", f"drill-{hospital}:/node"),
                *("-v", f"{EXPORTS / hospital}:/exports:ro", "-v", f"{path / 'invite'}:/mnt/invite:ro"),
            )
            numbers = ("--training", str(training), "--heldout", str(heldout))
            source = ("--exports", "/exports", "--layout", hospital, "--zone", zone)
            podman(
                "run",
                "--rm",
                *HARDENED,
                *common,
                "islet-node",
                "node",
                "join",
                "/mnt/invite",
                "/node",
                *numbers,
                *source,
            )
            podman("run", "--rm", *HARDENED, *common, "islet-node", "node", "import", "/node")
            podman("run", "--detach", *HARDENED, "--name", f"drill-{hospital}", *common, "islet-node")
        yield path
    finally:
        clear()


def test_three_containers_federate(federation: Path) -> None:
    """A round with every hospital's update, credited and published; exit code 0, and a ledger that verifies."""
    text = podman("exec", "drill-hub", "islet", "aggregator", "run", "/hub", "--out", "/hub/model")

    assert "round 1/1: 3 updates admitted" in text
    assert "finished:completed" in text
    podman("exec", "drill-hub", "islet", "ledger", "verify", "/hub")


def test_containers_have_no_rights_and_no_tools(federation: Path) -> None:
    """Not root, no capability, nothing writable but the volume and /tmp, and nothing that could install."""
    status = podman("exec", "drill-duke", "cat", "/proc/1/status")
    rights = dict(line.split(":", 1) for line in status.splitlines())
    assert rights["Uid"].split() == ["10001"] * 4
    assert int(rights["CapEff"], 16) == 0
    assert rights["NoNewPrivs"].strip() == "1"
    assert podman("exec", "drill-duke", "python3", "-c", _TRY) == "None None\n"


# Writes where nothing may be written, and looks for what could install.
_TRY = """
import pathlib, shutil
for place in ('/opt/islet/x', '/x'):
    try:
        pathlib.Path(place).touch()
        print('wrote', place)
    except OSError:
        pass
print(shutil.which('pip'), shutil.which('uv'))
"""


def test_hospitals_reach_the_fleet_api_and_nothing_else(federation: Path) -> None:
    """Through the proxy the Control API, the Runtime API, Flower's documentation, health and metrics are 404."""
    ask = (
        "import ssl, sys, urllib.request as u, urllib.error\n"
        "context = ssl.create_default_context(cafile='/node/link/ca.crt')\n"
        "for path in sys.argv[1:]:\n"
        "  try: print(u.urlopen('https://drill-hub:8443' + path, b'', context=context).status)\n"
        "  except urllib.error.HTTPError as e: print(e.code)\n"
    )
    closed = (
        "/v1/control/start-run",
        "/v1/runtime/acquire-task",
        "/docs",
        "/openapi.json",
        "/healthz",
        "/metrics",
        "/",
    )
    answers = podman("exec", "drill-duke", "python3", "-c", ask, *closed, "/v1/fleet/activate-node", "/v1/join").split()

    assert answers[:-2] == ["404"] * len(closed)
    assert "404" not in answers[-2:]


def test_health_checks_answer(federation: Path) -> None:
    """Both images say that they are well, by the check that compose and Kubernetes use."""
    for name in ("drill-hub", "drill-duke"):
        check = json.loads(podman("inspect", name))[0]["Config"]["Healthcheck"]["Test"]
        end = time.monotonic() + 600
        while subprocess.run(["podman", "exec", name, *check[1:]], capture_output=True, check=False).returncode:
            assert time.monotonic() < end, podman("logs", "--tail", "20", name)
            time.sleep(2)
