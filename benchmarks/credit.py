"""Does the credit hold when hospitals cheat? Real people, private head-only training, the product's own credit code.

    python -m benchmarks.credit [--nodes DIR] [--out DIR] [--rounds N]

Six hospitals are made from the people of the sample exports: four large, one tiny, and one that is honest or an
attacker. Every scenario is a federation of its own, because an attacker changes the model that everybody trains on.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from aggregator.admission import max_update_norm, originality_code
from data_schemas.messages import EpochRelease
from data_schemas.plan import AggregationRule, TrainingPlan
from hospital_node.cohorts import held_out_windows, training_windows
from hospital_node.folder import NodeFolder
from hospital_node.release import noise_std_mg_dl
from hospital_node.scoring import HeldOut, coalition_utilities, heldout_of, model_utilities, weighted_steps
from pipeline.accounting import calibrate
from pipeline.contribution import credit
from pipeline.demo import PLAN, SITES
from pipeline.forecaster import ForecasterSpec
from pipeline.noise import SeededNoise
from pipeline.plans import load_plan
from pipeline.private_training import LocalPlan, train_steps
from pipeline.robust import mean_of, norm_factors
from pipeline.shapley import clip_rows, game_of
from pipeline.windows import Batch, Series, Windows, WindowSpec, cut_windows

Vector = npt.NDArray[np.float32]
Matrix = npt.NDArray[np.float64]
LARGE, TINY, HELD_OUT, POT = 39, 8, 50, 10_000_000
NAMES = ("large-1", "large-2", "large-3", "large-4", "sixth", "tiny")
SIZES = dict(zip(NAMES, (LARGE, LARGE, LARGE, LARGE, LARGE, TINY), strict=True))
# What credit costs a held-out person, and the clip at which half of the people keep their whole vector.
EPSILON, CLIP = 1.0, 0.25


@dataclass(frozen=True)
class Wrong:
    """Windows whose targets say something else: each window's change gets another window's, the other way round."""

    windows: Windows

    @property
    def anchors(self) -> npt.NDArray[np.int64]:
        """Anchors of the true windows."""
        return self.windows.anchors

    @property
    def offsets(self) -> npt.NDArray[np.int64]:
        """Offsets of the true windows."""
        return self.windows.offsets

    def gather(self, anchors: npt.NDArray[np.int64]) -> Batch:
        """Return the batch with wrong targets."""
        batch = self.windows.gather(anchors)
        change = batch.y - batch.last[:, None]
        return replace(batch, y=(batch.last[:, None] - 2 * np.roll(change, 7, axis=0)).astype(np.float32))


@dataclass(frozen=True)
class Situation:
    """What the sixth hospital knows when it makes its update: its honest one, a colleague's, the last global step."""

    own: Vector
    colleague: Vector
    last_step: Vector
    limit: float


Cheat = Callable[[Situation], Vector]


@dataclass(frozen=True)
class Scenario:
    """One federation: what the sixth hospital does, and under which rule the updates become one step."""

    name: str
    cheat: Cheat
    wrong_labels: bool = False
    rule: AggregationRule = "norm-bounded-mean"


def _at_limit(update: Vector, limit: float) -> Vector:
    return (update * (limit / max(float(np.linalg.norm(update)), 1e-12))).astype(np.float32)


SCENARIOS = (
    Scenario("honest large", lambda s: s.own),
    Scenario("no update", lambda s: np.zeros_like(s.own)),
    Scenario("replays the last step", lambda s: s.last_step),
    Scenario("copies large-1, disguised", lambda s: (s.colleague * np.float32(0.97)).astype(np.float32)),
    Scenario("label noise", lambda s: s.own, wrong_labels=True),
    Scenario("sign flip", lambda s: -s.own),
    Scenario("scaled to the gate's limit", lambda s: _at_limit(s.own, s.limit)),
    Scenario("sign flip at the gate's limit", lambda s: _at_limit(-s.own, s.limit)),
    Scenario("sign flip at the limit, plain mean", lambda s: _at_limit(-s.own, s.limit), rule="patient-weighted-mean"),
    Scenario("honest large, plain mean", lambda s: s.own, rule="patient-weighted-mean"),
)


