"""The main job end to end: six hospitals, one aggregator, one private forecaster, on real public data.

With the command line this is the composition root: the one place where both rooms meet in one process. Each step is
safe to repeat, so a run that was killed goes on where it stopped when the same command is given again.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_schemas.errors import BadInput

if TYPE_CHECKING:
    from aggregator.progress import RoundSummary
    from aggregator.recorder import Recorder
    from aggregator.rounds import FederationResult
    from aggregator.settings import AggregatorFolder
    from data_schemas.ledger import CreditEntry, MemberEntry
    from data_schemas.reading import QualityReport
    from pipeline.comparison import Cohort
    from pipeline.export import LoadedModel
    from pipeline.windows import Windows

Say = Callable[[str], None]

FEDERATION = "islet-demo"
PLAN = Path(__file__).parents[1] / "data_schemas" / "plans" / "demo.toml"
EXPORTS = Path(__file__).parents[1] / "hospital_node" / "sample_exports"
HELDOUT_FRACTION = 0.2


@dataclass(frozen=True, slots=True)
class Site:
    """A hospital of the demo: its exports' layout and zone, and how many people its public data set has."""

    name: str
    zone: str
    people: int

    @property
    def heldout(self) -> int:
        """Declared number of held-out patients."""
        return round(self.people * HELDOUT_FRACTION)


SITES = (
    Site("arizona", "America/Phoenix", 20),
    Site("duke", "America/New_York", 13),
    Site("madrid", "Europe/Madrid", 19),
    Site("manchester", "Europe/London", 14),
    Site("mostoles", "Europe/Madrid", 166),
    Site("stanford", "America/Los_Angeles", 46),
)


@dataclass
class Stage:
    """Prints what happens with the seconds since the start."""

    say: Say
    started: float = field(default_factory=time.monotonic)

    def __call__(self, text: str) -> None:
        """Print one line of progress."""
        self.say(f"[{time.monotonic() - self.started:4.0f} s] {text}")


def run_demo(out: Path, rounds: int | None, epsilon: float | None, seed: int, say: Say) -> None:
    """Run or resume the demo in `out`; a finished one is shown again. Raises BadInput when `out` holds another run."""
    from pipeline.demo_report import finish, show_again

    stage = Stage(say)
    if _finished(out, {"rounds": rounds, "epsilon": epsilon, "seed": seed}):
        say(f"{out} holds this run, finished: nothing to do. Remove the folder, or give --out, to run again.\n")
        show_again(out, say)
        return
    nodes = {site.name: out / "nodes" / site.name for site in SITES}
    folder = _aggregator(out / "aggregator", rounds, epsilon, seed)
    intake = {site.name: _node(site, nodes[site.name], folder, seed, stage) for site in SITES}
    admit(folder, list(nodes.values()))
    plan = folder.load_plan()
    stage(
        f"plan: {plan.rounds} rounds x {plan.local.steps_per_round} steps, LSTM-{plan.model.hidden_size}, "
        f"patient-level epsilon {plan.privacy.epsilon:g} at delta {plan.privacy.delta:g}: noise multiplier "
        f"{plan.privacy.noise_multiplier:.2f} at each hospital"
    )
    cohorts = [_cohort(nodes[site.name], plan.model.history_minutes) for site in SITES]
    stage("opening the MLflow store")
    record = RunRecord.start(Path.cwd(), folder, cohorts, out, stage)
    result = train(folder, nodes, record)
    finish(out, folder, cohorts, intake, result, record, nodes, stage)


def _finished(out: Path, asked: Mapping[str, Any]) -> bool:
    """Whether `out` holds this very run, finished; remembers what was asked at the first call."""
    from pipeline.signing import write_durably

    settings = out / "demo.json"
    if not settings.exists():
        if out.exists() and any(out.iterdir()):
            raise BadInput(f"{out} holds something else", "give --out an empty or new folder")
        out.mkdir(parents=True, exist_ok=True)
        write_durably(settings, json.dumps(asked).encode())
    if (held := json.loads(settings.read_text())) != asked:
        told = ", ".join(f"{key} {value}" for key, value in held.items() if value is not None)
        raise BadInput(f"{out} holds a run with {told}", "give --out another folder, or the same options to resume")
    return (out / "result.json").exists()


