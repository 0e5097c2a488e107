"""Prometheus's text format, version 0.0.4."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

MEDIA_TYPE = "text/plain; version=0.0.4"
Labels = Mapping[str, str]


@dataclass(frozen=True)
class Metric:
    """A metric's name, kind, explanation, and its values by labels."""

    name: str
    kind: Literal["counter", "gauge"]
    about: str
    values: Sequence[tuple[Labels, float]]


def render(metrics: Sequence[Metric]) -> str:
    """Write metrics as text; one without values is left out."""
    lines: list[str] = []
    for metric in metrics:
        if metric.values:
            lines += [f"# HELP {metric.name} {metric.about}", f"# TYPE {metric.name} {metric.kind}"]
            lines += [f"{metric.name}{_labels(labels)} {value:.10g}" for labels, value in metric.values]
    return "\n".join([*lines, ""])


def _labels(labels: Labels) -> str:
    inside = ",".join(f'{name}="{escape_label(value)}"' for name, value in labels.items())
    return f"{{{inside}}}" if inside else ""


def escape_label(text: str) -> str:
    """Escape a label's value."""
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
