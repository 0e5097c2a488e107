"""Drawings as inline SVG: numbers in, markup out. Colours and type come from the page's style sheet by class."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import TypeAlias
from zoneinfo import ZoneInfo

import numpy as np
import numpy.typing as npt
from markupsafe import Markup, escape

from data_schemas.forecast import Forecast, GlucoseUnit
from data_schemas.units import MG_DL_PER_MMOL_L
from hospital_node.profile import Profile
from pipeline.forecasting import Float32, Int64

WIDTH, HEIGHT = 720, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 34
_GUIDES = (54.0, 70.0, 180.0, 250.0)
# The two lowest lines lie close together: their labels give each other room.
_NUDGE = {54.0: 14.0, 70.0: -1.0}
Point: TypeAlias = tuple[float, float]


class _Axes:
    """From minutes and mg/dL to the drawing's own units."""

    def __init__(self, minutes: tuple[float, float], top_mg_dl: float) -> None:
        self.first, self.last = minutes
        self.low, self.top = 40.0, top_mg_dl

    def x(self, minute: float) -> float:
        """Horizontal place of a minute."""
        return LEFT + (minute - self.first) / (self.last - self.first) * (WIDTH - LEFT - RIGHT)

    def y(self, mg_dl: float) -> float:
        """Vertical place of a value; what lies beyond the axis stays at its edge."""
        inside = min(max(mg_dl, self.low), self.top)
        return HEIGHT - BOTTOM - (inside - self.low) / (self.top - self.low) * (HEIGHT - TOP - BOTTOM)

    def at(self, points: Sequence[Point]) -> str:
        """Points of a polyline or polygon."""
        return " ".join(f"{self.x(m):.1f},{self.y(v):.1f}" for m, v in points)


def forecast_chart(
    time_s: Int64, glucose_mg_dl: Float32, made: Forecast | None, now_s: float, units: GlucoseUnit, zone: ZoneInfo
) -> Markup:
    """Readings of the last three hours as dots, and the forecast (in `units`) as a band that widens with time."""
    recent = time_s > now_s - 3 * 3600
    dots = [((t - now_s) / 60, float(g)) for t, g in zip(time_s[recent], glucose_mg_dl[recent], strict=True)]
    factor = 1.0 if units == "mg/dL" else MG_DL_PER_MMOL_L
    fan = [] if made is None else [_fan(made, now_s, factor, pair) for pair in (("p05", "p95"), ("p10", "p90"))]
    middle = [] if made is None else [((p.at.timestamp() - now_s) / 60, p.p50 * factor) for p in made.points]
    highest = max([v for _, v in dots] + [v for band in fan for _, v in band] + [200.0])
    axes = _Axes((-180.0, 70.0), min(400.0, highest + 20))
    start = dots[-1:] if made is not None else []
    shapes = [
        *_frame(axes, units),
        *_clock(axes, now_s, zone),
        *(f'<polygon class="fan fan{n}" points="{axes.at([*start, *band])}"/>' for n, band in enumerate(fan)),
        f'<polyline class="median" points="{axes.at([*start, *middle])}"/>' if middle else "",
        f'<line class="now" x1="{axes.x(0):.1f}" x2="{axes.x(0):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>',
        *(f'<circle class="dot" cx="{axes.x(m):.1f}" cy="{axes.y(v):.1f}" r="3.2"/>' for m, v in dots),
    ]
    words = "Glucose of the last three hours" + ("" if made is None else " and its forecast for the next hour")
    return _svg(words, shapes)


def profile_chart(found: Profile, units: GlucoseUnit) -> Markup:
    """The ambulatory glucose profile: median, 25 to 75 and 5 to 95% of 14 days by time of day."""
    axes = _Axes((0.0, 1440.0), min(400.0, max(260.0, float(np.nanmax(found.bands, initial=0.0)) + 20)))
    step = 1440 / len(found.bands)
    shapes = [*_frame(axes, units)]
    shapes += [
        _label(axes.x(h * 60), HEIGHT - 9, f"{h:02d}:00", "end" if h == 24 else "middle") for h in range(0, 25, 6)
    ]
    for low, high, css in ((0, 4, "agp95"), (1, 3, "agp75")):
        for run in _runs(found.bands[:, low]):
            upper = [((i + 0.5) * step, found.bands[i, high]) for i in run]
            lower = [((i + 0.5) * step, found.bands[i, low]) for i in reversed(run)]
            shapes.append(f'<polygon class="{css}" points="{axes.at([*upper, *lower])}"/>')
    for run in _runs(found.bands[:, 2]):
        points = [((i + 0.5) * step, found.bands[i, 2]) for i in run]
        shapes.append(f'<polyline class="agp50" points="{axes.at(points)}"/>')
    return _svg("Glucose by time of day over 14 days: median, and where half and nine tenths of it lay", shapes)


