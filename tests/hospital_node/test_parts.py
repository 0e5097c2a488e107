"""An export of any size is read in parts that share nobody, and comes out as if it were read at once."""

import os
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pytest

from data_schemas.errors import BadInput
from data_schemas.layout import Layout, load_layout
from hospital_node import crew, intake, lines, parts
from hospital_node.importing import Export, look_at, take_in
from hospital_node.intake import read_exports, read_parts
from hospital_node.portrait import Portrait
from hospital_node.store import Store, quarantine_ids
from hospital_node.suites import load_suite

KEY = b"k" * 32
HEAD = "patient,time,glucose_mg_dl\n"


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PART_BYTES", 200)


def write(folder: Path, people: Sequence[str], readings: int = 6) -> Path:
    """One file for each entry, which may name several people; a conflict in the first and a copy in the last."""
    folder.mkdir(exist_ok=True)
    for number, names in enumerate(people):
        lines = [
            f"{name},2024-01-{13 + number:02d}T00:{5 * at:02d}:00Z,{100 + number + at}\n"
            for name in names
            for at in range(readings)
        ]
        if number == 0:
            lines.append(f"{names[0]},2024-01-13T00:00:00Z,177\n")
        if number == len(people) - 1:
            lines.append(lines[-1])
        (folder / f"{number}.csv").write_text(HEAD + "".join(lines))
    return folder


def export(folder: Path, layout: str | Layout = "canonical") -> Export:
    return Export(folder, load_layout(layout) if isinstance(layout, str) else layout, "Europe/Madrid", KEY)


def rows(store: Store) -> pd.DataFrame:
    frames = [store.readings(patient) for patient in store.patients()]
    return pd.concat(frames).drop(columns="row").reset_index(drop=True)


def test_parts_share_nobody_and_hold_every_row(tmp_path: Path) -> None:
    """A person's lines are read together, from whatever files; every row has a number of its own."""
    write(tmp_path, ["a", "b", "ac", "d", "cb"])

    found = list(read_parts(tmp_path, load_layout("canonical"), None, KEY))

    people = [set(part.readings.frame["patient"]) for part in found]
    assert len(found) > 1
    assert sum(map(len, people)) == len(set().union(*people)) == 4
    numbers = pd.concat([part.readings.frame["row"] for part in found])
    whole = read_exports(tmp_path, load_layout("canonical"), None, KEY)
    assert numbers.is_unique
    assert len(numbers) == whole.rows_in
    assert sum(sum(part.rows_by_file.values()) for part in found) == whole.rows_in


