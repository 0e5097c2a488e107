"""A federation of real processes on the loopback interface: SuperLink, SuperExec, desk, and each hospital's node."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
ISLET = (sys.executable, "-c", "from pipeline.cli import main; main()")
EXPORTS = ROOT / "hospital_node" / "sample_exports"
# Hospital: time zone of its exports, declared numbers of patients.
HOSPITALS = {
    "duke": ("America/New_York", 10, 3),
    "madrid": ("Europe/Madrid", 15, 4),
    "manchester": ("Europe/London", 11, 3),
}
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def free_ports() -> int:
    """First of two free ports side by side."""
    while True:
        with socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", 0))
            port = int(one.getsockname()[1])
            try:
                two.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            if port >= 1024:
                return port


def write_plan(path: Path, rounds: int, *, seeded: bool = True) -> Path:
    """Write the demo's plan with another number of rounds, credited at the end, and a seed for nodes that have one."""
    text = ("seed = 1\n" if seeded else "") + (ROOT / "data_schemas" / "plans" / "demo.toml").read_text()
    for name in ("rounds", "rounds_per_epoch", "average_last_rounds"):
        text = re.sub(rf"^{name} = .*$", f"{name} = {rounds}", text, flags=re.M)
    path.write_text(text)
    return path


def be_patient(hub: Path) -> None:
    """Allow minutes for every message: a process starts for each, and the machine may be busy."""
    settings = (hub / "aggregator.toml").read_text()
    for name in ("hello_timeout_s", "cosign_timeout_s"):
        settings = re.sub(rf"^{name} = .*$", f"{name} = 400.0", settings, flags=re.M)
    (hub / "aggregator.toml").write_text(settings)


def islet(folder: Path, *arguments: str, timeout: float = 900) -> tuple[int, str]:
    """Run one command; its exit code and output."""
    done = subprocess.run(
        [*ISLET, *arguments], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout, check=False
    )
    return done.returncode, done.stdout + done.stderr


@dataclass
class RealFederation:
    """Folders `hub` and one per hospital under `path`, and the processes that run them."""

    path: Path
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def found(self, rounds: int = 2) -> None:
        """Make the aggregator's folder and start its programs; returns when the desk answers."""
        plan = write_plan(self.path / "plan.toml", rounds)
        options = ("--federation", "trial", "--plan", str(plan), "--port", str(free_ports()))
        code, text = islet(self.path, "aggregator", "init", "hub", *options)
        assert code == 0, text
        be_patient(self.path / "hub")
        self.up()

    def up(self) -> None:
        """Start the aggregator's programs, and wait for the SuperLink."""
        self.start("hub", "aggregator", "up", "hub")
        self.wait_for("hub", "Uvicorn running")

    def join(self, hospital: str, *options: str) -> None:
        """Invite a hospital, let it join, and import its exports. Its noise is seeded: the readings are public."""
        zone, training, heldout = HOSPITALS[hospital]
        code, text = islet(self.path, "aggregator", "invite", "hub", hospital)
        assert code == 0, text
        given = ("--training", str(training), "--heldout", str(heldout))
        source = ("--exports", str(EXPORTS / hospital), "--layout", hospital, "--zone", zone)
        code, text = islet(self.path, "node", "join", f"{hospital}.invite", hospital, *given, *source, *options)
        assert code == 0, text
        self.set(hospital, seed=1)
        code, text = islet(self.path, "node", "import", hospital)
        assert code == 0, text

    def set(self, hospital: str, **settings: object) -> None:
        """Change settings in a hospital's node.toml."""
        file = self.path / hospital / "node.toml"
        lines = [line for line in file.read_text().splitlines() if line.split(" = ")[0] not in settings]
        file.write_text("\n".join([*(f"{key} = {json.dumps(value)}" for key, value in settings.items()), *lines, ""]))

    def run_node(self, hospital: str) -> None:
        """Start a hospital's programs, without an endpoint."""
        self.start(hospital, "node", "run", hospital, "--port", "0")

    def start(self, name: str, *arguments: str) -> None:
        """Start a command in the background; its log goes to NAME.log."""
        with (self.path / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [*ISLET, *arguments], cwd=self.path, env=ENVIRONMENT, stdout=log, stderr=log
            )

    def log(self, name: str) -> list[dict[str, object]]:
        """Every line of a log; each is JSON."""
        return [json.loads(line) for line in (self.path / f"{name}.log").read_text().splitlines()]

    def wait_for(self, name: str, text: str, seconds: float = 300) -> None:
        """Wait until a log contains a text."""
        end = time.monotonic() + seconds
        while text not in (self.path / f"{name}.log").read_text():
            assert time.monotonic() < end, f"{text!r} is not in {name}.log"
            assert self.processes[name].poll() is None, (self.path / f"{name}.log").read_text()
            time.sleep(0.2)

    def pid(self, name: str, program: str) -> int:
        """Process id of a running program, as the newest log line that tells it."""
        started = [line for line in self.log(name) if line["program"] == program and line["message"] == "started"]
        return int(str(started[-1]["pid"]))

    def copy(self, name: str) -> Path:
        """Copy hub and hospitals as they are now, to run them in another way."""
        target = self.path / name
        target.mkdir()
        for folder in self.path.iterdir():
            if (folder / "node.toml").exists() or folder.name == "hub":
                shutil.copytree(folder, target / folder.name)
        return target

    def stop(self) -> dict[str, int]:
        """Stop everything with SIGTERM; exit codes by name."""
        for process in self.processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        return {name: process.wait(60) for name, process in self.processes.items()}

    def left_over(self) -> list[str]:
        """Command lines of processes that still use this folder."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                uses = str(self.path) in command or str(self.path) in (entry / "environ").read_bytes().decode(
                    errors="replace"
                )
            except OSError:
                continue
            if uses and int(entry.name) != os.getpid():
                found.append(command)
        return found
