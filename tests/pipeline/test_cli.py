"""The command line: what a person types, sees, and gets as exit code."""

import gzip
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hospital_node.folder import NodeFolder

ROOT = Path(__file__).parents[2]
DUKE = ROOT / "hospital_node" / "sample_exports" / "duke"

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def islet(tmp_path: Path) -> Run:
    """Run `islet ARGS` in an empty folder."""

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        code = "from pipeline.cli import main; main()"
        command = [sys.executable, "-c", code, *map(str, arguments)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    return run


@pytest.fixture
def exports(tmp_path: Path) -> Path:
    """Six people's real exports."""
    folder = tmp_path / "exports"
    folder.mkdir()
    for file in sorted(DUKE.glob("*.csv"))[:6]:
        shutil.copy(file, folder)
    return folder


def make_node(islet: Run, exports: Path, layout: str = "duke", zone: str = "America/New_York") -> None:
    made = islet(
        *("node", "init", "duke", "--name", "duke", "--federation", "f", "--training", 5, "--heldout", 1),
        *("--exports", exports, "--layout", layout, "--zone", zone),
    )
    assert made.returncode == 0, made.stderr


def state(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_every_command_is_listed_with_what_it_does(islet: Run) -> None:
    """Help names every command that stays."""
    assert {"node", "aggregator", "ledger", "demo", "backtest"} <= set(islet("--help").stdout.split())
    for group, commands in {
        "node": {"init", "import", "validate", "status", "budget", "serve"},
        "aggregator": {"run", "status"},
        "ledger": {"verify", "show", "export"},
    }.items():
        assert commands <= set(islet(group, "--help").stdout.split())


def test_a_hospital_goes_from_exports_to_an_empty_budget(islet: Run, exports: Path) -> None:
    """Init, import, import again, status and budget tell one consistent story."""
    make_node(islet, exports)
    (exports / "Anna Berg.XLSX").write_bytes(b"PK")
    (exports / ".sync").write_bytes(b"")

    first, again = islet("node", "import", "duke"), islet("node", "import", "duke")
    status, budget = islet("node", "status", "duke"), islet("node", "budget", "duke")

    rows = first.stdout.split("rows in ")[1].split(" ")[0]
    assert f"rows in {rows} = {rows} accepted + 0 quarantined + 0 duplicates" in first.stdout
    assert "not read: 1 .xlsx; layout duke reads *.csv" in first.stdout
    assert f"rows in {rows} = 0 accepted + 0 quarantined + {rows} duplicates" in again.stdout
    assert f"{rows} readings of 6 patients" in status.stdout
    assert "nothing spent of epsilon 8 (unit patient, delta 1e-05)" in budget.stdout


def test_validate_stores_nothing_and_tells_by_its_exit_code(islet: Run, exports: Path, tmp_path: Path) -> None:
    """Clean exports give 0; a row that would be quarantined gives 1; the store stays as it was."""
    make_node(islet, exports)
    assert islet("node", "validate", "duke").returncode == 0
    before = state(tmp_path / "duke" / "store")
    assert set(before) == {"catalogue.db"}  # an empty one: no segment, so no reading
    victim = sorted(exports.glob("*.csv"))[0]
    victim.write_text(victim.read_text() + "2020-02-24 12:00:00,9.0\n")
    bad = islet("node", "validate", "duke")

    assert bad.returncode == 1
    assert "sensor-error-code" in bad.stdout
    assert state(tmp_path / "duke" / "store") == before


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda f: f.write_text(""), "empty"),
        (lambda f: f.write_text(f.read_text().replace("glucose_value_mg_dl", "sugar")), "glucose_value_mg_dl"),
        (lambda f: f.write_text(f.read_text()[: len(f.read_text()) // 2 - 4]), "cut"),
    ],
    ids=["empty", "missing-column", "truncated"],
)
def test_a_bad_export_is_refused_with_advice_and_nothing_changes(
    islet: Run, exports: Path, tmp_path: Path, spoil: Callable[[Path], None], says: str
) -> None:
    """Exit code 2, a hint, and a store with the bytes it had."""
    make_node(islet, exports)
    assert islet("node", "import", "duke").returncode == 0
    before = state(tmp_path / "duke" / "store")
    spoil(sorted(exports.glob("*.csv"))[2])

    refused = islet("node", "import", "duke")

    assert refused.returncode == 2
    assert says in refused.stderr
    assert "what to do:" in refused.stderr
    assert state(tmp_path / "duke" / "store") == before


def test_the_wrong_unit_is_refused(islet: Run, exports: Path) -> None:
    """mg/dL read as mmol/L is noticed before anything is stored."""
    layout = exports.parent / "mine.toml"
    layout.write_text((ROOT / "data_schemas/layouts/duke.toml").read_text().replace('"mg/dL"', '"mmol/L"'))
    make_node(islet, exports, layout=str(layout))

    refused = islet("node", "import", "duke")

    assert refused.returncode == 2
    assert "unit" in refused.stderr


def test_an_unknown_layout_and_a_wrong_zone_name_the_known_ones(islet: Run, exports: Path) -> None:
    """The refusal lists what would work."""
    make_node(islet, exports, layout="libra")
    refused = islet("node", "import", "duke")
    zoneless = islet(
        *("node", "init", "n2", "--name", "n2", "--federation", "f", "--training", 5, "--heldout", 1),
        *("--exports", exports, "--layout", "duke", "--zone", "America/Durham"),
    )

    assert refused.returncode == 2
    assert "arizona" in refused.stderr
    assert zoneless.returncode == 2
    assert "time zone" in zoneless.stderr


def test_a_second_process_on_a_node_folder_is_told_who_holds_it(islet: Run, exports: Path, tmp_path: Path) -> None:
    """The second one ends with 2 and the holder's process id."""
    make_node(islet, exports)
    code = (
        "import sys, time; from pathlib import Path; from hospital_node.folder import NodeFolder\n"
        "with NodeFolder.open(Path('duke')):\n    print('held', flush=True); time.sleep(60)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    holder = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        refused = islet("node", "import", "duke")
    finally:
        holder.kill()
        holder.wait()

    assert refused.returncode == 2
    assert str(holder.pid) in refused.stderr


def test_backtest_refuses_what_it_cannot_use(islet: Run, tmp_path: Path) -> None:
    """A missing model, a missing column and a cut archive each give 2 and advice, and no output file."""
    readings = tmp_path / "r.csv"
    readings.write_text("patient_id,time,glucose_mg_dl\na,2024-01-01T00:00:00,100\n")
    out = tmp_path / "out.csv"

    refused = islet("backtest", "--readings", readings, "--model", "nowhere", "--out", out)
    unregistered = islet("backtest", "--readings", readings, "--model", "models:/x@champion", "--out", out)

    assert (refused.returncode, unregistered.returncode) == (2, 2)
    assert "what to do:" in refused.stderr
    assert "what to do:" in unregistered.stderr
    assert not out.exists()


def test_wrong_use_is_exit_code_2(islet: Run, tmp_path: Path) -> None:
    """An unknown option, a folder that is no node, and a ledger that is not there."""
    (tmp_path / "empty").mkdir()

    assert islet("demo", "--speed", "9").returncode == 2
    assert islet("node", "status", "empty").returncode == 2
    assert islet("ledger", "verify", "empty").returncode == 2
    assert islet("aggregator", "status", "empty").returncode == 2


def test_no_reading_or_identity_is_in_an_error(islet: Run, exports: Path) -> None:
    """A refusal about a file with a marked value and a name shows neither."""
    make_node(islet, exports)
    victim = sorted(exports.glob("*.csv"))[0]
    victim.write_text(victim.read_text() + "not-a-time Jane Roe,77.125\n")

    told = islet("node", "import", "duke")

    assert "77.125" not in told.stdout + told.stderr
    assert "Jane" not in told.stdout + told.stderr


def test_compressed_readings_are_read_as_they_are(islet: Run, tmp_path: Path) -> None:
    """A truncated gzip is named as such."""
    whole = gzip.compress(b"patient_id,time,glucose_mg_dl\n" + b"a,2024-01-01T00:00:00,100\n" * 500)
    (tmp_path / "r.csv.gz").write_bytes(whole[: len(whole) // 2])

    refused = islet("backtest", "--readings", "r.csv.gz", "--model", "m", "--out", "o.csv")

    assert refused.returncode == 2


def test_keys_are_made_listed_and_revoked(islet: Run, exports: Path) -> None:
    """A key is shown once; the list tells its id and scope; revoking by id removes it, also while the node is busy."""
    make_node(islet, exports)
    secret = islet("node", "key", "duke", "--patient", "anna", "--writes").stdout.strip()
    assert secret.startswith("islet_")
    listed = islet("node", "key", "duke", "--list").stdout.split()
    assert listed[-2:] == ["writes", "anna"]
    with NodeFolder.open(exports.parent / "duke"):
        revoked = islet("node", "key", "duke", "--revoke", listed[0])
    assert revoked.returncode == 0, revoked.stderr
    assert secret not in revoked.stdout
    assert islet("node", "key", "duke", "--list").stdout == ""
    again = islet("node", "key", "duke", "--revoke", listed[0])
    assert again.returncode == 2
    assert "--list" in again.stderr
