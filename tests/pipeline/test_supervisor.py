"""Programs under supervision: kept running, told about in JSON, and stopped with everything they started."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SUPERVISOR = """
import os, sys
from pipeline.supervisor import Program, supervise
supervise([Program("p", (sys.executable, "-u", "-c", code), dict(os.environ)) for code in sys.argv[1:]])
"""
# Starts a child of its own, tells its pid, and waits.
PARENT = (
    "import subprocess, sys, time\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    "print('INFO :      child', child.pid, flush=True)\n"
    "time.sleep(600)"
)
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"


def start(*programs: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR, *programs],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )


def until(supervisor: subprocess.Popen[str], text: str) -> dict[str, Any]:
    """First log line whose message contains a text."""
    assert supervisor.stdout is not None
    for raw in supervisor.stdout:
        line = json.loads(raw)
        if text in line["message"]:
            return dict(line)
    raise AssertionError(f"{text!r} never came")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def gone(pid: int) -> bool:
    end = time.monotonic() + 20
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.05)
    return not alive(pid)


def test_a_program_that_ends_starts_again() -> None:
    """Its exit code is told, and a new process follows."""
    supervisor = start("raise SystemExit(3)")
    first = until(supervisor, "started")
    ended = until(supervisor, "ended")
    second = until(supervisor, "started")
    supervisor.terminate()

    assert ended["exit_code"] == 3
    assert ended["level"] == "warning"
    assert first["pid"] != second["pid"]
    assert supervisor.wait(20) == 0


def test_stopping_ends_every_program_and_what_it_started() -> None:
    """SIGTERM leaves no process behind, also one that a program had started for itself."""
    supervisor = start(PARENT, PARENT)
    children = [int(until(supervisor, "child")["message"].split()[1]) for _ in range(2)]
    assert all(alive(child) for child in children)
    supervisor.terminate()
    until(supervisor, "stopped")

    assert supervisor.wait(30) == 0
    assert all(gone(child) for child in children)


def test_a_supervisor_that_is_killed_takes_its_programs_along() -> None:
    """After SIGKILL nobody is left to stop them; the kernel tells them to end."""
    supervisor = start("import time; print('up', flush=True); time.sleep(600)")
    pid = until(supervisor, "started")["pid"]
    until(supervisor, "up")
    supervisor.send_signal(signal.SIGKILL)
    supervisor.wait(20)

    assert gone(pid)


def test_output_becomes_json_lines_with_its_level() -> None:
    """What Flower and uvicorn write keeps its level; blank lines vanish; JSON passes as it is."""
    supervisor = start(
        "import time\nprint('\\x1b[92mWARNING\\x1b[0m :   slow')\nprint('INFO :      ')\n"
        "print('2026-01-01T00:00:00Z INFO [uvicorn.error] ready')\nprint('plain')\n"
        'print(\'{"at": "x", "level": "info", "program": "inner", "message": "own"}\', flush=True)\ntime.sleep(600)'
    )
    lines = [until(supervisor, text) for text in ("slow", "ready", "plain", "own")]
    supervisor.terminate()

    assert [line["level"] for line in lines] == ["warning", "info", "info", "info"]
    assert [line["message"] for line in lines] == ["slow", "ready", "plain", "own"]
    assert lines[3]["program"] == "inner"
