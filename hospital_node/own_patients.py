"""The model in use beside the next one, on this hospital's own held-out people. The numbers stay here.

They are exact, so they must not leave: only the hospital's own staff sees them, on the clinic's page.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from data_schemas.errors import IsletError
from data_schemas.units import HORIZON_MINUTES
from hospital_node.cohorts import held_out_windows
from hospital_node.folder import NodeFolder
from pipeline.scored import FloatArray, Scored, level_at, score_windows

if TYPE_CHECKING:
    from pipeline.export import LoadedModel
    from pipeline.windows import Batch, Windows

# Windows of one person: enough for an error, and a bound on the time it takes.
PER_PERSON = 200
# With fewer people an interval over people says nothing.
FEWEST_PEOPLE = 5
_RESAMPLES, _SEED = 1000, 7


@dataclass(frozen=True, slots=True)
class OwnScore:
    """RMSE in mg/dL at 30 and 60 minutes, and the share of readings inside the 80% band at 30 (None without one)."""

    name: str
    version: str
    model_hash: str
    rmse_30: float
    rmse_60: float
    inside_80: float | None


@dataclass(frozen=True, slots=True)
class OwnComparison:
    """Scores on `people` held-out people, `forecasts` forecasts each: last value, champion, challenger.

    gain_30: RMSE of the champion minus the challenger's at 30 minutes, with its 95% interval over people.
    """

    people: int
    forecasts: int
    scores: tuple[OwnScore, ...]
    gain_30: tuple[float, float, float] | None = None

    @property
    def verdict(self) -> str:
        """The comparison in a sentence."""
        if self.gain_30 is None:
            return "No challenger is being served beside it."
        if self.people < FEWEST_PEOPLE:
            return f"{self.people} held-out people are too few to tell which is better."
        gain, low, high = self.gain_30
        names = ("challenger", "champion") if gain > 0 else ("champion", "challenger")
        near, far = sorted((low, high) if gain > 0 else (-high, -low))
        range_told = (
            f"between {near:.2f} and {far:.2f} lower"
            if near > 0
            else f"anything from {-near:.2f} higher to {far:.2f} lower, so no clear difference"
        )
        return (
            f"At 30 minutes the {names[0]}'s error is {abs(gain):.2f} mg/dL lower than the {names[1]}'s; "
            f"for other people like these, {range_told} (95%)."
        )


class OwnPatients:
    """Compares in a thread of its own, once for each pair of models and state of the store."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asked: tuple[object, ...] | None = None
        self._found: OwnComparison | None = None
        self._work: threading.Thread | None = None

    def comparison(
        self, node: NodeFolder, champion: LoadedModel | None, challenger: LoadedModel | None
    ) -> OwnComparison | None:
        """Return the comparison, or None while there is none: ask again a little later."""
        if champion is None:
            return None
        asked = (
            champion.model_hash,
            challenger and challenger.model_hash,
            (node.store / "catalogue.db").stat().st_mtime_ns,
        )
        with self._lock:
            if asked != self._asked:
                self._asked, self._found = asked, None
                self._work = threading.Thread(
                    target=self._compare, args=(asked, node, champion, challenger), name="own-patients", daemon=True
                )
                self._work.start()
            return self._found

    def wait(self) -> None:
        """Wait for the comparison that was asked for last."""
        if self._work is not None:
            self._work.join()

    def _compare(
        self, asked: tuple[object, ...], node: NodeFolder, champion: LoadedModel, challenger: LoadedModel | None
    ) -> None:
        try:
            found = compare(node, champion, challenger)
        except (IsletError, OSError):
            found = None  # the page says that there is none; the store's own commands say why
        with self._lock:
            if self._asked == asked:
                self._found = found


def compare(node: NodeFolder, champion: LoadedModel, challenger: LoadedModel | None = None) -> OwnComparison | None:
    """Score both on an even pick of each held-out person's windows; None where nobody is held out.

    The node may be one whose lock another process holds: only the store and the key of the split are read.
    """
    windows = _picked(held_out_windows(node, champion.spec.history_minutes))
    if not len(windows):
        return None
    ours = score_windows(windows, lambda b: champion.predict(b.x, b.last), "own")
    last = score_windows(windows, _last_value, "own")
    scores = [_score("last value", "", "", last), _score("champion", champion.card.version, champion.model_hash, ours)]
    people = len(np.unique(ours.patient))
    if challenger is None or challenger.spec.history_minutes != champion.spec.history_minutes:
        return OwnComparison(people, len(windows), tuple(scores))
    theirs = score_windows(windows, lambda b: challenger.predict(b.x, b.last), "own")
    scores.append(_score("challenger", challenger.card.version, challenger.model_hash, theirs))
    return OwnComparison(people, len(windows), tuple(scores), _gain(ours, theirs))


def _picked(windows: Windows) -> Windows:
    picks = [windows.anchors[a:b][:: max(1, (b - a) // PER_PERSON)] for a, b in windows.by_patient()]
    offsets = np.concatenate([[0], np.cumsum([len(pick) for pick in picks])]).astype(np.int64)
    anchors = np.concatenate(picks) if picks else windows.anchors
    return replace(windows, anchors=anchors, offsets=offsets)


def _last_value(batch: Batch) -> tuple[FloatArray, None]:
    return np.repeat(batch.last[:, None], len(HORIZON_MINUTES), axis=1), None


def _score(name: str, version: str, model_hash: str, scored: Scored) -> OwnScore:
    inside = None
    if scored.quantiles is not None:
        column = HORIZON_MINUTES.index(30)
        levels, seen = scored.quantiles[:, column], scored.mask[:, column]
        truth = scored.truth[:, column]
        held = (truth >= level_at(levels, 0.1)) & (truth <= level_at(levels, 0.9))
        inside = float(held[seen].mean()) if seen.any() else None
    return OwnScore(name, version, model_hash, _rmse(scored, 30), _rmse(scored, 60), inside)


def _rmse(scored: Scored, minutes: int) -> float:
    column = HORIZON_MINUTES.index(minutes)
    seen = scored.mask[:, column]
    error = (scored.forecast[:, column] - scored.truth[:, column])[seen].astype(np.float64)
    return float(np.sqrt(np.mean(error**2))) if len(error) else float("nan")


def _gain(ours: Scored, theirs: Scored) -> tuple[float, float, float]:
    """Champion's RMSE minus the challenger's at 30 minutes; people are drawn again with replacement."""
    column = HORIZON_MINUTES.index(30)
    seen, person = ours.mask[:, column], ours.patient
    people = np.unique(person)
    sums = np.zeros((3, len(people)))
    for row, value in enumerate(
        (
            (ours.forecast - ours.truth)[:, column].astype(np.float64) ** 2,
            (theirs.forecast - theirs.truth)[:, column].astype(np.float64) ** 2,
            np.ones(len(seen)),
        )
    ):
        sums[row] = np.bincount(np.searchsorted(people, person[seen]), value[seen], minlength=len(people))
    draws = np.random.default_rng(_SEED).integers(0, len(people), (_RESAMPLES, len(people)))
    a, b, count = (part[draws].sum(axis=1) for part in sums)
    kept = count > 0
    spread = np.sqrt(a[kept] / count[kept]) - np.sqrt(b[kept] / count[kept])
    low, high = np.percentile(spread, [2.5, 97.5])
    return _rmse(ours, 30) - _rmse(theirs, 30), float(low), float(high)
