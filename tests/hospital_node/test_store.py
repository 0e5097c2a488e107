"""The store keeps imports whole or not at all, knows what it has, and holds nobody's name."""

import hashlib
import os
import resource
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import pytest

from data_schemas.errors import BadInput, StorageFailed, Tampered
from data_schemas.layout import load_layout
from data_schemas.reading import COLUMNS, Flag, QualityReport, ValidReadings
from hospital_node.importing import import_exports
from hospital_node.intake import pseudonym
from hospital_node.split import heldout
from hospital_node.store import Store, quarantine_ids

KEY = b"k" * 32
ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "hospital_node" / "sample_exports"


def frame(*rows: tuple[str, int, float], source: str = "a", flags: int = 0) -> pd.DataFrame:
    """Rows of (person, minute, mg/dL)."""
    table = pd.DataFrame(rows, columns=["patient", "minute", "glucose_mg_dl"])
    start = pd.Timestamp("2024-05-01", tz="UTC")
    table["measured_at"] = start + pd.to_timedelta(table["minute"], unit="min")
    table = table.assign(row=range(len(table)), zone="UTC", flags=flags, source=source * 64)
    for name in ("carbs_g", "bolus_u", "basal_u_per_h", "heart_rate"):
        table[name] = float("nan")
    return table[list(COLUMNS)].astype(COLUMNS)


def add(store: Store, good: pd.DataFrame, bad: pd.DataFrame | None = None) -> QualityReport:
    held = (frame() if bad is None else bad).assign(rule="flat").astype({"rule": "str"})
    counts = {"flat": len(held)} if len(held) else {}
    report = QualityReport(len(good) + len(held), len(good), counts, {}, {}, good["patient"].nunique())
    return store.add(ValidReadings(good), held, report, sorted(set(good["source"]) | set(held["source"])))


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_was_added_comes_back(tmp_path: Path) -> None:
    """Readings return by person and time in canonical columns; quarantine is apart and names its rule."""
    store = Store(tmp_path / "store")
    good = frame(("p", 0, 100.0), ("p", 5, 101.0), ("q", 0, 90.0))
    report = add(store, good, frame(("q", 5, 500.0)))
    again = Store(tmp_path / "store")

    assert report.balanced
    assert again.patients() == ("p", "q")
    pd.testing.assert_frame_equal(again.readings("p"), good[:2])
    assert {n: str(d) for n, d in again.readings("p").dtypes.items()} == COLUMNS
    assert again.readings("p", datetime(2024, 5, 1, 0, 5, tzinfo=UTC))["glucose_mg_dl"].tolist() == [101.0]
    assert again.readings("nobody").empty
    assert again.quarantined()[["patient", "rule"]].to_numpy().tolist() == [["q", "flat"]]
    assert (again.counts().readings, again.counts().quarantined, again.counts().files) == (3, 1, 1)


def test_an_empty_store_answers(tmp_path: Path) -> None:
    """Before the first import there are no people, no rows and an empty series."""
    store = Store(tmp_path / "store")

    assert store.patients() == ()
    assert store.readings("p").empty
    assert len(store.series().time_s) == 0


def test_series_leaves_interpolated_rows_out(tmp_path: Path) -> None:
    """What the source's authors made is stored and never becomes a training or scoring reading."""
    store = Store(tmp_path / "store")
    add(store, frame(("p", 0, 100.0), ("q", 0, 90.0)))
    add(store, frame(("p", 5, 101.0), source="b", flags=int(Flag.INTERPOLATED)))

    assert store.series().glucose_mg_dl.tolist() == [100.0, 90.0]
    assert store.series(["q"]).patients == ("q",)
    assert (store.counts().readings, store.counts().interpolated) == (3, 1)


def test_the_same_file_twice_adds_nothing_and_says_so(tmp_path: Path) -> None:
    """The second import of a file counts all its rows as duplicates and leaves every byte as it was."""
    store = Store(tmp_path / "store")
    good, bad = frame(("p", 0, 100.0), ("p", 5, 101.0)), frame(("p", 10, 500.0))
    add(store, good, bad)
    before = bytes_of(tmp_path)

    report = add(store, good, bad)

    assert report == QualityReport(3, 0, {}, {"file-already-imported": 3}, {}, 1)
    assert report.balanced
    assert bytes_of(tmp_path) == before


def test_readings_known_from_another_file_are_duplicates_and_contradictions_are_held(tmp_path: Path) -> None:
    """A longer export of the same person adds its new rows only; what contradicts the store goes to quarantine."""
    store = Store(tmp_path / "store")
    add(store, frame(("p", 0, 100.0), ("p", 5, 101.0)))

    report = add(store, frame(("p", 0, 100.0), ("p", 5, 99.0), ("p", 10, 102.0), source="b"))

    assert (report.accepted, report.quarantined, report.duplicates) == (
        1,
        {"conflicts-with-stored": 1},
        {"already-stored": 1},
    )
    assert store.readings("p")["glucose_mg_dl"].tolist() == [100.0, 101.0, 102.0]


