"""The suite decides; every row that came in is accounted for."""

import json
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import pytest

from data_schemas.errors import BadInput
from data_schemas.layout import load_layout
from data_schemas.reading import COLUMNS, Flag, QualityReport, Readings
from hospital_node.intake import read_exports
from hospital_node.validation import SUITE, load_suite, render_report, validate

SAMPLES = Path(__file__).parents[2] / "hospital_node" / "sample_exports"
NOW = datetime(2024, 6, 1, tzinfo=UTC)


def readings(*rows: tuple[str, str, float], flags: int = 0, **channels: list[float]) -> Readings:
    """Rows of (person, time, mg/dL), valid but for what a test makes wrong."""
    frame = pd.DataFrame(rows, columns=["patient", "measured_at", "glucose_mg_dl"])
    frame["measured_at"] = pd.to_datetime(frame["measured_at"], utc=True, format="ISO8601")
    frame = frame.assign(row=range(len(frame)), zone="UTC", flags=flags, source="a" * 64)
    for name in ("carbs_g", "bolus_u", "basal_u_per_h", "heart_rate"):
        frame[name] = channels.get(name, [float("nan")] * len(frame))
    return Readings(frame[list(COLUMNS)].astype(COLUMNS), len(frame))


def day(hour: int, minute: float = 0) -> str:
    return f"2024-05-01T{hour:02d}:{int(minute):02d}:{round(minute % 1 * 60):02d}"


def held(*rows: tuple[str, str, float]) -> list[tuple[int, str]]:
    valid, quarantined, report = validate(readings(*rows), load_suite(), NOW)
    assert report.balanced
    assert len(valid.frame) == report.accepted
    return list(zip(quarantined["row"], quarantined["rule"], strict=True))


GOOD = ("p", day(8), 100.0)


@pytest.mark.parametrize(
    ("row", "rule"),
    [
        (("p", day(9), 38.0), "sensor-error-code"),
        (("p", day(9), 12.0), "sensor-error-code"),
        (("p", day(9), 1.8), "below-sensor-range"),
        (("p", day(9), -5.0), "below-sensor-range"),
        (("p", day(9), 502.0), "above-sensor-range"),
        (("p", day(9), float("inf")), "above-sensor-range"),
        (("p", day(9), float("nan")), "glucose-missing"),
        (("p", "2024-06-01T00:11:00", 100.0), "in-the-future"),
        (("p", "2000-01-01T05:00:00", 100.0), "clock-reset"),
        (("p", "NaT", 100.0), "time-unreadable"),
    ],
)
def test_a_row_that_breaks_a_rule_is_quarantined_under_its_name(row: tuple[str, str, float], rule: str) -> None:
    """The row goes to quarantine with the rule it broke; the good row beside it stays."""
    assert held(GOOD, row) == [(1, rule)]


@pytest.mark.parametrize(
    ("flag", "time", "rule"),
    [(Flag.CLOCK_CHANGE, "NaT", "clock-change"), (Flag.UNREADABLE, day(8), "glucose-unreadable")],
)
def test_what_intake_could_not_read_has_a_rule_of_its_own(flag: Flag, time: str, rule: str) -> None:
    """A clock change is told from a bad stamp, and text from an empty field."""
    value = float("nan") if flag is Flag.UNREADABLE else 100.0
    bad = readings(("p", time, value), flags=int(flag)).frame
    good = readings(*(("p", day(9, 5 * step), 100.0) for step in range(3))).frame.assign(row=[1, 2, 3])
    _, quarantined, report = validate(Readings(pd.concat([bad, good]), 4), load_suite(), NOW)

    assert report.quarantined == {rule: 1}
    assert quarantined["rule"].tolist() == [rule]


def test_values_at_an_end_of_the_range_are_kept_there_and_marked() -> None:
    """39.6 (2.2 mmol/L) is a clamp and becomes 40; 500.8 (27.8 mmol/L) becomes 400; both say that they are censored."""
    rows = [("p", day(8), 39.634), ("p", day(9), 40.0), ("p", day(10), 41.0), ("p", day(11), 500.83)]
    valid, _, report = validate(readings(*rows), load_suite(), NOW)

    assert valid.frame["glucose_mg_dl"].tolist() == [40.0, 40.0, 41.0, 400.0]
    assert valid.frame["flags"].tolist() == [Flag.CENSORED_LOW, Flag.CENSORED_LOW, 0, Flag.CENSORED_HIGH]
    assert report.flagged["censored"] == 3


def test_conflicting_values_at_one_second_all_go() -> None:
    """Nothing tells which of them is right; another person at that second is not concerned."""
    assert held(GOOD, ("p", day(8), 101.0), ("p", day(8), 100.0), ("q", day(8), 180.0)) == [
        (0, "conflicting-stamp"),
        (1, "conflicting-stamp"),
        (2, "conflicting-stamp"),
    ]


def test_garbage_at_a_second_does_not_take_the_good_reading_with_it() -> None:
    """An error code beside a reading at the same second is quarantined alone."""
    assert held(GOOD, ("p", day(8), 38.0)) == [(1, "sensor-error-code")]


def test_two_devices_written_into_one_series_are_quarantined() -> None:
    """Readings a minute apart that differ beyond noise both go; those that agree stay."""
    rows = [GOOD, ("p", day(8, 1), 140.0), ("p", day(8, 10), 100.0), ("p", day(8, 11), 110.0), ("p", day(8, 16), 150.0)]

    assert held(*rows) == [(0, "conflicting-neighbour"), (1, "conflicting-neighbour")]


