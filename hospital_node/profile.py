"""A person's glucose of the last 14 days by the conventions: times in ranges and the ambulatory glucose profile.

Battelino et al., "Clinical targets for continuous glucose monitoring data interpretation", Diabetes Care 42 (2019),
1593-1603: five ranges, 14 days, at least 70% of the data.
"""

from __future__ import annotations

from dataclasses import dataclass
from zoneinfo import ZoneInfo

import numpy as np
import numpy.typing as npt
import pandas as pd

from pipeline.forecasting import Float32, Int64

DAYS = 14
DAY_SECONDS = 24 * 3600
ENOUGH_SHARE = 0.7
PERCENTILES = (5, 25, 50, 75, 95)
BIN_MINUTES = 15
_LEAST_PER_BIN = 5


@dataclass(frozen=True, slots=True)
class Range:
    """Share of readings in one range, and the goal for most adults in words."""

    name: str
    css: str
    low_mg_dl: float | None
    high_mg_dl: float | None
    share: float
    goal: str


@dataclass(frozen=True, slots=True)
class Profile:
    """Fourteen days: ranges from very high to very low; bands float64[96, 5] of percentiles, NaN where too few."""

    ranges: tuple[Range, ...]
    bands: npt.NDArray[np.float64]
    mean_mg_dl: float
    variation_percent: float
    covered: float
    readings: int


_RANGES: tuple[tuple[str, str, float | None, float | None, str], ...] = (
    ("Very high", "veryhigh", 250.0, None, "below 5%"),
    ("High", "high", 180.0, 250.0, "below 25% with very high"),
    ("In range", "target", 70.0, 180.0, "above 70%"),
    ("Low", "low", 54.0, 70.0, "below 4% with very low"),
    ("Very low", "verylow", None, 54.0, "below 1%"),
)


def profile(time_s: Int64, glucose_mg_dl: Float32, now_s: float, zone: ZoneInfo) -> Profile | None:
    """Return the profile of the 14 days before now_s, or None without a reading in them.

    time_s: int64[N] increasing. Clock times are those of the zone.
    """
    recent = (time_s > now_s - DAYS * DAY_SECONDS) & (time_s <= now_s)
    times, glucose = time_s[recent], glucose_mg_dl[recent].astype(np.float64)
    if not len(times):
        return None
    mean = float(glucose.mean())
    return Profile(
        ranges=times_in_ranges(glucose),
        bands=_bands(times, glucose, zone),
        mean_mg_dl=mean,
        variation_percent=100 * float(glucose.std()) / mean,
        covered=_covered(times),
        readings=len(times),
    )


def times_in_ranges(glucose_mg_dl: npt.NDArray[np.floating]) -> tuple[Range, ...]:
    """Return the share of readings in each range, from very high to very low. glucose_mg_dl: float[N], N > 0."""
    glucose = glucose_mg_dl.astype(np.float64)
    return tuple(Range(n, css, low, high, _share(glucose, low, high), goal) for n, css, low, high, goal in _RANGES)


def _share(glucose: npt.NDArray[np.float64], low: float | None, high: float | None) -> float:
    """70 and 180 belong to the target, 54 to low, 250 to high."""
    if low is None:
        return float((glucose < 54).mean())
    if high is None:
        return float((glucose > 250).mean())
    if low == 70:
        return float(((glucose >= 70) & (glucose <= 180)).mean())
    return float(((glucose >= low) & (glucose < high) if low < 70 else (glucose > low) & (glucose <= high)).mean())


def _covered(times: Int64) -> float:
    """Share of the 14 days with data: readings times their usual distance."""
    if len(times) < 2:
        return 0.0
    usual = min(float(np.median(np.diff(times))), 900.0)
    return min(1.0, len(times) * usual / (DAYS * DAY_SECONDS))


def _bands(times: Int64, glucose: npt.NDArray[np.float64], zone: ZoneInfo) -> npt.NDArray[np.float64]:
    """Percentiles by time of day in 15-minute bins, each with its neighbours."""
    local = pd.to_datetime(times, unit="s", utc=True).tz_convert(zone)
    count = 24 * 60 // BIN_MINUTES
    bins = ((local.hour * 60 + local.minute) // BIN_MINUTES).to_numpy()
    bands = np.full((count, len(PERCENTILES)), np.nan)
    for at in range(count):
        near = glucose[np.isin(bins, [(at - 1) % count, at, (at + 1) % count])]
        if len(near) >= _LEAST_PER_BIN:
            bands[at] = np.percentile(near, PERCENTILES)
    return bands
