"""Does scoring a round cost less than training it? Eight hospitals, 256 coalitions, one thread, the same run.

    python -m benchmarks.scoring_cost [--nodes DIR]

The people of the sample exports are dealt to eight hospitals: each trains one round of the demo's plan on its own and
scores every coalition on its own held-out people. The ratio of the two is the figure; seconds depend on the machine.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.credit import joined
from data_schemas.plan import TrainingPlan
from hospital_node.cohorts import held_out_windows, training_windows
from hospital_node.folder import NodeFolder
from hospital_node.scoring import coalition_utilities, heldout_of, weighted_steps
from pipeline.demo import PLAN, SITES
from pipeline.forecaster import ForecasterSpec
from pipeline.noise import SeededNoise
from pipeline.plans import load_plan
from pipeline.private_training import LocalPlan, train_steps
from pipeline.shapley import game_of
from pipeline.windows import Series, WindowSpec, cut_windows

HOSPITALS = 8


def dealt(series: Series) -> list[Series]:
    """Deal people to the hospitals in turn."""
    return [series.select(list(series.patients[place::HOSPITALS])) for place in range(HOSPITALS)]


def measure(
    training: Series, heldout: Series, plan: TrainingPlan, start: np.ndarray, hospitals: int
) -> dict[str, float]:
    """CPU seconds of a round's training and scoring, summed over hospitals, the better of two repeats."""
    spec, model = WindowSpec(history_minutes=plan.model.history_minutes), ForecasterSpec(plan.model.hidden_size)
    seconds = {"train": np.inf, "score": np.inf}
    parts = list(zip(dealt(training), dealt(heldout), strict=True))
    windows = [(cut_windows(own, spec), heldout_of(cut_windows(aside, spec), 32)) for own, aside in parts]
    game, local = game_of(hospitals, b"cost"), LocalPlan.of(plan, plan.privacy.noise_multiplier)
    for repeat in range(2):
        begun = time.process_time()
        updates = [
            train_steps(start, model, own, local, len(own.series.patients), SeededNoise(repeat)).delta
            for own, _ in windows
        ]
        seconds["train"] = min(seconds["train"], time.process_time() - begun)
        stacked = np.stack([updates[place % HOSPITALS] for place in range(hospitals)])
        begun = time.process_time()
        for _, aside in windows:
            steps = weighted_steps(stacked, np.full(hospitals, 1 / hospitals), 1.0)
            game.values(coalition_utilities(start, steps, game.coalitions, aside, plan.model.hidden_size))
        seconds["score"] = min(seconds["score"], time.process_time() - begun)
    return seconds


def main() -> None:
    """Measure heads alone and the whole model, eight hospitals and (sampled) twelve."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=Path, default=Path("demo-run/nodes"), help="node folders that the demo made")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    plan = load_plan(PLAN, rounds=10, seed=1)
    start = np.load(Path(__file__).parents[1] / "pipeline" / "warm_start.npz", allow_pickle=False)["weights"]
    trained, aside = [], []
    for site in SITES:
        with NodeFolder.open(asked.nodes / site.name) as node:
            trained.append(training_windows(node, plan.model.history_minutes).series)
            aside.append(held_out_windows(node, plan.model.history_minutes).series)
    training, heldout = joined(trained), joined(aside)
    for trainable in ("head", "all"):
        changed = plan.model_copy(update={"local": plan.local.model_copy(update={"trainable": trainable})})
        for hospitals in (HOSPITALS, 12) if trainable == "head" else (HOSPITALS,):
            s = measure(training, heldout, changed, start, hospitals)
            print(
                f"{trainable:>4}, {hospitals:>2} updates, {len(heldout.patients)} held-out people: training"
                f" {s['train']:.2f} s, scoring {s['score']:.2f} s, ratio {s['score'] / s['train']:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
