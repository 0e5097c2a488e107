"""Clip, learning rate and horizon curves, chosen on PUBLIC readings only: a make-believe federation of public people.

    python -m benchmarks.public_calibration PHYSIOCGM.csv OUT_FOLDER [EPSILON]

Without EPSILON every clip at every step size (learning rate x clip) at the demo plan's epsilon; with it every number of
horizon curves at every step size at that epsilon, the clip that of the plan.

Three of the nine public people make a warm start of their own (the shipped one has seen all nine). Four others, cut
into spells of two days, play the patients of six hospitals of the demo's declared sizes; half of the spells are moved
to the range of people without diabetes, as most of the demo's patients are. The last two people, as they are and moved,
are held out. Noise is that of the demo's plan. No hospital's reading takes part.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.epsilon_curve import measure
from benchmarks.federation import HeadTrainer, Hospital, Scorer, recipe_of
from pipeline import warm_start
from pipeline.demo import HELDOUT_FRACTION, PLAN, SITES
from pipeline.fitting import FitPlan, fit
from pipeline.forecaster import Forecaster, ForecasterSpec, flatten, unflatten, whiten
from pipeline.plans import load_plan
from pipeline.private_training import LocalPlan
from pipeline.windows import Series, WindowSpec, cut_windows

STEPS = 1500
SPELL_SECONDS = 2 * 24 * 3600
CALM_FACTOR = 0.4
CALM_MEAN_MG_DL = 100.0
CLIPS = (0.05, 0.1, 0.2, 0.4)
STEP_SIZES = (0.0025, 0.005, 0.01, 0.02, 0.04)
CURVES = (1, 2, 3, 12)


def calm(series: Series) -> Series:
    """The same people as if without diabetes: level and spread smaller, as in the warm start's augmentation."""
    glucose = CALM_MEAN_MG_DL + CALM_FACTOR * (series.glucose_mg_dl - series.glucose_mg_dl.mean())
    return replace(series, glucose_mg_dl=glucose.clip(40, 400).astype(np.float32))


def spells(series: Series, seconds: int) -> Series:
    """Cut each person into make-believe people of `seconds` each."""
    owner = np.repeat(np.arange(len(series.patients)), np.diff(series.starts))
    block = owner * 10_000 + (series.time_s - series.time_s[series.starts[owner]]) // seconds
    names, first = np.unique(block, return_index=True)
    starts = np.append(first, len(block)).astype(np.int64)
    return Series(tuple(f"{n:06d}" for n in names), starts, series.time_s, series.glucose_mg_dl)


def start_of(series: Series, spec: ForecasterSpec) -> np.ndarray:
    """A warm start of fewer people and steps by the recipe of the shipped one, float32[D]."""
    sources = warm_start.sources(series)
    plan = FitPlan(steps=STEPS, weights=warm_start.SHARES)
    model = unflatten(fit(flatten(Forecaster(spec)), spec, sources, plan, warm_start.shrunk), spec)
    draw = np.random.default_rng(0)
    picked = [warm_start.shrunk(draw, w.gather(draw.choice(w.anchors, 1000))).x for w in sources]
    whiten(model, np.concatenate(picked))
    return flatten(model)


def hospitals(series: Series, spec: WindowSpec) -> list[Hospital]:
    """Six hospitals of the demo's sizes; the two with type 1 first, the others' people made calm."""
    people = series.patients
    pieces = {"varied": spells(series.select(people[3:7]), SPELL_SECONDS)}
    pieces["calm"] = calm(pieces["varied"])
    held = {"varied": series.select(people[7:])}
    held["calm"] = calm(held["varied"])
    draw, made = np.random.default_rng(0), []
    for site in SITES:
        kind = "varied" if site.name in {"arizona", "madrid", "manchester"} else "calm"
        wanted = site.people - round(site.people * HELDOUT_FRACTION)
        names = draw.choice(pieces[kind].patients, min(wanted, len(pieces[kind].patients)), replace=False)
        training = cut_windows(pieces[kind].select([str(n) for n in names]), spec)
        made.append(Hospital(site.name, wanted, training, cut_windows(held[kind], spec)))
    return made


def choices(local: LocalPlan, curves: bool) -> dict[str, LocalPlan]:
    """Every setting to compare."""
    if curves:
        return {
            f"{number} curves, rate {size / local.max_grad_norm:g}": replace(
                local, horizon_curves=number, learning_rate=size / local.max_grad_norm
            )
            for number in CURVES
            for size in STEP_SIZES
        }
    return {
        f"clip {clip:g}, rate {size / clip:g}": replace(local, max_grad_norm=clip, learning_rate=size / clip)
        for clip in CLIPS
        for size in STEP_SIZES
    }


def main(arguments: Sequence[str]) -> int:
    """Measure every setting and print the best."""
    if len(arguments) not in (2, 3):
        sys.stderr.write("usage: python -m benchmarks.public_calibration PHYSIOCGM.csv OUT_FOLDER [EPSILON]\n")
        return 2
    torch.set_num_threads(1)
    out = Path(arguments[1])
    out.mkdir(parents=True, exist_ok=True)
    plan = load_plan(PLAN)
    series, spec = warm_start.read_public(Path(arguments[0])), ForecasterSpec(hidden_size=plan.model.hidden_size)
    start = start_of(series.select(series.patients[:3]), spec)
    sites = hospitals(series, WindowSpec(history_minutes=plan.model.history_minutes))
    sites = [replace(h, heads=HeadTrainer(h.training, start, spec)) for h in sites]
    epsilon = float(arguments[2]) if len(arguments) == 3 else plan.privacy.epsilon
    scorer, recipe = Scorer(sites[:2], start, spec), recipe_of(plan, epsilon)
    print("public start", scorer.errors(start), flush=True)
    rows = [
        measure(name, sites, scorer, replace(recipe, local=local), (1, 2))
        for name, local in choices(recipe.local, curves=len(arguments) == 3).items()
    ]
    (out / "calibration.json").write_text(json.dumps(rows, indent=1))
    best = min(rows, key=lambda row: row["mean_30"] + row["mean_60"])
    print("best by mean over both kinds of people, 30 and 60 minutes:", best["name"])
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
