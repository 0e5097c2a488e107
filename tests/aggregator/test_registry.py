"""The model registry: a real MLflow store in a temporary folder."""

from __future__ import annotations

import base64
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import zlib
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from aggregator import registry
from aggregator.progress import RoundSummary
from aggregator.registry import Published, Registry, RegistryFailed, load_exported, relocate
from aggregator.registry_store import review_path
from data_schemas.canonical import bytes_hash
from data_schemas.errors import BadInput, Tampered
from data_schemas.ledger import CreditEntry, CreditLine, MemberEntry
from data_schemas.plan import TrainingPlan
from pipeline.export import load_model, write_model
from pipeline.forecaster import Forecaster, ForecasterSpec, flatten
from pipeline.model_card import CardPrivacy, ModelCard, TrainedOn
from pipeline.windows import FEATURES

NODES = ("north", "south")
PLAN = TrainingPlan.model_validate(
    {
        "name": "tiny",
        "model": {"history_minutes": 60, "hidden_size": 4},
        "rounds": 3,
        "local": {"steps_per_round": 2, "windows_per_patient": 4, "learning_rate": 0.1, "trainable": "all"},
        "server": {"learning_rate": 1.0, "momentum": 0.0, "average_last_rounds": 1},
        "privacy": {"epsilon": 4.0, "max_grad_norm": 1.0, "sample_rate": 0.5, "noise_multiplier": 2.0},
        "credit": {
            "rounds_per_epoch": 3,
            "windows_per_patient": 4,
            "clip_mg_dl": 5.0,
            "noise_multiplier": 2.0,
            "epsilon": 2.0,
            "pot_micro_credits_per_round": 1000,
        },
    }
)
MEMBERS = [
    MemberEntry(node=node, public_key="ab" * 32, declared_training_patients=20, declared_heldout_patients=5)
    for node in NODES
]
PNG = bytes.fromhex("89504e470d0a1a0a")


def summary(number: int) -> RoundSummary:
    return RoundSummary(
        run="run-1",
        round=number,
        rounds=3,
        admitted=NODES,
        rejected=(),
        update_norms=dict.fromkeys(NODES, 0.5),
        cosine_to_mean=dict.fromkeys(NODES, 0.7),
        model_hash="cd" * 32,
        epsilon_by_node={"north": 0.5 * number, "south": 0.4 * number},
        seconds=1.25,
    )


def credit() -> CreditEntry:
    lines = tuple(
        CreditLine(node=node, shapley_mg_dl=0.2, interval_low_mg_dl=0.1, interval_high_mg_dl=0.3, micro_credits=1500)
        for node in NODES
    )
    return CreditEntry(
        run="run-1",
        epoch=1,
        rounds=(1, 2, 3),
        mode="exact-shapley-weighted-median",
        pot_micro_credits=3000,
        unpaid_micro_credits=0,
        lines=lines,
        releases=(),
    )


def model_folder(parent: Path, seed: int) -> Path:
    weights = flatten(Forecaster(ForecasterSpec(hidden_size=PLAN.model.hidden_size), seed=seed))
    card = ModelCard(
        version=str(seed),
        model_hash=bytes_hash(weights.tobytes()),
        spec=PLAN.model,
        trained_on=tuple(TrainedOn(node=n, declared_training_patients=20, declared_heldout_patients=5) for n in NODES),
        privacy=CardPrivacy(unit="patient", epsilon=1.5, delta=1e-5, rounds=3, noise_source="secure"),
    )
    return write_model(parent / f"model-{seed}", weights, PLAN.model, card).folder


def publish(store: Registry, run_id: str, folder: Path) -> Published:
    return store.finish(
        run_id,
        folder,
        files={"plots/clarke_30.png": PNG},
        privacy={"epsilon_by_node": {"north": 1.5}},
        credit={"north": 1500},
        results={"rmse_30/north/islet": 20.123456789, "rmse_30/north/pooled (not private)": 18.0},
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, Path, Published]:
    """Finish one run in a store: its root, MLflow run id, exported folder and publication."""
    root = tmp_path_factory.mktemp("consortium")
    folder = model_folder(tmp_path_factory.mktemp("exports"), 1)
    store = Registry(root)
    run_id = store.start_run("run-1", "trial", PLAN, MEMBERS)
    for number in (1, 2):
        store.log_round(run_id, summary(number))
    resumed = Registry(root)
    assert resumed.start_run("run-1", "trial", PLAN, MEMBERS) == run_id
    for number in (2, 3):  # round 2 is told twice, as after a crash
        resumed.log_round(run_id, summary(number))
    for _ in range(2):
        resumed.log_credit(run_id, credit())
        resumed.log_errors(run_id, 3, {"north": 17.5})
    publish(resumed, run_id, folder)
    # The end of a run may be repeated, as after a crash: the run is found, resumed and finished once more.
    assert resumed.start_run("run-1", "trial", PLAN, MEMBERS) == run_id
    assert publish(resumed, run_id, folder).alias == "challenger"
    crowned = resumed.crown(load_model(folder).model_hash)
    assert crowned is not None
    assert crowned == resumed.crown(load_model(folder).model_hash) == publish(resumed, run_id, folder)
    return root, run_id, folder, crowned


