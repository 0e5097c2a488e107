"""The small drill: a few rounds under random faults, in processes of their own. `make faults` runs two hundred."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("rounds", "seed"), [(3, 4), pytest.param(200, 1, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
)
def test_whatever_befalls_the_federation_its_history_is_whole(rounds: int, seed: int) -> None:
    """Kills, lost, late and repeated messages, full disks, spoilt checkpoints: one aggregate and one spend each."""
    command = [
        sys.executable,
        "-m",
        "tests.faults",
        f"--rounds={rounds}",
        f"--each={min(rounds, 10)}",
        f"--seed={seed}",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "every history is whole" in done.stdout
    assert "killed" in done.stdout
