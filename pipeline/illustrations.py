"""The pictures of a finished run, with what each one shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data_schemas.units import HORIZON_MINUTES
from pipeline import plots
from pipeline.comparison import COLUMNS, Cohort, Comparison, lstm, quick_rmse_30
from pipeline.evaluation import SCORED_MINUTES
from pipeline.forecaster import ForecasterSpec
from pipeline.report import CreditRow, Illustration
from pipeline.scored import coverage_curve
from pipeline.windows import Float32

EXAMPLES = 3


@dataclass(frozen=True, slots=True)
class Story:
    """What a run did besides its scores.

    weights and references: float32[D]; curve: round -> hospital -> RMSE at 30 minutes in mg/dL;
    spend: hospital -> (round, epsilon); at_epsilon: epsilon -> float32[D], the plan's own among them.
    """

    spec: ForecasterSpec
    weights: Float32
    references: Mapping[str, Float32]
    curve: Mapping[int, Mapping[str, float]]
    spend: Mapping[str, Sequence[tuple[int, float]]]
    ceiling: float
    credit: Sequence[CreditRow]
    at_epsilon: Mapping[float, Float32]


def illustrate(cohorts: Sequence[Cohort], compared: Comparison, story: Story) -> tuple[Illustration, ...]:
    """Forecasts, error grid, error by horizon, by round and by epsilon, calibration, credit and privacy spend."""
    ours, seen = compared.ours, compared.ours.mask[:, 5]
    mean = [(number, float(np.mean(list(errors.values())))) for number, errors in sorted(story.curve.items())]
    levels = {label: _mean_error(weights, cohorts, story) for label, weights in story.references.items()}
    by_epsilon = [(epsilon, _mean_error(weights, cohorts, story)) for epsilon, weights in story.at_epsilon.items()]
    by_model = {
        c.label: [(m, compared.evaluations[c.label].pooled.at(m).rmse) for m in SCORED_MINUTES] for c in COLUMNS
    }
    bars = [(r.node, r.shapley_mg_dl, r.interval_low_mg_dl, r.interval_high_mg_dl) for r in story.credit]
    return (
        Illustration(
            "Forecasts of held-out patients",
            "Forecast, 50% and 90% bands against what happened; picked by position in the data, not by fit.",
            plots.forecast_examples([_example(c, story) for c in _most_variable(cohorts)]),
        ),
        Illustration(
            "Clarke error grid, 30 minutes",
            "Federated model on all held-out people.",
            plots.error_grid(ours.truth[seen, 5], ours.forecast[seen, 5], kind="clarke", horizon_minutes=30),
        ),
        Illustration("Error by horizon", "Pooled held-out people, lower is better.", plots.rmse_by_horizon(by_model)),
        Illustration(
            "Convergence",
            "Held-out RMSE at 30 minutes after each round: mean over hospitals, an even pick of each person's windows.",
            plots.convergence({"federated": mean}, levels),
        ),
        Illustration(
            "Error against privacy",
            "The same plan at other epsilons, one run each: mean over hospitals, an even pick of everyone's windows.",
            plots.error_against_epsilon(sorted(by_epsilon), levels),
        ),
        Illustration(
            "Calibration",
            "Share of readings below each quantile.",
            plots.calibration({f"{m} min": coverage_curve(ours, m) for m in (30, 60)}),
        ),
        Illustration(
            "Credit",
            "Shapley value of each hospital's updates with the 95% interval of the privacy noise.",
            plots.credit_bars(bars),
        ),
        Illustration(
            "Privacy spend",
            "Patient-level epsilon of each hospital's training cohort at delta 1e-5.",
            plots.privacy_spend(story.spend, {"ceiling": story.ceiling}),
        ),
    )


def _mean_error(weights: Float32, cohorts: Sequence[Cohort], story: Story) -> float:
    return float(np.mean([quick_rmse_30(weights, story.spec, c.heldout) for c in cohorts]))


def _most_variable(cohorts: Sequence[Cohort]) -> list[Cohort]:
    """The hospitals whose held-out glucose varies most: there a forecast has something to show."""
    spread = [float(np.std(c.heldout.series.glucose_mg_dl)) for c in cohorts]
    return [cohorts[i] for i in np.argsort(spread)[::-1][:EXAMPLES]]


def _example(cohort: Cohort, story: Story) -> plots.Example:
    """The window in the middle of those of the hospital that have a reading at most horizons."""
    anchors, series = cohort.heldout.anchors, cohort.heldout.series
    filled = cohort.heldout.gather(anchors).mask.sum(axis=1)
    fullest = np.flatnonzero(filled == filled.max())
    row = int(anchors[fullest[len(fullest) // 2]])
    chosen = cohort.heldout.gather(np.array([row]))
    forecast, quantiles = lstm(story.weights, story.spec)(chosen)
    before = slice(int(series.starts[np.searchsorted(series.starts, row, side="right") - 1]), row + 1)
    minutes = (series.time_s[before] - series.time_s[row]) / 60.0
    past = [(float(m), float(g)) for m, g in zip(minutes, series.glucose_mg_dl[before], strict=True) if m >= -180]
    truth = [(float(h), float(y)) for h, y, m in zip(HORIZON_MINUTES, chosen.y[0], chosen.mask[0], strict=True) if m]
    if quantiles is None:
        raise TypeError("an LSTM forecasts quantiles")
    return plots.Example(past, truth, forecast[0], quantiles[0])
