"""How far the private federation is from the best LSTM that pooled readings allow, and whether it beats public-only.

    python -m benchmarks.best_pooled OUT_FOLDER

LSTMs without privacy of several sizes, from the public start and from scratch, learn from everybody's readings at once;
beside them the two shipped plans, three seeds each. "Above the best" is against the best of the pooled ones in each
column by itself, chosen on the very people it is scored on: that flatters the pooled side. Real data, public, so exact
errors may be shown.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.epsilon_curve import COLUMNS, Row, fixed, measure, setup
from benchmarks.federation import Hospital, Scorer, recipe_of
from pipeline.comparison import POOLED_FIT
from pipeline.demo import PLAN
from pipeline.fitting import FitPlan, fit
from pipeline.forecaster import Forecaster, ForecasterSpec, flatten
from pipeline.plans import load_plan

# Hidden size and steps from scratch; steps from the public start, which has 32 units.
SCRATCH = ((16, 2000), (32, 2000), (64, 2000), (64, 5000), (128, 2000))
WARM_STEPS = (600, 1800)
PLANS = (PLAN, PLAN.with_name("epsilon-2.toml"))


def pooled(hospitals: Sequence[Hospital], scorer: Scorer) -> Iterator[Row]:
    """Train and score each LSTM without privacy."""
    training = [h.training for h in hospitals]
    for steps in WARM_STEPS:
        weights = fit(scorer.start, scorer.spec, training, replace(POOLED_FIT, steps=steps))
        yield fixed(f"pooled, {scorer.spec.hidden_size} units, public start, {steps} steps", scorer.errors(weights))
    for hidden, steps in SCRATCH:
        spec, begun = ForecasterSpec(hidden_size=hidden), time.monotonic()
        weights = fit(flatten(Forecaster(spec)), spec, training, FitPlan(steps=steps))
        row = fixed(f"pooled, {hidden} units, scratch, {steps} steps", Scorer(hospitals, weights, spec).errors(weights))
        yield row | {"seconds": time.monotonic() - begun}


def verdict(private: Row, best: dict[str, float], public: Row) -> str:
    """Percent above the best pooled and below public-only, column by column."""
    above = " / ".join(f"{100 * (private[c] / best[c] - 1):.1f}" for c in COLUMNS)
    below = " / ".join(f"{100 * (1 - private[c] / public[c]):.2f}" for c in COLUMNS)
    return f"{private['name']}: {above}% above the best pooled LSTM, {below}% below public-only"


def main(arguments: Sequence[str]) -> int:
    """Print the table and what it says; columns are mean over hospitals and pooled, at 30 and 60 minutes."""
    if not arguments:
        sys.stderr.write("usage: python -m benchmarks.best_pooled OUT_FOLDER\n")
        return 2
    out = Path(arguments[0])
    out.mkdir(parents=True, exist_ok=True)
    hospitals, scorer, _ = setup(out)
    print(f"{'':44s}  noise  " + "  ".join(f"{c:>13s}" for c in COLUMNS))
    public = fixed("public-only", scorer.errors(scorer.start))
    plans = {path.stem: load_plan(path) for path in PLANS}
    private = [
        measure(f"plan {name}, epsilon {p.privacy.epsilon:g}", hospitals, scorer, recipe_of(p, p.privacy.epsilon))
        for name, p in plans.items()
    ]
    open_rows = list(pooled(hospitals, scorer))
    best = {c: min(row[c] for row in open_rows) for c in COLUMNS}
    for row in private:
        print(verdict(row, best, public))
    (out / "best-pooled.json").write_text(json.dumps([public, *private, *open_rows], indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