def test_run_tells_the_whole_story(finished: tuple[Path, str, Path, Published]) -> None:
    """Parameters, one point per round however often it was told, results, datasets, files and tags are there."""
    root, run_id, _, _ = finished
    client = Registry(root)._client
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["privacy.noise_multiplier"] == "2.0"
    assert run.data.tags["privacy.unit"] == "patient"
    history = client.get_metric_history(run_id, "epsilon/north")
    assert [(m.step, m.value) for m in history] == [(1, 0.5), (2, 1.0), (3, 1.5)]
    assert [m.step for m in client.get_metric_history(run_id, "credit_micro/south")] == [3]
    assert [(m.step, m.value) for m in client.get_metric_history(run_id, "heldout_rmse_30/north")] == [(3, 17.5)]
    assert run.data.metrics["rmse_30/north/islet"] == 20.1235
    assert run.data.metrics["rmse_30/north/pooled -not private-"] == 18  # MLflow takes no brackets
    assert [d.dataset.name for d in run.inputs.dataset_inputs] == list(NODES)
    written = {p.name for p in (root / run.info.artifact_uri).rglob("*") if p.is_file()}
    assert written == {"plan.json", "model_card.md", "model_card.json", "privacy.json", "credit.json", "clarke_30.png"}


def test_store_names_no_folder_and_no_user(finished: tuple[Path, str, Path, Published]) -> None:
    """Neither the database nor any file beside it holds the path it was written at, nor the user who ran it."""
    root, run_id, *_ = finished
    for file in (root / "mlruns").rglob("*"):
        if file.is_file():
            assert str(root).encode() not in file.read_bytes(), file.name
    tags = Registry(root)._client.get_run(run_id).data.tags
    assert (tags["mlflow.user"], tags["mlflow.source.name"]) == ("aggregator", "islet")


