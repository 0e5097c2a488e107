"""The main job: a short demo on the real sample exports, killed in the middle, resumed, finished and shown again."""

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
OPTIONS = ("--rounds", "3", "--seed", "1")


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", "from pipeline.cli import main; main()", *arguments]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def islet(folder: Path, *arguments: str) -> tuple[int, str]:
    done = start(folder, *arguments)
    text = done.communicate(timeout=280)[0]
    return done.returncode, text


def kill_after(folder: Path, words: str) -> None:
    """Start the demo and kill it with SIGKILL a moment after it printed a line with these words."""
    demo = start(folder, "demo", *OPTIONS)
    assert demo.stdout is not None
    for line in demo.stdout:
        if words in line:
            time.sleep(0.2)
            demo.send_signal(signal.SIGKILL)
            break
    assert demo.wait() == -signal.SIGKILL


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A demo that was killed with SIGKILL in its second round and then given the same command again."""
    folder = tmp_path_factory.mktemp("demo")
    kill_after(folder, "round  1/3")
    code, text = islet(folder, "demo", *OPTIONS)
    assert code == 0, text
    return folder, text


def test_a_killed_demo_resumes_and_ends_with_the_table(finished: tuple[Path, str]) -> None:
    """The second run does not import or train again what was done, and prints everything that is promised."""
    _, text = finished

    assert text.count("imported before") == 6
    assert "round  3/3: 6 updates admitted" in text
    for column in ("persistence", "ridge", "local-only", "public-only", "federated", "pooled"):
        assert column in text
    assert "unit patient" in text
    assert "at delta 1e-05" in text
    assert "cosigned by 6 of 6 hospitals" in text
    assert "registered models:/islet-forecaster@challenger" in text
    assert "vote: 6 hospitals made it the champion; 6 nodes serve it" in text
    assert "a held-out patient of arizona asked" in text


def test_the_run_in_mlflow_shows_what_privacy_costs_and_withstands(finished: tuple[Path, str]) -> None:
    """Beside the run lie the picture of error against epsilon, and a card with an attack on both models."""
    (card,) = (finished[0] / "mlruns" / "artifacts" / "islet-federation").glob("*/artifacts/model_card.json")
    attacks = {m["model"]: m for m in json.loads(card.read_text())["membership"]}

    assert (card.parent / "plots" / "error_against_epsilon.png").read_bytes().startswith(b"\x89PNG")
    assert {"federated", "pooled"} == set(attacks)
    assert all(0 <= m["low"] <= m["auc"] <= m["high"] <= 1 and m["members"] > m["others"] for m in attacks.values())


def test_each_round_was_paid_for_once(finished: tuple[Path, str]) -> None:
    """After a kill and a resume, every node's book holds exactly one release per round, and one for its credit."""
    from hospital_node.folder import NodeFolder

    for home in sorted((finished[0] / "demo-run" / "nodes").iterdir()):
        with NodeFolder.open(home) as node:
            cohorts = [row.cohort for row in node.budget().rows()]
            assert cohorts.count("training") == 3
            assert cohorts.count("heldout") == 1
            assert node.budget().spent("training") <= 8.0


def test_the_same_seed_gives_the_same_model(finished: tuple[Path, str], tmp_path: Path) -> None:
    """Rounds that nothing disturbed end, with the same seed, with the very weights of the killed and resumed ones."""
    kill_after(tmp_path, "credit, epoch 1")
    (undisturbed,) = (tmp_path / "demo-run" / "aggregator" / "state").rglob("round-00003.npz")
    (resumed,) = (finished[0] / "demo-run" / "aggregator" / "state").rglob("round-00003.npz")

    with np.load(undisturbed) as once, np.load(resumed) as again:
        assert once.files == again.files
        for name in once.files:
            np.testing.assert_array_equal(once[name], again[name])


def test_a_finished_demo_says_so_and_another_one_is_refused(finished: tuple[Path, str]) -> None:
    """The same command shows the table again; other options in the same folder end with 2 and advice."""
    same, text = islet(finished[0], "demo", *OPTIONS)
    other, refusal = islet(finished[0], "demo", "--rounds", "4", "--seed", "1")

    assert same == 0
    assert "nothing to do" in text
    assert "federated" in text
    assert other == 2
    assert "give --out another folder" in refusal


