"""Reading exports: the six real sites' samples, hand-made edge cases, and refusals that leave the store as it was."""

import gzip
import hashlib
import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from data_schemas.errors import BadInput
from data_schemas.layout import LAYOUTS, Layout, load_layout
from data_schemas.reading import COLUMNS, Flag, Readings
from hospital_node import intake
from hospital_node.fixed_stamps import read_fixed
from hospital_node.importing import import_exports
from hospital_node.intake import pseudonym, read_exports
from hospital_node.store import Store

SAMPLES = Path(intake.__file__).parent / "sample_exports"
KEY = b"k" * 32
SITES = {"arizona": 20, "manchester": 14, "madrid": 19, "stanford": 46, "mostoles": 166, "duke": 13}
HEAD = "patient,time,glucose_mg_dl\n"


def sample(site: str) -> Readings:
    return read_exports(SAMPLES / site, load_layout(site), None, KEY)


def rows(*lines: str) -> str:
    return HEAD + "".join(f"{line}\n" for line in lines)


def canonical(
    folder: Path, content: str | bytes, zone: str | None = "Europe/London", name: str = "a.csv"
) -> pd.DataFrame:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return read_exports(folder, load_layout("canonical"), zone, KEY).frame


def at(readings: Readings, identity: str, local: str, zone: str) -> pd.DataFrame:
    moment = pd.Timestamp(local, tz=zone)
    frame = readings.frame
    return frame[(frame["patient"] == pseudonym(identity, KEY)) & (frame["measured_at"] == moment)]


@pytest.mark.parametrize("site", SITES)
def test_each_sites_sample_parses_into_canonical_columns(site: str) -> None:
    """Every line of every glucose file is a row, in canonical dtypes, in mg/dL, under a pseudonym."""
    readings = sample(site)
    lines = sum(
        len(path.read_text(encoding="utf-8-sig").splitlines()) - 1
        for path in (SAMPLES / site).glob(load_layout(site).glucose_files)
    )

    assert readings.rows_in == len(readings.frame) == lines
    assert {name: str(dtype) for name, dtype in readings.frame.dtypes.items()} == COLUMNS
    assert 80 < readings.frame["glucose_mg_dl"].median() < 200
    assert readings.frame["patient"].str.fullmatch("[0-9a-f]{16}").all()
    # Two of the site's files are the same byte for byte, and one person counts once.
    assert readings.frame["patient"].nunique() == SITES[site] - (site == "mostoles")


def test_manchester_reads_day_first_and_mmol() -> None:
    """01/10/2023 00:04 with 7.5 mmol/L is the 1st of October, 23:04 UTC the day before, and 135.1 mg/dL."""
    row = at(sample("manchester"), "2301", "2023-10-01 00:04", "Europe/London")

    assert row["glucose_mg_dl"].tolist() == [pytest.approx(7.5 * 18.0156)]
    assert str(row["measured_at"].iloc[0]) == "2023-09-30 23:04:00+00:00"


def test_manchester_joins_insulin_and_meals_of_the_same_person() -> None:
    """Doses from other folders land on the next reading, never on one before them."""
    frame = sample("manchester").frame
    mine = frame[frame["patient"] == pseudonym("2302", KEY)]
    source = pd.read_csv(SAMPLES / "manchester/Insulin Data/Bolus Data/UoMBolus2302.csv")
    given = pd.to_datetime(source["bolus_ts"], format="%d/%m/%Y %H:%M").dt.tz_localize("Europe/London").iloc[0]
    first = mine[mine["bolus_u"].notna()].iloc[0]

    assert frame[["carbs_g", "bolus_u", "basal_u_per_h"]].notna().any().all()
    assert first["bolus_u"] == pytest.approx(source["bolus_dose"].iloc[0])
    assert first["measured_at"] >= given
    assert not ((mine["measured_at"] >= given) & (mine["measured_at"] < first["measured_at"])).any()