def test_exact_duplicates_are_dropped_counted_and_leave_their_doses() -> None:
    """The first row stays and takes the bolus that its copy carries."""
    nan = float("nan")
    valid, quarantined, report = validate(
        readings(GOOD, GOOD, ("p", day(9), 90.0), bolus_u=[nan, 2.5, nan]), load_suite(), NOW
    )

    assert report.duplicates == {"exact-duplicate": 1}
    assert len(quarantined) == 0
    assert valid.frame["row"].tolist() == [0, 2]
    assert valid.frame["bolus_u"].iloc[0] == 2.5


def test_what_looks_odd_is_kept_and_flagged() -> None:
    """A jump, a stuck sensor, a gap and a small cohort are counted, and every reading stays."""
    flat = [("p", day(8, 5 * step), 100.0) for step in range(11)]
    _, _, report = validate(readings(*flat, ("p", day(8, 55), 180.0)), load_suite(), NOW)

    assert report.flagged == {"flat": 1, "jump": 1, "short-record": 1, "small-cohort": 1}
    assert report.accepted == 12


def test_interpolated_rows_are_kept_and_counted() -> None:
    """They are stored with their flag, and no gap or jump is measured on them."""
    _, _, report = validate(readings(GOOD, ("p", day(23), 300.0), flags=int(Flag.INTERPOLATED)), load_suite(), NOW)

    assert report.flagged == {"interpolated": 2, "short-record": 1, "small-cohort": 1}


def test_accepted_readings_are_sorted_and_one_a_second() -> None:
    """Whatever the order of the file, accepted readings come by person and time, in canonical columns."""
    valid, _, _ = validate(
        readings(("q", day(9), 90.0), ("p", day(9), 91.0), ("p", day(8), 92.0), ("p", day(8), 92.0)), load_suite(), NOW
    )

    assert valid.frame["glucose_mg_dl"].tolist() == [92.0, 91.0, 90.0]
    assert {name: str(dtype) for name, dtype in valid.frame.dtypes.items()} == COLUMNS


def test_an_export_that_is_mostly_unreadable_is_rejected_whole() -> None:
    """More than half without a value means the wrong layout: nothing of it is taken."""
    nan = float("nan")
    with pytest.raises(BadInput, match="mostly-readable"):
        validate(readings(GOOD, *(("p", day(9, step), nan) for step in range(2))), load_suite(), NOW)


def test_a_frame_without_a_column_is_rejected() -> None:
    """The schema rule stops a table that is not canonical."""
    whole = readings(GOOD)
    with pytest.raises(BadInput, match="schema"):
        validate(Readings(whole.frame.drop(columns="heart_rate"), 1), load_suite(), NOW)


@pytest.mark.parametrize("site", ["arizona", "manchester", "madrid", "stanford", "mostoles", "duke"])
def test_the_account_of_each_real_site_adds_up(site: str) -> None:
    """Rows in = accepted + quarantined + duplicates; each quarantined row names a quarantine rule; most rows pass."""
    suite = load_suite()
    came = read_exports(SAMPLES / site, load_layout(site), None, b"k" * 32)
    valid, quarantined, report = validate(came, suite)
    names = {rule.name for rule in suite.rules if rule.severity == "quarantine"}

    assert report.balanced
    assert report.rows_in == len(came.frame)
    assert set(quarantined["rule"]) <= names
    assert not valid.frame.duplicated(["patient", "measured_at"]).any()
    assert valid.frame["glucose_mg_dl"].between(40, 400).all()
    assert report.accepted > 0.8 * report.rows_in
    assert set(valid.frame["row"]).isdisjoint(quarantined["row"])


def test_the_report_is_one_sum_and_counts_by_rule() -> None:
    """People read one line that adds up, then the counts; never a value."""
    report = QualityReport(12_345, 12_000, {"clock-change": 300}, {"exact-duplicate": 45}, {"flat": 7}, 3)

    lines = render_report(report).splitlines()

    assert lines[0] == "rows in 12,345 = 12,000 accepted + 300 quarantined + 45 duplicates"
    assert [line.split() for line in lines[1:]] == [
        ["people", "3"],
        ["quarantined", "clock-change", "300"],
        ["duplicate", "exact-duplicate", "45"],
        ["flagged", "flat", "7"],
    ]


def test_the_thresholds_that_run_are_those_of_the_json(tmp_path: Path) -> None:
    """A hospital that edits the suite changes what is quarantined, without touching code."""
    document = json.loads(SUITE.read_text())
    for entry in document["expectations"]:
        if entry["meta"]["name"] == "above-sensor-range":
            entry["kwargs"]["max_value"] = 300
    own = tmp_path / "own.json"
    own.write_text(json.dumps(document))

    _, quarantined, _ = validate(readings(GOOD, ("p", day(9), 301.0)), load_suite(own), NOW)

    assert quarantined["rule"].tolist() == ["above-sensor-range"]


@pytest.mark.parametrize("field", ["name", "severity", "stage", "explanation"])
def test_a_rule_without_its_meaning_is_refused(tmp_path: Path, field: str) -> None:
    """Every rule tells its name, severity, stage and reason."""
    document = json.loads(SUITE.read_text())
    del document["expectations"][3]["meta"][field]
    own = tmp_path / "own.json"
    own.write_text(json.dumps(document))

    with pytest.raises(BadInput, match=field):
        load_suite(own)


def test_an_unknown_severity_is_refused(tmp_path: Path) -> None:
    """A typing error in a severity is not read as "ignore"."""
    own = tmp_path / "own.json"
    own.write_text(SUITE.read_text().replace('"quarantine"', '"quarantaine"', 1))

    with pytest.raises(BadInput, match="clock-change"):
        load_suite(own)