def test_many_parts_end_as_one_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same readings, quarantine, counts by rule and by file, and the same portrait."""
    folder = write(tmp_path / "in", ["a", "b", "cd", "e", "fa", "g"])
    several = take_in(export(folder), Store(tmp_path / "several"), load_suite())
    looked = look_at(export(folder), Portrait.empty(), load_suite())
    monkeypatch.setattr(parts, "PART_BYTES", 1 << 20)
    one = take_in(export(folder), Store(tmp_path / "one"), load_suite())

    assert several.account.report == one.account.report == looked.account.report
    assert one.account.report.quarantined == {"conflicting-stamp": 2}
    assert several.account.files == one.account.files == looked.account.files
    assert several.account.days == one.account.days
    assert several.account.portrait.to_json() == one.account.portrait.to_json()
    assert several.labels == one.labels
    pd.testing.assert_frame_equal(rows(Store(tmp_path / "several")), rows(Store(tmp_path / "one")))
    assert len(Store(tmp_path / "several").state()) > 1


def test_a_refusal_in_the_last_part_takes_back_the_first(tmp_path: Path) -> None:
    """Segments of earlier parts are gone, and the store is as it was."""
    folder = write(tmp_path / "in", ["a", "b", "c", "d"])
    (folder / "z.csv").write_text(HEAD + "z,2024-01-01T00:00:00Z,5.5\n" * 10)
    store = Store(tmp_path / "store")

    with pytest.raises(BadInput, match="look like mmol/L"):
        take_in(export(folder), store, load_suite())

    assert store.counts().readings == store.counts().files == 0
    assert list((tmp_path / "store" / "segments").iterdir()) == []


def test_files_that_are_the_same_byte_for_byte_are_one_person_across_parts(tmp_path: Path) -> None:
    """Copies under other names are read with the first of them."""
    for number, value in enumerate((61, 62, 63, 64, 61)):
        lines = "".join(f"2020-02-13 1{hour}:23:32,{value}.0\n" for hour in range(9))
        (tmp_path / f"00{number}.csv").write_text("timestamp,glucose_value_mg_dl\n" + lines)

    found = list(read_parts(tmp_path, load_layout("duke"), None, KEY))

    assert len(found) > 1
    assert len({name for part in found for name in part.readings.frame["patient"]}) == 4


def libre(day: str, readings: int = 8) -> str:
    head = "Glucose Data,Generated by,Jane\nDevice,Device Timestamp,Record Type,Historic Glucose mg/dL\n"
    return head + "".join(f"Libre,{day} {10 + at}:00,0,{100 + at}\n" for at in range(readings))


def test_the_whole_export_settles_the_order_of_day_and_month(tmp_path: Path) -> None:
    """A file whose days never pass 12 is read as another file of the export tells, in whatever part that is."""
    for name, day in (("a", "05-03-2024"), ("b", "06-03-2024"), ("z", "14-03-2024")):
        (tmp_path / f"{name}_glucose.csv").write_text(libre(day))

    found = list(read_parts(tmp_path, load_layout("libreview"), "Europe/Madrid", KEY))

    assert len(found) == 3
    assert {month for part in found for month in part.readings.frame["measured_at"].dt.month} == {3}


def test_an_order_that_no_file_of_the_export_tells_is_refused(tmp_path: Path) -> None:
    """Nothing decides, and nothing is guessed."""
    for name, day in (("a", "05-03-2024"), ("b", "06-03-2024")):
        (tmp_path / f"{name}_glucose.csv").write_text(libre(day))

    with pytest.raises(BadInput, match="date order is ambiguous"):
        list(read_parts(tmp_path, load_layout("libreview"), "Europe/Madrid", KEY))


def test_files_of_different_orders_are_settled_one_by_one(tmp_path: Path) -> None:
    """Where no order fits all, a file that does not tell its own is refused, whoever its neighbours are."""
    (tmp_path / "a_glucose.csv").write_text(libre("14-03-2024"))
    (tmp_path / "b_glucose.csv").write_text(libre("03-15-2024"))
    layout = load_layout("libreview")

    found = list(read_parts(tmp_path, layout, "Europe/Madrid", KEY))
    assert {str(when.date()) for part in found for when in part.readings.frame["measured_at"]} == {
        "2024-03-14",
        "2024-03-15",
    }
    (tmp_path / "c_glucose.csv").write_text(libre("05-03-2024"))
    with pytest.raises(BadInput, match="ambiguous"):
        list(read_parts(tmp_path, layout, "Europe/Madrid", KEY))


@pytest.mark.parametrize("which", ["0.csv", "5.csv"])
def test_a_file_that_changes_between_two_parts_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    """Whether its part was read or not, the import as a whole would be neither the old export nor the new one."""
    folder = write(tmp_path / "in", "abcdef")
    real, seen = intake._read, list[int]()

    def meanwhile(*arguments: object, **more: int) -> object:
        part = real(*arguments, **more)  # type: ignore[arg-type]
        if not seen:
            with (folder / which).open("a") as file:
                file.write("a,2024-02-01T00:00:00Z,100\n")
        seen.append(1)
        return part

    monkeypatch.setattr(intake, "_read", meanwhile)
    store = Store(tmp_path / "store")

    with pytest.raises(BadInput, match="changed while it was imported"):
        take_in(export(folder), store, load_suite())
    assert store.counts().readings == 0
    assert os.listdir(tmp_path / "store" / "segments") == []  # noqa: PTH208


def test_a_day_more_is_compared_with_what_it_may_repeat_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new day reads no stored row; one that repeats a stored day finds it."""
    store = Store(tmp_path / "store")
    take_in(export(write(tmp_path / "first", "abc")), store, load_suite())
    later = tmp_path / "later"
    later.mkdir()
    (later / "x.csv").write_text(HEAD + "a,2024-02-01T00:00:00Z,100\nb,2024-02-01T00:00:00Z,100\n")
    read = list[object]()
    frame = store._segments.frame
    monkeypatch.setattr(store._segments, "frame", lambda *places: read.append(places) or frame(*places))

    assert take_in(export(later), store, load_suite()).account.report.accepted == 2
    assert read == []
    (later / "x.csv").write_text(HEAD + "b,2024-01-14T00:00:00Z,101\nb,2024-01-14T00:05:00Z,99\n")
    report = take_in(export(later), store, load_suite()).account.report
    assert (report.duplicates, report.quarantined) == ({"already-stored": 1}, {"conflicts-with-stored": 1})