def test_arizona_has_no_clock_change_and_keeps_doses() -> None:
    """Phoenix keeps one offset all year: the first line is 07:04 UTC; boluses and carbohydrates are read."""
    readings = sample("arizona")

    assert at(readings, "Subject 1", "2023-12-08 00:04", "America/Phoenix")["glucose_mg_dl"].tolist() == [151.0]
    assert not (readings.frame["flags"] & int(Flag.CLOCK_CHANGE)).any()
    assert readings.frame[["carbs_g", "bolus_u", "basal_u_per_h"]].notna().any().all()


def test_arizonas_other_glucose_column_is_known(tmp_path: Path) -> None:
    """The same site calls its glucose column by two names."""
    head = "EventDateTime,Readings (CGM / BGM)\n"
    (tmp_path / "Subject 99.csv").write_text(head + "2024-01-01 00:00:00,101\n")

    frame = read_exports(tmp_path, load_layout("arizona"), None, KEY).frame

    assert frame["glucose_mg_dl"].tolist() == [101.0]


def test_madrid_tells_the_sensors_own_rows_from_the_filled_ones() -> None:
    """Of a 15-minute sensor's file at most every third row is its own, on the quarter hour and a whole number."""
    frame = sample("madrid").frame
    own = frame[(frame["flags"] & int(Flag.INTERPOLATED)) == 0]
    libre = own[own["patient"] == pseudonym("HUPA0011P", KEY)]
    share = len(libre) / (frame["patient"] == pseudonym("HUPA0011P", KEY)).sum()
    fine = own[own["patient"] == pseudonym("HUPA0001P", KEY)]

    assert 0.28 < share <= 0.34
    assert set(libre["measured_at"].dt.minute % 15) == {0}
    assert np.array_equal(own["glucose_mg_dl"], own["glucose_mg_dl"].round())
    # One person wore a 5-minute sensor: there the grid is the sensor's own.
    assert set(fine["measured_at"].dt.minute % 15) == {0, 5, 10}


def test_madrid_filled_gaps_are_interpolated_to_their_last_row(tmp_path: Path) -> None:
    """A straight line over an hour is a filled gap, whole numbers on the quarter hour inside it included."""
    head = "time;glucose\n"
    values = [100, 104, 108, 112, 109, 107, 104, 107, 110, *range(113, 161, 3), 150, 140, 130]
    stamps = pd.date_range("2020-01-06 00:00", periods=len(values), freq="5min")
    lines = [f"{stamp:%Y-%m-%dT%H:%M:%S};{float(value)}" for stamp, value in zip(stamps, values, strict=True)]
    text = (
        (LAYOUTS / "madrid.toml")
        .read_text()
        .replace("straight_minutes = 45", "straight_minutes = 45\ndense_share = 1.0")
    )
    (tmp_path / "own.toml").write_text(text)
    (tmp_path / "HUPA0099P.csv").write_text(head + "\n".join(lines) + "\n")

    frame = read_exports(tmp_path, load_layout(tmp_path / "own.toml"), None, KEY).frame
    own = frame[(frame["flags"] & int(Flag.INTERPOLATED)) == 0]

    assert [f"{when:%H:%M}" for when in own["measured_at"].dt.tz_convert("Europe/Madrid")] == [
        "00:00",
        "00:15",
        "00:30",
        "02:00",
        "02:15",
    ]


def test_mostoles_counts_days_from_the_declared_origin(tmp_path: Path) -> None:
    """Clock-only stamps begin on the origin date, and a clock that goes back past midnight begins the next day."""
    (tmp_path / "case  1.csv").write_text("timestamp,glucose_value_mg_dl\n23:55:00,90\n00:00:00,91\n00:05:00,92\n")

    frame = read_exports(tmp_path, load_layout("mostoles"), None, KEY).frame

    local = frame["measured_at"].dt.tz_convert("Europe/Madrid")
    assert [f"{when:%Y-%m-%d %H:%M}" for when in local] == ["2012-01-02 23:55", "2012-01-03 00:00", "2012-01-03 00:05"]


