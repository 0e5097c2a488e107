"""Forecasts for a whole file of past readings, each from what was known when it would have been issued.

Input: see pipeline.readings_csv. Output: CSV or CSV.gz with the columns COLUMNS, sorted by patient, issue time and
horizon.

When a forecast is issued, for one patient in order of time: at a reading that has an earlier reading of the patient
within the model's history (2.5 minutes to `history_minutes` before it), and that is at least `stride_minutes` after
the patient's previous issue, less a tolerance for sensor jitter of 2.5 minutes or half the stride, whichever is
smaller. There is no other condition: after a gap the second reading already gets a forecast, from the little that is
known.

Of readings of one patient in the same second the lowest counts, so the order of rows does not matter. Values are
clipped to 40..400 mg/dL as model input. Memory holds one group of patients (GROUP_READINGS, or more where one patient
has more) and the patients' names; a bigger file is first spread over temporary files beside the output.
"""

from __future__ import annotations

import contextlib
import gzip
import os
import shutil
import tempfile
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data_schemas.errors import BadInput, StorageFailed
from data_schemas.plan import ModelSpec
from data_schemas.units import GRID_MINUTES, HORIZON_MINUTES
from pipeline.adaptation import past_of, replayed
from pipeline.readings_csv import ROW, Int64, Rows, Spool, spool_readings
from pipeline.windows import Float32, Series, Windows, WindowSpec, cut_windows

COLUMNS = ("patient_id", "issued_at", "horizon_minutes", "forecast_mg_dl", "p05", "p25", "p50", "p75", "p95")
GROUP_READINGS = 1_000_000
JITTER_SECONDS = 150
_MAX_GROUPS = 128
_READING_SHARE = 0.3  # of the work, for the progress


class Predictor(Protocol):
    """What a backtest needs of a model; pipeline.export.LoadedModel is one."""

    @property
    def spec(self) -> ModelSpec:
        """Shape of the model: how much history it wants."""

    def predict(self, x: Float32, last: Float32) -> tuple[Float32, Float32]:
        """Forecast [B,12] and quantiles [B,12,5] in mg/dL from x float32[B,T,F] and last float32[B] mg/dL."""


@dataclass(frozen=True, slots=True)
class BacktestSummary:
    """What was read and written.

    rows_in = readings + sum(skipped.values()). forecasts counts issue points, each 12 rows of output.
    """

    rows_in: int
    readings: int
    patients: int
    forecasts: int
    skipped: dict[str, int]


