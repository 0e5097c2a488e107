"""The model registry: what a run did, and the model that came out of it, in MLflow.

    mlruns/mlflow.db     runs, series, models, aliases (SQLite)
    mlruns/artifacts/    plots, model card, privacy and credit records, model folders

Only the aggregator writes. In SQLite's database locations are relative to the folder that holds mlruns/, so a moved
tree works when MLflow runs from there; in PostgreSQL's they are absolute. Nothing here is needed to train: a failure is
a RegistryFailed, which the round loop survives, and what was missed can be logged again.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aggregator.progress import RoundSummary
from aggregator.registry_store import ARTIFACTS, DATABASE, STORE, RegistryFailed, parse_uri, relocate
from aggregator.registry_text import (
    EXPERIMENT,
    EXPERIMENT_NOTE,
    MODEL_NOTE,
    declaration,
    flat,
    library_versions,
    metric_name,
    privacy_tags,
    requirements,
    round_values,
    run_note,
    run_tags,
)
from data_schemas.canonical import canonical_bytes
from data_schemas.errors import BadInput
from data_schemas.ledger import CreditEntry, MemberEntry
from data_schemas.plan import TrainingPlan
from pipeline.export import load_model
from pipeline.model_card import MODEL_NAME, ModelCard, privacy_statement
from pipeline.windows import FEATURES, WindowSpec

__all__ = ["Published", "Registry", "RegistryFailed", "load_exported", "relocate"]

CHAMPION, CHALLENGER = "champion", "challenger"
_BATCH = 1000  # MLflow's limit on metrics in one batch


@dataclass(frozen=True, slots=True)
class Published:
    """A registered model version, its alias, and the URI it is loaded by."""

    version: str
    alias: str
    uri: str


def load_exported(uri: str, root: Path) -> Path:
    """Return the exported model folder behind `models:/<name>@<alias>` or `models:/<name>/<version>`.

    The folder is the one of pipeline.export.load_model, which verifies it. Raises BadInput, RegistryFailed.
    """
    if not (root / DATABASE).exists():
        raise BadInput(f"{root} holds no {DATABASE}", "run where mlruns/ is, or finish a run first")
    return Registry(root).exported(uri)


class Registry:
    """Writer and reader of one store. root: the folder that holds mlruns/; database: a PostgreSQL URL, or SQLite's."""

    def __init__(self, root: Path, database: str = "") -> None:
        """Open the store, or create it: the first time takes seconds, because MLflow builds its tables by migration."""
        self._root, self._movable = root.resolve(), not database
        with _reported("open the store"):
            mlflow = _mlflow()
            if self._movable:
                _create_store(self._root)
            uri = database or f"sqlite:///{self._root / DATABASE}"
            self._client = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)

    def start_run(
        self, run: str, federation: str, plan: TrainingPlan, members: Sequence[MemberEntry], git_sha: str | None = None
    ) -> str:
        """Return the MLflow run id of this federation run, made now or found again. Raises RegistryFailed."""
        with _reported("start the run"):
            experiment = self._experiment()
            found = self._client.search_runs([experiment], f"tags.`islet.run` = '{run}'", max_results=1)
            if found:
                run_id: str = found[0].info.run_id
                self._client.update_run(run_id, status="RUNNING")
                return run_id
            tags = run_tags(run, federation, plan, members, git_sha)
            created = self._client.create_run(experiment, tags=tags, run_name=run)
            run_id = created.info.run_id
            self._log_plan(run_id, plan, members)
            return run_id

    def log_round(self, run_id: str, summary: RoundSummary) -> None:
        """Log one closed round in one batch; a round already logged is left as it is. Raises RegistryFailed."""
        with _reported(f"log round {summary.round}"):
            if not self._logged(run_id, "round/admitted", summary.round):
                self._log_series(run_id, round_values(summary), summary.round)

    def log_errors(self, run_id: str, round_number: int, rmse_30: Mapping[str, float]) -> None:
        """Log held-out RMSE at 30 minutes by hospital after a round: on public data only, it is exact.

        A round already logged is left as it is. Raises RegistryFailed.
        """
        with _reported(f"log the errors of round {round_number}"):
            values = {f"heldout_rmse_30/{node}": value for node, value in rmse_30.items()}
            if values and not self._logged(run_id, next(iter(values)), round_number):
                self._log_series(run_id, values, round_number)

    def log_credit(self, run_id: str, entry: CreditEntry) -> None:
        """Log one credit epoch at its last round; an epoch already logged is left as it is. Raises RegistryFailed."""
        step = max(entry.rounds)
        with _reported(f"log credit epoch {entry.epoch}"):
            if not self._logged(run_id, "credit_micro_unpaid", step):
                values = {f"credit_micro/{line.node}": float(line.micro_credits) for line in entry.lines}
                values |= {f"shapley_mg_dl/{line.node}": line.shapley_mg_dl for line in entry.lines}
                self._log_series(run_id, values | {"credit_micro_unpaid": float(entry.unpaid_micro_credits)}, step)

    def finish(
        self,
        run_id: str,
        model_folder: Path,
        *,
        files: Mapping[str, bytes],
        privacy: Mapping[str, Any],
        credit: Mapping[str, Any],
        results: Mapping[str, float],
    ) -> Published:
        """Record the outcome and register the model as `challenger`; the members' vote makes a champion (crown).

        files: artifacts by path. privacy, credit: JSON records. results: metrics such as rmse_30/madrid/islet.
        Called again it returns what it registered before. Raises BadInput, Tampered (the folder), RegistryFailed.
        """
        # Reading the card refuses a model without unit, relation, epsilon, delta and rounds.
        model = load_model(model_folder)
        with _reported("publish the model"):
            if published := self._published(run_id, model.model_hash):
                self._client.set_terminated(run_id, "FINISHED")
                return published
            self._log_files(run_id, model_folder, files, privacy, credit)
            model_id = self._log_model(run_id, model_folder, model.card)
            rounds = model.card.privacy.rounds
            self._log_series(run_id, results, rounds, model_id=model_id)
            published = self._register(run_id, model_id, model.card, results)
            self._client.set_tag(
                run_id, "mlflow.note.content", run_note(model.card, published.version, published.alias)
            )
            self._client.set_terminated(run_id, "FINISHED")
            return published

    def stop(self, run_id: str) -> None:
        """Mark a run as ended without a model; start_run resumes it. Raises RegistryFailed."""
        with _reported("stop the run"):
            self._client.set_terminated(run_id, "KILLED")

    def crown(self, model_hash: str) -> Published | None:
        """Make the newest version of this model the champion; None when it was never registered. RegistryFailed."""
        with _reported("promote the model"):
            versions = self._client.search_model_versions(f"name = '{MODEL_NAME}'")
            found = [int(v.version) for v in versions if v.tags.get("model_hash") == model_hash]
            if not found:
                return None
            newest = str(max(found))
            self._client.set_registered_model_alias(MODEL_NAME, CHAMPION, newest)
            if CHALLENGER in self._client.get_model_version(MODEL_NAME, newest).aliases:
                self._client.delete_registered_model_alias(MODEL_NAME, CHALLENGER)
            return _published(newest, CHAMPION)

    def exported(self, uri: str) -> Path:
        """Return the exported model folder behind a models:/ URI. Raises BadInput, RegistryFailed."""
        name, alias, version = parse_uri(uri)
        with _reported(f"find {uri}"):
            if alias:
                version = self._client.get_model_version_by_alias(name, alias).version
            location = self._client.get_model_version_download_uri(name, version)
        folders = sorted((self._root / location / "data").glob("*/manifest.json"))
        if not folders:
            raise BadInput(
                f"{uri} is not an exported forecaster", "its files may have been moved: run from mlruns' folder"
            )
        return Path(folders[0].parent)

    def _experiment(self) -> str:
        found = self._client.get_experiment_by_name(EXPERIMENT)
        if found is not None:
            return str(found.experiment_id)
        tags = {"mlflow.note.content": EXPERIMENT_NOTE, "mlflow.experimentKind": "custom_model_development"}
        made: str = self._client.create_experiment(EXPERIMENT, str(self._root / ARTIFACTS / EXPERIMENT), tags)
        if self._movable:
            relocate(self._root)
        return made

    def _log_plan(self, run_id: str, plan: TrainingPlan, members: Sequence[MemberEntry]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param

        params = flat(plan.model_dump(mode="json")) | library_versions()
        self._client.log_batch(run_id, params=[Param(key, value) for key, value in params.items()])
        self._write(run_id, "plan.json", canonical_bytes(plan))
        inputs = [
            DatasetInput(Dataset(**declaration(member)), [InputTag("mlflow.data.context", "training")])
            for member in members
        ]
        self._client.log_inputs(run_id, inputs)

    def _logged(self, run_id: str, key: str, step: int) -> bool:
        return any(metric.step == step for metric in self._client.get_metric_history(run_id, key))

    def _log_series(self, run_id: str, values: Mapping[str, float], step: int, model_id: str | None = None) -> None:
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        # Six digits: what a reader can use.
        rounded = {metric_name(key): float(f"{value:.6g}") for key, value in values.items()}
        metrics = [Metric(key, value, now_ms, step, model_id=model_id) for key, value in rounded.items()]
        for at in range(0, len(metrics), _BATCH):
            self._client.log_batch(run_id, metrics=metrics[at : at + _BATCH])

    def _log_files(
        self,
        run_id: str,
        model_folder: Path,
        files: Mapping[str, bytes],
        privacy: Mapping[str, Any],
        credit: Mapping[str, Any],
    ) -> None:
        for name in ("model_card.md", "model_card.json"):
            self._write(run_id, name, (model_folder / name).read_bytes())
        self._write(run_id, "privacy.json", json.dumps(privacy, indent=2).encode())
        self._write(run_id, "credit.json", json.dumps(credit, indent=2).encode())
        for name, data in files.items():
            self._write(run_id, name, data)

    def _write(self, run_id: str, name: str, data: bytes) -> None:
        """Write an artifact. MLflow itself would resolve the relative location against the working directory."""
        target = self._root / self._client.get_run(run_id).info.artifact_uri / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)

    def _log_model(self, run_id: str, model_folder: Path, card: ModelCard) -> str:
        from mlflow.entities import LoggedModelOutput
        from mlflow.models import Model
        from mlflow.pyfunc import save_model

        run = self._client.get_run(run_id)
        logged = self._client.create_logged_model(
            run.info.experiment_id, MODEL_NAME, run_id, privacy_tags(card), flat(card.spec.model_dump()), "LSTM, ONNX"
        )
        with tempfile.TemporaryDirectory() as temporary:
            staged = Path(temporary) / "model"
            save_model(
                staged,
                loader_module="pipeline.export",
                data_path=str(model_folder),
                mlflow_model=Model(run_id=run_id, model_id=logged.model_id, artifact_path=logged.artifact_location),
                signature=_signature(card),
                input_example=_example(card),
                pip_requirements=requirements(),
            )
            shutil.copytree(staged, self._root / logged.artifact_location, dirs_exist_ok=True)
        self._client.finalize_logged_model(logged.model_id, "READY")
        self._client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, card.privacy.rounds)])
        model_id: str = logged.model_id
        return model_id

    def _register(self, run_id: str, model_id: str, card: ModelCard, results: Mapping[str, float]) -> Published:
        location = self._client.get_logged_model(model_id).artifact_location
        if not any(m.name == MODEL_NAME for m in self._client.search_registered_models(f"name = '{MODEL_NAME}'")):
            self._client.create_registered_model(MODEL_NAME, description=MODEL_NOTE)
        made = self._client.create_model_version(
            MODEL_NAME,
            # A models:/ source would make MLflow ask its process-wide store, which is not this one.
            location,
            run_id,
            tags=privacy_tags(card) | {"model_hash": card.model_hash},
            description=f"{privacy_statement(card)}\n\n{len(results)} results on held-out people are in the run.",
            model_id=model_id,
        )
        self._client.set_registered_model_alias(MODEL_NAME, CHALLENGER, made.version)
        return _published(made.version, CHALLENGER)

    def _published(self, run_id: str, model_hash: str) -> Published | None:
        for version in self._client.search_model_versions(f"name = '{MODEL_NAME}' and run_id = '{run_id}'"):
            if version.tags.get("model_hash") == model_hash:
                aliases = self._client.get_model_version(MODEL_NAME, version.version).aliases
                return _published(version.version, min(aliases, default=""))
        return None


