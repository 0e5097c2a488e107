"""Bars as inline SVG: readings by day, the distribution of glucose, and what was set aside. Markup only; no scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

import numpy as np
from markupsafe import Markup, escape

from hospital_node.portrait import Portrait

WIDTH = 960
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 12, 10, 30
_MOST_BARS = 180
_BIN_MG_DL = 10
_RANGES = ((54, "verylow"), (70, "low"), (181, "target"), (251, "high"), (401, "veryhigh"))


def days_chart(days: Mapping[int, tuple[int, int]]) -> Markup:
    """Accepted readings by UTC day (since 1970) as bars, people with one as a line; long records by several days."""
    if not days:
        return Markup("")
    first, last = min(days), max(days)
    each = -(-(last - first + 1) // _MOST_BARS)
    starts = list(range(first, last + 1, each))
    spans = [[days.get(day, (0, 0)) for day in range(start, min(start + each, last + 1))] for start in starts]
    readings = [sum(count for count, _ in span) / len(span) for span in spans]
    people = [sum(persons for _, persons in span) / len(span) for span in spans]
    height = 240
    shapes, top = _bars(readings, height, "count"), max(readings)
    shapes += _value_axis(top, height)
    most = max(people)
    points = " ".join(
        f"{_x(at + 0.5, len(starts)):.1f},{_y(value, most, height):.1f}" for at, value in enumerate(people)
    )
    shapes.append(f'<polyline class="line" points="{points}"/>')
    for at in sorted({0, len(starts) // 2, len(starts) - 1}):
        day = datetime.fromtimestamp(starts[at] * 86_400, tz=UTC)
        anchor = "start" if at == 0 else "end" if at == len(starts) - 1 else "middle"
        place = _x(at + (0 if at == 0 else 1 if at == len(starts) - 1 else 0.5), len(starts))
        shapes.append(_text(place, height - 8, f"{day:%d %b %Y}", anchor))
    what = "day" if each == 1 else f"day, means of {each} days"
    return _svg(f"Readings by {what}: up to {top:,.0f}, of up to {most:,.0f} people", shapes, height)


def distribution_chart(new: Portrait, past: Portrait | None) -> Markup:
    """Share of readings in bins of 10 mg/dL as bars; what was there before as a line."""
    height = 240
    share = _shares(new)
    before = _shares(past) if past is not None and past.readings else np.zeros(0)
    top = float(max([*share, *before, 1e-9]))
    shapes = []
    for at, value in enumerate(share):
        css = next(name for limit, name in _RANGES if 40 + at * _BIN_MG_DL + _BIN_MG_DL / 2 < limit)
        shapes += _bars([value], height, css, at, len(share), top)
    shapes += _value_axis(top, height, "{:.0%}" if top >= 0.05 else "{:.1%}")
    if len(before):
        points = " ".join(
            f"{_x(at + side, len(before)):.1f},{_y(value, top, height):.1f}"
            for at, value in enumerate(before)
            for side in (0, 1)
        )
        shapes.append(f'<polyline class="line" points="{points}"/>')
    for mark in (40, 70, 100, 140, 180, 250, 300, 350, 400):
        anchor = "end" if mark == 400 else "middle"
        shapes.append(_text(_x((mark - 40) / _BIN_MG_DL, len(share)), height - 8, str(mark), anchor))
    words = "Share of readings by glucose in mg/dL" + (", and before this import as a line" if len(before) else "")
    return _svg(words, shapes, height)


def rules_chart(counts: Sequence[tuple[str, int]]) -> Markup:
    """Rows by rule as horizontal bars on a logarithmic scale, with their counts."""
    row, label = 26, 230
    top = np.log10(max((count for _, count in counts), default=1) + 1)
    shapes = []
    for at, (rule, count) in enumerate(counts):
        y, width = at * row, float(np.log10(count + 1) / top) * (WIDTH - label - 90)
        shapes.append(_text(label - 8, y + 17, rule, "end"))
        shapes.append(f'<rect class="aside" x="{label}" y="{y + 4}" width="{width:.1f}" height="{row - 8}" rx="3"/>')
        shapes.append(_text(label + width + 6, y + 17, f"{count:,}", "start"))
    told = ", ".join(f"{rule} {count:,}" for rule, count in counts)
    return _svg(f"Rows set aside by rule, logarithmic: {told}", shapes, max(row * len(counts), 1))


def _shares(portrait: Portrait) -> np.ndarray:
    return portrait.bins(_BIN_MG_DL) / max(portrait.readings, 1)


def _bars(
    values: Sequence[float], height: int, css: str, first: int = 0, count: int | None = None, top: float | None = None
) -> list[str]:
    count, top = count or len(values), top or max([*values, 1e-9])
    shapes = []
    for at, value in enumerate(values, start=first):
        x, y = _x(at, count), _y(value, top, height)
        width = max(_x(at + 1, count) - x - (1 if count < 100 else 0), 0.8)
        if value:
            shapes.append(
                f'<rect class="{css}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height - _BOTTOM - y:.1f}"/>'
            )
    return shapes


def _value_axis(top: float, height: int, form: str = "{:,.0f}") -> list[str]:
    shapes = []
    for share in (0.0, 0.5, 1.0):
        y = _y(share * top, top, height)
        shapes.append(f'<line class="guide" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        shapes.append(_text(_LEFT - 7, y + 5, form.format(share * top), "end"))
    return shapes


def _x(at: float, count: int) -> float:
    return _LEFT + at / count * (WIDTH - _LEFT - _RIGHT)


def _y(value: float, top: float, height: int) -> float:
    return height - _BOTTOM - value / (top or 1) * (height - _TOP - _BOTTOM)


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(words: str, shapes: Sequence[str], height: int) -> Markup:
    head = f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(words)}">'
    return Markup(head + "".join(shapes) + "</svg>")  # noqa: S704 numbers and escaped words only
