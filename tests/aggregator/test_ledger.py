"""The ledger only grows, survives what a disk and a power cut do to it, and never logs a round twice."""

from __future__ import annotations

import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from aggregator.ledger import CHECKPOINT_FILE, Ledger, read_entries
from aggregator.verification import verify_ledger
from data_schemas.canonical import canonical_bytes
from data_schemas.errors import BadInput, CheckFailed, StorageFailed, Tampered
from data_schemas.ledger import MemberEntry, PlanEntry, Receipt
from pipeline import merkle
from pipeline.checkpoint import SignedCheckpoint, cosign, empty, extends, verify_note
from pipeline.signing import PrivateKey

KEY = PrivateKey.from_seed(b"A" * 32)
HOSPITAL = PrivateKey.from_seed(b"H" * 32)
ORIGIN = "islet.example/test"
NOW = "2026-01-31T12:00:00+00:00"


def _plan(number: int, run: str = "run") -> PlanEntry:
    return PlanEntry(run=f"{run}-{number}", plan_hash=f"{number:064x}")


def _member(key: PrivateKey = HOSPITAL, name: str = "clinic-a") -> MemberEntry:
    return MemberEntry(
        node=name, public_key=key.public.hex, declared_training_patients=30, declared_heldout_patients=10
    )


def _open(folder: Path) -> Ledger:
    return Ledger(folder / "ledger.db", KEY, ORIGIN)


def _append_many(ledger: Ledger, count: int) -> None:
    for number in range(1, count):
        ledger.append_once(("plan", number), _plan(number), NOW)


def _edit(ledger: Ledger, statement: str) -> None:
    """Change rows past the triggers and put the triggers back."""
    rows = ledger._connection.execute("SELECT name, sql FROM sqlite_schema WHERE type = 'trigger'").fetchall()
    for name, _ in rows:
        ledger._connection.execute(f"DROP TRIGGER {name}")
    for sql in (statement, *(sql for _, sql in rows)):
        ledger._connection.execute(sql)


def _holds(receipt: Receipt, root: bytes) -> bool:
    path = [bytes.fromhex(h) for h in receipt.path]
    leaf = bytes.fromhex(receipt.leaf_hash)
    return merkle.verify_inclusion(leaf, receipt.index, receipt.tree_size, path, root)


def test_receipts_prove_inclusion(tmp_path: Path) -> None:
    """Each receipt, given at appending or asked for later, proves its entry in the signed checkpoint's tree."""
    ledger = _open(tmp_path)
    for number in range(20):
        receipt = ledger.append(_plan(number), NOW)
        head = verify_note(ledger.checkpoint(), KEY.public.hex)

        assert (receipt.index, receipt.tree_size, head.size) == (number, number + 1, number + 1)
        assert _holds(receipt, head.root)
    assert all(_holds(ledger.receipt(index), head.root) for index in range(20))
    assert bytes.fromhex(ledger.receipt(3).leaf_hash) == merkle.leaf_hash(canonical_bytes(ledger.entry(3)))


def test_entries_come_back_signed_and_in_order(tmp_path: Path) -> None:
    """What was appended is what is read, each entry signed by the aggregator over all its other fields."""
    ledger = _open(tmp_path)
    for number in range(5):
        ledger.append(_plan(number), NOW)

    for index, entry in enumerate(ledger.entries()):
        assert (entry.index, entry.recorded_at, entry.entry) == (index, NOW, _plan(index))
        assert KEY.sign(entry.model_dump(mode="json", exclude={"signature"})) == entry.signature
    assert tuple(ledger.entries()) == read_entries(ledger.path)


def test_a_reopened_ledger_goes_on(tmp_path: Path) -> None:
    """Size, root and receipts are the same after closing and opening, and appending continues."""
    ledger = _open(tmp_path)
    ledger.append(_plan(0), NOW)
    note = ledger.checkpoint()
    ledger.close()
    again = _open(tmp_path)

    assert again.checkpoint() == note
    assert again.append(_plan(1), NOW).index == 1


@pytest.mark.parametrize("table", ["entries", "once", "checkpoints", "cosignatures"])
@pytest.mark.parametrize("verb", ["UPDATE {} SET rowid_ = 1", "DELETE FROM {}", "REPLACE"])
def test_no_row_changes(tmp_path: Path, table: str, verb: str) -> None:
    """UPDATE, DELETE and REPLACE are refused on every table, for whoever opens the file."""
    ledger = _open(tmp_path)
    ledger.append_once(("member", "clinic-a"), _member(), NOW)
    head = verify_note(ledger.checkpoint(), KEY.public.hex)
    ledger.add_cosignature(cosign(head, HOSPITAL, "clinic-a", 1_790_000_000))
    connection = sqlite3.connect(ledger.path)
    column = connection.execute(f"SELECT * FROM {table}").description[-1][0]
    sql = {
        "REPLACE": f"REPLACE INTO {table} SELECT * FROM {table}",
        "DELETE FROM {}": f"DELETE FROM {table}",
    }.get(verb, f"UPDATE {table} SET {column} = x'00'")
    connection.execute("PRAGMA recursive_triggers=ON")

    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        connection.execute(sql)