def test_freshness_is_told_by_origin(tmp_path: Path) -> None:
    """Each origin has its newest reading, files and readings; an older store without origins answers nothing."""
    store = Store(tmp_path)
    for origin, source, minute in (("exports", "a", 0), ("exports", "b", 35), ("apps", "c", 20)):
        good = frame(("p", minute, 100.0), ("q", minute, 100.0), source=source)
        store.add(
            ValidReadings(good), frame().assign(rule=""), QualityReport(2, 2, {}, {}, {}, 2), [source * 64], origin
        )
    start = int(pd.Timestamp("2024-05-01", tz="UTC").timestamp())
    found = Store(tmp_path).freshness()
    assert {name: (f.newest_s - start, f.files, f.readings) for name, f in found.items()} == {
        "exports": (35 * 60, 2, 4),
        "apps": (20 * 60, 1, 2),
    }
    with closing(sqlite3.connect(tmp_path / "catalogue.db")) as db, db:
        db.execute("DROP TABLE origins")
    assert Store(tmp_path).freshness() == {}


def test_no_identity_of_any_site_is_in_the_store(tmp_path: Path) -> None:
    """Neither file names nor identities, nor their unkeyed hashes, are among the store's bytes."""
    for site in ("arizona", "madrid", "manchester"):
        folder = tmp_path / site
        paths = sorted(path for path in (SAMPLES / site).rglob("*.csv") if path.stem[-3:] in {"t 1", "01P", "302"})
        assert paths
        for path in paths:
            target = folder / path.relative_to(SAMPLES / site)
            target.parent.mkdir(parents=True, exist_ok=True)
            lines = path.read_bytes().splitlines(keepends=True)
            target.write_bytes(b"".join(lines[:300]))
        import_exports(folder, load_layout(site), None, KEY, Store(tmp_path / "store"))
    content = b"".join(bytes_of(tmp_path / "store").values())

    assert len(Store(tmp_path / "store").patients()) == 3
    for identity in (b"Subject", b"HUPA", b"UoM", b".csv", b"Glucose Data"):
        assert identity not in content
    assert hashlib.sha256(b"Subject 1").hexdigest()[:16].encode() not in content
    # The bytes are searchable: what should be there is found.
    assert pseudonym("Subject 1", KEY).encode() in content


def test_files_of_the_store_are_the_owners_alone(tmp_path: Path) -> None:
    """Nobody else on the machine reads patients' data."""
    store = Store(tmp_path / "store")
    add(store, frame(("p", 0, 100.0)))

    assert {path.stat().st_mode & 0o077 for path in (tmp_path / "store").rglob("*") if path.is_file()} == {0}