def test_words_for_low_and_high_are_the_ends_of_the_range(tmp_path: Path) -> None:
    """Low and High are 40 and 400 mg/dL, marked as censored; other text is a row without a value."""
    frame = canonical(
        tmp_path,
        rows(
            "p,2024-01-01T00:00:00,Low",
            "p,2024-01-01T00:05:00,HIGH",
            "p,2024-01-01T00:10:00,???",
            "p,2024-01-01T00:15:00,",
        ),
    )

    assert frame["glucose_mg_dl"].tolist()[:2] == [40.0, 400.0]
    assert frame["glucose_mg_dl"].isna().tolist() == [False, False, True, True]
    assert frame["flags"].tolist() == [Flag.CENSORED_LOW, Flag.CENSORED_HIGH, Flag.UNREADABLE, Flag.NONE]


def test_the_header_says_the_unit(tmp_path: Path) -> None:
    """A canonical file in mmol/L becomes mg/dL."""
    frame = canonical(tmp_path, "patient,time,glucose_mmol_l\np,2024-01-01T00:00:00,5.5\n")

    assert frame["glucose_mg_dl"].tolist() == [pytest.approx(99.0858)]


def test_stamps_with_an_offset_need_no_zone(tmp_path: Path) -> None:
    """An offset in the stamp is taken as it is, also in the hour that a clock change repeats."""
    frame = canonical(tmp_path, rows("p,2023-10-29T01:30:00+01:00,90", "p,2023-10-29T01:30:00+00:00,92"), zone=None)

    assert frame["measured_at"].dt.strftime("%H:%M").tolist() == ["00:30", "01:30"]
    assert not frame["flags"].any()


def test_a_repeated_hour_is_settled_by_order_where_that_is_exact(tmp_path: Path) -> None:
    """Rows before the clock goes back are summer time, rows after it standard time: all twelve steps are 15 minutes."""
    clock = ["00:45", "01:00", "01:15", "01:30", "01:45", "01:00", "01:15", "01:30", "01:45", "02:00"]
    frame = canonical(tmp_path, rows(*(f"p,2023-10-29T{time}:00,100" for time in clock)))

    assert frame["measured_at"].diff().dropna().dt.total_seconds().unique().tolist() == [900.0]


def test_a_time_that_a_clock_change_leaves_open_has_no_utc_time(tmp_path: Path) -> None:
    """A skipped time, and a repeated one whose order tells nothing, are marked and never guessed."""
    frame = canonical(
        tmp_path, rows("p,2024-03-31T01:30:00,90", "p,2023-10-29T01:30:00,91", "p,2023-10-29T03:00:00,92")
    )

    assert frame["measured_at"].isna().tolist() == [True, True, False]
    assert frame["flags"].tolist() == [Flag.CLOCK_CHANGE, Flag.CLOCK_CHANGE, Flag.NONE]


@pytest.mark.parametrize("packed", ["gzip", "zip"])
def test_packed_files_are_read(tmp_path: Path, packed: str) -> None:
    """A gzip or a zip with one file reads like the file itself."""
    content = rows("p,2024-01-01T00:00:00,100").encode()
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as target:
        target.writestr("a.csv", content)
    data = gzip.compress(content) if packed == "gzip" else archive.getvalue()

    assert canonical(tmp_path, data, name="a.csv.gz")["glucose_mg_dl"].tolist() == [100.0]


def test_the_pseudonym_needs_the_key() -> None:
    """The same identity has the same pseudonym under one key and another under another."""
    assert pseudonym("Subject 1", KEY) == pseudonym("Subject 1", KEY)
    assert pseudonym("Subject 1", KEY) != pseudonym("Subject 1", b"j" * 32)
    assert pseudonym("Subject 1", KEY) != hashlib.sha256(b"Subject 1").hexdigest()[:16]