@dataclass(frozen=True)
class People:
    """Windows of each hospital's training people, and the held-out people of all sites as scoring sees them."""

    training: dict[str, Windows]
    heldout: HeldOut


@dataclass(frozen=True)
class Outcome:
    """A finished scenario: each held-out person's Shapley sum [P, n], the model's error, and what it took."""

    scenario: Scenario
    by_person: Matrix
    rmse: float
    train_s: float
    score_s: float
    cosine_to_colleague: float
    rejected: int


def people(nodes: Path, plan: TrainingPlan, seed: int) -> People:
    """Deal the sites' training people to six hospitals at random."""
    history = plan.model.history_minutes
    trained, heldout = [], []
    for site in SITES:
        with NodeFolder.open(nodes / site.name) as node:
            trained.append(training_windows(node, history).series)
            heldout.append(held_out_windows(node, history).series)
    pool, tested = joined(trained), joined(heldout)
    order = [pool.patients[i] for i in np.random.default_rng(seed).permutation(len(pool.patients))]
    if len(order) < sum(SIZES.values()):
        raise SystemExit(f"only {len(order)} training people for {sum(SIZES.values())} places")
    spec, training, start = WindowSpec(history_minutes=history), {}, 0
    for name, size in SIZES.items():
        training[name] = cut_windows(pool.select(sorted(order[start : start + size])), spec)
        start += size
    return People(training, heldout_of(cut_windows(tested, spec), plan.credit.windows_per_patient))


def joined(parts: Sequence[Series]) -> Series:
    """Put the people of several sites into one series."""
    counts = np.concatenate([np.diff(part.starts) for part in parts])
    names = [f"{i}/{p}" for i, part in enumerate(parts) for p in part.patients]
    return Series(
        patients=tuple(names),
        starts=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        time_s=np.concatenate([part.time_s for part in parts]),
        glucose_mg_dl=np.concatenate([part.glucose_mg_dl for part in parts]),
    )


def run(scenario: Scenario, who: People, plan: TrainingPlan, start: Vector) -> Outcome:
    """Train a federation in which the sixth hospital behaves as the scenario says, and score every round."""
    local, spec = LocalPlan.of(plan, plan.privacy.noise_multiplier), ForecasterSpec(hidden_size=plan.model.hidden_size)
    patients, before, rejected = np.array([SIZES[n] for n in NAMES]), list[Vector](), 0
    sixth = NAMES.index("sixth")
    weights, last_step = start, np.zeros_like(start)
    total = np.zeros((len(who.heldout.patients), len(NAMES)))
    train_s = score_s = cosine = 0.0
    for number in range(plan.rounds):
        begun = time.perf_counter()
        rows = []
        for place, name in enumerate(NAMES):
            windows = who.training[name]
            data = Wrong(windows) if name == "sixth" and scenario.wrong_labels else windows
            source = SeededNoise(1000 * number + place)
            rows.append(train_steps(weights, spec, data, local, SIZES[name], source).delta)  # type: ignore[arg-type]
        limit = max_update_norm(plan, LARGE, len(start))
        rows[sixth] = scenario.cheat(Situation(rows[sixth], rows[0], last_step, limit))
        updates = np.stack(rows)
        train_s += time.perf_counter() - begun
        begun = time.perf_counter()
        earlier = (last_step, *before, *rows[:4])
        code = originality_code(updates[sixth], plan, SIZES["sixth"], earlier)
        rejected += code is not None
        admitted = [place for place in range(len(NAMES)) if place != sixth or code is None]
        before, updates = rows, updates[admitted]
        shares = patients[admitted] / patients[admitted].sum()
        factors = norm_factors(updates, tuple(shares), scenario.rule)
        game = game_of(len(admitted), b"")
        steps = weighted_steps(updates, factors * shares, plan.server.learning_rate)
        size = plan.model.hidden_size
        total[:, admitted] += game.values(coalition_utilities(weights, steps, game.coalitions, who.heldout, size))
        score_s += time.perf_counter() - begun
        cosine = max(cosine, *(_cosine(rows[0], v) for v in (*rows[1:4], rows[5], last_step)))
        step = plan.server.learning_rate * mean_of(updates, tuple(shares), scenario.rule)
        last_step = step.astype(np.float32)
        weights = (weights.astype(np.float64) + step).astype(np.float32)
    rmse = -model_utilities(weights, who.heldout, plan.model.hidden_size).mean()
    return Outcome(scenario, total, float(rmse), train_s, score_s, cosine, rejected)


