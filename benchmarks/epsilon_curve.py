"""Held-out error against epsilon, for a plan over the demo's hospitals, and levers tried one by one.

    python -m benchmarks.epsilon_curve OUT_FOLDER [--levers]

Writes curve.json and epsilon-curve.svg (or levers.json) to OUT_FOLDER and prints a table. Real data, public, so exact
errors may be shown; with patients' data they would have to be released privately like anything else.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib as mpl
import torch

from benchmarks.federation import (
    Errors,
    HeadTrainer,
    Hospital,
    Recipe,
    Scorer,
    Weights,
    demo_hospitals,
    federate,
    recipe_of,
)
from pipeline import warm_start
from pipeline.comparison import POOLED_FIT
from pipeline.demo import PLAN
from pipeline.fitting import fit
from pipeline.forecaster import ForecasterSpec
from pipeline.plans import load_plan

EPSILONS: tuple[float | None, ...] = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, None)
SEEDS = (1, 2, 3)
COLUMNS = ("mean_30", "mean_60", "pooled_30", "pooled_60")
Row = dict[str, Any]


def measure(
    name: str, hospitals: Sequence[Hospital], scorer: Scorer, recipe: Recipe, seeds: Sequence[int] = SEEDS
) -> Row:
    """Errors of a recipe over seeds of sampling and noise: mean and standard deviation of each column."""
    begun = time.monotonic()
    runs = [scorer.errors(federate(hospitals, scorer.start, scorer.spec, recipe, seed)) for seed in seeds]
    noise = recipe.calibrated().noise_multiplier
    row = {"name": name, "epsilon": recipe.epsilon, "noise": noise, **summary(runs)}
    print(line(row), f"{(time.monotonic() - begun) / len(runs):5.1f} s a run", flush=True)
    return row


def summary(runs: Sequence[Errors]) -> Row:
    """Mean and standard deviation of each column."""
    values = {c: [getattr(r, c) for r in runs] for c in COLUMNS}
    return {c: mean(v) for c, v in values.items()} | {
        f"{c}_std": stdev(v) if len(v) > 1 else 0.0 for c, v in values.items()
    }


def line(row: Row) -> str:
    """One line of the table."""
    figures = "  ".join(f"{row[c]:6.2f} ± {row[c + '_std']:.2f}" for c in COLUMNS)
    return f"{row['name']:44s} {row['noise']:6.2f}  {figures}"


def curve(hospitals: Sequence[Hospital], scorer: Scorer, recipe: Recipe) -> list[Row]:
    """Public-only, the plan at every epsilon, and the same LSTM pooled without privacy."""
    rows = [fixed("public-only", scorer.errors(scorer.start))]
    for epsilon in EPSILONS:
        name = "same plan, no noise" if epsilon is None else f"epsilon {epsilon:g}"
        rows.append(measure(name, hospitals, scorer, replace(recipe, epsilon=epsilon)))
    pooled = fit(scorer.start, scorer.spec, [h.training for h in hospitals], POOLED_FIT)
    rows.append(fixed("pooled, not private, all weights", scorer.errors(pooled)))
    return rows


def fixed(name: str, errors: Errors) -> Row:
    """Row of a model that was trained once, without privacy."""
    row = {"name": name, "epsilon": None, "noise": 0.0, **summary([errors])}
    print(line(row), flush=True)
    return row


def levers(plan: Recipe) -> dict[str, Recipe]:
    """The plan with one thing changed at a time, always at the plan's epsilon."""
    local = plan.local
    every: dict[str, Recipe] = {"the plan": plan, "the plan, epsilon 2": replace(plan, epsilon=2.0)}
    for clip in (0.05, 0.1, 0.4):
        same_step = local.learning_rate * local.max_grad_norm / clip
        changed = replace(local, max_grad_norm=clip)
        every[f"clip {clip:g}"] = replace(plan, local=changed)
        every[f"clip {clip:g}, rate {same_step:g} (same noise)"] = replace(
            plan, local=replace(changed, learning_rate=same_step)
        )
    for rate in (0.025, 0.1):
        every[f"learning rate {rate:g}"] = replace(plan, local=replace(local, learning_rate=rate))
    for q, rounds in ((0.1, 60), (0.15, 40), (0.6, 10), (1.0, 6)):
        every[f"sample rate {q:g}, {rounds} rounds"] = replace(plan, local=replace(local, sample_rate=q), rounds=rounds)
    every["40 rounds"] = replace(plan, rounds=40)
    every["10 rounds"] = replace(plan, rounds=10)
    for last in (1, 10):
        every[f"average of the last {last}"] = replace(plan, average_last=last)
    for rate in (0.02, 0.05):
        every[f"all weights, learning rate {rate:g}"] = replace(
            plan, local=replace(local, trainable="all", learning_rate=rate)
        )
    return every


