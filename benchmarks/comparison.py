"""Our model beside what one would use instead: `python -m benchmarks.comparison [--peer PYTHON] [NODE ...]`.

Every model learns from the same people and forecasts the same windows of the same held-out people. Without arguments
the six sample hospitals are imported into a temporary folder; NODE names node folders of a demo that was run before.
PYTHON is the interpreter of an environment with darts, whose N-HiTS then takes part: the one `make bench` makes, unless
another is named.
"""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks.darts_peer import receive, send
from benchmarks.federation import demo_hospitals
from pipeline.accounting import calibrate
from pipeline.baselines import LAGS, fit_ridge, fit_trees, persistence, ridge, trees
from pipeline.comparison import fit_pooled, lstm
from pipeline.demo import PLAN, windows_of_nodes
from pipeline.evaluation import EventScore, evaluate
from pipeline.noise import SeededNoise
from pipeline.plans import load_plan
from pipeline.private_training import LocalPlan, train_steps
from pipeline.scorecard import plain
from pipeline.scored import Predict, Scored, concat, score_personally, score_windows
from pipeline.warm_start import SPEC, WINDOWS, load
from pipeline.windows import _CHANGE_SCALE_MG_DL, FEATURES, RESIDUAL_SCALE_MG_DL, Batch, Float32, Series, Windows

LSTM_UNITS, LSTM_STEPS = 64, 1500
CALLS = 200
FEDERATED = "islet, federated"
PEER = ".venv-peer/bin/python"

Sites = Mapping[str, tuple[Windows, Windows]]


class PlainLstm(nn.Module):
    """What one writes in an afternoon: nn.LSTM, a linear layer, the change from the last reading."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(len(FEATURES), LSTM_UNITS, batch_first=True)
        self.head = nn.Linear(LSTM_UNITS, len(RESIDUAL_SCALE_MG_DL))
        self.register_buffer("scale", torch.tensor(RESIDUAL_SCALE_MG_DL))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """X [B,T,F] to the change from the last reading [B,12] in mg/dL."""
        change: torch.Tensor = self.head(self.lstm(x)[1][0][-1]) * self.scale
        return change


def fit_plain_lstm(training: Sequence[Windows]) -> Predict:
    """Adam on the masked squared error, windows of all hospitals drawn alike, no privacy, from scratch."""
    torch.manual_seed(0)
    rng, model = np.random.default_rng(0), PlainLstm()
    adam = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, 3e-3, total_steps=LSTM_STEPS)
    share = np.array([len(w) for w in training], dtype=np.float64)
    for _ in range(LSTM_STEPS):
        counts = rng.multinomial(256, share / share.sum())
        parts = [w.gather(rng.choice(w.anchors, c)) for w, c in zip(training, counts, strict=True) if c]
        x, y, last = (torch.from_numpy(np.concatenate([getattr(p, k) for p in parts])) for k in ("x", "y", "last"))
        mask = torch.from_numpy(np.concatenate([p.mask for p in parts])).float()
        loss = (((model(x) + last[:, None] - y) / model.scale).square() * mask).sum() / mask.sum()
        adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        schedule.step()

    def forecast(batch: Batch) -> Float32:
        with torch.inference_mode():
            change = model(torch.from_numpy(batch.x)).numpy()
        clipped: Float32 = np.clip(batch.last[:, None] + change, 40, 400).astype(np.float32)
        return clipped

    return plain(forecast)


def fit_federated(training: Mapping[str, Windows]) -> Predict:
    """The demo's plan: patient-level epsilon 8, full noise at each hospital; Flower and signatures left out."""
    plan = load_plan(PLAN)
    steps = plan.rounds * plan.local.steps_per_round
    noise = calibrate(plan.privacy.epsilon, plan.privacy.delta, plan.privacy.sample_rate, steps)
    local = LocalPlan.of(plan, noise)
    people = {name: len(w.series.patients) for name, w in training.items()}
    sources = {name: SeededNoise(i) for i, name in enumerate(training)}
    weights, kept = load().astype(np.float64), []
    for _ in range(plan.rounds):
        start = weights.astype(np.float32)
        deltas = {n: train_steps(start, SPEC, w, local, people[n], sources[n]).delta for n, w in training.items()}
        weights = weights + sum(people[n] * d.astype(np.float64) for n, d in deltas.items()) / sum(people.values())
        kept.append(weights)
    return lstm(np.mean(kept[-plan.server.average_last_rounds :], axis=0).astype(np.float32), SPEC)


