"""Pictures of a run, in one house style: readable at 700 pixels, safe for colour-blind readers, units on every axis.

Every function returns a Picture; `.png()` gives bytes on white for an artifact, `.svg()` a fragment to put inside an
HTML page whose style sheet defines the custom properties --ink, --muted, --line and --paper, so that it follows light
and dark.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec

import numpy as np

from data_schemas.units import HORIZON_MINUTES, QUANTILES
from pipeline.error_grids import PARKES_LOWER, PARKES_UPPER, ZONE_NAMES, clarke_zones, parkes_zones
from pipeline.scored import FloatArray

# Okabe and Ito's palette, distinguishable with every common colour vision, in tones that hold on white and on black.
BLUE, ORANGE, GREEN, PURPLE, RED, SKY = "#2f7fc1", "#e08a00", "#119c77", "#b8679a", "#d3590f", "#5aaedb"
OLIVE = "#8a7a12"
SERIES = (BLUE, ORANGE, GREEN, PURPLE, RED, SKY, OLIVE)
# Another number of each, so that curves beyond the seventh still differ.
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
# Stand-ins that a page replaces by its own colours: hex numbers that nothing else uses.
INK, MUTED, LINE, PAPER = "#1b2430", "#5d6875", "#c9d0d8", "#fefefe"
_TOKENS = {INK: "var(--ink)", MUTED: "var(--muted)", LINE: "var(--line)", PAPER: "var(--paper)"}
_WIDTH, _HEIGHT = 5.6, 3.5
_STYLE = {
    "font.family": "sans-serif",
    "font.size": 10.5,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "lines.linewidth": 1.8,
    "svg.fonttype": "none",
    "figure.facecolor": "none",
}


@dataclass(frozen=True, slots=True)
class Picture:
    """A finished drawing."""

    name: str
    figure: Any

    def png(self) -> bytes:
        """PNG at twice the nominal resolution, on white."""
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="png", dpi=192, facecolor="white", metadata={"Software": None})
        return buffer.getvalue()

    def svg(self) -> str:
        """One <svg> element without size, ids of its own, colours as custom properties."""
        import matplotlib as mpl

        buffer = io.StringIO()
        with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": self.name}):
            self.figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        text = buffer.getvalue()
        text = text[text.index("<svg") :]
        for token, variable in _TOKENS.items():
            text = text.replace(token, variable)
        text = text.replace('id="', f'id="{self.name}-').replace('href="#', f'href="#{self.name}-')
        text = text.replace("url(#", f"url(#{self.name}-")
        head, body = text.split(">", 1)
        # Its own style sheet would reach the whole page: the one rule goes on the element instead.
        body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.DOTALL)
        kept = [part for part in head.split(" ") if not part.startswith(("width=", "height="))]
        rule = "stroke-linejoin:round;stroke-linecap:butt"
        return f'{" ".join(kept)} role="img" style="{rule}">{body}'


Arguments = ParamSpec("Arguments")


def _styled(draw: Callable[Arguments, Picture]) -> Callable[Arguments, Picture]:
    """Draw in the house style, whatever the process has set."""

    @wraps(draw)
    def styled(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Picture:
        import matplotlib as mpl

        with mpl.rc_context({**mpl.rcParamsDefault, **_STYLE}):
            picture = draw(*args, **kwargs)
            picture.figure.draw_without_rendering()
        return picture

    return styled


@dataclass(frozen=True, slots=True)
class Example:
    """One forecast to draw: minutes relative to the issue reading (history <= 0 < truth) and glucose in mg/dL."""

    history: Sequence[tuple[float, float]]
    truth: Sequence[tuple[float, float]]
    forecast: FloatArray
    quantiles: FloatArray


@_styled
def forecast_examples(examples: Sequence[Example]) -> Picture:
    """Forecasts with their 50% and 90% bands beside what happened; up to three panels."""
    shown = examples[:3]
    figure, axes = _canvas(len(shown), height=1.8 * len(shown) + 0.7, sharex=True)
    for axis, example in zip(axes, shown, strict=True):
        _target_range(axis)
        low90, low50, _, high50, high90 = np.moveaxis(np.asarray(example.quantiles), -1, 0)
        axis.fill_between(HORIZON_MINUTES, low90, high90, color=BLUE, alpha=0.18, lw=0, label="90% band")
        axis.fill_between(HORIZON_MINUTES, low50, high50, color=BLUE, alpha=0.35, lw=0, label="50% band")
        axis.plot(HORIZON_MINUTES, example.forecast, color=BLUE, ls="--", label="forecast")
        axis.plot(*zip(*example.history, strict=True), "o", color=INK, ms=3, label="reading")
        if example.truth:
            axis.plot(*zip(*example.truth, strict=True), "o", mfc="none", mec=INK, ms=4, label="what happened")
        axis.axvline(0, color=MUTED, lw=0.9)
        axis.set_ylabel("glucose (mg/dL)")
    axes[-1].set_xlabel("minutes from the forecast")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=3, handlelength=1.6, columnspacing=1.4)
    return _finish("examples", figure, top=1 - 0.52 / figure.get_figheight())


@_styled
def error_grid(truth: FloatArray, forecast: FloatArray, *, kind: str, horizon_minutes: int) -> Picture:
    """Clarke or Parkes (type 1) grid with up to 3000 evenly picked pairs and the share of all pairs in each zone."""
    zones = (clarke_zones if kind == "clarke" else parkes_zones)(truth, forecast)
    figure, (axis,) = _canvas(1, height=4.5)
    axis.grid(visible=False)
    step = max(1, len(truth) // 3000)
    axis.scatter(truth[::step], forecast[::step], s=5, color=BLUE, alpha=0.3, lw=0, rasterized=True)
    lines, labels = _CLARKE if kind == "clarke" else _parkes_lines()
    for line in lines:
        axis.plot(*zip(*line, strict=True), color=INK, lw=1.0)
    axis.plot([0, 400], [0, 400], color=MUTED, lw=0.8, ls=":")
    for x, y, letter in labels:
        axis.text(x, y, letter, color=INK, weight="bold", ha="center", va="center", fontsize=12)
    share = [float(np.mean(zones == z)) if len(zones) else math.nan for z in range(len(ZONE_NAMES))]
    name = "Clarke" if kind == "clarke" else "Parkes type 1"
    shares = " · ".join(_share(*pair) for pair in zip(ZONE_NAMES, share, strict=True))
    axis.set_title(f"{name} at {horizon_minutes} min", pad=22)
    axis.annotate(shares, (0, 1), xycoords="axes fraction", xytext=(0, 7), textcoords="offset points", color=MUTED)
    axis.set(xlim=(0, 400), ylim=(0, 400), xlabel="sensor reading (mg/dL)", ylabel="forecast (mg/dL)")
    axis.set_aspect("equal")
    return _finish(f"{kind}-{horizon_minutes}", figure)


@_styled
def calibration(curves: Mapping[str, Sequence[tuple[float, float]]]) -> Picture:
    """Nominal quantile level against the observed share of readings below it: label (a horizon, a model) -> curve."""
    figure, (axis,) = _canvas(1, height=4.2)
    axis.plot([0, 1], [0, 1], color=MUTED, lw=0.9, ls=":", label="perfect")
    for index, (label, curve) in enumerate(curves.items()):
        axis.plot(*zip(*curve, strict=True), **_line(index), label=label)
    axis.set(
        xlim=(0, 1), ylim=(0, 1), xlabel="nominal level of the quantile", ylabel="share of readings at or below it"
    )
    axis.set_xticks(QUANTILES, [f"{100 * q:.0f}%" for q in QUANTILES])
    axis.set_yticks(QUANTILES, [f"{100 * q:.0f}%" for q in QUANTILES])
    axis.set_aspect("equal")
    axis.legend(loc="upper left")
    return _finish("calibration", figure)


@_styled
def rmse_by_horizon(curves: Mapping[str, Sequence[tuple[int, float]]]) -> Picture:
    """RMSE of each model against the horizon: model -> (minutes, mg/dL)."""
    figure, (axis,) = _canvas(1, height=_HEIGHT + 1)
    for index, (label, curve) in enumerate(curves.items()):
        axis.plot(*zip(*curve, strict=True), **_line(index), label=label)
    axis.set(xlabel="minutes ahead", ylabel="RMSE (mg/dL)", ylim=(0, None))
    axis.set_xticks(sorted({minutes for curve in curves.values() for minutes, _ in curve}))
    figure.legend(loc="outside upper center", ncols=3)
    return _finish("rmse-by-horizon", figure)


@_styled
def rmse_by_range(curves: Mapping[str, Sequence[tuple[str, float]]]) -> Picture:
    """RMSE of each model by the range in which glucose turned out to be: model -> (range, mg/dL)."""
    figure, (axis,) = _canvas(1, height=_HEIGHT + 1)
    for index, (label, curve) in enumerate(curves.items()):
        names, values = zip(*curve, strict=True)
        axis.plot(range(len(names)), values, **_line(index), label=label)
        axis.set_xticks(range(len(names)), names)
    axis.set(xlabel="real reading (mg/dL)", ylabel="RMSE at 30 min (mg/dL)", ylim=(0, None))
    figure.legend(loc="outside upper center", ncols=3)
    return _finish("rmse-by-range", figure)


@_styled
def convergence(curves: Mapping[str, Sequence[tuple[int, float]]], references: Mapping[str, float]) -> Picture:
    """RMSE at 30 minutes after each round: label -> (round, mg/dL), with dotted lines for models that do not change."""
    figure, (axis,) = _canvas(1)
    for index, (label, curve) in enumerate(curves.items()):
        style = {**_line(index), "marker": "", "lw": 2.2 if index == 0 else 1.3}
        axis.plot(*zip(*curve, strict=True), **style, label=label)
    for index, (label, value) in enumerate(references.items()):
        axis.axhline(value, color=MUTED, lw=1.1, ls=(":", "--", "-.")[index % 3], label=label)
    axis.set(xlabel="round", ylabel="RMSE at 30 min (mg/dL)")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(loc="upper right")
    return _finish("convergence", figure)


@_styled
def error_against_epsilon(curve: Sequence[tuple[float, float]], references: Mapping[str, float]) -> Picture:
    """RMSE at 30 minutes against epsilon: (epsilon, mg/dL), with lines for models without privacy or hospitals."""
    figure, (axis,) = _canvas(1)
    axis.plot(*zip(*curve, strict=True), **_line(0), label="federated, private")
    for index, (label, value) in enumerate(references.items()):
        axis.axhline(value, color=MUTED, lw=1.1, ls=(":", "--", "-.")[index % 3], label=label)
    axis.set(xlabel="epsilon per patient, delta 1e-5", ylabel="RMSE at 30 min (mg/dL)", xscale="log")
    axis.set_xticks([epsilon for epsilon, _ in curve], [f"{epsilon:g}" for epsilon, _ in curve])
    axis.minorticks_off()
    axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=1 + len(references), columnspacing=1.0)
    return _finish("error_against_epsilon", figure)


@_styled
def credit_bars(lines: Sequence[tuple[str, float, float, float]]) -> Picture:
    """Contribution of each node: (node, Shapley value, interval low, interval high), mg/dL of RMSE saved."""
    figure, (axis,) = _canvas(1, height=0.42 * len(lines) + 1.1)
    names = [name for name, *_ in lines]
    for row, (_, value, low, high) in enumerate(lines):
        axis.barh(row, value, height=0.58, color=GREEN if value > 0 else MUTED, alpha=0.75)
        axis.plot([low, high], [row, row], color=INK, lw=1.5, marker="|", ms=8)
    axis.axvline(0, color=MUTED, lw=0.9)
    axis.set_yticks(range(len(lines)), names)
    axis.invert_yaxis()
    axis.grid(visible=False, axis="y")
    axis.set_xlabel("contribution (mg/dL of error saved), 95% interval")
    return _finish("credit", figure)


@_styled
def privacy_spend(spend: Mapping[str, Sequence[tuple[int, float]]], ceilings: Mapping[str, float]) -> Picture:
    """Cumulative epsilon of each node after each round; ceilings: label -> epsilon that a node refuses to exceed."""
    figure, (axis,) = _canvas(1)
    for index, (label, curve) in enumerate(spend.items()):
        axis.plot(*zip(*curve, strict=True), **{**_line(index), "marker": ""}, label=label)
    for label, value in ceilings.items():
        axis.axhline(value, color=RED, lw=1.6)
        axis.annotate(
            label,
            (0.01, value),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            color=RED,
        )
    axis.set(
        xlabel="round",
        ylabel="epsilon spent per patient",
        ylim=(0, 1.15 * max([*ceilings.values(), *_heights(spend)], default=1)),
    )
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(loc="lower right", ncols=2)
    return _finish("privacy", figure)


def _heights(curves: Mapping[str, Sequence[tuple[int, float]]]) -> list[float]:
    return [y for curve in curves.values() for _, y in curve]


def _canvas(panels: int, *, height: float = _HEIGHT, sharex: bool = False) -> tuple[Any, Sequence[Any]]:
    """Make a figure of stacked panels, without pyplot: no global state, no display."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, list(figure.subplots(panels, 1, squeeze=False, sharex=sharex)[:, 0])