def picture(rows: Sequence[Row], out: Path) -> None:
    """Four curves with a band of one standard deviation, and the two lines they lie between."""
    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "islet"
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(13, 3.6))
    private = [r for r in rows if r["epsilon"] is not None]
    titles = ("mean over hospitals, 30 min", "mean over hospitals, 60 min", "pooled, 30 min", "pooled, 60 min")
    for axis, column, title in zip(axes, COLUMNS, titles, strict=True):
        epsilon = [r["epsilon"] for r in private]
        value, spread = [r[column] for r in private], [r[column + "_std"] for r in private]
        axis.plot(epsilon, value, "o-", color="#1f5fa8", label="private federation")
        low = [v - s for v, s in zip(value, spread, strict=True)]
        high = [v + s for v, s in zip(value, spread, strict=True)]
        axis.fill_between(epsilon, low, high, color="#1f5fa8", alpha=0.2, linewidth=0)
        for name, style, color in (
            ("public-only", "--", "#8a3b12"),
            ("same plan, no noise", ":", "#555555"),
            ("pooled, not private, all weights", "-.", "#1b7837"),
        ):
            axis.axhline(next(r[column] for r in rows if r["name"] == name), ls=style, color=color, label=name)
        axis.set_xscale("log", base=2)
        axis.set_xticks(epsilon, [f"{e:g}" for e in epsilon])
        axis.set_xlabel("epsilon (patient, delta 1e-5)")
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("RMSE on held-out people, mg/dL")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=4, frameon=False)
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    figure.savefig(out, metadata={"Date": None})
    plt.close(figure)


def setup(out: Path) -> tuple[list[Hospital], Scorer, Recipe]:
    """Import the sample exports into OUT_FOLDER/nodes once, and encode the held-out windows."""
    torch.set_num_threads(1)
    plan = load_plan(PLAN)
    hospitals = demo_hospitals(out / "nodes", plan.model.history_minutes, seed=1)
    spec = ForecasterSpec(hidden_size=plan.model.hidden_size)
    start: Weights = warm_start.load()
    hospitals = [replace(h, heads=HeadTrainer(h.training, start, spec)) for h in hospitals]
    return hospitals, Scorer(hospitals, start, spec), recipe_of(plan, plan.privacy.epsilon)


def main(arguments: Sequence[str]) -> int:
    """Measure the curve, or with --levers the levers."""
    if not arguments:
        sys.stderr.write("usage: python -m benchmarks.epsilon_curve OUT_FOLDER [--levers]\n")
        return 2
    out = Path(arguments[0])
    out.mkdir(parents=True, exist_ok=True)
    hospitals, scorer, plan = setup(out)
    print(f"{'':44s}  noise  " + "  ".join(f"{c:>13s}" for c in COLUMNS))
    if "--levers" in arguments:
        rows = [
            measure(name, hospitals, scorer, recipe, SEEDS if recipe.local.trainable == "head" else SEEDS[:1])
            for name, recipe in levers(plan).items()
        ]
        (out / "levers.json").write_text(json.dumps(rows, indent=1))
        return 0
    rows = curve(hospitals, scorer, plan)
    (out / "curve.json").write_text(json.dumps({"plan": asdict(plan), "rows": rows}, indent=1))
    picture(rows, out / "epsilon-curve.svg")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