def test_a_round_is_logged_once(tmp_path: Path) -> None:
    """A repeat under the same key, in this process or after a restart, returns the first entry's receipt."""
    ledger = _open(tmp_path)
    first = ledger.append_once(("round", "run", 1), _plan(1), NOW)
    ledger.append_once(("round", "run", 2), _plan(2), NOW)
    ledger.close()
    again = _open(tmp_path)
    repeat = again.append_once(("round", "run", 1), _plan(1), "2026-02-01T00:00:00+00:00")

    assert again.size == 2
    assert (repeat.index, repeat.leaf_hash) == (first.index, first.leaf_hash)
    found = again.find(("round", "run", 1))
    assert found is not None
    assert found.entry == _plan(1)
    assert again.find(("round", "run", 3)) is None


def test_keys_are_not_confused(tmp_path: Path) -> None:
    """Number and text, and parts cut elsewhere, are different keys."""
    ledger = _open(tmp_path)
    keys: list[tuple[str | int, ...]] = [("a", 1), ("a", "1"), ("a1",), ("a", 1, ""), ("", "a", 1)]
    for number, key in enumerate(keys):
        ledger.append_once(key, _plan(number), NOW)

    assert ledger.size == 5


def test_other_content_under_a_taken_key_is_refused(tmp_path: Path) -> None:
    """A resumed round that came out differently is an error, not a silent second truth."""
    ledger = _open(tmp_path)
    ledger.append_once(("round", "run", 1), _plan(1), NOW)

    with pytest.raises(CheckFailed, match="other content"):
        ledger.append_once(("round", "run", 1), _plan(2), NOW)
    assert ledger.size == 1


@pytest.mark.parametrize("time", ["", "yesterday", "2026-01-31T12:00:00", "2026-01-31T12:00:00+02:00"])
def test_times_are_utc(tmp_path: Path, time: str) -> None:
    """A time without zone or in another zone is refused."""
    with pytest.raises(BadInput, match="UTC"):
        _open(tmp_path).append(_plan(1), time)


def test_a_member_keeps_its_key(tmp_path: Path) -> None:
    """The same hospital may declare new numbers, but not another key."""
    ledger = _open(tmp_path)
    ledger.append(_member(), NOW)
    ledger.append(_member().model_copy(update={"declared_training_patients": 31}), NOW)

    with pytest.raises(BadInput, match="another key"):
        ledger.append(_member(PrivateKey.generate()), NOW)
    assert ledger.members()["clinic-a"].declared_training_patients == 31


def test_a_witness_follows_the_log(tmp_path: Path) -> None:
    """A witness that checks each checkpoint against its last one can follow the ledger and cosign it."""
    ledger = _open(tmp_path)
    ledger.append(_member(), NOW)
    seen = empty(ORIGIN)
    for number in range(9):
        ledger.append(_plan(number), NOW)
        head = verify_note(ledger.checkpoint(), KEY.public.hex)
        assert extends(seen, head, ledger.consistency_proof(seen.size))
        ledger.add_cosignature(cosign(head, HOSPITAL, "clinic-a", 1_790_000_000 + number))
        note, seen = ledger.publish(), head

    assert [s.name for s in SignedCheckpoint.from_text(note).signatures] == [ORIGIN, "clinic-a"]
    assert (tmp_path / CHECKPOINT_FILE).read_text() == note == ledger.checkpoint()


def test_a_cosignature_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    """Lines of strangers, of other checkpoints and from before the first checkpoint are not stored."""
    ledger = _open(tmp_path)
    ledger.append(_member(), NOW)
    line = cosign(empty(ORIGIN), HOSPITAL, "clinic-a", 1_790_000_000)

    with pytest.raises(BadInput, match="no checkpoint yet"):
        ledger.add_cosignature(line)
    head = verify_note(ledger.checkpoint(), KEY.public.hex)
    for wrong in (line, cosign(head, KEY, "clinic-a", 1), cosign(head, KEY, "stranger", 1)):
        with pytest.raises(CheckFailed):
            ledger.add_cosignature(wrong)
    assert len(SignedCheckpoint.from_text(ledger.checkpoint()).signatures) == 1


