"""`make audit`: canary patients on the real training path, and the same audit on planted bugs.

    python -m benchmarks.audit [OUT_FOLDER]

The guesser is the aggregator itself: it chooses the base model, sees every update and knows every canary's readings.
It sends a forecaster that turns each of the canaries' histories into a coordinate of its own (possible for anyone who
chooses the weights), with output heads at zero. A canary is a patient with 13 readings in an hour, and one reading of
400 mg/dL at one horizon: exactly one window, whose gradient lies (to 99.9%) in one weight of the mean head, no two
canaries in the same. So each canary owns a coordinate of every update, through real readings, windows, sampling,
gradients, clip and noise; the score of a canary is that coordinate, summed over the rounds.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from data_schemas.plan import PrivacyEvent
from data_schemas.units import DELTA, HORIZON_MINUTES, SENSOR_MAX_MG_DL, SENSOR_MIN_MG_DL
from pipeline.accounting import calibrate, epsilon_of
from pipeline.auditing import AuditBounds, audit, caught, spread
from pipeline.forecaster import Forecaster, ForecasterSpec, flatten
from pipeline.noise import NoiseSource, SecureNoise
from pipeline.private_training import LocalPlan, train_steps
from pipeline.windows import Series, Windows, WindowSpec, cut_windows

WINDOWS = WindowSpec(history_minutes=60)
CLIP = 0.05
# How far the canaries' codes stand out against the heads' shared biases.
_LOUD = 30.0
_LARGEST_STEP_MG_DL = 35.0


@dataclass(frozen=True, slots=True)
class Setting:
    """Size of an audit: `histories` x 12 canaries, and the plan that is audited."""

    histories: int = 100
    hidden_size: int = 128
    rounds: int = 20
    steps: int = 5
    sample_rate: float = 0.3
    epsilon: float = 2.0
    runs: int = 3
    trainable: Literal["all", "head"] = "head"

    @property
    def noise_multiplier(self) -> float:
        """The noise that the accountant asks for."""
        return calibrate(self.epsilon, DELTA, self.sample_rate, self.rounds * self.steps)

    @property
    def round_event(self) -> PrivacyEvent:
        """What one round is said to cost."""
        return PrivacyEvent(sample_rate=self.sample_rate, noise_multiplier=self.noise_multiplier, steps=self.steps)

    @property
    def local_plan(self) -> LocalPlan:
        """A round as a node gets it."""
        return LocalPlan(
            steps=self.steps,
            learning_rate=1e-4,  # so small that the model hardly moves within a round, whatever bug is planted
            sample_rate=self.sample_rate,
            noise_multiplier=self.noise_multiplier,
            max_grad_norm=CLIP,
            windows_per_patient=1,
            trainable=self.trainable,
        )


QUICK = Setting(histories=50, hidden_size=64, rounds=4, steps=10, runs=1)


@dataclass(frozen=True, slots=True)
class Scaled:
    """A noise source whose Gaussians come out too small: the planted bug of the noise."""

    source: NoiseSource
    factor: float

    def normal(self, count: int) -> torch.Tensor:
        """Gaussians times the factor."""
        return self.source.normal(count) * self.factor

    def uniform(self, count: int) -> torch.Tensor:
        """Draws as they should be."""
        return self.source.uniform(count)


@dataclass(frozen=True, slots=True)
class Variant:
    """A training path: as it is, or with one planted bug. copies: how many "patients" one person is made into."""

    name: str
    noise_factor: float = 1.0
    clip_factor: float = 1.0
    copies: int = 1
    claims_one_round: bool = False

    def claim(self, setting: Setting) -> float:
        """The epsilon that this path reports."""
        events = [setting.round_event] * (1 if self.claims_one_round else setting.rounds)
        return epsilon_of(events, DELTA)


CORRECT = Variant("as it is")
PLANTED = (
    Variant("noise divided by 3", noise_factor=1 / 3),
    Variant("no noise", noise_factor=0.0),
    Variant("no clipping", clip_factor=1e4),
    Variant("4 windows of a person claimed as 4 patients", copies=4),
    Variant("epsilon restarted each round", claims_one_round=True),
)


@dataclass(frozen=True, slots=True)
class Canaries:
    """base: float32[D] weights to train from. coordinate: int64[m], position in the update that each canary owns."""

    base: npt.NDArray[np.float32]
    spec: ForecasterSpec
    histories_mg_dl: npt.NDArray[np.float32]
    coordinate: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.coordinate)

    def windows(self, included: npt.NDArray[np.bool_], copies: int = 1) -> Windows:
        """Cut the windows of a cohort of these canaries bool[m]; each is written down `copies` times."""
        members = np.repeat(np.flatnonzero(included), copies)
        return cut_windows(_series(self.histories_mg_dl, members), WINDOWS)


def make_canaries(setting: Setting, seed: int) -> Canaries:
    """Make `histories` x 12 canaries and the base model under which each owns a coordinate."""
    rng = np.random.default_rng(seed)
    spec = ForecasterSpec(hidden_size=setting.hidden_size)
    histories = _histories(rng, setting.histories)
    model = Forecaster(spec, seed=seed)
    width = 2 * spec.hidden_size + 1
    with torch.no_grad():
        for weight in (model.tap.weight_ih, model.tap.weight_hh):
            weight.mul_(4.0)  # saturated gates tell nearby histories apart
        for head in (model.mean_head, model.quantile_head):
            head.weight.zero_()
            head.bias.zero_()
        model.mix.weight.copy_(torch.eye(width))
        one_each = cut_windows(_series(histories, np.arange(len(histories)) * len(HORIZON_MINUTES)), WINDOWS)
        encoded = model.encode(torch.from_numpy(one_each.gather(one_each.anchors).x)).double().numpy()
        code = np.zeros((width, width))
        code[: len(histories)] = np.linalg.pinv(encoded).T * _LOUD
        model.mix.weight.copy_(torch.from_numpy(code))
    heads = sum(p.numel() for name, p in model.named_parameters() if name.split(".")[0] in ("tap", "mix"))
    pairs = [(p, h) for p in range(len(histories)) for h in range(len(HORIZON_MINUTES))]
    coordinate = np.array([heads + h * width + p for p, h in pairs], dtype=np.int64)
    return Canaries(flatten(model), spec, histories, coordinate)


def _histories(rng: np.random.Generator, count: int) -> npt.NDArray[np.float32]:
    """float32[count, 13]: an hour of readings each, every change one that a sensor may report."""
    values = np.empty((count, WINDOWS.steps), dtype=np.float32)
    values[:, 0] = rng.uniform(80, 300, count)
    for t in range(1, WINDOWS.steps):
        step = rng.uniform(-_LARGEST_STEP_MG_DL, _LARGEST_STEP_MG_DL, count)
        values[:, t] = np.clip(values[:, t - 1] + step, SENSOR_MIN_MG_DL, SENSOR_MAX_MG_DL - 50)
    return values


def _series(histories: npt.NDArray[np.float32], members: npt.NDArray[np.int64]) -> Series:
    """Readings of canaries: number c is history c // 12 followed by one reading after HORIZON_MINUTES[c % 12]."""
    rows = WINDOWS.steps + 1
    hour = np.arange(WINDOWS.steps) * WINDOWS.grid_minutes
    after = hour[-1] + np.array(HORIZON_MINUTES)[members % len(HORIZON_MINUTES)]
    minutes = np.concatenate([np.tile(hour, (len(members), 1)), after[:, None]], axis=1)
    end = np.full((len(members), 1), SENSOR_MAX_MG_DL, dtype=np.float32)
    glucose = np.concatenate([histories[members // len(HORIZON_MINUTES)], end], axis=1)
    return Series(
        tuple(f"{i:06d}" for i in range(len(members))),
        np.arange(len(members) + 1, dtype=np.int64) * rows,
        (minutes * 60).ravel().astype(np.int64),
        glucose.ravel().astype(np.float32),
    )


def attack(
    canaries: Canaries, setting: Setting, variant: Variant, source: NoiseSource, seed: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Train `rounds` rounds with half of the canaries and return scores float64[m] and who was in, bool[m]."""
    included = np.random.default_rng(seed).random(len(canaries)) < 0.5
    windows = canaries.windows(included, variant.copies)
    plan = setting.local_plan
    plan = replace(
        plan,
        max_grad_norm=plan.max_grad_norm * variant.clip_factor,
        noise_multiplier=plan.noise_multiplier / variant.clip_factor,
    )
    planted = Scaled(source, variant.noise_factor)
    scores = np.zeros(len(canaries))
    for _ in range(setting.rounds):
        result = train_steps(canaries.base, canaries.spec, windows, plan, len(canaries), planted)
        scores += result.delta[canaries.coordinate].astype(np.float64)
    return scores, included


def run_variant(setting: Setting, variant: Variant, source: NoiseSource | None = None) -> tuple[AuditBounds, ...]:
    """Audit a path `runs` times, each with its own canaries, coins and noise of the production source."""
    found = []
    for seed in range(setting.runs):
        canaries = make_canaries(setting, seed)
        found.append(audit(*attack(canaries, setting, variant, source or SecureNoise(), 1000 + seed), DELTA))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Finding:
    """What the audit says of one path. recomputed: epsilon of everything that was really released."""

    variant: Variant
    claimed: float
    recomputed: float
    bounds: tuple[AuditBounds, ...]

    @property
    def caught_by_canaries(self) -> int:
        """Number of runs with a bound above the claim."""
        return sum(caught(b, self.claimed) for b in self.bounds)

    @property
    def caught_by_recomputation(self) -> bool:
        """Whether the claim differs from the exact sum of the events."""
        return abs(self.claimed - self.recomputed) > 1e-6


def examine(setting: Setting, variant: Variant, source: NoiseSource | None = None) -> Finding:
    """Audit one path, with the noise of production unless another source is given."""
    recomputed = epsilon_of([setting.round_event] * setting.rounds, DELTA)
    return Finding(variant, variant.claim(setting), recomputed, run_variant(setting, variant, source))


def table(findings: Sequence[Finding]) -> str:
    """Claim, bounds and verdict of every path."""
    heads = ("training path", "claimed epsilon", "one-run bound", "Gaussian bound", "right guesses", "verdict")
    rows = [heads, *(_row(f) for f in findings)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _row(finding: Finding) -> tuple[str, ...]:
    shares = [b.guesses.right / b.guesses.made for b in finding.bounds]
    return (
        finding.variant.name,
        f"{finding.claimed:.2f}",
        spread([b.one_run for b in finding.bounds]),
        spread([b.gaussian for b in finding.bounds]),
        f"{100 * min(shares):.0f} to {100 * max(shares):.0f}%",
        _verdict(finding),
    )


def _verdict(finding: Finding) -> str:
    runs, seen = len(finding.bounds), finding.caught_by_canaries
    if finding.caught_by_recomputation:
        return f"caught by recomputation ({finding.recomputed:.2f} was spent); by canaries in {seen} of {runs}"
    return f"caught in {seen} of {runs}" if seen else f"consistent with its claim in {runs} of {runs}"


def picture(findings: Sequence[Finding], out: Path) -> None:
    """Bounds of every run beside the claim, one row a path, as SVG or PNG by the name of `out`."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8.5, 0.55 * len(findings) + 1.4))
    for y, finding in enumerate(reversed(findings)):
        axis.plot([finding.claimed] * 2, [y - 0.3, y + 0.3], color="black", lw=2, label="claimed" if y == 0 else None)
        for kind, marker, colour in (("one_run", "o", "#1f5fa8"), ("gaussian", "s", "#c2571a")):
            label = {"one_run": "one-run bound", "gaussian": "Gaussian bound"}[kind] if y == 0 else None
            values = [getattr(b, kind) for b in finding.bounds]
            axis.plot(values, [y] * len(values), marker, color=colour, alpha=0.8, label=label)
    axis.set_yticks(range(len(findings)), [f.variant.name for f in reversed(findings)])
    axis.set_xlabel("epsilon at delta 1e-5: right of the black line is refuted")
    axis.set_xlim(left=0)
    axis.grid(axis="x", alpha=0.3)
    axis.legend(loc="lower right", frameon=False)
    figure.tight_layout()
    figure.savefig(out)
    plt.close(figure)


def wrong(findings: Sequence[Finding]) -> list[str]:
    """Paths whose verdict is not what it must be: a planted bug unseen, or the real path refuted."""
    return [
        f.variant.name
        for f in findings
        if (f.variant == CORRECT and f.caught_by_canaries)
        or (f.variant != CORRECT and not f.caught_by_canaries and not f.caught_by_recomputation)
    ]


def main(arguments: Sequence[str]) -> int:
    """Audit every path, print the table, write the picture; exit status 1 when a verdict is wrong."""
    torch.set_num_threads(1)
    setting, begun = Setting(), time.monotonic()
    out = Path(arguments[0] if arguments else "audit-run")
    out.mkdir(parents=True, exist_ok=True)
    print(
        f"{setting.histories * len(HORIZON_MINUTES)} canary patients, {setting.rounds} rounds x {setting.steps} steps, "
        f"sample rate {setting.sample_rate}, noise multiplier {setting.noise_multiplier:.2f}, delta {DELTA:g}, "
        f"{setting.runs} runs a path, 95% confidence each"
    )
    findings = []
    for variant in (CORRECT, *PLANTED):
        findings.append(examine(setting, variant))
        print(f"[{time.monotonic() - begun:4.0f} s] {variant.name}: {_verdict(findings[-1])}", flush=True)
    text = table(findings)
    print("\n" + text)
    (out / "audit.txt").write_text(text + "\n")
    picture(findings, out / "audit.svg")
    print(f"\nPicture: {out / 'audit.svg'}")
    if unexpected := wrong(findings):
        print(f"WRONG: {', '.join(unexpected)}")
    return 1 if unexpected else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