def mixed(folder: Path, tail: str = "") -> Path:
    """One file of seven people whose lines alternate, one row out of range, and a conflict."""
    folder.mkdir()
    text = "".join(
        f"{name},2024-01-13T0{at // 12}:{at % 12 * 5:02d}:00Z,{100 + at + number}\n"
        for at in range(20)
        for number, name in enumerate("abcdefg")
    )
    (folder / "all.csv").write_text(HEAD + text + "c,2024-01-14T00:00:00Z,700\nd,2024-01-13T00:00:00Z,140\n" + tail)
    return folder


@pytest.mark.parametrize("block", [100, 1 << 20])
def test_one_file_of_many_people_is_cut_by_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """Each part holds some people's lines, whatever block they lie in; the sum is what one reading gives."""
    monkeypatch.setattr(lines, "_BLOCK_BYTES", block)
    folder = mixed(tmp_path / "in")
    found = list(read_parts(folder, load_layout("canonical"), None, KEY))
    several = take_in(export(folder), Store(tmp_path / "several"), load_suite())
    monkeypatch.setattr(parts, "PART_BYTES", 1 << 20)
    one = take_in(export(folder), Store(tmp_path / "one"), load_suite())

    assert len(found) == 7
    assert several.account.report == one.account.report
    assert several.account.files == one.account.files
    assert one.account.report.quarantined == {"above-sensor-range": 1, "conflicting-stamp": 2}
    pd.testing.assert_frame_equal(rows(Store(tmp_path / "several")), rows(Store(tmp_path / "one")))
    held = Store(tmp_path / "several").quarantined()
    assert quarantine_ids(held).is_unique


def test_a_file_whose_fields_span_lines_is_read_whole(tmp_path: Path) -> None:
    """Lines do not tell the rows there."""
    folder = mixed(tmp_path / "in")
    content = (folder / "all.csv").read_text().replace("a,2024-01-13T00:00:00Z", '"a\n",2024-01-13T00:00:00Z')
    (folder / "all.csv").write_text(content)

    assert len(list(read_parts(folder, load_layout("canonical"), None, KEY))) == 1


def test_a_cut_off_last_line_is_refused_whoever_it_belongs_to(tmp_path: Path) -> None:
    """As in a file that is read whole."""
    folder = mixed(tmp_path / "in", tail="a,2024-01-15T00:0")

    with pytest.raises(BadInput, match="cut off"):
        take_in(export(folder), Store(tmp_path / "store"), load_suite())
    assert list((tmp_path / "store" / "segments").iterdir()) == []


@pytest.mark.slow
def test_two_processes_find_what_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same account and the same store, in the same order; their refusal is raised here and changes nothing."""
    folder = mixed(tmp_path / "in")
    one = take_in(export(folder), Store(tmp_path / "one"), load_suite())
    monkeypatch.setattr(crew, "CREW_BYTES", 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    two = take_in(export(folder), Store(tmp_path / "two"), load_suite())

    assert one.account.report == two.account.report
    assert Store(tmp_path / "one").state() == Store(tmp_path / "two").state()
    (folder / "z.csv").write_text(HEAD + "z,2024-01-01T00:00:00Z,5.5\n" * 10)
    with pytest.raises(BadInput, match="look like mmol/L") as refusal:
        take_in(export(folder), Store(tmp_path / "three"), load_suite())
    assert refusal.value.hint
    assert list((tmp_path / "three" / "segments").iterdir()) == []


def test_two_processes_answer_in_order_and_raise_refusals_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that dies, as when the system takes its memory, ends the import with a reason."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})

    with crew.crew(crew.CREW_BYTES + 1) as run:
        assert list(run(abs, range(-5, 0))) == [5, 4, 3, 2, 1]
        answers = run(load_layout, ["duke", "ohio", "nowhere", "fhir"])
        assert [next(answers).name, next(answers).name] == ["duke", "ohio"]
        with pytest.raises(BadInput, match="unknown layout") as refusal:
            next(answers)
        assert refusal.value.hint
    with pytest.raises(BadInput, match="ended early"), crew.crew(crew.CREW_BYTES + 1) as run:
        list(run(os._exit, [1, 1]))