def test_two_processes_share_one_log(tmp_path: Path) -> None:
    """A second handle sees what the first appended before it appends itself."""
    one, two = _open(tmp_path), _open(tmp_path)
    indexes = [ledger.append(_plan(n), NOW).index for n, ledger in enumerate([one, two, two, one, two])]

    assert indexes == [0, 1, 2, 3, 4]
    assert verify_ledger(one.path, KEY.public.hex).head.size == 5


def test_a_full_disk_leaves_the_ledger_as_it_was(tmp_path: Path) -> None:
    """When SQLite cannot get another page, the append fails as StorageFailed and nothing has changed."""
    ledger = _open(tmp_path)
    ledger.append(_plan(0), NOW)
    note = ledger.checkpoint()
    pages = ledger._connection.execute("PRAGMA page_count").fetchone()[0]
    ledger._connection.execute(f"PRAGMA max_page_count={pages}")

    with pytest.raises(StorageFailed, match="full"):
        _append_many(ledger, 200)
    size = ledger.size
    ledger._connection.execute("PRAGMA max_page_count=100000")
    assert len(read_entries(ledger.path)) == size
    assert ledger.append_once(("plan", size), _plan(size), NOW).index == size
    assert verify_ledger(ledger.path, KEY.public.hex, [note]).head.size == size + 1


WRITER = """
import resource, sys
from pathlib import Path
from aggregator.ledger import Ledger
from data_schemas.errors import StorageFailed
from data_schemas.ledger import PlanEntry
from pipeline.signing import PrivateKey
ledger = Ledger(Path(sys.argv[1]) / "ledger.db", PrivateKey.from_seed(b"A" * 32), "islet.example/test")
if sys.argv[2:]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
try:
    for number in range(ledger.size, 100000):
        receipt = ledger.append_once(("plan", number), PlanEntry(run=f"run-{number}", plan_hash=f"{number:064x}"),
                                     "2026-01-31T12:00:00+00:00")
        print(receipt.index, flush=True)
        if number % 7 == 0:
            ledger.checkpoint()
except StorageFailed as error:
    print("refused", ledger.size, flush=True)
"""


def _writer(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder), *arguments],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )


@pytest.mark.parametrize("kill_after", [1, 15, 40])
def test_kill_during_append(tmp_path: Path, kill_after: int) -> None:
    """A process killed while it appends leaves a ledger that verifies, holds every receipt given, and goes on."""
    writer = _writer(tmp_path)
    assert writer.stdout is not None
    promised = -1
    for line in writer.stdout:
        promised = int(line)
        if promised >= kill_after:
            writer.send_signal(signal.SIGKILL)
            break
    promised = max([promised, *(int(line) for line in writer.stdout if line.endswith("\n"))])
    writer.wait()
    before = verify_ledger(tmp_path / "ledger.db", KEY.public.hex).head.size
    ledger = _open(tmp_path)

    assert ledger.size == before >= promised + 1
    assert ledger.append(_plan(0), NOW).index == before
    assert verify_ledger(ledger.path, KEY.public.hex).head.size == before + 1


