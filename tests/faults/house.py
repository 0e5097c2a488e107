"""A small real federation for the drills: three hospitals with readings, budget books and ledger copies."""

from __future__ import annotations

import shutil
from pathlib import Path

from aggregator import governance, settings
from data_schemas.canonical import canonical_bytes
from data_schemas.ledger import MemberEntry
from data_schemas.plan import TrainingPlan
from hospital_node.folder import NodeFolder
from tests.hospital_node.small_node import base_weights, fill, make_node, plan

NAMES = ("alder", "birch", "cedar")
FEDERATION = "drill"
AT = "2026-01-01T00:00:00+00:00"
TRAINING, HELDOUT = 10, 6


def plan_of(rounds: int) -> TrainingPlan:
    """Noise comes from the operating system, so a second draw where only one was paid for would show."""
    return plan(
        rounds=rounds,
        seed=None,
        server__momentum=0.5,
        privacy__epsilon=30.0,
        credit__epsilon=30.0,
        credit__windows_per_patient=2,
    )


def template(path: Path) -> Path:
    """Make the aggregator's and the hospitals' folders once; each federation of a drill starts from a copy."""
    import numpy as np

    folder = settings.create(
        path / "aggregator",
        settings.AggregatorSettings(
            federation=FEDERATION,
            initial_weights="start.npz",
            min_updates=2,
            max_attempts=4,
            retry_pause_s=0.05,
            hello_timeout_s=30,
            round_timeout_s=60,
            score_timeout_s=60,
            cosign_timeout_s=60,
        ),
        seed=1,
    )
    np.savez(folder.path / "start.npz", weights=base_weights(plan()))
    for name in NAMES:
        make_node(
            path / name,
            name=name,
            federation=FEDERATION,
            aggregator_public_key=folder.key().public.hex,
            declared_training_patients=TRAINING,
            declared_heldout_patients=HELDOUT,
            max_epsilon_training=40.0,
            max_epsilon_heldout=40.0,
        )
        fill(path / name, TRAINING + HELDOUT, hours=6)
    return path


def build(start: Path, path: Path, rounds: int) -> settings.AggregatorFolder:
    """Copy the template, and enter plan, founding policy and members into the ledger."""
    shutil.copytree(start, path)
    folder, task_plan = settings.open_folder(path / "aggregator"), plan_of(rounds)
    (folder.path / "plan.json").write_bytes(canonical_bytes(task_plan))
    ledger = folder.open_ledger()
    governance.found_federation(ledger, governance.founding_of(FEDERATION, task_plan), AT)
    for name in NAMES:
        with NodeFolder.open(path / name) as node:
            entry = MemberEntry(
                node=name,
                public_key=node.key.public.hex,
                declared_training_patients=TRAINING,
                declared_heldout_patients=HELDOUT,
            )
        governance.admit_member(ledger, entry, AT)
    ledger.close()
    return folder