def _cosine(a: Vector, b: Vector) -> float:
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norm if norm else 0.0


def releases(outcome: Outcome, plan: TrainingPlan, seed: int, liars: Sequence[str] = ()) -> list[EpochRelease]:
    """Each hospital's noised vector over 50 held-out people, drawn from all; liars praise the sixth, damn the rest."""
    rng, nodes = np.random.default_rng(seed), credited(outcome, plan)
    columns = [NAMES.index(name) for name in nodes]
    std = noise_std_mg_dl(plan.credit, HELD_OUT)
    made = []
    for name in NAMES:
        chosen = rng.integers(0, len(outcome.by_person), HELD_OUT)
        values = clip_rows(outcome.by_person[chosen][:, columns], plan.credit.clip_mg_dl).mean(axis=0)
        values = values + rng.normal(size=len(nodes)) * std
        if name in liars:
            values = np.where(np.array(nodes) == "sixth", 10.0, -10.0) * plan.credit.clip_mg_dl
        made.append(
            EpochRelease(
                federation="benchmark",
                run="benchmark",
                epoch=1,
                node=name,
                nodes=nodes,
                shapley_mg_dl=tuple(float(v) for v in values),
                noise_std_mg_dl=std,
                declared_heldout_patients=HELD_OUT,
                abstained=False,
                spend=None,
                budget_head="0" * 64,
            )
        )
    return made


def credited(outcome: Outcome, plan: TrainingPlan) -> tuple[str, ...]:
    """Hospitals with an admitted update in some round: only they are scored and paid."""
    return NAMES if outcome.rejected < plan.rounds else tuple(name for name in NAMES if name != "sixth")


def shares_of(outcome: Outcome, plan: TrainingPlan, draws: int, liars: Sequence[str] = ()) -> Matrix:
    """Credit in percent of the pot, [draws, n], over draws of noise and of held-out people."""
    rows = []
    for seed in range(draws):
        lines, _ = credit(releases(outcome, plan, seed, liars), credited(outcome, plan), POT, SIZES)
        paid = {line.node: 100 * line.micro_credits / POT for line in lines}
        rows.append([paid.get(name, 0.0) for name in NAMES])
    return np.array(rows)


