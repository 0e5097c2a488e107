"""Real processes, one after another killed, cut off, slowed down or filled up in the middle of a round: `make drills`.

One federation trains through all of it. Each drill waits for its stage of a round, does its harm, and the round after
it must close. At the end the files of all sides must tell one true history (tests/faults/history.py), and MLflow must
have every round. The table that this prints is the one in docs/reliability.md.

    python -m tests.deployment.drills                     all of them
    python -m tests.deployment.drills --list              their names
    python -m tests.deployment.drills superlink/scored    those that begin so
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from aggregator.progress import RoundSummary
from tests.deployment.drilled import LATE, OTHER, PATIENCE_S, STAGES, VICTIM, Drilled
from tests.deployment.real_federation import ENVIRONMENT, free_ports
from tests.faults import history

_FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")


@dataclass(frozen=True)
class Drill:
    """What is done, and at which stage of a round. word: the drill is chosen by WORD/STAGE."""

    word: str
    name: str
    stage: str
    harm: Callable[[Drilled], None]

    @property
    def key(self) -> str:
        """What it is chosen by."""
        return f"{self.word}/{self.stage}"


def killing(name: str, program: str) -> Callable[[Drilled], None]:
    """Kill one program of a side."""
    return lambda drilled: drilled.kill(name, program)


def killing_aggregator(drilled: Drilled) -> None:
    """Kill the ServerApp at its work and the SuperExec that started it."""
    for pid in drilled.children("hub", "flwr-serverapp"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    drilled.kill("hub", "superexec")


def killing_client(drilled: Drilled) -> None:
    """Kill the ClientApp at its work."""
    for pid in drilled.children(VICTIM, "flwr-clientapp"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def killing_node(drilled: Drilled) -> None:
    """Kill the supervisor, and with it all programs of the node; start the node again."""
    drilled.federation.processes[VICTIM].kill()
    drilled.federation.processes[VICTIM].wait()
    time.sleep(5)
    drilled.federation.run_node(VICTIM)


def killing_mlflow(drilled: Drilled) -> None:
    """Kill MLflow's server, which a reviewer looks at, while it answers; the store must outlive it."""
    port = free_ports()
    store = f"sqlite:///{drilled.path / 'hub' / 'mlruns' / 'mlflow.db'}"
    program = str(Path(sys.executable).parent / "mlflow")
    command = [program, "server", "--port", str(port), "--workers", "1", "--backend-store-uri", store]
    with (drilled.path / "mlflow.log").open("ab") as log:
        server = subprocess.Popen(
            command, cwd=drilled.path / "hub", env=ENVIRONMENT, stdout=log, stderr=log, start_new_session=True
        )
    try:
        drilled.wait(lambda: _answers(f"http://127.0.0.1:{port}/health"), "MLflow's server")
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _answers(url: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2) as answer:  # noqa: S310
        return bool(answer.status == 200)
    return False


def locking_mlflow(drilled: Drilled) -> None:
    """Hold MLflow's database for two minutes, as a program that hangs in the middle of a write would."""
    with contextlib.closing(sqlite3.connect(drilled.path / "hub" / "mlruns" / "mlflow.db", timeout=60)) as database:
        database.execute("BEGIN EXCLUSIVE")
        time.sleep(120)


def cutting(drilled: Drilled) -> None:
    """Cut one hospital's network for 90 seconds."""
    drilled.wire.set_cut(True)
    time.sleep(90)
    drilled.wire.set_cut(False)


def slowing(drilled: Drilled) -> None:
    """Delay every packet of one hospital by half a second, for two minutes."""
    drilled.wire.delay_s = 0.5
    time.sleep(120)
    drilled.wire.delay_s = 0.0


def freezing(drilled: Drilled) -> None:
    """Stop the ClientApp for two minutes: a node that is slow, not gone."""
    pids = list(drilled.children(VICTIM, "flwr-clientapp"))
    for number, pause in ((signal.SIGSTOP, 120), (signal.SIGCONT, 0)):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        time.sleep(pause)