def test_champion_loads_by_alias_and_forecasts_the_same(
    finished: tuple[Path, str, Path, Published], tmp_path: Path
) -> None:
    """From a moved copy of the tree, plain MLflow loads models:/...@champion, and it forecasts what was exported."""
    root, _, folder, published = finished
    assert (published.alias, published.uri) == ("champion", "models:/islet-forecaster@champion")
    moved = tmp_path / "clone"
    shutil.copytree(root, moved)
    draw = np.random.default_rng(3)
    x = draw.standard_normal((3, 13, len(FEATURES))).astype(np.float32)
    last = np.array([80, 150, 260], np.float32)
    np.savez(tmp_path / "in.npz", x=x, last=last)
    script = (
        "import mlflow, numpy as np, sys\n"
        "mlflow.set_tracking_uri('sqlite:///mlruns/mlflow.db')\n"
        "model = mlflow.pyfunc.load_model('models:/islet-forecaster@champion')\n"
        "given = np.load(sys.argv[1])\n"
        "np.savez(sys.argv[2], **model.predict({'x': given['x'], 'last': given['last']}))\n"
    )
    code = Path(registry.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(code), "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
    command = [sys.executable, "-c", script, str(tmp_path / "in.npz"), str(tmp_path / "out.npz")]
    subprocess.run(command, cwd=moved, env=environment, check=True, capture_output=True, timeout=120)
    forecast, quantiles = load_model(folder).predict(x, last)
    with np.load(tmp_path / "out.npz") as answer:
        np.testing.assert_array_equal(answer["forecast"], forecast)
        np.testing.assert_array_equal(answer["quantiles"], quantiles)


def test_exported_folder_is_found_by_uri(finished: tuple[Path, str, Path, Published]) -> None:
    """load_exported gives the verified folder behind an alias or a version, and refuses other URIs."""
    root, _, folder, published = finished
    for uri in (published.uri, f"models:/islet-forecaster/{published.version}"):
        assert load_model(load_exported(uri, root)).model_hash == load_model(folder).model_hash
    with pytest.raises(BadInput, match="not a model URI"):
        load_exported("runs:/abc/model", root)
    with pytest.raises(RegistryFailed):
        load_exported("models:/islet-forecaster@nobody", root)


def test_later_model_is_challenger_until_promoted(finished: tuple[Path, str, Path, Published], tmp_path: Path) -> None:
    """A model becomes the champion by its hash, as members vote; finishing twice registers once; strangers do not."""
    root = tmp_path / "copy"
    shutil.copytree(finished[0], root)
    store = Registry(root)
    folder = model_folder(tmp_path, 2)
    run_id = store.start_run("run-2", "trial", PLAN, MEMBERS)
    second = publish(store, run_id, folder)
    assert (second.version, second.alias) == ("2", "challenger")
    assert publish(store, run_id, folder) == second
    assert load_model(load_exported("models:/islet-forecaster@champion", root)).card.version == "1"
    assert store.crown("0" * 64) is None
    crowned = store.crown(load_model(folder).model_hash)
    assert crowned is not None
    assert crowned.version == second.version
    assert load_model(load_exported("models:/islet-forecaster@champion", root)).card.version == "2"
    with pytest.raises(RegistryFailed):
        load_exported("models:/islet-forecaster@challenger", root)


def test_damaged_or_unknown_model_is_not_published(finished: tuple[Path, str, Path, Published], tmp_path: Path) -> None:
    """A flipped bit stops publication before MLflow hears of it, and a folder without a card is refused."""
    root, run_id, folder, _ = finished
    store = Registry(root)
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    data = bytearray((broken / "model.onnx").read_bytes())
    data[100] ^= 1
    (broken / "model.onnx").write_bytes(data)
    with pytest.raises(Tampered, match=r"model\.onnx"):
        publish(store, run_id, broken)
    with pytest.raises(BadInput, match="not a model folder"):
        publish(store, run_id, tmp_path)


def test_failure_of_the_store_is_one_typed_error(finished: tuple[Path, str, Path, Published], tmp_path: Path) -> None:
    """A broken database surfaces as RegistryFailed, which the round loop reports and survives."""
    root = tmp_path / "copy"
    shutil.copytree(finished[0], root)
    store = Registry(root)
    (root / "mlruns" / "mlflow.db").write_bytes(b"not a database" * 100)
    with pytest.raises(RegistryFailed, match="log round 4"):
        store.log_round(finished[1], summary(4))


def test_relocate_repairs_absolute_locations(finished: tuple[Path, str, Path, Published], tmp_path: Path) -> None:
    """Locations that another tool stored absolute become relative; a second time there is nothing to do."""
    root = tmp_path / "copy"
    shutil.copytree(finished[0], root)
    with closing(sqlite3.connect(root / "mlruns" / "mlflow.db")) as connection, connection:
        connection.execute("UPDATE runs SET artifact_uri = '/somewhere/else/' || artifact_uri")
        connection.execute("UPDATE model_versions SET storage_location = 'file:///old/' || storage_location")
    assert relocate(root) == 2
    assert relocate(root) == 0
    assert load_model(load_exported("models:/islet-forecaster@champion", root)).card.version == "1"
    with pytest.raises(BadInput, match=r"holds no mlruns/mlflow\.db"):
        relocate(tmp_path)


def test_a_reviewers_view_is_put_into_the_store_once(finished: tuple[Path, str, Path, Published]) -> None:
    """The path names the experiment and the view; asking twice leaves one tag, whose columns the run has."""
    root = finished[0]
    path = review_path(root)
    assert path == review_path(root)
    with closing(sqlite3.connect(root / "mlruns" / "mlflow.db")) as db:
        told = db.execute("SELECT experiment_id, value FROM experiment_tags WHERE key LIKE '%sharedView%'").fetchall()
        params = {key for (key,) in db.execute("SELECT DISTINCT key FROM params")}
    ((experiment, packed),) = told
    assert path.startswith(f"#/experiments/{experiment}/runs?viewStateShareKey=reviewer")
    state = json.loads(zlib.decompress(base64.b64decode(packed.removeprefix("deflate;"))))
    assert set(state["selectedColumns"]) < set(state["columnOrder"])
    shown = {name[8:-1] for name in state["selectedColumns"] if name.startswith("params.")}
    assert shown
    assert shown <= params
    assert len(packed) < 5000  # MLflow's limit on a tag


def test_a_review_of_nothing_says_what_to_do(tmp_path: Path) -> None:
    """A folder without a store is a plain error."""
    with pytest.raises(BadInput, match="holds no"):
        review_path(tmp_path)