def test_files_that_are_the_same_byte_for_byte_are_one_person(tmp_path: Path) -> None:
    """A copied file does not give one person's days twice the influence under a second name."""
    for name in ("001.csv", "002.csv"):
        (tmp_path / name).write_text("timestamp,glucose_value_mg_dl\n2020-02-13 17:23:32,61.0\n")

    assert read_exports(tmp_path, load_layout("duke"), None, KEY).frame["patient"].nunique() == 1


LINE = "Jane Doe,2024-01-01T00:00:00,100"
DUKE = "timestamp,glucose_value_mg_dl\n2020-02-13 17:23:32,61.0\n"


def auto() -> Layout:
    layout = load_layout("canonical")
    formats = ("%d/%m/%Y %H:%M", "%m/%d/%Y %H:%M")
    return layout.model_copy(update={"time": layout.time.model_copy(update={"order": "auto", "formats": formats})})


def declared(form: str) -> Layout:
    layout = load_layout("canonical")
    return layout.model_copy(update={"time": layout.time.model_copy(update={"formats": (form,)})})


def day_first(days: range) -> str:
    return rows(*(f"Jane Doe,{day:02d}/03/2024 12:00,100" for day in days))


REFUSALS: dict[str, tuple[bytes | str, Layout | str, str | None, str]] = {
    "missing column": (
        "patient,when,glucose_mg_dl\nJane Doe,2024,1\n",
        "canonical",
        "UTC",
        "no column 'time'.*knows 'patient', 'glucose_mg_dl'",
    ),
    "empty file": ("", "canonical", "UTC", "is empty"),
    "header only": (HEAD, "canonical", "UTC", "no row"),
    "last line cut": (rows(LINE) + "Jane Doe,2024-01", "canonical", "UTC", "cut off.*2 of 3"),
    "gzip cut": (gzip.compress(rows(LINE).encode())[:-9], "canonical", "UTC", "cut off"),
    "zip cut": (b"PK\x03\x04 and no more", "canonical", "UTC", "cut off"),
    "more fields than names": (rows(LINE, LINE + ",1,2"), "canonical", "UTC", "more fields than"),
    "not text": (HEAD.encode() + b"Jane Doe,2024-01-01T00:00:00,\xff\xfe\n", "canonical", "UTC", "not utf-8"),
    "no zone": (rows(LINE), "canonical", None, "time zone of the export is not known"),
    "wrong zone": (rows(LINE), "canonical", "Europe/Atlantis", "not a time zone"),
    "ambiguous order": (day_first(range(1, 13)), auto(), "UTC", "date order is ambiguous"),
    "no order fits": (day_first(range(13, 15)) + "Jane Doe,03/14/2024 12:00,1\n", auto(), "UTC", "no format"),
    "order that loses days": (
        day_first(range(1, 29)),
        declared("%m/%d/%Y %H:%M"),
        "UTC",
        "do not fit the declared order",
    ),
    "order that scatters days": (day_first(range(1, 9)), declared("%m/%d/%Y %H:%M"), "UTC", "do not fit the declared"),
    "times of another layout": (rows("Jane Doe,yesterday,100"), "canonical", "UTC", "fit none of"),
    "mmol under mg/dL": (rows("Jane Doe,2024-01-01T00:00:00,5.5"), "canonical", "UTC", "look like mmol/L"),
    "mg/dL under mmol": (
        "patient,time,glucose_mmol_l\nJane Doe,2024-01-01T00:00:00,99\n",
        "canonical",
        "UTC",
        "look like mg/dL",
    ),
    "row without patient": (rows(LINE, ",2024-01-01T00:05:00,100"), "canonical", "UTC", "row without a patient"),
    "mostly unreadable": (
        rows(LINE, *[f"Jane Doe,2024-01-01T0{h}:00:00,?" for h in "123"]),
        "canonical",
        "UTC",
        "mostly-readable",
    ),
    "name without patient": (DUKE, "duke", None, "does not tell the patient"),
    "clock going back a little": (
        "timestamp,glucose_value_mg_dl\n10:00:00,90\n09:00:00,91\n",
        "mostoles",
        None,
        "less than half a day",
    ),
}


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a store that already holds one person."""
    folder = tmp_path_factory.mktemp("filled")
    (folder / "export").mkdir()
    (folder / "export" / "001.csv").write_text(DUKE)
    import_exports(folder / "export", load_layout("duke"), None, KEY, Store(folder / "store"))
    return folder / "store"


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refused_export_says_why_and_leaves_the_store_as_it_was(tmp_path: Path, filled: Path, case: str) -> None:
    """Each refusal tells what to do, names nobody, and changes no byte of the store."""
    content, layout, zone, named = REFUSALS[case]
    chosen = load_layout(layout) if isinstance(layout, str) else layout
    name = "case one.csv" if layout == "duke" else "case 1.csv"
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    before = bytes_of(filled)

    with pytest.raises(BadInput, match=named) as refusal:
        import_exports(tmp_path, chosen, zone, KEY, Store(filled))

    assert bytes_of(filled) == before
    assert refusal.value.hint
    assert "Jane" not in f"{refusal.value.message} {refusal.value.hint} {refusal.value.__cause__}"
    assert name not in refusal.value.message


def test_a_file_that_changes_during_the_import_is_refused(
    tmp_path: Path, filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file to which somebody still writes is refused even when its size and time stay the same."""
    path = tmp_path / "002.csv"
    path.write_text(DUKE.replace("61.0", "75.0"))
    stamps = intake.stamps_of

    def meanwhile(*arguments: object) -> object:
        state = path.stat()
        path.write_text(DUKE.replace("61.0", "76.0"))
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
        return stamps(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(intake, "stamps_of", meanwhile)
    before = bytes_of(filled)

    with pytest.raises(BadInput, match="changed while it was imported"):
        import_exports(tmp_path, load_layout("duke"), None, KEY, Store(filled))
    assert bytes_of(filled) == before


def test_an_empty_folder_and_a_short_key_are_refused(tmp_path: Path) -> None:
    """No file, no folder and no proper key each say so."""
    for folder, key, named in (
        (tmp_path, KEY, "no file matches"),
        (tmp_path / "no", KEY, "does not exist"),
        (tmp_path, b"k", "key"),
    ):
        with pytest.raises(BadInput, match=named):
            read_exports(folder, load_layout("duke"), None, key)


def test_auto_order_is_settled_by_a_day_above_twelve(tmp_path: Path) -> None:
    """One stamp that only one order explains settles the whole export."""
    (tmp_path / "a.csv").write_text(day_first(range(1, 14)))

    frame = read_exports(tmp_path, auto(), "UTC", KEY).frame

    assert frame["measured_at"].dt.month.unique().tolist() == [3]


@pytest.mark.parametrize("form", ["%Y-%m-%dT%H:%M:%S", "%d/%m/%Y %H:%M", "%m-%d-%Y %H:%M", "%Y-%m-%d"])
def test_stamps_of_fixed_width_are_those_of_strptime(form: str) -> None:
    """Whatever is read is what strptime reads; stamps of every odd shape are left to it."""
    good = pd.Series(pd.date_range("1999-12-25", periods=900, freq="37h")).dt.strftime(form)
    damaged = [text[:at] + mark + text[at + 1 :] for text in good[:9] for at in range(len(text)) for mark in "9x0- /é"]
    text = pd.Series([*good, *damaged, *(text[:-1] for text in good[:9]), "", None, "2023-02-29T00:00:00"], dtype="str")
    fixed = pd.Series(read_fixed(text, form))
    strptime = pd.to_datetime(text, format=form, errors="coerce").astype("datetime64[s]")

    assert fixed[: len(good)].notna().all()
    pd.testing.assert_series_equal(fixed[fixed.notna()], strptime[fixed.notna()])