def joining_late(drilled: Drilled) -> None:
    """Start a member's node that was away until now."""
    drilled.federation.run_node(LATE)


def spoiling(drilled: Drilled) -> None:
    """Kill the ServerApp and flip a bit in its newest checkpoint's arrays."""
    killing_aggregator(drilled)
    newest = max((drilled.path / "hub" / "state").glob("*/round-*.npz"), key=lambda file: file.name)
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(bytes(data))


def doubling(drilled: Drilled) -> None:
    """Submit the same run once more by mistake; it must fail and leave the first alone."""
    second = drilled.submit("second")
    assert second.wait(PATIENCE_S) == 1, "two aggregators worked on one folder"


def restarting(drilled: Drilled) -> None:
    """Stop every process of every side, and start them again; who follows the run waits for the SuperLink."""
    running = [name for name in drilled.federation.processes if name != "hub"]
    drilled.federation.stop()
    drilled.federation.up()
    for hospital in running:
        drilled.federation.run_node(hospital)


def filling(drilled: Drilled) -> None:
    """Fill the hospital's disk, a small file system of its own, for two minutes."""
    filler = drilled.path / VICTIM / "reports" / "filler"
    with contextlib.suppress(OSError), filler.open("wb") as file:
        while True:
            file.write(b"\0" * 4096)
            file.flush()
    time.sleep(120)
    filler.unlink()


