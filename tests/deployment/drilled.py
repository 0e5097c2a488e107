"""A deployed federation while a drill does its worst: what stage it is at, what runs, and the command given again."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from aggregator.progress import RoundSummary
from aggregator.state import StateFolder
from tests.deployment.real_federation import ENVIRONMENT, ISLET, RealFederation
from tests.deployment.wire import Wire

# duke suffers, madrid is well (and is cut off once), manchester joins late.
VICTIM, OTHER, LATE = "duke", "madrid", "manchester"
# Neither a stage nor the round after a drill may take longer.
PATIENCE_S = 600.0
STAGES = {
    "reserved": f"{VICTIM}/budget.db",
    "trained": f"{VICTIM}/reports/last_round.json",
    "checkpointed": "hub/state/*/round-*.json",
    "scored": f"{VICTIM}/scores.db",
    "cosigned": f"{VICTIM}/witness.json",
}


class Drilled:
    """A deployed federation under drill."""

    def __init__(self, path: Path, rounds: int) -> None:
        self.federation = RealFederation(path)
        self.path, self.rounds = path, rounds
        self.federation.found(rounds)
        self.configure("hub/aggregator.toml", min_updates=1, round_timeout_s=240.0, score_timeout_s=240.0)
        self.wire = Wire(int(self.setting("hub/aggregator.toml", "port")))
        for hospital in (VICTIM, OTHER, LATE):
            self.federation.join(hospital)
        self.federation.set(OTHER, fleet_address=f"127.0.0.1:{self.wire.port}")
        for hospital in (VICTIM, OTHER):
            self.federation.run_node(hospital)
        self.runner = self.submit()
        self.submissions = 1

    def setting(self, file: str, name: str) -> str:
        """Read one value of a settings file, as written."""
        found = re.search(rf"^{name} = (.*)$", (self.path / file).read_text(), re.M)
        assert found
        return found[1]

    def configure(self, file: str, **values: float) -> None:
        """Change numbers in a settings file."""
        text = (self.path / file).read_text()
        for name, value in values.items():
            text = re.sub(rf"^{name} = .*$", f"{name} = {value}", text, flags=re.M)
        (self.path / file).write_text(text)

    def submit(self, out: str = "model") -> subprocess.Popen[bytes]:
        """Give the aggregator's command: submit, follow, resume."""
        with (self.path / f"{out}.run.log").open("ab") as log:
            command = [*ISLET, "aggregator", "run", "hub", "--out", out]
            return subprocess.Popen(command, cwd=self.path, env=ENVIRONMENT, stdout=log, stderr=log)

    def summaries(self) -> list[RoundSummary]:
        """Rounds that are closed."""
        runs = [entry.name for entry in (self.path / "hub" / "state").glob("*") if entry.is_dir()]
        return [s for run in runs for s in StateFolder(self.path / "hub" / "state").summaries(run)]

    def resubmitted(self) -> bool:
        """Give the command again where it ended with a failure; whether the run is still going on."""
        code = self.runner.poll()
        if code not in {None, 0}:
            self.runner, self.submissions = self.submit(), self.submissions + 1
        return code != 0

    def wait(self, done: Callable[[], bool], what: str) -> None:
        """Wait until something is so, or the run is over; the command is given again where it ended."""
        end = time.monotonic() + PATIENCE_S
        while not done():
            assert time.monotonic() < end, f"{what}: not within {PATIENCE_S:g} s"
            if not self.resubmitted():
                return
            time.sleep(0.5)

    def changes(self, pattern: str) -> Callable[[], bool]:
        """Whether a file changed since now."""

        def state() -> list[tuple[str, int]]:
            found = []
            for file in sorted(self.path.glob(pattern)):
                with contextlib.suppress(OSError):
                    found.append((file.name, file.stat().st_mtime_ns))
            return found

        before = state()
        return lambda: state() != before

    def kill(self, name: str, program: str) -> None:
        """Kill a program of one side, as the log knows it."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.federation.pid(name, program), signal.SIGKILL)

    def children(self, name: str, command: str) -> Iterator[int]:
        """Processes of one side whose command line contains this."""
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                home = (entry / "environ").read_bytes()
                if command in line and f"{self.path / name}".encode() in home:
                    yield int(entry.name)