@contextmanager
def _reported(what: str) -> Iterator[None]:
    """Turn every way the store can fail into RegistryFailed."""
    from sqlalchemy.exc import SQLAlchemyError

    failures: tuple[type[BaseException], ...] = (OSError, sqlite3.Error, SQLAlchemyError, _mlflow().MlflowException)
    try:
        yield
    except failures as error:
        raise RegistryFailed(
            f"MLflow could not {what}: {type(error).__name__}",
            "the run goes on; check the disk, and after an update of MLflow run `mlflow db upgrade "
            "sqlite:///mlruns/mlflow.db` once",
        ) from error


def _mlflow() -> Any:
    """Import MLflow, which must not phone home, draw progress bars or greet."""
    for name in ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK", "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"):
        os.environ.setdefault(name, "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
    import mlflow

    return mlflow


def _create_store(root: Path) -> None:
    """Create the database under another name and rename it: half-made tables would stop MLflow for good.

    A lock keeps two first users apart, which MLflow does not survive either.
    """
    (root / ARTIFACTS).mkdir(parents=True, exist_ok=True)
    with (root / STORE / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (root / DATABASE).exists():
            return
        unfinished = root / STORE / ".mlflow.db.new"
        unfinished.unlink(missing_ok=True)
        _migrate(unfinished, root / ARTIFACTS)
        with unfinished.open("rb") as database:
            os.fsync(database.fileno())
        unfinished.rename(root / DATABASE)
    relocate(root)


def _migrate(database: Path, artifacts: Path) -> None:
    """Let MLflow make its tables, without waiting for the disk at each of its many steps: a torn file is made anew."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    def without_waiting(connection: sqlite3.Connection, _record: object) -> None:
        if connection.execute("PRAGMA database_list").fetchone()[2] == str(database):
            connection.execute("PRAGMA synchronous = OFF")

    event.listen(Engine, "connect", without_waiting)
    try:
        store = SqlAlchemyStore(f"sqlite:///{database}", str(artifacts))
        store.delete_experiment("0")  # "Default" would only puzzle a reader
        store.engine.dispose()
    finally:
        event.remove(Engine, "connect", without_waiting)


def _signature(card: ModelCard) -> Any:
    """Named float32 tensors, batch size free."""
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    from data_schemas.units import HORIZON_MINUTES, QUANTILES

    steps = WindowSpec(history_minutes=card.spec.history_minutes).steps
    horizons = len(HORIZON_MINUTES)
    kind = np.dtype(np.float32)
    inputs = [TensorSpec(kind, (-1, steps, len(FEATURES)), "x"), TensorSpec(kind, (-1,), "last")]
    outputs = [
        TensorSpec(kind, (-1, horizons), "forecast"),
        TensorSpec(kind, (-1, horizons, len(QUANTILES)), "quantiles"),
    ]
    return ModelSignature(Schema(inputs), Schema(outputs))


def _example(card: ModelCard) -> dict[str, Any]:
    """Two steady, made-up histories: nobody's readings. Two, so that the batch size is seen to be free."""
    import numpy as np

    from pipeline.windows import history_features

    windows = WindowSpec(history_minutes=card.spec.history_minutes)
    times = np.arange(windows.steps, dtype=np.int64) * windows.grid_minutes * 60
    made_up = [np.linspace(first, 140.0, windows.steps, dtype=np.float32) for first in (110.0, 170.0)]
    features = [history_features(times, glucose, windows) for glucose in made_up]
    return {name: np.concatenate(parts) for name, parts in zip(("x", "last"), zip(*features, strict=True), strict=True)}


def _published(version: str, alias: str) -> Published:
    return Published(
        str(version), alias, f"models:/{MODEL_NAME}@{alias}" if alias else f"models:/{MODEL_NAME}/{version}"
    )
