"""Forecasts beside what really happened: what every score is computed from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from statistics import NormalDist
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from data_schemas.units import HORIZON_MINUTES, QUANTILES
from pipeline.adaptation import INPUTS, Past, inputs_of, replayed
from pipeline.windows import Batch, Windows

FloatArray: TypeAlias = npt.NDArray[np.floating]
Int64: TypeAlias = npt.NDArray[np.int64]
Bool: TypeAlias = npt.NDArray[np.bool_]
Predict: TypeAlias = Callable[[Batch], tuple[FloatArray, FloatArray | None]]

# A person whose readings typically lie closer than this has a five-minute sensor; the others read about every 15.
FIVE_MINUTE_SENSOR_BELOW_S = 450
# A low or high is announced when the quantiles give it this chance. Chosen on validation people, so that three of four
# lows are announced within 30 minutes; see docs/forecaster.md.
ALARM_PROBABILITY = 0.25
_BATCH = 4096
_Z = np.array([NormalDist().inv_cdf(q) for q in QUANTILES])


@dataclass(frozen=True, slots=True)
class Scored:
    """Forecasts and what really happened, one row per issue point.

    truth, forecast: float[B,12]; mask: bool[B,12], True where truth is a real reading; last: float[B], the issue
    reading; patient: int[B], person within the site; site: int[B], index into sites; quantiles: float[B,12,5] or
    None; time_s: int[B], epoch seconds of the issue, or None; sensor_minutes: int[B], 5 or 15, or None.
    """

    truth: FloatArray
    mask: Bool
    forecast: FloatArray
    last: FloatArray
    patient: Int64
    site: Int64
    sites: tuple[str, ...]
    quantiles: FloatArray | None = None
    time_s: Int64 | None = None
    sensor_minutes: Int64 | None = None

    def __post_init__(self) -> None:
        shape = (len(self.last), len(HORIZON_MINUTES))
        if not self.truth.shape == self.mask.shape == self.forecast.shape == shape:
            raise ValueError(f"truth, mask and forecast must have shape {shape}")
        if not len(self.patient) == len(self.site) == shape[0]:
            raise ValueError("patient and site need one value per issue point")
        if self.quantiles is not None and self.quantiles.shape != (*shape, len(QUANTILES)):
            raise ValueError(f"quantiles must have shape {(*shape, len(QUANTILES))}")
        if any(v is not None and len(v) != shape[0] for v in (self.time_s, self.sensor_minutes)):
            raise ValueError("time_s and sensor_minutes need one value per issue point")
        if shape[0] and not 0 <= int(self.site.min()) <= int(self.site.max()) < len(self.sites):
            raise ValueError("site must index sites")

    @property
    def person(self) -> Int64:
        """int64[B]: one number per person of any site."""
        width = int(self.patient.max()) + 1 if len(self.patient) else 1
        return self.site * width + self.patient

    def take(self, rows: Int64) -> Scored:
        """Only these issue points."""
        changed: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.ndarray):
                changed[field.name] = value[rows]
        return replace(self, **changed)


def score_windows(windows: Windows, predict: Predict, site: str) -> Scored:
    """Forecast every window of one site; predict gives float[B,12] and quantiles float[B,12,5] or None."""
    count, wide = len(windows), len(HORIZON_MINUTES)
    truth, forecast = np.empty((count, wide), np.float32), np.empty((count, wide), np.float32)
    mask, last = np.empty((count, wide), np.bool_), np.empty(count, np.float32)
    levels: list[FloatArray] = []
    for at in range(0, count, _BATCH):
        part = slice(at, at + _BATCH)
        batch = windows.gather(windows.anchors[part])
        truth[part], mask[part], last[part] = batch.y, batch.mask, batch.last
        forecast[part], quantiles = predict(batch)
        levels += [] if quantiles is None else [quantiles]
    patient = np.repeat(np.arange(len(windows.offsets) - 1, dtype=np.int64), np.diff(windows.offsets))
    return Scored(
        truth=truth,
        mask=mask,
        forecast=forecast,
        last=last,
        patient=patient,
        site=np.zeros(count, dtype=np.int64),
        sites=(site,),
        quantiles=np.concatenate(levels) if levels else None,
        time_s=windows.series.time_s[windows.anchors],
        sensor_minutes=_sensor_minutes(windows)[patient],
    )


def score_personally(windows: Windows, predict: Predict, site: str) -> tuple[Scored, Scored]:
    """`score_windows`, and the same forecasts as each person would have been shown them.

    Those are corrected from that person's own past; predict must give quantiles.
    """
    time_s, inputs, noted = windows.series.time_s[windows.anchors], np.empty((len(windows), INPUTS)), 0

    def noting(batch: Batch) -> tuple[FloatArray, FloatArray | None]:
        nonlocal noted
        rows = slice(noted, noted + len(batch.last))
        forecast, quantiles = predict(batch)
        inputs[rows], noted = inputs_of(batch.x, batch.last, forecast, time_s[rows]), rows.stop
        return forecast, quantiles

    plain = score_windows(windows, noting, site)
    if plain.quantiles is None:
        raise ValueError("personal forecasts need quantiles")
    forecast, quantiles = plain.forecast.copy(), plain.quantiles.copy()
    for start, stop in windows.by_patient():
        if start < stop:
            r = slice(start, stop)
            past = Past(time_s[r], inputs[r], plain.forecast[r], plain.quantiles[r], plain.truth[r], plain.mask[r])
            forecast[r], quantiles[r] = replayed(past)
    return plain, replace(plain, forecast=forecast, quantiles=quantiles)


def _sensor_minutes(windows: Windows) -> Int64:
    """int64[P]: 5 or 15, from the median distance of each person's readings."""
    series = windows.series
    gaps = [np.diff(series.time_s[a:b]) for a, b in zip(series.starts[:-1], series.starts[1:], strict=True)]
    five = [bool(len(g)) and float(np.median(g)) < FIVE_MINUTE_SENSOR_BELOW_S for g in gaps]
    return np.where(five, 5, 15).astype(np.int64) if five else np.zeros(0, np.int64)


