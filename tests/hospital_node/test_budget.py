"""The privacy budget book: nothing is under-counted, nothing spent twice, and no changed byte goes unnoticed."""

from __future__ import annotations

import hmac
import json
import multiprocessing
import os
import shutil
import signal
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_schemas.errors import BadInput, NodeBusy, StorageFailed, Tampered
from data_schemas.plan import PrivacyEvent, PrivacyUnit
from data_schemas.units import DELTA
from hospital_node import book_file
from hospital_node.budget import (
    MOST_ROUNDS,
    BudgetBook,
    BudgetExhausted,
    Cohort,
    Reservation,
    epsilon,
    exported,
    render,
)

KEY = b"k" * 32
EVENT = PrivacyEvent(sample_rate=0.2, noise_multiplier=2.0, steps=10)
RELEASE = PrivacyEvent(sample_rate=1.0, noise_multiplier=3.0, steps=1)
AT = "2026-11-22T10:00:00+00:00"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    BudgetBook.create(tmp_path / "budget.db", KEY)
    return tmp_path / "budget.db"


def reserve(
    book: BudgetBook, task: str, cohort: Cohort = "training", event: PrivacyEvent = EVENT, ceiling: float = 8.0
) -> Reservation | bytes:
    return book.reserve(
        task, cohort, "patient", event, asked_by="trial", run="run-1", at=AT, ceiling_epsilon=ceiling, noise="secure"
    )


def filled(path: Path, tasks: int = 4, reply_bytes: int = 20_000) -> BudgetBook:
    """Return a book with committed tasks whose replies are larger than a page."""
    book = BudgetBook(path, KEY)
    for number in range(tasks):
        reserve(book, f"task {number}")
        book.commit(f"task {number}", np.random.default_rng(number).bytes(reply_bytes))
    return book


def test_a_reservation_is_spent_and_a_commit_costs_nothing_more(path: Path) -> None:
    """Epsilon after a reservation is what the accountant says, before and after its commit, in a new process too."""
    book = BudgetBook(path, KEY)
    reserved = reserve(book, "a")
    assert isinstance(reserved, Reservation)
    book.commit("a", b"reply")

    again = BudgetBook(path, KEY)

    assert epsilon([EVENT], DELTA) == reserved.epsilon_after == book.spent("training") == again.spent("training")
    assert again.spent("heldout") == 0.0
    assert (book.head(), book.rows()) == (again.head(), again.rows())
    assert reserved.head != again.head()


def test_a_committed_task_gives_back_its_reply(path: Path) -> None:
    """Asking again for a committed task returns the stored bytes and spends nothing; a second reply is ignored."""
    book = BudgetBook(path, KEY)
    reserve(book, "a")
    first = book.commit("a", b"first")
    spent = book.spent("training")

    assert b"first" == first == reserve(book, "a", ceiling=1e-6) == book.commit("a", b"second")
    assert spent == book.spent("training")


def test_a_task_reserved_but_not_committed_uses_its_reservation(path: Path) -> None:
    """After a crash the same task goes on with the reservation it has; it is counted once."""
    first = reserve(BudgetBook(path, KEY), "a")
    spent = BudgetBook(path, KEY).spent("training")

    book = BudgetBook(path, KEY)

    assert first == reserve(book, "a")
    assert spent == book.spent("training") > 0


def test_a_task_cannot_come_back_as_something_else(path: Path) -> None:
    """A reserved task with another event is refused, and so is a reply nobody reserved."""
    book = BudgetBook(path, KEY)
    reserve(book, "a")

    with pytest.raises(BadInput):
        reserve(book, "a", event=RELEASE)
    with pytest.raises(BadInput):
        book.commit("never reserved", b"reply")


def test_a_weaker_unit_is_not_added_up_with_patients(path: Path) -> None:
    """An event that protects windows or days cannot enter the book, whoever asks, and nothing is written."""
    book = BudgetBook(path, KEY)
    units: tuple[PrivacyUnit, ...] = ("day (weaker than patient)", "window (weaker than patient)")
    for unit in units:
        with pytest.raises(BadInput, match="weaker than patient"):
            book.reserve("a", "training", unit, EVENT, asked_by="", run="", at=AT, ceiling_epsilon=8.0, noise="secure")

    assert book.rows() == () == BudgetBook(path, KEY).rows()