def table(outcomes: Sequence[Outcome], plan: TrainingPlan, draws: int) -> list[dict[str, object]]:
    """Rows of the result: mean credit, how often the order is right, and the model's error."""
    clean = {o.scenario.rule: o.rmse for o in outcomes if o.scenario.name.startswith("honest large")}
    rows: list[dict[str, object]] = []
    attacks = [o for o in outcomes if o.scenario.name in {"label noise", "sign flip", "no update"}]
    liars = ("sixth", "tiny")
    cases = [(o, plan, (), "") for o in outcomes]
    cases += [(o, plan, liars, ", 2 of 5 scorers lie") for o in attacks]
    for epsilon in (2.0, 4.0):
        quieter = with_epsilon(plan, epsilon)
        cases += [(o, quieter, liars, f", 2 of 5 scorers lie, epsilon {epsilon:g}") for o in attacks]
    for outcome, spent, lying, told in cases:
        shares = shares_of(outcome, spent, draws, lying)
        large, sixth, tiny = shares[:, :4], shares[:, NAMES.index("sixth")], shares[:, NAMES.index("tiny")]
        rows.append(
            {
                "scenario": outcome.scenario.name + told,
                "large": round(float(large.mean()), 2),
                "lowest large": round(float(large.mean(axis=0).min()), 2),
                "least large": round(float(large.min(axis=1).mean()), 2),
                "sixth": round(float(sixth.mean()), 2),
                "sixth spread": round(float(sixth.std()), 2),
                "tiny": round(float(tiny.mean()), 2),
                "tiny paid": round(float((tiny > 0).mean()), 2),
                "ordered": round(float((sixth < large.min(axis=1)).mean()), 2),
                "passes a large": round(float((sixth > large.min(axis=1)).mean()), 2),
                "rmse": round(outcome.rmse, 3),
                "rmse change %": round(100 * (outcome.rmse / clean[outcome.scenario.rule] - 1), 2),
                "honest cosine": round(outcome.cosine_to_colleague, 2),
                "rounds rejected": outcome.rejected,
                "train s": round(outcome.train_s / plan.rounds, 2),
                "score s": round(outcome.score_s / plan.rounds, 2),
            }
        )
    return rows


def with_epsilon(plan: TrainingPlan, epsilon: float) -> TrainingPlan:
    """Return the plan with credit that costs a held-out person this epsilon."""
    noise = {"noise_multiplier": calibrate(epsilon, plan.privacy.delta, 1.0, 1), "clip_mg_dl": CLIP}
    return plan.model_copy(update={"credit": plan.credit.model_copy(update=noise)})


def plot(rows: Sequence[dict[str, object]], path: Path) -> None:
    """Draw each scenario's credit: the mean large hospital, the sixth, the tiny one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.42 * len(rows) + 1.6), layout="constrained")
    axes, places = figure.subplots(), np.arange(len(rows))[::-1]
    for shift, (key, colour) in enumerate((("large", "#4477aa"), ("sixth", "#cc3311"), ("tiny", "#999999"))):
        label = {"large": "honest large (mean of four)", "sixth": "the sixth hospital", "tiny": "honest tiny"}[key]
        values = [float(str(row[key])) for row in rows]
        axes.barh(places + 0.27 * (1 - shift), values, 0.25, color=colour, label=label)
    axes.set_yticks(places, [str(row["scenario"]) for row in rows])
    axes.set_xlabel("credit, % of the pot")
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run every scenario, print the table, write table and plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=Path, default=Path("demo-run/nodes"), help="node folders that the demo made")
    parser.add_argument("--out", type=Path, default=Path("benchmark-credit"))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1, help="how people are dealt to the hospitals")
    parser.add_argument("--draws", type=int, default=200)
    asked = parser.parse_args()
    if not all((asked.nodes / site.name / "node.toml").exists() for site in SITES):
        raise SystemExit(f"no node folders in {asked.nodes}: run `islet demo` first, or give --nodes")
    plan = load_plan(PLAN, rounds=asked.rounds, seed=1)
    plan = with_epsilon(plan, EPSILON)
    start = np.load(Path(__file__).parents[1] / "pipeline" / "warm_start.npz", allow_pickle=False)["weights"]
    who, outcomes = people(asked.nodes, plan, asked.seed), []
    for scenario in SCENARIOS:
        outcomes.append(run(scenario, who, plan, start))
        print(f"{scenario.name}: RMSE {outcomes[-1].rmse:.3f}, "
              f"mean score {np.round(outcomes[-1].by_person.mean(axis=0), 4).tolist()}", flush=True)  # fmt: skip
    rows = table(outcomes, plan, asked.draws)
    asked.out.mkdir(parents=True, exist_ok=True)
    np.savez(asked.out / "people.npz", **{o.scenario.name: o.by_person for o in outcomes})
    (asked.out / "credit.json").write_text(json.dumps(rows, indent=1))
    plot(rows, asked.out / "credit.png")
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")


if __name__ == "__main__":
    main()
