"""The public warm start: where every federation begins, trained on PhysioCGM (CC0) alone.

Recipe: the public readings as they are, thinned to 15 minutes in two phases, played 1.5 and 2 times faster, and
smoothed over time as some sensors report them (professional recorders, 15-minute scanners); part of the windows
shrunk towards the range of people without diabetes, with sensor noise.  Then the basis before the heads is whitened
and the intervals are made a little narrower, because nine public people vary more than most.

    python -m pipeline.warm_start CSV OUT.npz
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_schemas.units import QUANTILES, SENSOR_MAX_MG_DL, SENSOR_MIN_MG_DL
from pipeline.forecaster import Forecaster, ForecasterSpec, flatten, unflatten, whiten
from pipeline.windows import Batch, Series, Windows, WindowSpec, cut_windows, shifted_levels

SPEC = ForecasterSpec(hidden_size=32)
WINDOWS = WindowSpec(history_minutes=120)
STEPS = 5000
SHARES = (0.42, 0.09, 0.09, 0.08, 0.04, 0.10, 0.10, 0.08)
# Widths of the smoothing kernels, minutes (standard deviation): two on the 5-minute grid, one before thinning to 15.
SMOOTHED_MINUTES = (6.0, 12.0, 9.0)
_REACH_READINGS, _REACH_MINUTES = 8, 40.0
# Width of the intervals after training, as a share: chosen on validation people so that 80% intervals cover 80%.
INTERVAL_WIDTH = 0.93
_SHRUNK_SHARE = 0.35
_SHRINK = (0.3, 0.9)
_NEW_MEAN_MG_DL = (85.0, 130.0)
_OLD_MEAN_MG_DL = 145.0
_SENSOR_NOISE_MG_DL = 0.7

Weights = npt.NDArray[np.float32]


def read_public(csv_path: Path) -> Series:
    """Columns patient_id, time, glucose_mg_dl; plain or gzip."""
    import pandas as pd

    frame = pd.read_csv(csv_path)
    frame["measured_at"] = pd.to_datetime(frame["time"]).dt.tz_localize("UTC")
    return Series.from_frame(frame.dropna(subset=["glucose_mg_dl"]))


def replayed(series: Series, *, speed: float = 1.0, grid_minutes: int = 5, phase_minutes: int = 0) -> Series:
    """Show the same people living `speed` times faster, the first reading of every grid_minutes kept."""
    times, glucose, starts = [], [], [0]
    for begin, end in zip(series.starts[:-1], series.starts[1:], strict=True):
        time_s = (series.time_s[begin:end] / speed).astype(np.int64)
        slot = (time_s + 60 * phase_minutes) // (60 * grid_minutes)
        keep = np.concatenate([[True], np.diff(slot) > 0])
        times.append(time_s[keep])
        glucose.append(series.glucose_mg_dl[begin:end][keep])
        starts.append(starts[-1] + int(keep.sum()))
    return Series(series.patients, np.array(starts, dtype=np.int64), np.concatenate(times), np.concatenate(glucose))


def smoothed(series: Series, width_minutes: float) -> Series:
    """Gaussian average over time, future readings included: a sensor's own filter, applied before any window is cut."""
    times = series.time_s / 60.0
    owner = np.repeat(np.arange(len(series.patients)), np.diff(series.starts))
    total = series.glucose_mg_dl.astype(np.float64)
    weight = np.ones(len(total))
    for step in range(1, _REACH_READINGS):
        apart = times[step:] - times[:-step]
        near = (apart <= _REACH_MINUTES) & (owner[step:] == owner[:-step])
        share = np.where(near, np.exp(-0.5 * (apart / width_minutes) ** 2), 0.0)
        for here, there in ((slice(step, None), slice(None, -step)), (slice(None, -step), slice(step, None))):
            total[here] += share * series.glucose_mg_dl[there]
            weight[here] += share
    return Series(series.patients, series.starts, series.time_s, (total / weight).astype(np.float32))