def test_the_ceiling_holds_over_all_runs_and_refusing_writes_nothing(path: Path) -> None:
    """Reservations stop before the ceiling, the refusal carries the figures, and the book is as it was."""
    book = BudgetBook(path, KEY)
    fits = book.rounds_left("training", EVENT, 2.0)
    for number in range(fits):
        reserve(book, str(number), ceiling=2.0)
    before = book.head()

    with pytest.raises(BudgetExhausted) as refusal:
        reserve(book, "one more", ceiling=2.0)

    assert refusal.value.spent == book.spent("training") <= 2.0 < refusal.value.needed
    assert (before, 0, 2.0) == (book.head(), book.rounds_left("training", EVENT, 2.0), refusal.value.ceiling)


def test_cohorts_do_not_share_a_budget(path: Path) -> None:
    """Held-out people are other people: an exhausted training cohort leaves theirs untouched."""
    book = BudgetBook(path, KEY)
    reserve(book, "a")

    reserve(book, "b", cohort="heldout", event=RELEASE)

    assert book.spent("training") == epsilon([EVENT], DELTA)
    assert book.spent("heldout") == epsilon([RELEASE], DELTA)


def test_a_smaller_delta_costs_more(path: Path) -> None:
    """Epsilon is always told, and held against the ceiling, at the delta that was asked for."""
    book = BudgetBook(path, KEY)
    reserve(book, "a")

    assert book.spent("training", 1e-7) > book.spent("training", 1e-5)


def test_every_single_bit_is_guarded(path: Path) -> None:
    """One flipped bit, wherever it falls in budget.db or budget.head, is found at the next opening."""
    filled(path, tasks=2, reply_bytes=5000)
    draw = np.random.default_rng(5)
    for name in ("budget.db", "budget.head"):
        good = (path.parent / name).read_bytes()
        places = {0, 17, 24, 100, len(good) - 1, *draw.integers(0, len(good), 40).tolist()}
        for place in sorted(places):
            bad = bytearray(good)
            bad[place] ^= 1 << int(draw.integers(8))
            (path.parent / name).write_bytes(bad)

            with pytest.raises(Tampered):
                BudgetBook(path, KEY)

        (path.parent / name).write_bytes(good)
    BudgetBook(path, KEY)


def test_a_changed_row_is_named_with_its_offset(path: Path) -> None:
    """A changed row is reported by number and by the byte offset where it begins."""
    filled(path)
    data = bytearray(path.read_bytes())
    place = data.find(b'"number":3')
    data[place - 5] ^= 1
    path.write_bytes(data)
    begins = data.rfind(b"{", 0, data.rfind(b'"event"', 0, place))

    with pytest.raises(Tampered, match="row 3") as caught:
        BudgetBook(path, KEY)

    assert ("budget.db", begins) == (caught.value.name, caught.value.offset)
    assert caught.value.hint


def test_a_file_sqlite_cannot_read_is_located_too(path: Path) -> None:
    """Where SQLite itself is damaged, the report names the damaged page."""
    filled(path)
    data = bytearray(path.read_bytes())
    data[4096 : 4096 + 64] = bytes(64)
    path.write_bytes(data)

    with pytest.raises(Tampered) as caught:
        BudgetBook(path, KEY)

    assert (caught.value.name, caught.value.offset) == ("budget.db", 4096)