def skewing(drilled: Drilled) -> None:
    """Start one hospital again with a clock ten minutes ahead, for one round; then with the right one."""
    skew = {"LD_PRELOAD": str(_FAKETIME), "FAKETIME": "+600s", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    closed = len(drilled.summaries())
    for wrong in (True, False):
        process = drilled.federation.processes.pop(OTHER)
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        ENVIRONMENT.update(skew if wrong else {})
        drilled.federation.run_node(OTHER)
        for name in skew:
            ENVIRONMENT.pop(name, None)
        if wrong:
            drilled.wait(lambda: len(drilled.summaries()) > closed, "a round under a wrong clock")


KILLS = (
    ("superlink", "kill -9 SuperLink", killing("hub", "superlink")),
    ("serverapp", "kill -9 ServerApp and its SuperExec", killing_aggregator),
    ("supernode", "kill -9 SuperNode", killing(VICTIM, "supernode")),
    ("superexec", "kill -9 a node's SuperExec", killing(VICTIM, "superexec")),
    ("node", "kill -9 a whole node", killing_node),
    ("mlflow", "kill -9 MLflow's server", killing_mlflow),
)
DRILLS = (
    *(Drill(word, name, stage, harm) for word, name, harm in KILLS for stage in STAGES),
    Drill("clientapp", "kill -9 a ClientApp", "reserved", killing_client),
    Drill("mlflow-locked", "MLflow's database held for 120 s", "trained", locking_mlflow),
    Drill("cut", "network cut for 90 s", "reserved", cutting),
    Drill("slow", "slow network for 120 s", "reserved", slowing),
    Drill("frozen", "ClientApp frozen for 120 s", "reserved", freezing),
    Drill("checkpoint", "corrupted checkpoint", "checkpointed", spoiling),
    Drill("double", "two aggregators by mistake", "reserved", doubling),
    Drill("late", "a hospital joins late", "scored", joining_late),
    Drill("clock", "clock ten minutes ahead at a hospital", "cosigned", skewing),
    Drill("disk", "a hospital's disk full for 120 s", "reserved", filling),
    Drill("restart", "everything stopped and started again", "reserved", restarting),
)


def run(drills: tuple[Drill, ...], path: Path) -> None:
    """Run drills in one federation and print a row for each. Raises AssertionError where one leaves a mark."""
    rounds = len(drills) + 2
    say(f"{len(drills)} drills, {rounds} rounds; three hospitals join")
    drilled = Drilled(path, rounds)
    say("| drill | stage | outcome of the rounds after it | command given again | seconds |\n|---|---|---|---|---|")
    try:
        for drill in drills:
            say(row(drilled, drill))
        drilled.wait(lambda: False, "the end of the run")
        assert drilled.runner.wait() == 0, (path / "model.run.log").read_text()
    finally:
        drilled.runner.terminate()
        drilled.federation.stop()
    assert drilled.federation.left_over() == [], "processes are left"
    history.check(path, rounds, (VICTIM, OTHER, LATE), "hub")
    assert logged_rounds(path / "hub" / "mlruns" / "mlflow.db") == set(range(1, rounds + 1)), "MLflow lacks a round"
    say(f"\n{rounds} rounds; every history is whole")


def row(drilled: Drilled, drill: Drill) -> str:
    """Wait for a drill's stage, do it, wait for the next closed round; its row of the table."""
    drilled.wait(drilled.changes(STAGES[drill.stage]), f"stage {drill.stage}")
    assert drilled.runner.poll() != 0, f"{drill.key}: the run was over before stage {drill.stage} came"
    closed, submissions, started = len(drilled.summaries()), drilled.submissions, time.monotonic()
    drill.harm(drilled)
    drilled.wait(lambda: len(drilled.summaries()) > closed, drill.name)
    told = "; ".join(map(_told, drilled.summaries()[closed:])) or "the run was over"
    again, seconds = drilled.submissions - submissions, time.monotonic() - started
    return f"| `{drill.key}` {drill.name} | {drill.stage} | {told} | {again} | {seconds:.0f} |"


def logged_rounds(database: Path) -> set[int]:
    """Rounds whose series MLflow has."""
    with contextlib.closing(sqlite3.connect(database)) as connection:
        return {step for (step,) in connection.execute("SELECT step FROM metrics WHERE key = 'round/admitted'")}


def _told(summary: RoundSummary) -> str:
    rejected = "".join(f", {update.node} {update.code}" for update in summary.rejected)
    return f"{summary.round}: {len(summary.admitted)} admitted{rejected}"


def say(line: str) -> None:
    """Print at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


@contextlib.contextmanager
def small_disk(path: Path) -> Iterator[None]:
    """Give the victim a file system of 48 MiB for as long as the drills last; needs root."""
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m,mode=700", "islet-drill", str(path)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(path)], check=False)


def chosen(words: list[str]) -> tuple[Drill, ...]:
    """Drills whose key begins with a word, in the order of the table; all without words. Says what cannot run here."""
    drills = tuple(d for d in DRILLS if not words or any(d.key.startswith(word) for word in words))
    if any(d.harm is skewing for d in drills) and not _FAKETIME.exists():
        say("no libfaketime here (Debian: apt-get install faketime): the clock's drill is left out")
        drills = tuple(d for d in drills if d.harm is not skewing)
    if any(d.harm is filling for d in drills) and os.geteuid():
        say("not root: a full disk cannot be made, its drill is left out")
        drills = tuple(d for d in drills if d.harm is not filling)
    return drills


def main() -> None:
    """Run all drills, or those whose keys begin with a word given; --list names them."""
    words = sys.argv[1:]
    if "--list" in words:
        for drill in DRILLS:
            say(f"{drill.key:28}{drill.name}")
        return
    drills = chosen(words)
    if not drills:
        raise SystemExit(f"no drill begins with {' or '.join(words)}; see --list")
    with tempfile.TemporaryDirectory(prefix="islet-drills-") as folder, contextlib.ExitStack() as stack:
        if any(d.harm is filling for d in drills):
            stack.enter_context(small_disk(Path(folder) / VICTIM))
        try:
            run(drills, Path(folder))
        except AssertionError:
            kept = Path(tempfile.mkdtemp(prefix="islet-drills-failed-"))
            shutil.copytree(folder, kept, dirs_exist_ok=True)
            say(f"what the files said is kept in {kept}")
            raise


if __name__ == "__main__":
    main()