def test_a_changed_segment_is_noticed(tmp_path: Path) -> None:
    """A reading altered on disk is not served."""
    store = Store(tmp_path / "store")
    add(store, frame(("p", 0, 100.0)))
    segment = next((tmp_path / "store" / "segments").iterdir())
    content = bytearray(segment.read_bytes())
    content[len(content) // 2] ^= 1
    segment.write_bytes(content)

    with pytest.raises(Tampered, match="not those that were stored"):
        store.readings("p")


def test_a_report_that_does_not_add_up_is_refused(tmp_path: Path) -> None:
    """No row is lost on the way to the store."""
    with pytest.raises(BadInput, match="does not add up"):
        Store(tmp_path).add(ValidReadings(frame()), frame().assign(rule=""), QualityReport(1, 0, {}, {}, {}, 0), [])


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: the system itself refuses the write."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("size", [0, 2000, 6000, 16000])
def test_a_disk_that_refuses_changes_nothing(tmp_path: Path, size: int) -> None:
    """An import that does not fit leaves the store as it was, and fits when there is space again."""
    store = Store(tmp_path / "store")
    add(store, frame(("p", 0, 100.0)))
    before = bytes_of(tmp_path)
    good, bad = frame(("p", 5, 101.0), source="b"), frame(*(("q", m, 500.0) for m in range(100)), source="b")

    with disk_of(size), pytest.raises(StorageFailed):
        add(store, good, bad)

    after = bytes_of(tmp_path)
    assert {name: after[name] for name in before} == before
    # Where the catalogue's commit is what failed, segments that nothing names may stay; the next import removes them.
    assert after == before or size == 16000
    assert (store.counts().readings, store.counts().quarantined) == (1, 0)
    assert add(store, good, bad).accepted == 1
    assert len(list((tmp_path / "store" / "segments").iterdir())) == 3


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
import hospital_node.incoming as incoming
import hospital_node.segments as segments
import hospital_node.store as store
from test_store import add, frame

point, folder = sys.argv[1], Path(sys.argv[2])
real = segments.write_durably
calls = []

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def write(path, data, mode):
    calls.append(path)
    if point == "torn" and len(calls) == 1:
        path.with_name("." + path.name + ".new").write_bytes(data[: len(data) // 2])
        die()
    real(path, data, mode)
    if point == f"segment {{len(calls)}}":
        die()

segments.write_durably = write
if point == "before commit":
    incoming.canonical_bytes = die
add(store.Store(folder), frame(("p", 5, 101.0), source="b"), frame(("q", 0, 500.0), source="b"))
if point == "after commit":
    die()
"""


@pytest.mark.parametrize("point", ["torn", "segment 1", "segment 2", "before commit", "after commit"])
def test_a_kill_in_the_middle_of_an_import_leaves_all_or_nothing(tmp_path: Path, point: str) -> None:
    """Killed at any point, the store has the whole import or none of it, and the next import completes it."""
    folder = tmp_path / "store"
    add(Store(folder), frame(("p", 0, 100.0)))
    script = KILLED.format(root=str(ROOT), tests=str(Path(__file__).parent))

    ended = subprocess.run([sys.executable, "-c", script, point, str(folder)], env=os.environ.copy(), check=False)

    assert ended.returncode == -signal.SIGKILL
    done = point == "after commit"
    store = Store(folder)
    assert store.counts().readings == 1 + done
    assert store.counts().quarantined == done
    report = add(store, frame(("p", 5, 101.0), source="b"), frame(("q", 0, 500.0), source="b"))
    assert report.duplicates == ({"file-already-imported": 2} if done else {})
    assert (store.counts().readings, store.counts().quarantined) == (2, 1)
    # What the killed import left behind is gone: two readings segments and one of quarantine.
    assert done or len(list((folder / "segments").iterdir())) == 3


def test_who_is_held_out_is_fixed_by_person_and_key() -> None:
    """About the asked fraction is held out; a person's place depends on the key and on nobody else."""
    people = [f"{number:016x}" for number in range(2000)]
    chosen = {person for person in people if heldout(person, KEY)}

    assert 0.17 < len(chosen) / len(people) < 0.23
    assert chosen == {person for person in reversed(people) if heldout(person, KEY)}
    assert chosen != {person for person in people if heldout(person, b"j" * 32)}
    assert chosen <= {person for person in people if heldout(person, KEY, 0.5)}


def test_rows_released_from_quarantine_are_readings_and_discarded_ones_are_gone(tmp_path: Path) -> None:
    """A released value is clamped and marked; what stays in quarantine stays; no byte of a discarded row is left."""
    store = Store(tmp_path / "store")
    add(store, frame(("p", 0, 100.0)), frame(("p", 5, 450.0), ("p", 10, 90.0), ("q", 0, 80.0), source="b"))
    first, second, third = quarantine_ids(store.quarantined())

    assert store.settle([first], release=True) == 1
    assert store.settle([second], release=False) == 1

    again = Store(tmp_path / "store")
    assert again.readings("p")["glucose_mg_dl"].tolist() == [100.0, 400.0]
    assert again.readings("p")["flags"].tolist() == [0, Flag.CENSORED_HIGH]
    assert quarantine_ids(again.quarantined()).tolist() == [third]
    assert len(list((tmp_path / "store" / "segments").iterdir())) == 3


def test_what_cannot_become_a_reading_is_not_released(tmp_path: Path) -> None:
    """A row without a value, one at the second of a reading, and one that is not there change nothing."""
    store = Store(tmp_path / "store")
    add(store, frame(("p", 0, 100.0)), frame(("p", 5, float("nan")), ("p", 0, 90.0), source="b"))
    before = bytes_of(tmp_path)

    for row in [*quarantine_ids(store.quarantined()), "nothing-7"]:
        with pytest.raises(BadInput):
            store.settle([row], release=True)
    assert bytes_of(tmp_path) == before


def test_a_reading_right_beside_a_stored_one_must_not_contradict_it(tmp_path: Path) -> None:
    """Within two and a half minutes of a reading of an earlier import: near it or quarantined, as within one import."""
    store = Store(tmp_path)
    add(store, frame(("p", 0, 100.0), ("p", 10, 100.0), ("q", 0, 100.0)))
    report = add(
        store, frame(("p", 1, 131.0), ("p", 5, 200.0), ("p", 9, 69.0), ("p", 12, 130.0), ("q", 3, 200.0), source="b")
    )

    assert report.quarantined == {"conflicts-with-stored": 2}
    assert report.accepted == 3
    assert store.readings("p")["glucose_mg_dl"].tolist() == [100.0, 200.0, 100.0, 130.0]
    assert store.readings("q")["glucose_mg_dl"].tolist() == [100.0, 200.0]


def test_a_store_of_another_form_says_how_to_go_on(tmp_path: Path) -> None:
    """It is not read wrongly, and the hint names the folder and the command."""
    Store(tmp_path / "store")
    with sqlite3.connect(tmp_path / "store" / "catalogue.db") as db:
        db.execute("PRAGMA user_version = 1")

    with pytest.raises(BadInput, match="another version") as refusal:
        Store(tmp_path / "store")
    assert f"mv {tmp_path / 'store'} " in refusal.value.hint
    assert "islet node import" in refusal.value.hint