def fit_peer(python: str, training: Sequence[Windows]) -> Predict:
    """N-HiTS of darts in its own process, trained on the same people's readings, linearly interpolated as is usual."""
    peer = subprocess.Popen(  # ends with this process: its stdin closes
        [python, str(Path(__file__).with_name("darts_peer.py"))], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    if peer.stdin is None or peer.stdout is None:
        raise RuntimeError("the peer has no pipes")
    to_peer, from_peer = peer.stdin, peer.stdout
    pieces = [piece for w in training for piece in on_grid(w.series)]
    send(to_peer, np.concatenate(pieces))
    send(to_peer, np.array([len(p) for p in pieces]))
    receive(from_peer)

    def forecast(batch: Batch) -> Float32:
        change = batch.x[:, -LAGS:, FEATURES.index("change_from_last")] * _CHANGE_SCALE_MG_DL
        send(to_peer, batch.last[:, None] + change)
        clipped: Float32 = np.clip(receive(from_peer), 40, 400).astype(np.float32)
        return clipped

    return plain(forecast)


def on_grid(series: Series) -> Iterator[Float32]:
    """Pieces of every person without a gap over 30 minutes, float32[N] every 5 minutes."""
    for begin, end in zip(series.starts[:-1], series.starts[1:], strict=True):
        time_s, glucose = series.time_s[begin:end], series.glucose_mg_dl[begin:end]
        for rows in np.split(np.arange(len(time_s)), np.flatnonzero(np.diff(time_s) > 1800) + 1):
            if len(rows):
                grid = np.arange(time_s[rows[0]], time_s[rows[-1]] + 1, 300)
                yield np.interp(grid, time_s[rows], glucose[rows]).astype(np.float32)


def contestants(training: Mapping[str, Windows], peer: str | None) -> dict[str, Callable[[], Predict]]:
    """Label to what trains the model; calling it is timed."""
    every = list(training.values())

    def fitted_ridge() -> Predict:
        model = fit_ridge(every)
        return plain(lambda batch: ridge(model, batch))

    def fitted_trees() -> Predict:
        model = fit_trees(every)
        return plain(lambda batch: trees(model, batch))

    published = {} if peer is None else {"N-HiTS of darts": lambda: fit_peer(peer, every)}
    return {
        "persistence": lambda: plain(persistence),
        "ridge on 24 lags": fitted_ridge,
        "gradient-boosted trees": fitted_trees,
        f"nn.LSTM-{LSTM_UNITS} from scratch": lambda: fit_plain_lstm(every),
        **published,
        "islet, public start only": lambda: lstm(load(), SPEC),
        "islet, pooled, no privacy": lambda: lstm(fit_pooled(every, load(), SPEC), SPEC),
        f"{FEDERATED}, epsilon 8": lambda: fit_federated(training),
    }


def sites_of(homes: Sequence[Path]) -> Sites:
    """(training, held-out) windows by hospital: of these nodes, else of the sample exports, split as the demo does."""
    if homes:
        return windows_of_nodes(homes, WINDOWS.history_minutes)
    with tempfile.TemporaryDirectory() as scratch:
        hospitals = demo_hospitals(Path(scratch), WINDOWS.history_minutes, seed=1)
        return {h.name: (h.training, h.heldout) for h in hospitals}


def latency_ms(predict_one: Predict, batch: Batch) -> float:
    """Median over single forecasts from a window that is already cut."""
    one = Batch(batch.x[:1], batch.y[:1], batch.mask[:1], batch.last[:1])
    taken = []
    for _ in range(CALLS):
        started = time.perf_counter()
        predict_one(one)
        taken.append(time.perf_counter() - started)
    return 1e3 * float(np.median(taken))


def lines(label: str, train: Callable[[], Predict], sites: Sites) -> Iterator[str]:
    """Train, score and time one model; ours also as each person would see it, corrected from that person's own past."""
    started = time.perf_counter()
    model = train()
    seconds = time.perf_counter() - started
    first = next(heldout for _, heldout in sites.values() if len(heldout))
    wait = latency_ms(model, first.gather(first.anchors[:1]))
    if label.startswith(FEDERATED):
        both = [score_personally(heldout, model, name) for name, (_, heldout) in sites.items()]
        yield scores(label, concat([plainly for plainly, _ in both]), seconds, wait)
        yield scores("  and personal", concat([personal for _, personal in both]), seconds, wait)
    else:
        parts = [score_windows(heldout, model, name) for name, (_, heldout) in sites.items()]
        yield scores(label, concat(parts), seconds, wait)


def scores(label: str, scored: Scored, seconds: float, wait: float) -> str:
    """One line of the table."""
    found = evaluate(scored)
    low = (found.pooled.events_by_probability or found.pooled.events)[0]
    mean = {m.horizon_minutes: m.rmse for m in found.mean_over_sites}
    errors = "".join(f"{v:8.2f}" for v in (mean[30], mean[60], found.pooled.at(30).rmse, found.pooled.at(60).rmse))
    return f"{label:<30}{errors}{_low(low)}{seconds:9.1f}{wait:9.2f}"


def _low(score: EventScore) -> str:
    return "".join(f"{100 * v:8.0f}" if math.isfinite(v) else f"{'-':>8}" for v in (score.recall, score.precision))


def main(arguments: Sequence[str]) -> int:
    """Print the table."""
    torch.set_num_threads(1)
    named = arguments[:1] == ["--peer"]
    peer = shutil.which(arguments[1] if named else PEER)
    if peer is None:
        print("No published forecaster takes part: `make .venv-peer/installed` makes the environment of one, darts.")
    sites = sites_of([Path(a) for a in arguments[2 * named :]])
    print("RMSE in mg/dL; lows (< 70 within 30 min) in %, by P(low) >= 25% where a model has quantiles, else by the")
    print("point forecast; training in seconds, one forecast in milliseconds, on one thread")
    print(f"{'':<30}{'mean@30':>8}{'@60':>8}{'pool@30':>8}{'@60':>8}{'recall':>8}{'prec.':>8}{'train':>9}{'call':>9}")
    for label, train in contestants({n: t for n, (t, _) in sites.items()}, peer).items():
        for line in lines(label, train, sites):
            print(line, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
