"""Two published ways to score forecasters, so that tables can be compared.

by-patient   five folds of people inside each data set; six hours of history and the hour ahead without a gap of more
             than 30 minutes; every third issue point; RMSE at a horizon over all pairs (the window scheme of federated
             glucose forecasting, 2025). Two things are stricter here: history is causal, and only real readings count.
glucobench   GlucoBench (Sergazinov et al., ICLR 2024): segments re-indexed to 5 minutes by interpolation, a tenth of
             the people out of distribution, the end of each other person's record as test, the hour ahead every 30
             minutes, and the MEDIAN over windows of each window's mean squared error. Interpolated values are scored,
             as published. The mean is reported too, because the median hides every hard window.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from data_schemas.errors import BadInput
from data_schemas.units import HORIZON_MINUTES
from pipeline.scorecard import Fold, Scorecard, alike, baselines, folds_by_person, score
from pipeline.scored import Predict
from pipeline.windows import Series, Windows, WindowSpec, cut_windows

Float64: TypeAlias = npt.NDArray[np.float64]

BY_PATIENT_STRIDE = 3
BY_PATIENT_HISTORY_S = 71 * 300
_GAP_S = 30 * 60
_JITTER_S = 150
LSTM_STEPS = 2000
SEEDS = tuple(range(10, 20))
_STEPS = len(HORIZON_MINUTES)
_GRID_S = 300
_STRIDE = 6


@dataclass(frozen=True, slots=True)
class BenchConfig:
    """GlucoBench's settings of one data set; lengths in 5-minute points, gap in minutes."""

    gap_minutes: int
    min_drop_length: int
    length_segment: int
    max_length_input: int
    linear_lags: int


CONFIGS = {
    "iglu": BenchConfig(45, 240, 240, 192, 192),
    "colas": BenchConfig(45, 192, 72, 144, 12),
    "dubosson": BenchConfig(30, 240, 144, 192, 12),
    "hall": BenchConfig(30, 192, 192, 144, 84),
    "weinstock": BenchConfig(45, 240, 240, 192, 84),
}
# Names of the demo's hospitals for the data sets they are.
ALIASES = {"mostoles": "colas", "stanford": "hall"}


@dataclass(frozen=True, slots=True)
class BenchLine:
    """One model on one data set: sqrt of the mean over seeds of the median (or mean) MSE, and MAE likewise."""

    data_set: str
    split: str
    model: str
    windows: int
    median_rmse: float
    median_mae: float
    mean_rmse: float
    mean_mae: float


def by_patient(
    sites: Mapping[str, Series], ours: Predict, history_minutes: int, say: Callable[[str], None]
) -> tuple[Scorecard, dict[str, str]]:
    """Score every baseline, a non-private LSTM fitted on the fold's training people of all sites, and `ours`."""
    windows = {name: by_patient_windows(series, history_minutes) for name, series in sites.items()}
    folds: list[Fold] = []
    learned: dict[int, Predict] = {}
    for number, fold in enumerate(folds_by_person(windows)):
        say(f"fold {number + 1}: fitting on the people of the other folds")
        pooled = _pooled_lstm(fold.training)
        for site, own in zip(fold.scored, fold.training, strict=True):
            folds.append(Fold([own], [site]))
            learned[id(folds[-1])] = pooled
    about = {"protocol": "by-patient: five folds of people inside each site, every third issue point, causal history"}
    card = score(
        folds,
        lambda f: alike({**baselines(f.training), "pooled LSTM": learned[id(f)], "model": ours}, f),
        ("pooled LSTM", "pooled LSTM, personal"),
    )
    return card, about


def by_patient_windows(series: Series, history_minutes: int) -> Windows:
    """Causal windows with six hours before and one hour after in one piece, every third of each person."""
    windows = cut_windows(series, WindowSpec(history_minutes=history_minutes))
    time_s, starts = series.time_s, series.starts
    cut = np.concatenate([[True], np.diff(time_s) > _GAP_S]) if len(time_s) else np.zeros(0, dtype=np.bool_)
    cut[starts[:-1][starts[:-1] < len(time_s)]] = True
    first = np.flatnonzero(cut)
    begins, ends = time_s[first], time_s[np.append(first[1:], len(time_s)) - 1]
    piece = np.cumsum(cut) - 1
    at = piece[windows.anchors]
    whole = time_s[windows.anchors] - begins[at] >= BY_PATIENT_HISTORY_S - _JITTER_S
    whole &= ends[at] - time_s[windows.anchors] >= HORIZON_MINUTES[-1] * 60 - _JITTER_S
    kept: list[npt.NDArray[np.int64]] = []
    for start, stop in windows.by_patient():
        kept.append(windows.anchors[start:stop][whole[start:stop]][::BY_PATIENT_STRIDE])
    offsets = np.concatenate([[0], np.cumsum([len(k) for k in kept])]).astype(np.int64)
    return replace(windows, anchors=np.concatenate(kept), offsets=offsets)


