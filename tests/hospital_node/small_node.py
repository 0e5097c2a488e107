"""A small hospital node with synthetic patients, made for the tests of this folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from data_schemas.canonical import bytes_hash
from data_schemas.messages import TrainTask
from data_schemas.plan import TrainingPlan
from data_schemas.reading import COLUMNS, QualityReport, ValidReadings
from hospital_node.folder import NodeFolder
from hospital_node.settings import NodeSettings
from hospital_node.store import Store

FEDERATION = "trial"
NOW = 1_800_000_000.0


def settings(**changes: Any) -> NodeSettings:
    """Return settings of a node called north, with seeded keys."""
    values: dict[str, Any] = {
        "name": "north",
        "federation": FEDERATION,
        "declared_training_patients": 10,
        "declared_heldout_patients": 4,
        "heldout_fraction": 0.3,
        "min_patients": 2,
        "max_epsilon_training": 8.0,
        "max_epsilon_heldout": 8.0,
        "seed": 1,
    }
    return NodeSettings(**{**values, **changes})


def plan(**changes: Any) -> TrainingPlan:
    """Return a plan of four rounds for a tiny model; part__name=value changes one value of a part."""
    values: dict[str, Any] = {
        "name": "tiny",
        "model": {"history_minutes": 60, "hidden_size": 4},
        "rounds": 4,
        "local": {"steps_per_round": 2, "windows_per_patient": 4, "learning_rate": 0.1, "trainable": "all"},
        "server": {"learning_rate": 1.0, "momentum": 0.0, "average_last_rounds": 2},
        "privacy": {"epsilon": 8.0, "max_grad_norm": 0.05, "sample_rate": 0.5, "noise_multiplier": 2.5},
        "credit": {
            "rounds_per_epoch": 2,
            "windows_per_patient": 6,
            "clip_mg_dl": 5.0,
            "noise_multiplier": 1.5,
            "epsilon": 8.0,
            "pot_micro_credits_per_round": 1000,
        },
        "seed": 3,
    }
    for key, value in changes.items():
        part, _, name = key.partition("__")
        if name:
            values[part] = {**values[part], name: value}
        else:
            values[part] = value
    return TrainingPlan.model_validate(values)


def make_node(path: Path, **changes: Any) -> Path:
    """Make a node folder without readings."""
    NodeFolder.create(path, settings(**changes))
    return path


def readings(patients: int, hours: int = 12, seed: int = 0) -> ValidReadings:
    """Make up glucose of `patients` people, one reading every 5 minutes: waves of each person's own size."""
    draw = np.random.default_rng(seed)
    count = hours * 12
    minutes = np.arange(count) * 5
    frames = []
    for number in range(patients):
        level, size, period = draw.uniform(110, 170), draw.uniform(10, 50), draw.uniform(90, 240)
        glucose = level + size * np.sin(2 * np.pi * minutes / period + draw.uniform(0, 6)) + draw.normal(0, 2, count)
        frames.append(
            pd.DataFrame(
                {
                    "patient": f"person-{number:03d}",
                    "measured_at": pd.Timestamp("2026-01-01", tz="UTC") + pd.to_timedelta(minutes, unit="min"),
                    "zone": "UTC",
                    "glucose_mg_dl": glucose.clip(40, 400),
                    "flags": 0,
                    "source": f"{seed:064x}",
                }
            )
        )
    frame = pd.concat(frames, ignore_index=True)
    return ValidReadings(frame.assign(row=np.arange(len(frame))).reindex(columns=list(COLUMNS)).astype(COLUMNS))


def fill(path: Path, patients: int, hours: int = 12) -> None:
    """Put synthetic readings into a node's store."""
    valid = readings(patients, hours)
    count = len(valid.frame)
    report = QualityReport(count, count, {}, {}, {}, patients)
    nothing = valid.frame.iloc[:0].assign(rule=pd.Series(dtype="str"))
    Store(path / "store").add(valid, nothing, report, [f"{0:064x}"])


def base_weights(task_plan: TrainingPlan, seed: int = 0) -> npt.NDArray[np.float32]:
    """Return initial weights float32[D] of the plan's model."""
    from pipeline.forecaster import Forecaster, ForecasterSpec, flatten

    return flatten(Forecaster(ForecasterSpec(hidden_size=task_plan.model.hidden_size), seed=seed))


def train_task(task_plan: TrainingPlan, weights: npt.NDArray[np.float32], **changes: Any) -> TrainTask:
    """Round 1 of a run, with an hour to do it."""
    values: dict[str, Any] = {
        "federation": FEDERATION,
        "run": "run-1",
        "round": 1,
        "plan": task_plan,
        "base_model_hash": bytes_hash(weights.tobytes()),
        "deadline_unix": NOW + 3600,
    }
    return TrainTask(**{**values, **changes})
