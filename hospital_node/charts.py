"""Drawings as inline SVG: numbers in, markup out. Colours and type come from the page's style sheet by class."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import TypeAlias
from zoneinfo import ZoneInfo

import numpy as np
import numpy.typing as npt
from markupsafe import Markup, escape

from data_schemas.forecast import Forecast, GlucoseUnit
from data_schemas.units import MG_DL_PER_MMOL_L
from hospital_node.profile import Profile, Range
from pipeline.forecasting import Float32, Int64

WIDTH, HEIGHT = 720, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 34
_GUIDES = (54.0, 70.0, 180.0, 250.0)
# The two lowest lines lie close together: their labels give each other room.
_NUDGE = {54.0: 14.0, 70.0: -1.0}
# Half circle of a gauge, in its own units; from this share on it is drawn as nearly full.
_GAUGE_X, _GAUGE_Y, _GAUGE_R = 120, 118, 100
_NEARLY_FULL = 0.9
# A profile's axis ends at 350 mg/dL by convention, and at 400 where the 95% line is above this.
_USUAL_TOP = 340.0
Point: TypeAlias = tuple[float, float]


class _Axes:
    """From minutes and mg/dL to the drawing's own units."""

    def __init__(self, minutes: tuple[float, float], top_mg_dl: float, low_mg_dl: float = 40.0) -> None:
        self.first, self.last = minutes
        self.low, self.top = low_mg_dl, top_mg_dl

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
    fan = [] if made is None else [_fan(made, now_s, factor, pair) for pair in (("p10", "p90"), ("p25", "p75"))]
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
    axes = _Axes((0.0, 1440.0), 350.0 if np.nanmax(found.bands, initial=0.0) <= _USUAL_TOP else 400.0, 0.0)
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


def range_bar(ranges: Sequence[Range], height: int = 34) -> Markup:
    """Times in ranges as one bar, each part with its width in per cent."""
    shapes, x = [], 0.0
    for part in reversed(ranges):
        width = part.share * WIDTH
        if width > 0:
            shapes.append(f'<rect class="{escape(part.css)}" x="{x:.1f}" y="0" width="{width:.1f}" height="{height}"/>')
        x += width
    told = ", ".join(f"{part.name.lower()} {part.share:.0%}" for part in ranges)
    return _svg(f"Times in ranges: {told}", shapes, height=height, css="bar")


def gauge(share: float, words: str, value: str, under: str) -> Markup:
    """How much of a whole is used up: a half circle that fills from the left, with the number inside."""
    inside = min(max(share, 0.0), 1.0)
    css = "spent full" if share >= _NEARLY_FULL else "spent"
    shapes = [
        f'<path class="whole" d="{_arc(1.0)}"/>',
        f'<path class="{css}" d="{_arc(inside)}"/>' if inside > 0 else "",
        f'<text class="big" x="{_GAUGE_X}" y="{_GAUGE_Y - 14}" text-anchor="middle">{escape(value)}</text>',
        f'<text x="{_GAUGE_X}" y="{_GAUGE_Y + 6}" text-anchor="middle">{escape(under)}</text>',
    ]
    head = f'<svg class="gauge" viewBox="0 0 240 138" role="img" aria-label="{escape(words)}">'
    return Markup(head + "".join(shapes) + "</svg>")  # noqa: S704 numbers and escaped words only


def share_bar(share: float, words: str) -> Markup:
    """One part of a whole as a thin bar."""
    width = min(max(share, 0.0), 1.0) * WIDTH
    shapes = [
        f'<rect class="whole" width="{WIDTH}" height="60" rx="30"/>',
        f'<rect class="spent" width="{max(width, 60):.1f}" height="60" rx="30"/>' if width > 0 else "",
    ]
    return _svg(words, shapes, height=60, css="thin")


def _arc(share: float) -> str:
    """From the left end of the half circle over the top, this far."""
    angle = math.pi * (1 - share)
    x, y = _GAUGE_X + _GAUGE_R * math.cos(angle), _GAUGE_Y - _GAUGE_R * math.sin(angle)
    return f"M {_GAUGE_X - _GAUGE_R} {_GAUGE_Y} A {_GAUGE_R} {_GAUGE_R} 0 0 1 {x:.2f} {y:.2f}"


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
            css = "guide edge" if value in (70.0, 180.0) else "guide"
            shapes.append(f'<line class="{css}" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
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


def _svg(words: str, shapes: list[str], height: int = HEIGHT, css: str = "chart") -> Markup:
    head = f'<svg class="{css}" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(words)}">'
    return Markup(head + "".join(shapes) + "</svg>")  # noqa: S704 numbers and escaped words only