def _pooled_lstm(training: Sequence[Windows]) -> Predict:
    """The LSTM from the public start, fitted on everybody's readings without privacy."""
    from pipeline.comparison import lstm
    from pipeline.fitting import FitPlan, fit
    from pipeline.warm_start import SPEC, load

    weights = fit(load(), SPEC, [w for w in training if len(w)], FitPlan(steps=LSTM_STEPS, learning_rate=2e-3))
    return lstm(weights, SPEC)


def glucobench_text(sites: Mapping[str, Series], ours: Predict, history_minutes: int, out: Path) -> str:
    """Score sites that are data sets of GlucoBench, write glucobench.json into `out`, return a table. BadInput."""
    lines = []
    for name, series in sites.items():
        config = CONFIGS.get(ALIASES.get(name, name))
        if config is None:
            raise BadInput(
                f"{name} is no data set of GlucoBench",
                f"name the file or node one of {', '.join((*CONFIGS, *ALIASES))}",
            )
        lines += glucobench(name, series, config, ours, history_minutes)
    out.mkdir(parents=True, exist_ok=True)
    rows = [{f: getattr(line, f) for f in BenchLine.__dataclass_fields__} for line in lines]
    (out / "glucobench.json").write_text(json.dumps(rows, indent=1))
    head = f"{'data set':<12}{'split':<6}{'model':<13}{'windows':>9}  median RMSE/MAE   mean RMSE/MAE"
    return "\n".join(
        [
            "GlucoBench protocol, mg/dL over the 12 steps of the next hour, split seeds 10..19",
            head,
            *(
                f"{r.data_set:<12}{r.split:<6}{r.model:<13}{r.windows:>9}"
                f"{r.median_rmse:>11.2f}/{r.median_mae:.2f}{r.mean_rmse:>11.2f}/{r.mean_mae:.2f}"
                for r in lines
            ),
        ]
    )


def glucobench(
    name: str,
    series: Series,
    config: BenchConfig,
    ours: Predict,
    history_minutes: int,
    seeds: Sequence[int] = SEEDS,
) -> list[BenchLine]:
    """Linear regression (as published), persistence and `ours` on one data set, in and out of distribution."""
    spec = WindowSpec(history_minutes=history_minutes, max_jumps=10_000)
    people = [segments(*_of(series, p), config) for p in range(len(series.patients))]
    people = [p for p in people if p]
    errors: dict[tuple[str, str], list[Float64]] = {}
    for seed in seeds:
        training, tests = split(people, config, seed)
        weights = _fit_linear(training, config.linear_lags)
        forecast = partial(_forecast, ours=ours, spec=spec)
        for where, records in tests.items():
            for model, found in _window_errors(records, config, weights, forecast).items():
                errors.setdefault((where, model), []).append(found)
    return [_line(name, where, model, found) for (where, model), found in errors.items()]


def _of(series: Series, person: int) -> tuple[npt.NDArray[np.int64], Float64]:
    rows = slice(int(series.starts[person]), int(series.starts[person + 1]))
    return series.time_s[rows], series.glucose_mg_dl[rows].astype(np.float64)


def segments(time_s: npt.NDArray[np.int64], glucose: Float64, config: BenchConfig) -> list[Float64]:
    """One person's record as 5-minute segments: stamps to the minute, cut at gaps, short ones dropped, interpolated."""
    if not len(time_s):
        return []
    stamps = np.round(time_s / 60.0).astype(np.int64) * 60
    stamps, first = np.unique(stamps, return_index=True)
    pieces = np.split(np.arange(len(stamps)), np.flatnonzero(np.diff(stamps) > config.gap_minutes * 60) + 1)
    values = glucose[first]
    return [
        np.interp(np.arange(stamps[p[0]], stamps[p[-1]] + 1, _GRID_S), stamps[p], values[p])
        for p in pieces
        if len(p) >= config.min_drop_length
    ]


