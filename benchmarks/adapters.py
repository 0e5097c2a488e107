"""Low-rank adapters inside the LSTM as a lever under privacy, beside heads alone and all weights.

    python -m benchmarks.adapters OUT_FOLDER

OUT_FOLDER/nodes keeps the imported sample exports, as for `benchmarks.epsilon_curve`. An adapter adds A D to the LSTM's
weights [4H, F+1+H]: D [rank, F+1+H] is fixed, the first right singular vectors of the public start's own weights, and A
[4H, rank] is trained with the gates' biases and the heads. So noise falls on few numbers (FFA-LoRA: Sun et al. 2024).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.epsilon_curve import Row, line, measure, setup, summary
from benchmarks.federation import Errors, Hospital, Recipe, Scorer, Weights
from pipeline.fitting import trainer
from pipeline.forecaster import Forecaster, ForecasterSpec, flatten, load_flat
from pipeline.gate_tap import last_hidden_recorded
from pipeline.noise import SeededNoise
from pipeline.private_training import LocalPlan, _PatientSamples, _PrivateRound

SEEDS = (1, 2)
RANKS = (1, 4)
CURVES = 2
EPSILONS = (2.0, 8.0)


class Adapted(Forecaster):
    """A forecaster whose LSTM changes only along `directions` [rank, F+1+H], and in its biases."""

    def __init__(self, start: Weights, spec: ForecasterSpec, rank: int) -> None:
        super().__init__(spec)
        load_flat(self, start)
        self.register_buffer("public", self.tap.joined())
        self.register_buffer("directions", torch.linalg.svd(self.public.T, full_matrices=False)[2][:rank].clone())
        self.adapter = nn.Linear(rank, 4 * spec.hidden_size)
        nn.init.zeros_(self.adapter.weight)
        nn.init.zeros_(self.adapter.bias)

    @torch.no_grad()
    def fold(self) -> None:
        """Write public weights plus adapter into the LSTM."""
        changed = self.public + self.directions.T @ self.adapter.weight.T
        changed[self.tap.features] += self.adapter.bias
        for parameter, value in self.tap.split(changed).items():
            parameter.copy_(value)

    def _last_hidden(self, x: Tensor) -> Tensor:
        self.fold()
        hidden, [(inputs, gates)] = last_hidden_recorded(x, [self.tap])
        if self.book is not None:
            along = inputs @ self.directions.T
            self.book.note_tap(self.adapter, torch.cat([along, torch.ones_like(along[..., :1])], dim=-1), gates)
        return hidden

    def trained(self) -> list[nn.Parameter]:
        """Adapter and heads."""
        return [p for part in (self.adapter, self.mean_head, self.quantile_head) for p in part.parameters()]


def _round(
    model: Adapted, state: Sequence[Tensor], plan: LocalPlan, hospital: Hospital, source: SeededNoise
) -> list[Tensor]:
    """What one hospital's round adds to the trained parameters."""
    with torch.no_grad():
        for parameter, value in zip(model.trained(), state, strict=True):
            parameter.copy_(value)
    samples = _PatientSamples(hospital.training, plan, source)
    trainer().fit(_PrivateRound(model, plan, hospital.declared, source), samples)
    return [p.detach() - value for p, value in zip(model.trained(), state, strict=True)]


def federate(hospitals: Sequence[Hospital], scorer: Scorer, recipe: Recipe, rank: int, seed: int) -> Errors:
    """Train all rounds and score the average of the last models."""
    plan, declared = recipe.calibrated(), sum(h.declared for h in hospitals)
    model, last = Adapted(scorer.start, scorer.spec, rank), list[list[Tensor]]()
    state = [p.detach().clone() for p in model.trained()]
    for number in range(recipe.rounds):
        sources = [SeededNoise(seed * 1_000_003 + number * 101 + index) for index in range(len(hospitals))]
        moved = [_round(model, state, plan, h, s) for h, s in zip(hospitals, sources, strict=True)]
        shares = [h.declared / declared for h in hospitals]
        state = [
            value + sum(share * delta[i] for share, delta in zip(shares, moved, strict=True))
            for i, value in enumerate(state)
        ]
        last = [*last, state][-recipe.average_last :]
    with torch.no_grad():
        for parameter, values in zip(model.trained(), zip(*last, strict=True), strict=True):
            parameter.copy_(torch.stack(values).mean(dim=0))
    model.fold()
    return scorer.errors(flatten(model)[: len(scorer.start)])


def adapted(hospitals: Sequence[Hospital], scorer: Scorer, recipe: Recipe, rank: int) -> Row:
    """Errors over seeds."""
    begun = time.monotonic()
    runs = [federate(hospitals, scorer, recipe, rank, seed) for seed in SEEDS]
    name = f"adapters of rank {rank}, epsilon {recipe.epsilon:g}"
    row = {"name": name, "epsilon": recipe.epsilon, "noise": recipe.calibrated().noise_multiplier, **summary(runs)}
    print(line(row), f"{(time.monotonic() - begun) / len(runs):5.1f} s a run", flush=True)
    return row


def main(arguments: Sequence[str]) -> int:
    """Print a row for heads alone, adapters and all weights at each epsilon."""
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m benchmarks.adapters OUT_FOLDER\n")
        return 2
    out = Path(arguments[0])
    out.mkdir(parents=True, exist_ok=True)
    hospitals, scorer, plan = setup(out)
    rows = []
    plan = replace(plan, local=replace(plan.local, horizon_curves=CURVES))
    for epsilon in EPSILONS:
        recipe = replace(plan, epsilon=epsilon)
        rows.append(measure(f"heads alone, epsilon {epsilon:g}", hospitals, scorer, recipe, SEEDS))
        rows += [adapted(hospitals, scorer, recipe, rank) for rank in RANKS]
        everything = replace(recipe, local=replace(recipe.local, trainable="all"))
        rows.append(measure(f"all weights, epsilon {epsilon:g}", hospitals, scorer, everything, SEEDS))
    (out / "adapters.json").write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