EDITS: dict[str, tuple[str, str]] = {
    "row deleted": ("DELETE FROM rows WHERE number = 3", "row 3 is missing"),
    "last rows deleted": ("DELETE FROM rows WHERE number > 6", "row 7 is missing"),
    "all rows deleted": ("DELETE FROM rows", "row 1 is missing"),
    "row copied": ("INSERT INTO rows SELECT 9, body, mac FROM rows WHERE number = 1", "row 9"),
    "rows swapped": ("UPDATE rows SET body = (SELECT body FROM rows WHERE number = 1) WHERE number = 3", "row 3"),
    "row of another type": ("UPDATE rows SET body = 'text' WHERE number = 3", "row 3"),
    "reply changed": ("UPDATE replies SET reply = zeroblob(10) WHERE number = 2", "reply of row 2"),
    "reply deleted": ("DELETE FROM replies WHERE number = 4", "reply of row 4"),
    "table dropped": ("DROP TABLE rows", "unreadable"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_editing_with_sql_is_noticed(path: Path, edit: str) -> None:
    """Whoever edits the book with SQLite but without the node's key is found out."""
    filled(path)
    statement, what = EDITS[edit]
    with sqlite3.connect(path) as db:
        db.execute(statement)

    with pytest.raises(Tampered, match=what) as caught:
        BudgetBook(path, KEY)

    assert 0 <= caught.value.offset <= path.stat().st_size


def test_cutting_the_file_or_losing_one_is_noticed(path: Path) -> None:
    """A file cut short, a missing seal, and a book from another node are all found."""
    filled(path)
    whole = path.read_bytes()
    seal = path.with_name("budget.head").read_bytes()
    with pytest.raises(Tampered):
        BudgetBook(path, b"another node's key")

    path.write_bytes(whole[:-4096])
    with pytest.raises(Tampered):
        BudgetBook(path, KEY)
    path.write_bytes(whole)
    path.with_name("budget.head").unlink()
    with pytest.raises(Tampered, match=r"budget\.head"):
        BudgetBook(path, KEY)

    path.with_name("budget.head").write_bytes(seal)
    BudgetBook(path, KEY)


def test_an_older_book_under_the_newer_seal_is_noticed(path: Path, tmp_path: Path) -> None:
    """Putting back yesterday's budget.db is found, because the seal remembers more rows."""
    filled(path, tasks=1)
    shutil.copy(path, tmp_path / "yesterday.db")
    filled(path, tasks=2)

    shutil.copy(tmp_path / "yesterday.db", path)

    with pytest.raises(Tampered, match="row 3 is missing"):
        BudgetBook(path, KEY)


def test_two_writers_do_not_mix(path: Path) -> None:
    """A book that somebody else wrote to meanwhile refuses to write on from a stale state."""
    one, other = BudgetBook(path, KEY), BudgetBook(path, KEY)
    reserve(one, "a")

    with pytest.raises(NodeBusy):
        reserve(other, "b")

    assert len(BudgetBook(path, KEY).rows()) == 1


def _die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _die_in_reserve_before_the_seal(path: Path) -> None:
    book = BudgetBook(path, KEY)
    book_file.write_seal = _die
    reserve(book, "a")


def _die_in_commit_before_the_seal(path: Path) -> None:
    book = BudgetBook(path, KEY)
    reserve(book, "a")
    book_file.write_seal = _die
    book.commit("a", b"reply")


def _die_inside_the_transaction(path: Path) -> None:
    """Killed with a hot rollback journal on the disk: the row is in the file and not committed."""
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("PRAGMA cache_size=1")
    db.execute("BEGIN IMMEDIATE")
    db.execute("INSERT INTO rows VALUES (1, x'7b7d', x'00')")
    db.execute("INSERT INTO replies VALUES (1, zeroblob(200000))")
    _die()


def killed(what: Callable[[Path], None], path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=what, args=(path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_a_kill_between_row_and_seal_is_no_tampering(path: Path) -> None:
    """Killed after the row and before the seal: the row counts, and the book is sealed again."""
    killed(_die_in_reserve_before_the_seal, path)

    book = BudgetBook(path, KEY)

    assert epsilon([EVENT], DELTA) == book.spent("training")
    assert book.stored_reply("a") is None
    BudgetBook(path, KEY)


def test_a_kill_after_a_commit_keeps_the_reply(path: Path) -> None:
    """Killed after the commit's row: the stored reply is what the task gets."""
    killed(_die_in_commit_before_the_seal, path)

    assert reserve(BudgetBook(path, KEY), "a") == b"reply"


def test_a_kill_inside_a_transaction_leaves_the_book_as_it_was(path: Path) -> None:
    """A half-written transaction is rolled back byte for byte, and that is not reported as tampering."""
    before = BudgetBook(path, KEY).head()
    killed(_die_inside_the_transaction, path)
    assert path.with_name("budget.db-journal").exists()

    assert before == BudgetBook(path, KEY).head()


def test_the_printed_book_says_what_was_spent_by_whom_and_what_is_left(path: Path) -> None:
    """The text names unit and delta beside each epsilon, who asked, and the rounds left at the present noise."""
    book = BudgetBook(path, KEY)
    assert "nothing spent" in render(book, {"training": 2.0, "heldout": 2.0})
    reserved = reserve(book, "a")
    assert isinstance(reserved, Reservation)

    text = render(book, {"training": 2.0, "heldout": 2.0})

    assert f"spent epsilon {reserved.epsilon_after:.3f} of 2" in text
    assert f"{book.rounds_left('training', EVENT, 2.0)} rounds left" in text
    row = next(line for line in text.splitlines() if AT in line)
    assert all(part in row for part in ("trial", "run-1", f"{reserved.epsilon_after:.3f}", "patient, 1e-05", "secure"))


def test_an_exported_book_is_all_that_a_recomputation_needs(path: Path) -> None:
    """Events, unit, delta and totals as JSON; task ids and replies stay in the book."""
    book = filled(path, tasks=2, reply_bytes=10)

    told = json.loads(json.dumps(exported(book)))

    assert [PrivacyEvent(**{k: r[k] for k in PrivacyEvent.model_fields}) for r in told["releases"]] == [EVENT, EVENT]
    assert told["spent"] == {"training": book.spent("training"), "heldout": 0.0}
    assert {(r["cohort"], r["unit"], r["delta"]) for r in told["releases"]} == {("training", "patient", DELTA)}
    assert "task" not in json.dumps(told)


def test_making_a_book_again_keeps_the_one_that_is_there(path: Path) -> None:
    """Creating over a book verifies and keeps it, and a reservation can be looked up by its task."""
    reserved = reserve(BudgetBook(path, KEY), "a")

    BudgetBook.create(path, KEY)

    assert BudgetBook(path, KEY).reservation("a") == reserved
    assert BudgetBook(path, KEY).reservation("b") is None
    with pytest.raises(Tampered):
        BudgetBook.create(path, b"another node's key")


def test_a_lost_book_beside_its_seal_is_noticed(path: Path) -> None:
    """budget.db removed while budget.head stays is no empty book."""
    path.unlink()

    with pytest.raises(Tampered, match="missing"):
        BudgetBook(path, KEY)


def test_a_book_of_other_rows_under_this_seal_is_noticed(path: Path, tmp_path: Path) -> None:
    """A second valid book of the same node, equally long, does not pass under the first one's seal."""
    reserve(BudgetBook(path, KEY), "a")
    other = tmp_path / "other" / "budget.db"
    other.parent.mkdir()
    BudgetBook.create(other, KEY)
    reserve(BudgetBook(other, KEY), "b")

    shutil.copy(other, path)

    with pytest.raises(Tampered, match="not the sealed one"):
        BudgetBook(path, KEY)


def test_a_seal_of_another_form_is_refused(path: Path) -> None:
    """A seal that the key confirms but that is not one, from a program of another version, stops the node."""
    mac = hmac.digest(KEY, b"{}", "sha256").hex().encode()
    path.with_name("budget.head").write_bytes(b"{}\n" + mac + b"\n")

    with pytest.raises(Tampered, match="cannot be read"):
        BudgetBook(path, KEY)


def test_a_book_that_another_process_writes_says_so(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A locked file is no tampering."""
    book, connect = BudgetBook(path, KEY), sqlite3.connect
    monkeypatch.setattr(book_file.sqlite3, "connect", lambda *a, **k: connect(*a, **{**k, "timeout": 0.0}))
    with closing(connect(path, isolation_level=None)) as holder:
        holder.execute("BEGIN EXCLUSIVE")

        with pytest.raises(NodeBusy):
            reserve(book, "a")

        holder.execute("ROLLBACK")


def test_a_disk_that_does_not_take_the_row_says_so(path: Path) -> None:
    """Nowhere to write is no tampering either."""
    with pytest.raises(StorageFailed):
        book_file.append(path.parent / "gone" / "budget.db", 1, b"{}", b"", None)


def test_a_row_without_its_noise_source_says_that(path: Path) -> None:
    """A row that does not tell where its noise came from is never shown as secure."""
    reserve(BudgetBook(path, KEY), "a")
    book = BudgetBook(path, KEY)
    value = {k: v for k, v in book._rows[0][0].items() if k != "noise"}

    book._index(value, b"")

    assert book.rows()[0].noise == "not recorded"


def test_a_long_book_shows_a_practically_endless_rest(path: Path) -> None:
    """Noise so large that no plan could use it up is shown as such."""
    book = BudgetBook(path, KEY)
    reserve(book, "a", event=PrivacyEvent(sample_rate=0.01, noise_multiplier=500.0, steps=1))

    assert f"{MOST_ROUNDS} or more rounds left" in render(book, {"training": 8.0, "heldout": 8.0})