def concat(parts: Sequence[Scored]) -> Scored:
    """One Scored of several, each with its own sites; what not every part has is dropped."""
    names = tuple(dict.fromkeys(name for part in parts for name in part.sites))
    site = [np.array([names.index(n) for n in p.sites], dtype=np.int64)[p.site] for p in parts]

    def joined(name: str) -> Any:
        values = [v for p in parts if (v := getattr(p, name)) is not None]
        return np.concatenate(values) if len(values) == len(parts) else None

    return Scored(
        truth=joined("truth"),
        mask=joined("mask"),
        forecast=joined("forecast"),
        last=joined("last"),
        patient=joined("patient"),
        site=np.concatenate(site),
        sites=names,
        quantiles=joined("quantiles"),
        time_s=joined("time_s"),
        sensor_minutes=joined("sensor_minutes"),
    )


def coverage_curve(scored: Scored, horizon_minutes: int) -> tuple[tuple[float, float], ...]:
    """(nominal level, observed share of truths at or below that quantile) for each of the five quantiles."""
    if scored.quantiles is None:
        raise ValueError("this model has no quantiles")
    column = HORIZON_MINUTES.index(horizon_minutes)
    keep = scored.mask[:, column]
    below = scored.truth[keep, column, None] <= scored.quantiles[keep, column]
    return tuple((q, float(below[:, k].mean())) for k, q in enumerate(QUANTILES))


def level_at(quantiles: FloatArray, q: float) -> FloatArray:
    """Quantile q from float[...,5]: the stored one, or between its neighbours in proportion to normal scores.

    For Gaussian quantiles that is exact; a straight line in probability would put the 10% quantile too far out and
    make an 80% interval cover 84%. Beyond the outermost quantiles the last piece is continued.
    """
    z = NormalDist().inv_cdf(q)
    k = int(np.clip(np.searchsorted(_Z, z, side="right") - 1, 0, len(_Z) - 2))
    share = (z - _Z[k]) / (_Z[k + 1] - _Z[k])
    lower, upper = quantiles[..., k], quantiles[..., k + 1]
    return lower if share == 0 else upper if share == 1 else lower + share * (upper - lower)


def surely_beyond(quantiles: FloatArray, threshold_mg_dl: float, sign: float) -> Bool:
    """bool[...]: whether P(beyond the threshold) reaches ALARM_PROBABILITY, from quantiles float[...,5].

    That level is a stored quantile, so the quantile itself is compared with the threshold.
    """
    level = QUANTILES.index(ALARM_PROBABILITY if sign < 0 else 1 - ALARM_PROBABILITY)
    found: Bool = (quantiles[..., level] - threshold_mg_dl) * sign > 0
    return found


def probability_beyond(quantiles: FloatArray, threshold_mg_dl: float, sign: float) -> FloatArray:
    """P(beyond the threshold), float[...] of quantiles float[...,5]; sign -1 means below, +1 above.

    Each value's normal score is interpolated between the quantiles, as in `level_at`.
    """
    z = np.full(quantiles.shape[:-1], np.nan)
    for k in range(len(_Z) - 1):
        lower, upper = quantiles[..., k], quantiles[..., k + 1]
        here = (threshold_mg_dl >= lower) if k else np.ones(lower.shape, dtype=np.bool_)
        piece = _Z[k] + (threshold_mg_dl - lower) / np.maximum(upper - lower, 1e-3) * (_Z[k + 1] - _Z[k])
        z = np.where(here, piece, z)
    return _normal_cdf(np.clip(-sign * z, -8.0, 8.0))


def _normal_cdf(z: FloatArray) -> FloatArray:
    """Standard normal distribution function; error below 7.5e-8 (Abramowitz and Stegun 1964, 26.2.17)."""
    t = 1.0 / (1.0 + 0.2316419 * np.abs(z))
    poly = t * (0.319381530 + t * (-0.356563782 + t * (1.781477937 + t * (-1.821255978 + t * 1.330274429))))
    tail = np.exp(-0.5 * z * z) / np.sqrt(2 * np.pi) * poly
    cdf: FloatArray = np.where(z >= 0, 1.0 - tail, tail)
    return cdf