def range_bar(found: Profile) -> Markup:
    """Times in ranges as one bar, each part with its width in per cent."""
    shapes, x = [], 0.0
    for part in reversed(found.ranges):
        width = part.share * WIDTH
        if width > 0:
            shapes.append(f'<rect class="{escape(part.css)}" x="{x:.1f}" y="0" width="{width:.1f}" height="34"/>')
        x += width
    told = ", ".join(f"{part.name.lower()} {part.share:.0%}" for part in found.ranges)
    return _svg(f"Times in ranges: {told}", shapes, height=34)


def gauge(share: float, words: str) -> Markup:
    """How much of a whole is used up, as a bar."""
    width = min(max(share, 0.0), 1.0) * WIDTH
    css = "spent full" if share >= 0.9 else "spent"
    shapes = [
        f'<rect class="whole" width="{WIDTH}" height="26" rx="13"/>',
        f'<rect class="{css}" width="{width:.1f}" height="26" rx="13"/>' if width >= 26 else "",
    ]
    return _svg(words, shapes, height=26)


def _fan(made: Forecast, now_s: float, factor: float, pair: tuple[str, str]) -> list[Point]:
    """Outline of one interval: upper edge forwards, lower edge backwards."""
    minutes = [(p.at.timestamp() - now_s) / 60 for p in made.points]
    low, high = ([getattr(p, name) * factor for p in made.points] for name in pair)
    return [*zip(minutes, high, strict=True), *reversed(list(zip(minutes, low, strict=True)))]


def _frame(axes: _Axes, units: GlucoseUnit) -> list[str]:
    """The target range, lines at the conventional limits, and their labels."""
    right = WIDTH - RIGHT
    high, low = axes.y(180), axes.y(70)
    shapes = [
        f'<rect class="goal" x="{LEFT}" y="{high:.1f}" width="{right - LEFT}" height="{low - high:.1f}"/>',
    ]
    for value in _GUIDES:
        if value < axes.top:
            y = axes.y(value)
            shapes.append(f'<line class="guide" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            shapes.append(_label(LEFT - 7, y + _NUDGE.get(value, 5), shown(value, units), "end"))
    return shapes


def _clock(axes: _Axes, now_s: float, zone: ZoneInfo) -> list[str]:
    """Local clock times at full hours."""
    now = datetime.fromtimestamp(now_s, tz=zone)
    first = now.replace(minute=0, second=0, microsecond=0) - timedelta(hours=3)
    hours = [first + timedelta(hours=n) for n in range(6)]
    minutes = [(hour.timestamp() - now_s) / 60 for hour in hours]
    return [
        _label(axes.x(minute), HEIGHT - 9, hour.strftime("%H:%M"), "middle")
        for hour, minute in zip(hours, minutes, strict=True)
        if axes.first + 8 <= minute <= axes.last - 8
    ]


def _runs(values: npt.NDArray[np.float64]) -> list[list[int]]:
    """Positions of neighbouring numbers that are there."""
    runs: list[list[int]] = []
    for at in np.flatnonzero(~np.isnan(values)).tolist():
        if runs and runs[-1][-1] == at - 1:
            runs[-1].append(at)
        else:
            runs.append([at])
    return runs


def shown(mg_dl: float, units: GlucoseUnit) -> str:
    """A glucose as people read it: whole mg/dL, or mmol/L with one decimal."""
    return f"{mg_dl:.0f}" if units == "mg/dL" else f"{mg_dl / MG_DL_PER_MMOL_L:.1f}"


def _label(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(words: str, shapes: list[str], height: int = HEIGHT) -> Markup:
    head = f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(words)}">'
    return Markup(head + "".join(shapes) + "</svg>")  # noqa: S704 numbers and escaped words only
