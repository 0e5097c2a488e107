"""The model that the members decided to serve: kept by hash, and pointed at by one link that the endpoint watches.

    models/<hash>/   an exported model (pipeline.export), made here from weights whose hash the ledger's decision names
    model            link to the champion

The ledger vouches for the weights alone, so the node makes the ONNX file from them itself: what it serves follows from
what was decided, whatever else the aggregator sends.
"""

from __future__ import annotations

import json
import secrets
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_schemas.canonical import bytes_hash
from data_schemas.errors import BadInput, StorageFailed
from data_schemas.ledger import ModelEntry
from data_schemas.messages import Installed, ModelTask, Refusal, RefusalCode
from hospital_node import ledger_view
from hospital_node.folder import NodeFolder
from hospital_node.settings import read_settings
from pipeline.charter import Charter
from pipeline.model_card import ModelCard, read_card

MODELS, LINK = "models", "model"


def install(node: NodeFolder, task: ModelTask, weights: NDArray[np.float32]) -> Installed | Refusal:
    """Take the champion in and serve it. weights: float32[D]. Refuses what the node's ledger copy does not say."""
    if task.federation != node.settings.federation or node.settings.aggregator_public_key is None:
        return Refusal(code=RefusalCode.UNKNOWN_FEDERATION)
    charter = ledger_view.decided(node)
    found, decided = bytes_hash(np.ascontiguousarray(weights, dtype="<f4").tobytes()), charter.champion
    if decided is None or found != decided:
        return Refusal(code=RefusalCode.MODEL_NOT_DECIDED)
    try:
        card = read_card(json.loads(task.card))
    except (ValueError, BadInput):
        return Refusal(code=RefusalCode.MALFORMED_TASK)
    if not _as_published(card, charter.models[decided], decided):
        return Refusal(code=RefusalCode.MODEL_MISMATCH)
    if not (node.path / MODELS / decided).exists():
        from pipeline.export import write_model

        try:
            write_model(node.path / MODELS / decided, weights, card.spec, card)
        except BadInput:
            return Refusal(code=RefusalCode.MODEL_MISMATCH)
    follow(node, charter)
    return Installed(model_hash=decided)


def follow(node: NodeFolder, charter: Charter) -> str | None:
    """Point the link at the champion if the node has it; return the hash of the model that the link points at."""
    decided = charter.champion
    if decided is not None and served(node.path) != decided and (node.path / MODELS / decided).is_dir():
        fresh = node.path / f".{LINK}.{secrets.token_hex(4)}"
        try:
            fresh.symlink_to(Path(MODELS) / decided)
            fresh.replace(node.path / LINK)
        except OSError as error:
            raise StorageFailed(f"{LINK}: not moved ({error.strerror})", "Check the disk and its mode.") from error
    return served(node.path)


def served(home: Path) -> str | None:
    """Hash of the model that the node's link points at."""
    try:
        return (home / LINK).readlink().name
    except OSError:
        return None


def folder_to_serve(home: Path, given: Path | None) -> Path:
    """Return the model folder that the node's endpoint watches. Raises BadInput where the hospital has no say alone."""
    follows = read_settings(home / "node.toml").aggregator_public_key is not None
    if follows and given not in (None, home / LINK):
        raise BadInput(
            "this node follows the federation's ledger: it serves the model that the members decide",
            "leave --model out; to change the model: `islet federation propose NODE promote`",
        )
    if not follows and given is None:
        raise BadInput("this node follows no ledger, so it must be told what to serve", "give --model FOLDER")
    return given or home / LINK


def is_champion(home: Path, model_hash: str) -> bool:
    """Whether the node's ledger copy says that this model is served; always where no ledger is followed."""
    node = NodeFolder(home, read_settings(home / "node.toml"), sitting=True)
    return node.settings.aggregator_public_key is None or ledger_view.decided(node).champion == model_hash


def _as_published(card: ModelCard, entry: ModelEntry, decided: str) -> bool:
    """Whether the card says of privacy what the ledger says of this model."""
    told = card.privacy
    return (card.model_hash, card.version, told.unit, told.relation, told.delta, told.epsilon) == (
        decided,
        entry.run,
        entry.unit,
        entry.relation,
        entry.delta,
        max(entry.epsilon_by_node.values(), default=0.0),
    )