def test_the_commands_agree_about_the_finished_run(finished: tuple[Path, str]) -> None:
    """Status, ledger and backtest work on what the demo left."""
    folder = finished[0]
    code, verified = islet(folder, "ledger", "verify", "demo-run/aggregator", "--witness", "demo-run/nodes/duke")
    assert code == 0, verified
    assert "arizona" in islet(folder, "aggregator", "status", "demo-run/aggregator")[1]
    assert len(islet(folder, "ledger", "show", "demo-run/aggregator")[1].splitlines()) == 27
    readings = folder / "readings.csv"
    lines = [f"a,2024-01-01T{h:02d}:{m:02d}:00,{100 + m}" for h in range(4) for m in range(0, 60, 5)]
    readings.write_text("\n".join(["patient_id,time,glucose_mg_dl", *lines]) + "\n")
    for number, model in enumerate(("demo-run/model", "models:/islet-forecaster@champion")):
        options = ("--readings", "readings.csv", "--model", model, "--out", f"{number}.csv")
        code, text = islet(folder, "backtest", *options)
        assert code == 0, text
    assert (folder / "0.csv").read_bytes() == (folder / "1.csv").read_bytes()
    assert (folder / "0.csv").read_text().startswith("patient_id,issued_at,horizon_minutes,forecast_mg_dl,p05,p25")


def test_the_mlflow_run_holds_the_scores_of_every_model(finished: tuple[Path, str]) -> None:
    """Metrics of our model and of every baseline, and the tables of `islet evaluate`, are in the run."""
    root = finished[0] / "mlruns"
    with contextlib.closing(sqlite3.connect(root / "mlflow.db")) as database:
        metrics = {name for (name,) in database.execute("SELECT key FROM latest_metrics")}
    models = ("persistence", "linear", "AR", "ridge", "trees", "local-only", "public-only", "federated", "personal")
    assert {f"{name}_45/pooled/{model}" for model in models for name in ("rmse", "mae", "bias", "skill")} <= metrics
    assert {"rmse_30/duke/pooled", "coverage80_60/pooled/federated", "lag_minutes_30/pooled/federated"} <= metrics
    scores = json.loads(next(root.rglob("evaluation/scores.json")).read_text())
    assert set(models) < set(scores["models"])
    assert next(root.rglob("evaluation/scores.html")).read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("aggregator/ledger.db", "ledger.db"),
        ("nodes/duke/budget.db", "budget.db"),
        ("model/weights.npz", "weights.npz"),
    ],
)
def test_a_flipped_bit_is_named(finished: tuple[Path, str], tmp_path: Path, file: str, name: str) -> None:
    """One bit changed in the ledger, a budget book or the model: exit code 1, the file's name and an offset."""
    copy = tmp_path / "demo-run"
    shutil.copytree(finished[0] / "demo-run", copy)
    data = bytearray((copy / file).read_bytes())
    place = data.find(b"duke", len(data) // 3) if name == "ledger.db" else len(data) * 2 // 3
    data[place] ^= 1
    (copy / file).write_bytes(data)
    command = {
        "ledger.db": ("ledger", "verify", "demo-run/aggregator"),
        "budget.db": ("node", "budget", "demo-run/nodes/duke"),
        "weights.npz": ("backtest", "--readings", "r.csv", "--model", "demo-run/model", "--out", "o.csv"),
    }[name]

    code, text = islet(tmp_path, *command)

    assert code == 1, text
    assert name in text
    assert "at offset" in text


def test_no_identity_and_no_secret_is_in_what_the_aggregator_holds(finished: tuple[Path, str]) -> None:
    """No pseudonym, export name or private key of a hospital is in the aggregator's folder or in MLflow's."""
    folder = finished[0]
    from hospital_node.store import Store

    homes = sorted((folder / "demo-run" / "nodes").iterdir())
    marks = [(home / "keys" / "node.ed25519").read_text().strip().encode() for home in homes]
    marks += [p.encode() for home in homes for p in Store(home / "store").patients()]
    held = [p for place in ("demo-run/aggregator", "mlruns") for p in (folder / place).rglob("*") if p.is_file()]

    assert len(held) > 20
    for path in held:
        data = path.read_bytes()
        assert not [m for m in marks if m in data], path.name