def _node(site: Site, home: Path, folder: AggregatorFolder, seed: int, stage: Stage) -> QualityReport:
    """Make the hospital's node unless it is there, and import its exports; importing again adds nothing."""
    from data_schemas.layout import load_layout
    from data_schemas.reading import QualityReport
    from hospital_node.folder import NodeFolder
    from hospital_node.importing import import_exports
    from hospital_node.settings import NodeSettings, Source
    from hospital_node.store import Store
    from hospital_node.validation import render_report
    from pipeline.signing import write_durably

    if not (home / "node.toml").exists():
        settings = NodeSettings(
            name=site.name,
            federation=FEDERATION,
            aggregator_public_key=folder.key().public.hex,
            sources=(Source(path=str(EXPORTS / site.name), layout=site.name, zone=site.zone),),
            declared_training_patients=site.people - site.heldout,
            declared_heldout_patients=site.heldout,
            heldout_fraction=HELDOUT_FRACTION,
            max_epsilon_training=folder.load_plan().privacy.epsilon,
            max_epsilon_heldout=folder.load_plan().credit.epsilon,
            seed=seed,
        )
        NodeFolder.create(home, settings)
    kept = home / "reports" / "intake.json"
    if kept.exists():
        stage(f"{site.name}: imported before")
        return QualityReport(**json.loads(kept.read_text()))
    with NodeFolder.open(home) as node:
        # A kill between the import and its report: import again, so that the report is the first import's.
        shutil.rmtree(node.store)
        node.store.mkdir(mode=0o700)
        source = node.settings.sources[0]
        layout, store = load_layout(source.layout), Store(node.store)
        report = import_exports(Path(source.path), layout, source.zone, node.pseudonym_key, store)
        write_durably(kept, json.dumps({name: getattr(report, name) for name in report.__slots__}).encode())
    stage(f"{site.name}: {render_report(report).replace(chr(10), chr(10) + ' ' * 9)}")
    return report


def _aggregator(path: Path, rounds: int | None, epsilon: float | None, seed: int) -> AggregatorFolder:
    from aggregator.settings import open_folder

    if (path / "aggregator.toml").exists():
        return open_folder(path)
    return found(path, FEDERATION, PLAN, rounds=rounds, epsilon=epsilon, seed=seed)


def found(
    path: Path,
    federation: str,
    plan: Path,
    *,
    rounds: int | None = None,
    epsilon: float | None = None,
    seed: int | None = None,
    **settings: Any,
) -> AggregatorFolder:
    """Make an aggregator folder with its key and the calibrated plan. A seed, for the demo, makes the key no secret.

    settings: of AggregatorSettings. Raises BadInput when they cannot be used.
    """
    from pydantic import ValidationError

    from aggregator.settings import AggregatorSettings, create
    from data_schemas.canonical import canonical_bytes
    from pipeline.plans import load_plan

    try:
        wanted = AggregatorSettings(federation=federation, plan="plan.json", **settings)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise BadInput(f"not an aggregator's settings: {wrong}", "see islet aggregator init --help") from error
    calibrated = load_plan(plan, rounds=rounds, epsilon=epsilon, seed=seed)
    path.mkdir(parents=True, exist_ok=True)
    (path / "plan.json").write_bytes(canonical_bytes(calibrated))
    return create(path, wanted, seed)


def admit(folder: AggregatorFolder, nodes: Sequence[Path]) -> None:
    """Enter the founding policy and the founders into the ledger; a member that is there already is left as it is."""
    from aggregator.governance import admit_member, found_federation, founding_of

    members = [_member(home, folder.settings.federation) for home in nodes]
    ledger, now = folder.open_ledger(), datetime.now(UTC).isoformat(timespec="seconds")
    try:
        found_federation(ledger, founding_of(folder.settings.federation, folder.load_plan()), now)
        for member in members:
            admit_member(ledger, member, now)
    finally:
        ledger.close()


def _member(home: Path, federation: str) -> MemberEntry:
    from data_schemas.ledger import MemberEntry
    from hospital_node.folder import NodeFolder

    with NodeFolder.open(home) as node:
        if node.settings.federation != federation:
            raise BadInput(f"{home} belongs to federation {node.settings.federation}", "name the same federation")
        return MemberEntry(
            node=node.settings.name,
            public_key=node.key.public.hex,
            declared_training_patients=node.settings.declared_training_patients,
            declared_heldout_patients=node.settings.declared_heldout_patients,
        )


def _cohort(home: Path, history_minutes: int) -> Cohort:
    from hospital_node.cohorts import held_out_windows, training_windows
    from hospital_node.folder import NodeFolder
    from pipeline.comparison import Cohort

    with NodeFolder.open(home) as node:
        training, heldout = training_windows(node, history_minutes), held_out_windows(node, history_minutes)
        return Cohort(node.settings.name, training, heldout)