def shrunk(rng: np.random.Generator, batch: Batch) -> Batch:
    """Move a share of the windows to a calmer, lower person: level and spread both, targets with them."""
    count = len(batch.last)
    chosen = rng.random(count) < _SHRUNK_SHARE
    factor = np.where(chosen, rng.uniform(*_SHRINK, count), 1.0).astype(np.float32)
    mean = rng.uniform(*_NEW_MEAN_MG_DL, count).astype(np.float32)
    shift = np.where(chosen, mean - factor * _OLD_MEAN_MG_DL, 0.0).astype(np.float32)
    noise = rng.normal(0.0, _SENSOR_NOISE_MG_DL, batch.x.shape[:2]).astype(np.float32) * chosen[:, None]
    x, last = shifted_levels(batch.x, factor, shift, noise)
    y = np.clip(batch.y * factor[:, None] + shift[:, None], SENSOR_MIN_MG_DL, SENSOR_MAX_MG_DL).astype(np.float32)
    return Batch(x, np.where(batch.mask, y, np.float32(0.0)), batch.mask, last)


def sources(series: Series) -> list[Windows]:
    """Cut the eight sources of windows, in the order of SHARES."""
    played = [
        series,
        replayed(series, grid_minutes=15),
        replayed(series, grid_minutes=15, phase_minutes=7),
        replayed(series, speed=1.5),
        replayed(series, speed=2.0),
        *(smoothed(series, width) for width in SMOOTHED_MINUTES[:2]),
        replayed(smoothed(series, SMOOTHED_MINUTES[2]), grid_minutes=15),
    ]
    return [cut_windows(s, WINDOWS) for s in played]


def train(csv_path: Path, *, steps: int = STEPS) -> Weights:
    """Weights float32[D] from the public readings; the same file gives the same weights on the same machine."""
    from pipeline.fitting import FitPlan, fit

    windows = sources(read_public(csv_path))
    weights = fit(flatten(Forecaster(SPEC)), SPEC, windows, FitPlan(steps=steps, weights=SHARES), shrunk)
    model = unflatten(weights, SPEC)
    rng = np.random.default_rng(0)
    x = np.concatenate([shrunk(rng, w.gather(rng.choice(w.anchors, 2000))).x for w in windows])
    whiten(model, x)
    narrow(model, x, INTERVAL_WIDTH)
    return flatten(model)


def narrow(model: Forecaster, x: npt.NDArray[np.float32], share: float) -> None:
    """Scale the steps between quantiles by `share`, to first order at the mean of x [B,T,F], in place.

    Only biases move, so the model keeps its shape and the median its place.
    """
    import torch
    from torch.nn import functional

    with torch.no_grad():
        raw = model.quantile_head(model.encode(torch.from_numpy(x))).unflatten(-1, (-1, len(QUANTILES)))
        shift = (share - 1.0) * functional.softplus(raw).mean(dim=0) / torch.sigmoid(raw).mean(dim=0)
        shift[:, QUANTILES.index(0.5)] = 0.0
        model.quantile_head.bias.add_(shift.reshape(-1))


def save(weights: Weights, csv_path: Path, out: Path, *, steps: int = STEPS) -> None:
    """Write float32 weights with the recipe as a JSON string."""
    recipe = {
        "source": "PhysioCGM (CC0 1.0)",
        "sha256_of_source": hashlib.sha256(csv_path.read_bytes()).hexdigest(),
        "model": asdict(SPEC),
        "windows": asdict(WINDOWS),
        "steps": steps,
        "shares": SHARES,
        "smoothed_minutes": SMOOTHED_MINUTES,
        "interval_width": INTERVAL_WIDTH,
    }
    np.savez_compressed(out, weights=weights, recipe=np.array(json.dumps(recipe)))


def load(path: Path | None = None) -> Weights:
    """Read the shipped weights float32[D], or those of another file written by `save`."""
    with np.load(path or Path(__file__).with_suffix(".npz"), allow_pickle=False) as stored:
        return np.asarray(stored["weights"], dtype=np.float32)


def main(arguments: list[str]) -> int:
    """Python -m pipeline.warm_start CSV OUT."""
    if len(arguments) != 2:
        sys.stderr.write("usage: python -m pipeline.warm_start CSV OUT.npz\n")
        return 2
    source, out = Path(arguments[0]), Path(arguments[1])
    save(train(source), source, out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
