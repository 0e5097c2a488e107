"""Backtests: causality, independence of row order and packing, the issue rule, bounded groups, and every refusal."""

from __future__ import annotations

import gzip
import resource
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from data_schemas.errors import BadInput, StorageFailed
from data_schemas.plan import ModelSpec
from pipeline import adaptation
from pipeline import backtest as module
from pipeline.backtest import COLUMNS, backtest

SPEC = ModelSpec(history_minutes=180, hidden_size=4)


@dataclass(frozen=True)
class Trend:
    """A model small enough to know by heart: it uses every history step, so that any leak would show."""

    spec: ModelSpec = SPEC

    def predict(self, x: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Forecast from a weighted sum of all features; quantiles around it."""
        steps, features = x.shape[1:]
        weights = np.cos(np.arange(steps * features)).reshape(steps, features)
        change = (x * weights).sum(axis=(1, 2))[:, None] * np.arange(1, 13) / 12
        forecast = np.clip(last[:, None] + change, 40, 400).astype(np.float32)
        return forecast, (forecast[..., None] + np.array([-20, -10, 0, 10, 20])).astype(np.float32)


def readings(people: int = 3, points: int = 120, seed: int = 0) -> pd.DataFrame:
    """Make readings about every 5 minutes with jitter and gaps."""
    draw = np.random.default_rng(seed)
    frames = []
    for p in range(people):
        seconds = np.cumsum(draw.choice([280, 300, 320, 3000], points, p=[0.3, 0.37, 0.3, 0.03]))
        glucose = (215 + 200 * np.tanh(np.cumsum(draw.normal(0, 0.05, points)))).round(1)
        time = (pd.Timestamp("2026-03-01") + pd.to_timedelta(seconds, unit="s")).strftime("%Y-%m-%dT%H:%M:%S")
        frames.append(pd.DataFrame({"patient_id": f"00{p}", "time": time, "glucose_mg_dl": glucose}))
    return pd.concat(frames, ignore_index=True)


def run(folder: Path, frame: pd.DataFrame, name: str = "out.csv", **options: object) -> pd.DataFrame:
    """Backtest a frame and read the result."""
    source = folder / "in.csv"
    frame.to_csv(source, index=False)
    backtest(source, Trend(), folder / name, **options)  # type: ignore[arg-type]
    return pd.read_csv(folder / name, dtype={"patient_id": str})


def test_later_readings_never_change_earlier_forecasts(tmp_path: Path) -> None:
    """With other readings after a moment, or none, every forecast issued up to it stays the same to the digit."""
    frame = readings(1)
    whole = run(tmp_path, frame)
    for cut in (20, 57, 90):
        moment = pd.Timestamp(frame.time[cut], tz="UTC")
        other = frame.copy()
        other.loc[cut + 1 :, "glucose_mg_dl"] = 333.0
        for changed in (frame[: cut + 1], other):
            found = run(tmp_path, changed)
            before = [f[pd.to_datetime(f.issued_at) <= moment].reset_index(drop=True) for f in (whole, found)]
            assert len(before[0]) > 12
            pd.testing.assert_frame_equal(*before)


def test_output_columns_and_form(tmp_path: Path) -> None:
    """The file has the promised columns, twelve horizons per issue, UTC offsets, and identifiers as they were."""
    found = run(tmp_path, readings(2))
    assert tuple(found.columns) == COLUMNS
    first = (tmp_path / "out.csv").read_text().splitlines()[1].split(",")
    assert first[0] == "000"
    assert first[1].endswith("+00:00")
    assert "T" in first[1]
    issues = found.groupby(["patient_id", "issued_at"]).horizon_minutes.apply(tuple)
    assert set(issues) == {tuple(range(5, 65, 5))}
    assert (found.p05 <= found.p95).all()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_forecasts_use_the_history_that_training_uses(tmp_path: Path) -> None:
    """A backtest's forecast equals the model on the features of that very window."""
    from pipeline.windows import WindowSpec, history_features

    frame = readings(1)
    found = run(tmp_path, frame, personal=False)
    times = pd.to_datetime(frame.time, utc=True).astype("datetime64[s, UTC]").astype("int64").to_numpy()
    spec = WindowSpec(history_minutes=180)
    for issued, rows in found.groupby("issued_at"):
        until = times <= pd.Timestamp(str(issued)).timestamp()
        x, last = history_features(times[until], frame.glucose_mg_dl.to_numpy(np.float32)[until], spec)
        assert rows.forecast_mg_dl.to_numpy() == pytest.approx(Trend().predict(x, last)[0][0], abs=0.006)


def test_personal_forecasts_begin_as_the_model_and_then_leave_it(tmp_path: Path) -> None:
    """The first hours of a person are the model's own; later forecasts are corrected from that person's past."""
    frame = readings(2)
    plain, personal = run(tmp_path, frame, personal=False), run(tmp_path, frame, "personal.csv")
    first = plain.groupby("patient_id").head(12).index

    assert plain.drop(columns=list(COLUMNS[3:])).equals(personal.drop(columns=list(COLUMNS[3:])))
    assert personal.forecast_mg_dl[first].to_numpy() == pytest.approx(plain.forecast_mg_dl[first].to_numpy())
    assert not np.allclose(personal.forecast_mg_dl, plain.forecast_mg_dl, atol=0.5)


@pytest.mark.parametrize("stride", [5, 15, 60])
def test_issue_rule(tmp_path: Path, stride: int) -> None:
    """A forecast comes at the first reading with any history, then stride (less jitter) after stride."""
    frame = readings(2)
    found = run(tmp_path, frame, stride_minutes=stride)
    for patient, rows in frame.groupby("patient_id"):
        times = [int(t) for t in pd.to_datetime(rows.time, utc=True).map(pd.Timestamp.timestamp)]
        expected: list[int] = []
        for i, t in enumerate(times):
            earlier = [t - u for u in times[:i] if t - u <= 180 * 60]
            if not earlier or max(earlier) < 150:
                continue
            if not expected or t - expected[-1] >= stride * 60 - min(150, stride * 30):
                expected.append(t)
        mine = found[found.patient_id == patient].issued_at.drop_duplicates()
        assert [int(pd.Timestamp(i).timestamp()) for i in mine] == expected


def test_order_of_rows_does_not_matter(tmp_path: Path) -> None:
    """Interleaved, reversed and grouped rows give the same bytes, conflicting duplicates included."""
    frame = readings(4)
    frame = pd.concat([frame, frame.iloc[10:20].assign(glucose_mg_dl=99.0)], ignore_index=True)
    results = []
    for order in (frame, frame.sample(frac=1, random_state=1), frame.iloc[::-1], frame.sort_values("time")):
        run(tmp_path, order)
        results.append((tmp_path / "out.csv").read_bytes())
    assert len(set(results)) == 1


def test_small_groups_give_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file bigger than a group is worked off in parts, with the same result."""
    frame = readings(9).sample(frac=1, random_state=2)
    run(tmp_path, frame)
    whole = (tmp_path / "out.csv").read_bytes()
    monkeypatch.setattr(module, "GROUP_READINGS", 150)
    monkeypatch.setattr(adaptation, "_BATCH", 7)
    run(tmp_path, frame)
    assert (tmp_path / "out.csv").read_bytes() == whole


def test_gzip_in_and_out_equals_plain(tmp_path: Path) -> None:
    """Packed input, whatever its name, and packed output hold what plain files hold; equal runs, equal bytes."""
    frame = readings(2)
    run(tmp_path, frame)
    plain = (tmp_path / "out.csv").read_bytes()
    for name in ("in.csv.gz", "packed.csv"):
        (tmp_path / name).write_bytes(gzip.compress((tmp_path / "in.csv").read_bytes()))
        backtest(tmp_path / name, Trend(), tmp_path / "o.csv.gz")
        assert gzip.decompress((tmp_path / "o.csv.gz").read_bytes()) == plain
    again = (tmp_path / "o.csv.gz").read_bytes()
    backtest(tmp_path / "in.csv.gz", Trend(), tmp_path / "o.csv.gz")
    assert (tmp_path / "o.csv.gz").read_bytes() == again


def test_column_order_extra_columns_bom_and_quotes(tmp_path: Path) -> None:
    """Columns are found by name; others, a byte-order mark and quotes are no trouble, and odd names survive."""
    frame = readings(1).assign(patient_id='a,"b"', note="x,y")
    expected = run(tmp_path, frame)
    frame[["note", "glucose_mg_dl", "time", "patient_id"]].to_csv(tmp_path / "b.csv", index=False, encoding="utf-8-sig")
    backtest(tmp_path / "b.csv", Trend(), tmp_path / "b_out.csv")
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "b_out.csv"), expected)
    assert set(expected.patient_id) == {'a,"b"'}


def test_zone_and_offsets(tmp_path: Path) -> None:
    """Naive times are local to the zone, offsets are respected, and both may stand in one file."""
    frame = readings(1)
    utc = run(tmp_path, frame)
    moments = pd.to_datetime(frame.time, utc=True).dt.tz_convert("America/New_York")
    local = frame.assign(time=moments.dt.strftime("%Y-%m-%d %H:%M:%S"))
    pd.testing.assert_frame_equal(run(tmp_path, local, zone="America/New_York"), utc)
    offsets = [m.isoformat() if i % 2 else m.strftime("%Y-%m-%d %H:%M:%S") for i, m in enumerate(moments)]
    pd.testing.assert_frame_equal(run(tmp_path, frame.assign(time=offsets), zone="America/New_York"), utc)
    pd.testing.assert_frame_equal(run(tmp_path, frame.assign(time=frame.time + "Z"), zone="Asia/Tokyo"), utc)
    pd.testing.assert_frame_equal(run(tmp_path, frame.assign(time=frame.time + ".250000")), utc)


def test_local_times_of_a_clock_change_are_skipped_and_counted(tmp_path: Path) -> None:
    """A local time that occurs twice or never is not guessed."""
    times = pd.date_range("2026-10-25T00:00", "2026-10-25T04:00", freq="5min").strftime("%Y-%m-%dT%H:%M:%S")
    pd.DataFrame({"patient_id": "p", "time": times, "glucose_mg_dl": 120}).to_csv(tmp_path / "in.csv", index=False)
    summary = backtest(tmp_path / "in.csv", Trend(), tmp_path / "out.csv", zone="Europe/Madrid")
    assert summary.skipped == {"clock-change": 12}
    assert summary.readings == len(times) - 12


def test_summary_accounts_for_every_row(tmp_path: Path) -> None:
    """Rows without patient, without glucose, not positive or at a time seen before are skipped and counted."""
    frame = readings(2).astype({"glucose_mg_dl": str})
    frame.loc[3, "glucose_mg_dl"] = ""
    frame.loc[4, "glucose_mg_dl"] = "NaN"
    frame.loc[5, "glucose_mg_dl"] = "-1"
    frame.loc[6, "patient_id"] = ""
    frame = pd.concat([frame, frame.iloc[[8]]])
    frame.to_csv(tmp_path / "in.csv", index=False)
    shares: list[float] = []
    summary = backtest(tmp_path / "in.csv", Trend(), tmp_path / "out.csv", progress=shares.append)
    assert summary.skipped == {"no-glucose": 2, "glucose-not-positive": 1, "no-patient": 1, "duplicate-time": 1}
    assert (summary.rows_in, summary.readings, summary.patients) == (241, 236, 2)
    assert summary.forecasts * 12 == len(pd.read_csv(tmp_path / "out.csv"))
    assert shares == sorted(shares)
    assert shares[-1] == 1


def test_no_due_reading_gives_a_file_with_a_header_only(tmp_path: Path) -> None:
    """One lonely reading per person is no error and no forecast."""
    assert run(tmp_path, readings(2, points=1)).empty


HEADER = "patient_id,time,glucose_mg_dl\n"
ROW = "p,2026-01-01T00:00:00,120\n"


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("", "empty", "columns"),
        (HEADER, "no row", "columns"),
        ("patient_id,time,glucose\n" + ROW, "no column glucose_mg_dl", "columns"),
        ("patient_id;time;glucose_mg_dl\n", "no column", "commas"),
        ("time," + HEADER + "x," + ROW, "more than once", "keep one"),
        (HEADER + ROW + "p,31/01/2026 10:00,120\n", "time cannot be read in data row 2", "2026-01-31"),
        (HEADER + ROW + "p,,120\n", "time cannot be read in data row 2", "2026-01-31"),
        (HEADER + ROW + "p,2026-02-30T00:00:00,120\n", "time cannot be read in data row 2", "2026-01-31"),
        (HEADER + ROW + "p,2026-01-01T00:05:00,Low\n", "not a number in data row 2", "Low as 40"),
        (HEADER + ROW + "p,2026-01-01T00:05:00,120,7\n", "4 cells where the header has 3", "quote"),
        (HEADER + "p,2026-01-01T00:00:00,\n", "no row has a patient and a positive", "columns"),
        (HEADER + "p,2026-01-01T00:00:00,5.4\np,2026-01-01T00:05:00,6.0\n", "mmol/L", "18.0156"),
    ],
)
def test_unusable_files_are_refused_with_a_hint(tmp_path: Path, text: str, message: str, hint: str) -> None:
    """What is wrong is said with the row's number, what to do in the hint, and no output appears."""
    (tmp_path / "in.csv").write_text(text)
    with pytest.raises(BadInput, match=message) as caught:
        backtest(tmp_path / "in.csv", Trend(), tmp_path / "out.csv")
    assert hint in caught.value.hint
    assert [p.name for p in tmp_path.iterdir()] == ["in.csv"]


def test_refusals_never_show_content(tmp_path: Path) -> None:
    """A name or a value in a bad row is in no message."""
    for bad in (
        "Jane Doe,13/13/2026,77.7",
        "Jane Doe,2026-01-01T00:00:00,77.7x",
        "Jane Doe,2026-01-01T00:00:00,77.7,1",
    ):
        (tmp_path / "in.csv").write_text(HEADER + bad + "\n")
        with pytest.raises(BadInput) as caught:
            backtest(tmp_path / "in.csv", Trend(), tmp_path / "out.csv")
        said = caught.value.message + caught.value.hint
        assert not any(part in said for part in ("Jane", "77.7", "13/13"))


def test_one_patient_in_mmol_is_refused(tmp_path: Path) -> None:
    """A single person's readings in mmol/L among others in mg/dL are noticed."""
    frame = readings(3)
    frame.loc[frame.patient_id == "001", "glucose_mg_dl"] /= 18
    with pytest.raises(BadInput, match="mmol/L for 1 of 3"):
        run(tmp_path, frame)


def test_broken_gzip_is_refused(tmp_path: Path) -> None:
    """A packed file that was cut off, or damaged, is refused, and not forecast as far as it goes."""
    readings(3, points=2000).to_csv(tmp_path / "in.csv", index=False)
    packed = gzip.compress((tmp_path / "in.csv").read_bytes())
    damaged = packed[: len(packed) // 2] + b"\x00\xff\x00\xff" + packed[len(packed) // 2 + 4 :]
    for broken in (packed[: len(packed) // 2], packed[:-9], packed[:4], damaged):
        (tmp_path / "in.csv.gz").write_bytes(broken)
        with pytest.raises(BadInput) as caught:
            backtest(tmp_path / "in.csv.gz", Trend(), tmp_path / "out.csv")
        assert caught.value.hint
        assert not (tmp_path / "out.csv").exists()


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    """A missing file or folder, an unknown zone, a stride below a minute, an output over the input: all refused."""
    readings(1).to_csv(tmp_path / "in.csv", index=False)
    source, out = tmp_path / "in.csv", tmp_path / "out.csv"
    for call, words in (
        (lambda: backtest(tmp_path / "none.csv", Trend(), out), "no file"),
        (lambda: backtest(source, Trend(), tmp_path / "none" / "out.csv"), "no folder"),
        (lambda: backtest(source, Trend(), out, zone="Mars/Olympus"), "not a time zone"),
        (lambda: backtest(source, Trend(), out, zone="../etc/passwd"), "not a time zone"),
        (lambda: backtest(source, Trend(), out, zone=""), "not a time zone"),
        (lambda: backtest(source, Trend(), out, stride_minutes=0), "stride"),
        (lambda: backtest(source, Trend(), source), "replace"),
        (lambda: backtest(source, Trend(), tmp_path), "replace"),
    ):
        with pytest.raises(BadInput, match=words) as caught:
            call()
        assert caught.value.hint
    assert [p.name for p in tmp_path.iterdir()] == ["in.csv"]


@pytest.mark.parametrize("name", ["out.csv", "out.csv.gz"])
def test_full_disk_leaves_the_old_output(tmp_path: Path, name: str) -> None:
    """When the disk refuses a write the error says so, the previous output stays and nothing else is left."""
    readings(3, points=3000).to_csv(tmp_path / "in.csv", index=False)
    (tmp_path / name).write_text("before")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, hard))
    try:
        with pytest.raises(StorageFailed) as caught:
            backtest(tmp_path / "in.csv", Trend(), tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "free some space" in caught.value.hint
    assert (tmp_path / name).read_text() == "before"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.csv", name]