def load_any(model: str) -> LoadedModel:
    """Load an exported model from its folder, or by its name in this folder's registry."""
    from pipeline.export import load_model

    if model.startswith("models:/"):
        from aggregator.registry import load_exported

        return load_model(load_exported(model, Path.cwd()), threads=2)
    return load_model(Path(model), threads=2)


def windows_of_nodes(homes: Sequence[Path], history_minutes: int) -> dict[str, tuple[Windows, Windows]]:
    """(training, held-out) windows by hospital, of nodes on this machine: for public data only."""
    cohorts = [_cohort(home, history_minutes) for home in homes]
    return {c.name: (c.training, c.heldout) for c in cohorts}


def train(folder: AggregatorFolder, nodes: Mapping[str, Path], observer: Any) -> FederationResult:
    """Run, or resume, the plan over nodes on this machine: no daemon, no port, no network."""
    from aggregator.embedded_grid import EmbeddedGrid
    from aggregator.server_app import run_folder
    from hospital_node.client_app import app

    return run_folder(EmbeddedGrid(app, nodes, workers=2), folder, observer)


def train_federation(path: Path, nodes: Sequence[Path], out: Path, say: Say) -> None:
    """Train over node folders on this machine and export the model. Raises BadInput when `out` holds something else."""
    from aggregator.release import export_model
    from aggregator.settings import open_folder

    stage, folder = Stage(say), open_folder(path)
    homes = {_member(home, folder.settings.federation).node: home for home in nodes}
    record = RunRecord.start(Path.cwd(), folder, [], path, stage)
    result = train(folder, homes, record)
    export_model(out, folder, result, ())
    stage(f"the released model {result.model_hash[:12]} is in {out}")


@dataclass(frozen=True)
class RunRecord:
    """Watches the rounds: a line on the terminal, MLflow's series, and, on public data, error on held-out people."""

    stage: Stage
    recorder: Recorder
    cohorts: Sequence[Cohort]
    curve_file: Path
    folder: AggregatorFolder

    @classmethod
    def start(
        cls, root: Path, folder: AggregatorFolder, cohorts: Sequence[Cohort], out: Path, stage: Stage
    ) -> RunRecord:
        """Open the MLflow store under root/mlruns and find or make the run."""
        from aggregator.recorder import Recorder

        return cls(stage, Recorder.start(root, folder, stage), cohorts, out / "convergence.json", folder)

    def round_closed(self, summary: RoundSummary) -> None:
        """Tell a round."""
        from pipeline.signing import write_durably

        curve = self.curve()
        if self.cohorts and str(summary.round) not in curve:
            curve[str(summary.round)] = self._errors(summary.run)
            write_durably(self.curve_file, json.dumps(curve).encode())
        errors = curve.get(str(summary.round), {})
        mean = f"held-out RMSE@30 {sum(errors.values()) / len(errors):.2f}  " if errors else ""
        rejected = "".join(f"  {update.node}: {update.code}" for update in summary.rejected)
        epsilon = max(summary.epsilon_by_node.values(), default=0.0)
        self.stage(
            f"round {summary.round:2d}/{summary.rounds}: {len(summary.admitted)} updates admitted  {mean}"
            f"epsilon {epsilon:.2f} per patient  {summary.seconds:.1f} s{rejected}"
        )
        self.recorder.round_closed(summary)
        self.recorder.errors_measured(summary.round, errors)

    def epoch_closed(self, credit: CreditEntry) -> None:
        """Tell a credit epoch."""
        shares = "  ".join(f"{line.node} {line.micro_credits / 1e6:.2f}" for line in credit.lines)
        self.stage(f"credit, epoch {credit.epoch}: {shares}")
        self.recorder.epoch_closed(credit)

    def champion_decided(self, model_hash: str) -> None:
        """Let MLflow's alias follow the members' vote."""
        self.recorder.champion_decided(model_hash)

    def curve(self) -> dict[str, dict[str, float]]:
        """RMSE at 30 minutes by round and hospital, as far as it was measured."""
        return dict(json.loads(self.curve_file.read_text())) if self.curve_file.exists() else {}

    def _errors(self, run: str) -> dict[str, float]:
        from aggregator.state import StateFolder
        from pipeline.comparison import quick_rmse_30
        from pipeline.forecaster import ForecasterSpec

        newest = StateFolder(self.folder.state).newest(run)
        if newest is None:
            return {}
        spec = ForecasterSpec(hidden_size=self.folder.load_plan().model.hidden_size)
        return {c.name: quick_rmse_30(newest.server.weights, spec, c.heldout) for c in self.cohorts}