def test_a_failing_disk_under_a_running_writer(tmp_path: Path) -> None:
    """When the operating system refuses the file more room, the writer reports it and every earlier entry stands."""
    writer = _writer(tmp_path, str(20 * 4096))
    output = writer.communicate()[0].split("\n")
    refused = int(output[-2].removeprefix("refused "))

    assert refused > 10
    assert _open(tmp_path).size == refused
    assert verify_ledger(tmp_path / "ledger.db", KEY.public.hex).head.size == refused


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
@pytest.mark.parametrize("call", ["openat", "pwrite64", "write", "fdatasync", "fsync", "unlink", "rename"])
@pytest.mark.parametrize("fault", ["error=EIO", "error=ENOSPC", "signal=KILL"])
def test_faults_of_every_disk_call(tmp_path: Path, call: str, fault: str) -> None:
    """Whichever disk call fails or is the last: the log verifies, holds every receipt, and resumes without repeats."""
    first, folder = tmp_path / "first", tmp_path / "again"
    first.mkdir()
    _open(first).append_once(("plan", 0), _plan(0), NOW)
    files = [folder, folder / "ledger.db", folder / "ledger.db-journal"]
    only = [f"--trace-path={file}" for file in files] if call == "openat" else []  # the interpreter opens many others
    for count in range(1, 1000):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(first, folder)
        trace = tmp_path / "trace"
        inject = ["strace", "-f", "-qq", "-o", str(trace), *only, "-e", f"trace={call}"]
        inject += ["-e", f"inject={call}:{fault}:when={count}"]
        result = subprocess.run(
            [*inject, sys.executable, "-B", "-c", WRITER.replace("100000", "2").replace("% 7", "% 1"), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            check=False,
            cwd=Path(__file__).parents[2],
        )
        promised = [int(line) for line in result.stdout.splitlines() if line.isdigit()]
        assert verify_ledger(folder / "ledger.db", KEY.public.hex).head.size > max(promised, default=0)
        ledger = _open(folder)
        for number in range(2):
            ledger.append_once(("plan", number), _plan(number), NOW)
        assert ledger.size == 2
        assert verify_ledger(folder / "ledger.db", KEY.public.hex).head.size == 2
        ledger.close()
        if "INJECTED" not in trace.read_text() and "KILL" not in trace.read_text():
            break
    assert count > 1


def test_a_cut_tail_is_noticed_at_opening(tmp_path: Path) -> None:
    """A ledger with fewer entries than its checkpoint was signed over does not open."""
    ledger = _open(tmp_path)
    for number in range(5):
        ledger.append(_plan(number), NOW)
    ledger.checkpoint()
    _edit(ledger, "DELETE FROM entries WHERE idx = 4")

    with pytest.raises(Tampered, match=r"4 entries, but ledger\.db was signed over 5"):
        _open(tmp_path)


def test_a_rolled_back_file_is_noticed_at_opening(tmp_path: Path) -> None:
    """An older copy of the database under a newer checkpoint.txt does not open."""
    ledger = _open(tmp_path)
    ledger.append(_plan(0), NOW)
    old = ledger.path.read_bytes()
    ledger.append(_plan(1), NOW)
    ledger.checkpoint()
    ledger.close()
    ledger.path.write_bytes(old)

    with pytest.raises(Tampered, match=r"1 entries, but checkpoint\.txt was signed over 2"):
        _open(tmp_path)


def test_a_missing_or_changed_row_is_noticed_at_opening(tmp_path: Path) -> None:
    """A gap, or a last entry that is not the one hashed, does not open."""
    ledger = _open(tmp_path)
    for number in range(5):
        ledger.append(_plan(number), NOW)
    _edit(ledger, "UPDATE entries SET payload = x'7b7d' WHERE idx = 4")

    with pytest.raises(Tampered, match="entry 4: leaf hash differs"):
        _open(tmp_path)
    _edit(ledger, "DELETE FROM entries WHERE idx = 2")
    with pytest.raises(Tampered, match="entry 2 is missing"):
        _open(tmp_path)


def test_a_ledger_without_its_triggers_does_not_open(tmp_path: Path) -> None:
    """Nobody appends to a file that is no longer append-only."""
    ledger = _open(tmp_path)
    ledger._connection.execute("DROP TRIGGER once_DELETE")

    with pytest.raises(Tampered, match="append-only triggers"):
        _open(tmp_path)


def test_another_key_or_origin_does_not_open_it(tmp_path: Path) -> None:
    """A ledger is opened with its own key and name only."""
    ledger = _open(tmp_path)
    ledger.append(_plan(0), NOW)
    ledger.checkpoint()

    with pytest.raises(CheckFailed, match="another key"):
        Ledger(ledger.path, HOSPITAL, ORIGIN)
    with pytest.raises(BadInput, match="belongs to the log"):
        Ledger(ledger.path, KEY, "islet.example/other")


def test_a_file_that_is_no_ledger_does_not_open(tmp_path: Path) -> None:
    """Another file under the name is not touched."""
    (tmp_path / "ledger.db").write_bytes(b"notes" * 1000)

    with pytest.raises(Tampered, match="not readable as a ledger"):
        _open(tmp_path)
    assert (tmp_path / "ledger.db").read_bytes() == b"notes" * 1000


def test_checkpoint_file_is_brought_up_to_date(tmp_path: Path) -> None:
    """A crash between the database and checkpoint.txt is mended at the next opening."""
    ledger = _open(tmp_path)
    ledger.append(_plan(0), NOW)
    note = ledger.checkpoint()
    (tmp_path / CHECKPOINT_FILE).unlink()
    _open(tmp_path)

    assert (tmp_path / CHECKPOINT_FILE).read_text() == note


def test_unknown_entries_are_refused(tmp_path: Path) -> None:
    """Asking for an entry or receipt that is not there says how many there are."""
    ledger = _open(tmp_path)

    with pytest.raises(BadInput, match="no entry 0; it has 0"):
        ledger.entry(0)
    with pytest.raises(BadInput):
        ledger.receipt(0)
    with pytest.raises(BadInput):
        ledger.consistency_proof(1)
