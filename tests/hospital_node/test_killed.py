"""kill -9 at any point of an import leaves either the whole import in the store or none of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_kill_before_any_change_of_a_file_leaves_all_or_nothing(tmp_path: Path) -> None:
    """Real processes, killed before every write, sync, rename and SQL statement of an import of three parts.

    Whatever is left is read whole and passes its checks, and the next import completes it without a trace of the first.
    """
    command = [sys.executable, "-m", "tests.hospital_node.killed_import", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    tries = [json.loads(line) for line in done.stdout.splitlines()]

    nothing, everything = [1, 0, 1, 1], [19, 3, 4, 4]
    assert [found["killed"] for found in tries] == [True] * (len(tries) - 1) + [False]
    assert len(tries) > 40
    after = [found["after"] for found in tries]
    assert all(found in (nothing, everything) for found in after)
    # Nothing up to the commit, everything from it on.
    assert after == sorted(after)
    assert after[0] == nothing
    assert all(found["ok"] and found["mended"] == everything for found in tries)
    # One of old readings, three of readings and three of quarantine.
    assert {found["segments"] for found in tries} == {7}