def backtest(
    readings_path: Path,
    predictor: Predictor,
    out_path: Path,
    zone: str = "UTC",
    *,
    stride_minutes: int = 15,
    personal: bool = True,
    progress: Callable[[float], None] | None = None,
) -> BacktestSummary:
    """Forecast every due reading of a file (see the module's text); out_path appears complete or not at all.

    personal: correct each person's forecasts from that person's own past, as a node does (pipeline.adaptation).

    progress gets the share done, 0..1. Raises BadInput (nothing is written) or StorageFailed (disk full, no
    permission).
    """
    if stride_minutes < 1:
        raise BadInput("the stride must be at least 1 minute", "give the minutes between two forecasts of a patient")
    if not out_path.parent.is_dir():
        raise BadInput(f"there is no folder {out_path.parent}", "make the folder of the output first")
    if out_path.is_dir() or (out_path.exists() and readings_path.exists() and out_path.samefile(readings_path)):
        raise BadInput("the output would replace the readings or a folder", "give another output file")
    tick = progress or (lambda _: None)
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{out_path.name}.", dir=out_path.parent))
        try:
            spool = spool_readings(readings_path, zone, folder / "spool", lambda p: tick(_READING_SHARE * p))
            summary = _forecast_all(spool, predictor, folder / f"out{out_path.suffix}", stride_minutes, personal, tick)
            _publish(folder / f"out{out_path.suffix}", out_path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise StorageFailed(
            f"could not write beside {out_path.name}: {os.strerror(error.errno or 0)}",
            "free some space there, or give an output in another folder",
        ) from error
    tick(1.0)
    return summary


def _forecast_all(
    spool: Spool, predictor: Predictor, file: Path, stride_minutes: int, personal: bool, tick: Callable[[float], None]
) -> BacktestSummary:
    """Forecast group by group into `file`."""
    spec = WindowSpec(
        history_minutes=predictor.spec.history_minutes,
        min_history_minutes=GRID_MINUTES,
        max_last_gap_minutes=predictor.spec.history_minutes,
    )
    read = used = forecasts = 0
    with _writer(file) as write:
        for rows in _groups(spool, file.parent):
            series = _series(rows, spool)
            windows = cut_windows(series, spec, need_target=False)
            people = _due(windows, stride_minutes)
            for person, due in enumerate(people):
                if len(due):
                    write(_table(series, due, person, *_forecast(windows, due, predictor, personal)))
                    share = (read + int(series.starts[person + 1])) / spool.readings
                    tick(_READING_SHARE + (1 - _READING_SHARE) * share)
            read, used, forecasts = read + len(rows), used + len(series.time_s), forecasts + sum(map(len, people))
    skipped = dict(spool.skipped)
    if read > used:
        skipped["duplicate-time"] = read - used
    patients = int(np.count_nonzero(spool.counts))
    return BacktestSummary(used + sum(skipped.values()), used, patients, forecasts, skipped)


def _groups(spool: Spool, folder: Path) -> Iterator[Rows]:
    """Yield records by groups of whole patients; `patient` becomes the rank of the name over all groups."""
    rank = np.empty(len(spool.patients), dtype=np.uint32)
    by_name = np.array(sorted(range(len(rank)), key=spool.patients.__getitem__), dtype=np.int64)
    rank[by_name] = np.arange(len(rank), dtype=np.uint32)
    limit = max(GROUP_READINGS, -(-spool.readings // _MAX_GROUPS))
    group = (np.cumsum(spool.counts[by_name]) - 1) // limit
    files = [folder / f"group{g}" for g in range(int(group[-1]) + 1)]
    with contextlib.ExitStack() as stack, spool.file.open("rb") as source:
        sinks = [stack.enter_context(f.open("wb")) for f in files]
        while len(rows := np.frombuffer(source.read(GROUP_READINGS * ROW.itemsize), dtype=ROW)):
            ranked = rows.copy()
            ranked["patient"] = rank[rows["patient"]]
            home = group[ranked["patient"]]
            order = np.argsort(home, kind="stable")
            cuts = np.searchsorted(home[order], np.arange(1, len(files)))
            for sink, part in zip(sinks, np.split(ranked[order], cuts), strict=True):
                sink.write(part.tobytes())
    spool.file.unlink()
    for file in files:
        yield np.fromfile(file, dtype=ROW)
        file.unlink()


def _series(rows: Rows, spool: Spool) -> Series:
    """Sorted readings of one group; of readings in the same second the lowest stays."""
    order = np.lexsort((rows["glucose_mg_dl"], rows["time_s"], rows["patient"]))
    rows = rows[order]
    first = np.ones(len(rows), dtype=np.bool_)
    first[1:] = (rows["patient"][1:] != rows["patient"][:-1]) | (rows["time_s"][1:] != rows["time_s"][:-1])
    rows = rows[first]
    ranks, starts = np.unique(rows["patient"], return_index=True)
    names = sorted(spool.patients)
    return Series(
        tuple(names[r] for r in ranks),
        np.append(starts, len(rows)).astype(np.int64),
        rows["time_s"].astype(np.int64),
        rows["glucose_mg_dl"].astype(np.float32),
    )


def _due(windows: Windows, stride_minutes: int) -> list[Int64]:
    """For each person the rows of the series at which a forecast is issued: the first possible, then by strides."""
    step = stride_minutes * 60 - min(JITTER_SECONDS, stride_minutes * 30)
    people: list[Int64] = []
    for start, stop in windows.by_patient():
        anchors = windows.anchors[start:stop]
        times = windows.series.time_s[anchors].tolist()
        at, due = 0, []
        while at < len(times):
            due.append(at)
            at = bisect_left(times, times[at] + step, at + 1)
        people.append(anchors[np.array(due, dtype=np.int64)])
    return people


def _forecast(windows: Windows, due: Int64, predictor: Predictor, personal: bool) -> tuple[Float32, Float32]:
    """Forecast [B,12] and quantiles [B,12,5] in mg/dL at one person's issue readings, in order of time."""
    past = past_of(windows, due, predictor.predict)
    return replayed(past) if personal else (past.forecast, past.quantiles)


def _table(series: Series, due: Int64, person: int, forecast: Float32, quantiles: Float32) -> Any:
    """Arrow table of 12 rows for each of these issue readings of one person."""
    import pyarrow as pa

    wide = len(HORIZON_MINUTES)
    row = np.repeat(np.arange(len(due)), wide)
    moments = np.datetime_as_string(series.time_s[due].astype("datetime64[s]"), timezone="naive")
    issued = pa.array(np.char.add(moments, "+00:00").tolist(), pa.string())
    values = [forecast, *np.moveaxis(quantiles, -1, 0)]
    columns = [
        pa.repeat(series.patients[person], len(row)),
        issued.take(pa.array(row)),
        np.tile(HORIZON_MINUTES, len(due)).astype(np.int32),
    ]
    columns += [np.round(v.astype(np.float32).ravel(), 2) for v in values]
    return pa.table(columns, names=list(COLUMNS))


@contextlib.contextmanager
def _writer(file: Path) -> Iterator[Callable[[Any], None]]:
    """Append tables to a CSV file, compressed if its name ends in .gz."""
    import pyarrow.compute as pc
    from pyarrow import csv as arrow_csv

    sink: Any
    with contextlib.ExitStack() as stack:
        if file.suffix == ".gz":
            # The quick end of gzip: half as much again on disk for a tenth of the time.
            sink = stack.enter_context(gzip.GzipFile("", "wb", 2, stack.enter_context(file.open("wb")), 0))
        else:
            sink = stack.enter_context(file.open("wb"))
        sink.write((",".join(COLUMNS) + "\n").encode())

        def write(table: Any) -> None:
            special = pc.any(pc.match_substring_regex(table.column("patient_id"), '[",\\r\\n]')).as_py()
            options = arrow_csv.WriteOptions(include_header=False, quoting_style="needed" if special else "none")
            arrow_csv.write_csv(table, sink, options)

        yield write


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _publish(file: Path, out_path: Path) -> None:
    """Rename durably."""
    _sync(file)
    file.replace(out_path)
    _sync(out_path.parent)
