"""What a finished run leaves: the released model with its card, in the aggregator's folder and in MLflow.

released/<hash>/    the exported model (pipeline.export), <hash> the first 12 digits of its model hash
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from aggregator.governance import replay
from aggregator.ledger import read_entries
from data_schemas.errors import BadInput, CheckFailed, IsletError

if TYPE_CHECKING:
    from aggregator.recorder import Recorder
    from aggregator.rounds import FederationResult
    from aggregator.settings import AggregatorFolder
    from pipeline.model_card import CardMembership, CardResult


def export_model(
    path: Path,
    folder: AggregatorFolder,
    result: FederationResult,
    results: tuple[CardResult, ...] = (),
    membership: tuple[CardMembership, ...] = (),
) -> None:
    """Write the released model with its card, also into the aggregator's folder, from where members' votes take it."""
    from pipeline.export import write_model
    from pipeline.model_card import CardPrivacy, ModelCard, TrainedOn

    plan, members = folder.load_plan(), replay(read_entries(folder.path / "ledger.db")).members
    card = ModelCard(
        version=result.run,
        model_hash=result.model_hash,
        spec=plan.model,
        trained_on=tuple(
            TrainedOn(node=name, **m.model_dump(include={"declared_training_patients", "declared_heldout_patients"}))
            for name, m in members.items()
        ),
        privacy=CardPrivacy(
            unit=plan.privacy.unit,
            epsilon=max(result.epsilon_by_node.values()),
            delta=plan.privacy.delta,
            rounds=plan.rounds,
            noise_source="secure" if plan.seed is None else "seeded",
        ),
        results=results,
        membership=membership,
    )
    write_model(path, result.weights, plan.model, card)
    kept = folder.released / result.model_hash[:12]
    if not kept.exists():
        folder.released.mkdir(exist_ok=True)
        write_model(kept, result.weights, plan.model, card)


@dataclass(frozen=True)
class Released:
    """A model to hand over: weights float32[D], whose hash its name is, and its card, canonical JSON."""

    weights: NDArray[np.float32]
    card: str


def find_release(released: Path, model_hash: str) -> Released | None:
    """Return the released model with this hash, every file checked; None when it is not in the folder whole."""
    from pipeline.export import load_model
    from pipeline.model_card import card_bytes

    try:
        model = load_model(released / model_hash[:12])
    except (BadInput, CheckFailed):
        return None
    return Released(model.weights, card_bytes(model.card).decode()) if model.model_hash == model_hash else None


def release(folder: AggregatorFolder, result: FederationResult, recorder: Recorder) -> Path:
    """Export a finished run's model into the folder and register it in MLflow; done again, it changes nothing."""
    path = folder.released / result.model_hash[:12]
    folder.released.mkdir(exist_ok=True)
    export_model(path, folder, result)
    if recorder.registry is not None:
        try:
            published = recorder.registry.finish(
                recorder.run_id,
                path,
                files={},
                privacy={"unit": "patient", "epsilon_by_node": result.epsilon_by_node},
                credit={f"epoch {c.epoch}": [line.model_dump(mode="json") for line in c.lines] for c in result.credits},
                results={},
            )
            recorder.tell(f"MLflow: registered {published.uri} as {published.alias}")
        except IsletError as error:
            recorder.tell(f"MLflow did not take the model, it is in {path}: {error.message}")
    return path


def fetch_release(folder: AggregatorFolder, run: str, out: Path) -> str:
    """Copy the released model of a finished run to `out`; its model hash. Raises BadInput when there is none."""
    entry = replay(read_entries(folder.path / "ledger.db")).models.get(run)
    source = None if entry is None else folder.released / entry.model_hash[:12]
    if entry is None or source is None or not source.is_dir():
        raise BadInput(f"run {run} has released no model", "run it to its end with `islet aggregator run`")
    if not out.exists():
        shutil.copytree(source, out)
    elif not _holds(out, source):
        raise BadInput(f"{out} holds something else", "give --out a new folder")
    return entry.model_hash


def _holds(out: Path, source: Path) -> bool:
    return all((out / f.name).is_file() and (out / f.name).read_bytes() == f.read_bytes() for f in source.iterdir())
