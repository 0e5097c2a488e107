"""Drift: how a new import differs from what the node held before. Stays at the node.

The distribution is compared by the population stability index over bins of 10 mg/dL, half a reading added to each, and
its usual limits 0.1 and 0.25 (Siddiqi, "Credit Risk Scorecards", 2006, ch. 10). The other limits are ours: a changed
sensor, unit or kind of patient exceeds them, and a new month of the same people does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from hospital_node.portrait import Portrait

Level = Literal["as before", "look at it", "far off"]
LEVELS: tuple[Level, ...] = ("as before", "look at it", "far off")
# Fewer people differ from a cohort as persons do.
FEW_PEOPLE = 5
_BIN_MG_DL = 10


@dataclass(frozen=True, slots=True)
class Difference:
    """One measure of the past and of the new import, as people read them."""

    what: str
    before: str
    now: str
    level: Level


@dataclass(frozen=True, slots=True)
class Drift:
    """The verdict is the worst level of all measures."""

    verdict: Level
    differences: tuple[Difference, ...]
    few_people: bool

    @property
    def sentence(self) -> str:
        """The verdict in words."""
        found = ", ".join(d.what for d in self.differences if d.level == self.verdict)
        told = {
            "as before": "This import looks like what was here before.",
            "look at it": f"This import differs from what was here before: {found}.",
            "far off": f"This import is far off what was here before: {found}. Check layout, unit, zone and device.",
        }[self.verdict]
        few = f" It holds fewer than {FEW_PEOPLE} people: one person differs from a cohort more than a month does."
        return told + (few if self.few_people and self.verdict != "as before" else "")


def drift(new: Portrait, past: Portrait) -> Drift | None:
    """Compare an import with the past; None when either holds no readings."""
    if not new.readings or not past.readings:
        return None
    index = stability_index(new, past)
    differences = [
        Difference("distribution", "", f"stability index {index:.2f}", _level(index, 0.1, 0.25)),
        _shift("median", past.median_mg_dl, new.median_mg_dl, (15, 40), "{:.0f} mg/dL"),
        _interval(past.usual_minutes, new.usual_minutes),
        _shift("share missing", past.share_missing, new.share_missing, (0.1, 0.3), "{:.1%}"),
    ]
    for name, low, high in (("below 70 mg/dL", 0, 69), ("70 to 180 mg/dL", 70, 180), ("above 180 mg/dL", 181, 400)):
        differences.append(_shift(name, past.share(low, high), new.share(low, high), (0.1, 0.25), "{:.1%}"))
    worst = max(differences, key=lambda difference: LEVELS.index(difference.level)).level
    return Drift(worst, tuple(differences), new.people < FEW_PEOPLE)


def stability_index(new: Portrait, past: Portrait) -> float:
    """Sum over the bins of (p - q) ln(p / q), p and q the shares of the new and the past readings."""
    p, q = (found.bins(_BIN_MG_DL) + 0.5 for found in (new, past))
    p, q = p / p.sum(), q / q.sum()
    return float(((p - q) * np.log(p / q)).sum())


def _level(value: float, look: float, far: float) -> Level:
    return LEVELS[int(value > look) + int(value > far)]


def _shift(what: str, before: float, now: float, limits: tuple[float, float], form: str) -> Difference:
    return Difference(what, form.format(before), form.format(now), _level(abs(now - before), *limits))


def _interval(before: float, now: float) -> Difference:
    """A sensor of another interval is at least half as fast or twice as fast."""
    if np.isnan(before) or np.isnan(now):
        return Difference("interval", _minutes(before), _minutes(now), "as before")
    ratio = max(before, now) / max(min(before, now), 1)
    return Difference("interval", _minutes(before), _minutes(now), _level(ratio, 1.2, 1.9))


def _minutes(value: float) -> str:
    return "unknown" if np.isnan(value) else f"{value:.0f} min"