def _finish(name: str, figure: Any, top: float = 1.0) -> Picture:
    """Leave room above for a legend of the whole figure."""
    figure.get_layout_engine().set(rect=(0, 0, 1, top))
    return Picture(name, figure)


def _line(index: int) -> dict[str, Any]:
    """Colour, dash and marker together, so that no curve is told by its colour alone."""
    return {
        "color": SERIES[index % len(SERIES)],
        "ls": DASHES[index % len(DASHES)],
        "marker": MARKERS[index % len(MARKERS)],
        "ms": 4.5,
    }


def _target_range(axis: Any) -> None:
    axis.axhspan(70, 180, color=GREEN, alpha=0.08, lw=0)


def _share(name: str, share: float) -> str:
    return f"{name} {100 * share:.1f}%"


# Lines that bound the Clarke zones within 400 mg/dL, and where their letters stand.
_CLARKE: tuple[list[list[tuple[float, float]]], list[tuple[float, float, str]]] = (
    [
        [(0, 70), (175 / 3, 70), (400 / 1.2, 400)],
        [(70, 84), (70, 400)],
        [(0, 180), (70, 180)],
        [(70, 180), (290, 400)],
        [(70, 0), (70, 56), (400, 320)],
        [(180, 0), (180, 70), (400, 70)],
        [(240, 70), (240, 180), (400, 180)],
        [(130, 0), (180, 70)],
    ],
    [
        (30, 20, "A"),
        (345, 330, "A"),
        (370, 258, "B"),
        (270, 355, "B"),
        (163, 22, "C"),
        (130, 360, "C"),
        (32, 130, "D"),
        (370, 125, "D"),
        (32, 330, "E"),
        (370, 30, "E"),
    ],
)


def _parkes_lines() -> tuple[list[list[tuple[float, float]]], list[tuple[float, float, str]]]:
    """Collect the Parkes polylines and where the letters stand."""
    letters: list[tuple[float, float, str]] = [
        (30, 20, "A"),
        (345, 330, "A"),
        (370, 240, "B"),
        (230, 370, "B"),
        (370, 130, "C"),
        (138, 370, "C"),
        (370, 40, "D"),
        (76, 370, "D"),
        (20, 370, "E"),
    ]
    return [list(line) for line in (*PARKES_UPPER, *PARKES_LOWER)], letters
