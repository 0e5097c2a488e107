"""The comparison beside every result: the same held-out people, scored under every model a reader would ask about.

Non-private models (ridge, local-only, pooled) exist only to be compared with; where readings may not be pooled, neither
can they be made. Each LSTM starts from the same public warm start and trains to the same recipe, so they differ only in
whose readings they saw and under what privacy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.evaluation import Evaluation
from pipeline.fitting import FitPlan, fit
from pipeline.forecaster import ForecasterSpec, predict, unflatten
from pipeline.membership import attack
from pipeline.model_card import CardMembership
from pipeline.report import ModelColumn, ResultRow
from pipeline.scorecard import Fold, Scorecard, alike, baselines, score
from pipeline.scored import Predict, Scored
from pipeline.windows import Float32, Windows

OURS, PERSONAL = "federated", "personal"
COLUMNS = (
    ModelColumn("persistence", "the last reading, for ever"),
    ModelColumn("ridge", "ridge regression on 24 readings, hospitals' readings pooled, no privacy"),
    ModelColumn("local-only", "LSTM, public start, each hospital alone, no privacy"),
    ModelColumn("public-only", "LSTM, public start, never saw a hospital"),
    ModelColumn(OURS, "LSTM, public start, all hospitals, patient-level privacy", is_ours=True),
    ModelColumn(PERSONAL, "the federated model, corrected at the node from each person's own past"),
    ModelColumn("pooled", "LSTM, public start, hospitals' readings pooled, no privacy"),
)
# Steps and rate of the non-private fits, chosen on public people: more steps overfit a hospital of ten patients.
LOCAL_FIT = FitPlan(steps=150, batch_size=256, learning_rate=1e-3)
POOLED_FIT = FitPlan(steps=600, batch_size=256, learning_rate=2e-3)


@dataclass(frozen=True, slots=True)
class Cohort:
    """One hospital's two groups of people; nobody is in both."""

    name: str
    training: Windows
    heldout: Windows


@dataclass(frozen=True, slots=True)
class Comparison:
    """Scores of every model, and who can be told to be in the trained ones."""

    card: Scorecard
    membership: tuple[CardMembership, ...] = ()

    @property
    def evaluations(self) -> dict[str, Evaluation]:
        """Scores by model label."""
        return {label: card.evaluation for label, card in self.card.cards.items()}

    @property
    def ours(self) -> Scored:
        """The federated model's forecasts themselves, for the pictures."""
        return self.card.scored[OURS]


def fit_local(training: Windows, start: Float32, spec: ForecasterSpec) -> Float32:
    """Weights float32[D] of the LSTM that one hospital would train alone, without privacy; from nobody, the start."""
    return fit(start, spec, [training], LOCAL_FIT) if len(training) else start


def fit_pooled(training: Sequence[Windows], start: Float32, spec: ForecasterSpec) -> Float32:
    """Weights float32[D] of the LSTM trained on everybody's readings, without privacy."""
    return fit(start, spec, [w for w in training if len(w)], POOLED_FIT)


def lstm(weights: Float32, spec: ForecasterSpec) -> Predict:
    """Predictor of flat weights float32[D]."""
    model = unflatten(weights, spec).eval()
    return lambda batch: predict(model, batch.x, batch.last)


def compare(
    cohorts: Sequence[Cohort],
    spec: ForecasterSpec,
    *,
    public: Float32,
    federated: Float32,
    pooled: Float32,
    local: Mapping[str, Float32],
) -> Comparison:
    """Score every model of COLUMNS and every baseline on the held-out people of every hospital."""
    everywhere = {"public-only": lstm(public, spec), OURS: lstm(federated, spec), "pooled": lstm(pooled, spec)}
    alone = [lstm(local[c.name], spec) for c in cohorts]
    fold = Fold([c.training for c in cohorts], [(c.name, c.heldout) for c in cohorts])
    card = score(
        [fold],
        lambda f: {**alike({**baselines(f.training), **everywhere}, f), "local-only": alone},
        (OURS, PERSONAL),
    )
    return Comparison(card, attacked(cohorts, spec, public, {OURS: federated, "pooled": pooled}))


def attacked(
    cohorts: Sequence[Cohort], spec: ForecasterSpec, public: Float32, models: Mapping[str, Float32]
) -> tuple[CardMembership, ...]:
    """Membership inference on each model, everybody's training people against everybody's held-out people."""
    inside, outside = [c.training for c in cohorts], [c.heldout for c in cohorts]
    found = {label: attack(weights, public, spec, inside, outside) for label, weights in models.items()}
    return tuple(
        CardMembership(model=label, auc=m.auc, low=m.low, high=m.high, members=m.members, others=m.others)
        for label, m in found.items()
    )


def rows(evaluations: Mapping[str, Evaluation]) -> tuple[ResultRow, ...]:
    """Rows of the results table: each hospital, the mean over hospitals, and everybody pooled."""
    shown = [evaluations[column.label] for column in COLUMNS]
    sites = [
        _row(group.name, group.people, lambda e, h, i=i: e.sites[i].at(h).rmse, shown)  # type: ignore[misc]
        for i, group in enumerate(shown[0].sites)
    ]
    people = shown[0].pooled.people
    mean = _row("mean", people, _mean_over_sites, shown, summary=True)
    return (*sites, mean, _row("pooled", people, lambda e, h: e.pooled.at(h).rmse, shown, summary=True))


def _row(
    name: str, people: int, rmse: Callable[[Evaluation, int], float], shown: Sequence[Evaluation], summary: bool = False
) -> ResultRow:
    return ResultRow(name, people, tuple(rmse(e, 30) for e in shown), tuple(rmse(e, 60) for e in shown), summary)


def _mean_over_sites(evaluation: Evaluation, minutes: int) -> float:
    return next(m.rmse for m in evaluation.mean_over_sites if m.horizon_minutes == minutes)


def margins(evaluations: Mapping[str, Evaluation]) -> Iterator[tuple[str, int, str, float]]:
    """(baseline, minutes, 'mean' or 'pooled', RMSE of ours minus the baseline's): negative where ours is better."""
    ours = evaluations[OURS]
    for label in ("persistence", "ridge", "public-only"):
        for minutes in (30, 60):
            other = evaluations[label]
            yield label, minutes, "mean", _mean_over_sites(ours, minutes) - _mean_over_sites(other, minutes)
            yield label, minutes, "pooled", ours.pooled.at(minutes).rmse - other.pooled.at(minutes).rmse


def quick_rmse_30(weights: Float32, spec: ForecasterSpec, heldout: Windows, per_patient: int = 60) -> float:
    """RMSE in mg/dL at 30 minutes on an even pick of each held-out person's windows: for curves, not for tables."""
    picks = [heldout.anchors[a:b][:: max(1, (b - a) // per_patient)] for a, b in heldout.by_patient()]
    batch = heldout.gather(np.concatenate(picks))
    forecast, seen = lstm(weights, spec)(batch)[0][:, 5], batch.mask[:, 5]
    return float(np.sqrt(np.mean((forecast[seen] - batch.y[seen, 5]) ** 2))) if seen.any() else float("nan")
