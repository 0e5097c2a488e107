"""Credits over time as inline SVG: one stepped line a hospital, told apart by colour, dash and a name at its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from markupsafe import Markup, escape

WIDTH, HEIGHT = 720, 320
LEFT, RIGHT, TOP, BOTTOM = 56, 150, 14, 36
COLOURS = 8
_LABEL_GAP = 17.0


def credit_chart(epochs: Sequence[str], earned: Mapping[str, Sequence[float]]) -> Markup:
    """Draw credits earned so far, by hospital, after each epoch; `epochs` are the epochs' labels."""
    top = max((line[-1] for line in earned.values() if line), default=0.0) or 1.0
    step = (WIDTH - LEFT - RIGHT) / max(len(epochs), 1)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - value / top * (HEIGHT - TOP - BOTTOM)

    shapes = [_guide(y(top * part), f"{top * part:.3g}") for part in (0.0, 0.5, 1.0)]
    shapes += _ticks(epochs, step)
    ends = _spread({name: y(line[-1]) for name, line in earned.items() if line})
    for number, (name, line) in enumerate(earned.items()):
        points: list[tuple[float, float]] = [(LEFT, y(0.0))]
        for at, value in enumerate(line):
            points += [(LEFT + at * step + step / 2, points[-1][1]), (LEFT + at * step + step / 2, y(value))]
        end = WIDTH - RIGHT
        points.append((end, points[-1][1]))
        drawn = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        shapes.append(f'<polyline class="line s{number % COLOURS}" points="{drawn}"/>')
        if name in ends:
            shapes.append(f'<line class="lead s{number % COLOURS}" x1="{end}" y1="{points[-1][1]:.1f}" x2="{end + 10}" '
                          f'y2="{ends[name]:.1f}"/>')  # fmt: skip
            shapes.append(f'<text class="t{number % COLOURS}" x="{end + 14}" y="{ends[name] + 4.5:.1f}">'
                          f"{escape(name[:14])} {line[-1]:.2f}</text>")  # fmt: skip
    words = "Credits earned so far, by hospital, after each credit epoch: " + ", ".join(
        f"{name} {line[-1]:.2f}" for name, line in earned.items() if line
    )
    head = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(words)}">'
    return Markup(head + "".join(shapes) + "</svg>")  # noqa: S704 numbers and escaped words only


def _guide(y: float, label: str) -> str:
    return (
        f'<line class="guide" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>'
        f'<text x="{LEFT - 8}" y="{y + 4.5:.1f}" text-anchor="end">{escape(label)}</text>'
    )


def _ticks(epochs: Sequence[str], step: float) -> list[str]:
    every = max(1, -(-len(epochs) // 6))
    return [
        f'<text x="{LEFT + at * step + step / 2:.1f}" y="{HEIGHT - 12}" text-anchor="middle">{escape(label)}</text>'
        for at, label in enumerate(epochs)
        if at % every == 0
    ]


def _spread(wanted: Mapping[str, float]) -> dict[str, float]:
    """Heights of the names at the lines' ends, pushed apart so that none covers another."""
    placed: dict[str, float] = {}
    lowest = -1e9
    for name, height in sorted(wanted.items(), key=lambda pair: pair[1]):
        placed[name] = lowest = max(height, lowest + _LABEL_GAP)
    over = max(0.0, lowest - (HEIGHT - BOTTOM)) if placed else 0.0
    return {name: height - over for name, height in placed.items()}
