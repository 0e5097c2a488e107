"""The report of an import: self-contained, complete, nobody's name in it; and what it says about drift."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_schemas.layout import load_layout
from hospital_node.drift import drift
from hospital_node.importing import Export, Intake, look_at, take_in
from hospital_node.intake_report import report_page, summary
from hospital_node.portrait import Portrait
from hospital_node.store import Store
from hospital_node.suites import load_suite

KEY = b"k" * 32


def write(folder: Path, seed: int, *, people: int = 6, step_min: int = 5, shift: float = 0.0, month: int = 1) -> Export:
    """Two days of each person around 140 mg/dL in a file named after a person; one row of each is above the range."""
    folder.mkdir(exist_ok=True)
    draw = np.random.default_rng(seed)
    for number in range(people):
        minutes = np.arange(0, 2 * 1440, step_min)
        wave = 140 + shift + 45 * np.sin(minutes / 200 + number) + draw.normal(0, 4, len(minutes))
        lines = [
            f"Jane Doe {number},2024-{month:02d}-{13 + m // 1440:02d}T{m // 60 % 24:02d}:{m % 60:02d}:00Z,{value:.0f}\n"
            for m, value in zip(minutes.tolist(), wave, strict=True)
        ]
        lines.append(f"Jane Doe {number},2024-{month:02d}-15T00:00:00Z,700\n")
        (folder / f"jane-doe-{number}.csv").write_text("patient,time,glucose_mg_dl\n" + "".join(lines))
    return Export(folder, load_layout("canonical"), "Europe/Madrid", KEY)


def looked(folder: Path, past: Portrait | None = None) -> Intake:
    return look_at(write(folder, 1), past or Portrait.empty(), load_suite())


def test_the_page_needs_nothing_but_itself(tmp_path: Path) -> None:
    """No address, no script, no file of its own; the drawings are inside; a browser is told to load nothing."""
    page = report_page(looked(tmp_path), load_suite(), "Import 1", "Node north")

    assert re.findall(r"(?:src|href)=\"(?!data:,\")", page) == []
    assert re.findall(r"https?:|url\(|@import|<script", page) == []
    assert "default-src 'none'" in page
    assert page.count("<svg") == 3


def test_the_page_accounts_for_every_row_and_names_nobody(tmp_path: Path) -> None:
    """Totals, rules with their reasons, and a line for each file; no name of a person or file."""
    page = report_page(looked(tmp_path), load_suite(), "Import 1", "Node north")
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))

    assert "3,462 rows in 3,456 accepted, 99.8% 6 quarantined 0 duplicates 6 people" in text
    assert "above-sensor-range 6 6 No sensor reports more than 27.8 mmol/L" in text
    assert text.count("577 576 1 0") == 6
    assert "file 6 of 6 in name order" in text
    assert "jane" not in page.lower()


def test_text_in_a_suite_cannot_become_markup(tmp_path: Path) -> None:
    """What a hospital writes into its suite is shown, not run."""
    base = load_suite()
    rules = tuple(replace(rule, explanation="<script>alert(1)</script>") for rule in base.rules)

    page = report_page(looked(tmp_path), replace(base, rules=rules), "Import <1>", "Node")

    assert "<script" not in page
    assert "Import &lt;1&gt;" in page


def test_an_import_without_anything_new_still_has_a_page(tmp_path: Path) -> None:
    """Nothing to draw, nothing to compare, and the counts say so."""
    export, store = write(tmp_path / "in", 1), Store(tmp_path / "store")
    take_in(export, store, load_suite())

    again = take_in(export, store, load_suite())

    assert again.number is None
    assert again.account.report.duplicates == {"file-already-imported": 3462}
    assert "no reading is new" in report_page(again, load_suite(), "t", "s")


def test_a_month_of_the_same_kind_is_as_before(tmp_path: Path) -> None:
    """Other days of like people are no drift, and the summary says so."""
    store = Store(tmp_path / "store")
    take_in(write(tmp_path / "first", 1), store, load_suite())

    second = take_in(write(tmp_path / "second", 2, month=2), store, load_suite())

    assert summary(second).splitlines()[-1] == "drift: as before. This import looks like what was here before."
    assert second.number == 2


@pytest.mark.parametrize(
    ("change", "what"),
    [({"step_min": 15}, "interval"), ({"shift": 60.0}, "median"), ({"shift": -60.0}, "below 70 mg/dL")],
)
def test_another_sensor_or_other_people_are_noticed(tmp_path: Path, change: dict[str, float], what: str) -> None:
    """A changed interval, and a distribution that moved, are named in the verdict."""
    past = looked(tmp_path / "first").account.portrait
    export = write(tmp_path / "second", 2, **change)  # type: ignore[arg-type]

    found = drift(look_at(export, past, load_suite()).account.portrait, past)

    assert found is not None
    assert found.verdict == "far off"
    assert what in found.sentence


def test_few_people_are_said_to_be_few(tmp_path: Path) -> None:
    """One person differs from a cohort as persons do: the verdict says so instead of crying wolf."""
    past = looked(tmp_path / "first").account.portrait
    one = look_at(write(tmp_path / "second", 2, people=1, shift=50), past, load_suite())

    found = drift(one.account.portrait, past)

    assert found is not None
    assert "fewer than 5 people" in found.sentence


def test_the_past_is_the_sum_of_the_imports(tmp_path: Path) -> None:
    """What the next import is compared with holds each stored reading once."""
    store = Store(tmp_path / "store")
    for number in (1, 2):
        take_in(write(tmp_path / str(number), number, month=number), store, load_suite())

    past = Store(tmp_path / "store").past()

    assert past.readings == store.counts().readings == 2 * 3456
    assert past.people == 12
    assert past.usual_minutes == 5
    assert drift(past, Portrait.empty()) is None