def split(
    people: Sequence[list[Float64]], config: BenchConfig, seed: int
) -> tuple[list[Float64], dict[str, list[Float64]]]:
    """Training segments, and test segments in ("ID") and out of ("OOD") distribution."""
    draw = np.random.RandomState(seed)
    outside = set(draw.choice(len(people), math.ceil(0.1 * len(people)), replace=False).tolist())
    training: list[Float64] = []
    tests: dict[str, list[Float64]] = {"ID": [], "OOD": []}
    for index, pieces in enumerate(people):
        if index in outside:
            tests["OOD"] += pieces
        else:
            train, test = _ends(pieces, config.length_segment, config.max_length_input)
            training += train
            tests["ID"] += test
    return training, tests


def _ends(pieces: list[Float64], length: int, history: int) -> tuple[list[Float64], list[Float64]]:
    """One person's training and test segments; what lies between them is the published validation part."""
    *earlier, last = pieces
    if len(last) >= history + 3 * length:
        return [*earlier, last[: -2 * length]], [last[-length - history :]]
    if len(last) >= history + 2 * length:
        return (earlier or [last[:-length]]), [last[-length - history :]]
    if not earlier:
        return [last], []
    *before, previous = earlier
    return [*before, *([previous[:-length]] if len(previous) >= history + 2 * length else [])], [last]


def _fit_linear(training: Sequence[Float64], lags: int) -> Float64:
    """Least squares of the next 12 values on the last `lags`: float64[lags+1,12]. Min-max scaling changes nothing."""
    wide = lags + _STEPS
    rows = [np.lib.stride_tricks.sliding_window_view(s, wide) for s in training if len(s) >= wide]
    if not rows:
        raise BadInput("no segment is long enough to fit on", "give longer records")
    gram, moment = np.zeros((lags + 1, lags + 1)), np.zeros((lags + 1, _STEPS))
    for block in rows:
        x = np.concatenate([block[:, :lags], np.ones((len(block), 1))], axis=1)
        gram += x.T @ x
        moment += x.T @ block[:, lags:]
    weights: Float64 = np.linalg.lstsq(gram, moment, rcond=None)[0].astype(np.float64)
    return weights


def _window_errors(
    records: Sequence[Float64],
    config: BenchConfig,
    weights: Float64,
    ours: Callable[[Float64, npt.NDArray[np.int64]], Float64],
) -> dict[str, Float64]:
    """Error e[W,12] of each model on every window: forecasts begin at index M and every 30 minutes."""
    starts = [np.arange(config.max_length_input, len(r) - _STEPS + 1, _STRIDE) for r in records]
    kept = [(r, s) for r, s in zip(records, starts, strict=True) if len(s)]
    if not kept:
        return {m: np.zeros((0, _STEPS)) for m in ("linear", "persistence", "model")}
    truth = np.concatenate([r[s[:, None] + np.arange(_STEPS)] for r, s in kept])
    lags = np.concatenate([r[s[:, None] + np.arange(-config.linear_lags, 0)] for r, s in kept])
    linear = np.concatenate([lags, np.ones((len(lags), 1))], axis=1) @ weights
    return {
        "linear": linear - truth,
        "persistence": lags[:, -1:] - truth,
        "model": np.concatenate([ours(r, s) for r, s in kept]) - truth,
    }


def _forecast(record: Float64, starts: npt.NDArray[np.int64], ours: Predict, spec: WindowSpec) -> Float64:
    """Forecasts float64[W,12] of a model that sees the segment up to the point before each start."""
    time_s = np.arange(len(record), dtype=np.int64) * _GRID_S
    series = Series(("one",), np.array([0, len(record)], dtype=np.int64), time_s, record.astype(np.float32))
    windows = cut_windows(series, spec, need_target=False)
    return ours(windows.gather(starts - 1))[0].astype(np.float64)


def _line(name: str, where: str, model: str, found: Sequence[Float64]) -> BenchLine:
    """Published reduction: over windows first, then over seeds, the root last."""
    seen = [e for e in found if len(e)]
    if not seen:
        return BenchLine(name, where, model, 0, *(math.nan,) * 4)
    squared, absolute = [(e * e).mean(axis=1) for e in seen], [np.abs(e).mean(axis=1) for e in seen]
    return BenchLine(
        data_set=name,
        split=where,
        model=model,
        windows=sum(map(len, seen)),
        median_rmse=math.sqrt(float(np.mean([np.median(s) for s in squared]))),
        median_mae=float(np.mean([np.median(a) for a in absolute])),
        mean_rmse=math.sqrt(float(np.mean([s.mean() for s in squared]))),
        mean_mae=float(np.mean([a.mean() for a in absolute])),
    )
