"""A model as a folder: ONNX to serve, flat weights to continue from, a card to judge it by, and a sealing manifest.

    model.onnx        opset 17, inputs x [B,T,F] and last [B], outputs forecast [B,12] and quantiles [B,12,5] in mg/dL
    weights.npz       `weights` float32[D], the vector the federation trains and the ledger hashes
    model_card.json   canonical JSON of the ModelCard;  model_card.md is the same for people
    manifest.json     SHA-256 of every file, and of each of its 4096-byte blocks

The manifest finds damage and says where. It is no signature: the ledger's model entry vouches for the weights' hash.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import secrets
import shutil
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from data_schemas.canonical import bytes_hash, canonical_bytes, content_hash
from data_schemas.errors import BadInput, CheckFailed, StorageFailed, Tampered
from data_schemas.plan import ModelSpec
from data_schemas.units import HORIZON_MINUTES, QUANTILES, SENSOR_MAX_MG_DL, SENSOR_MIN_MG_DL
from pipeline.model_card import ModelCard, card_bytes, complete, read_card, to_markdown
from pipeline.windows import FEATURES, WindowSpec

Float32: TypeAlias = npt.NDArray[np.float32]

FORMAT = "islet-model/1"
MANIFEST = "manifest.json"
FILES = ("model.onnx", "weights.npz", "model_card.json", "model_card.md")
BLOCK_BYTES = 4096
OPSET = 17
# ONNX and torch add up in a different order; float32 near 400 mg/dL resolves 3e-5.
TOLERANCE_MG_DL = 1e-3
_PROBE_BATCHES = (1, 7)
# torch's exporter, like the list of warnings, belongs to the whole process.
_EXPORTING = threading.Lock()


@dataclass(frozen=True, slots=True)
class ExportedModel:
    """A folder that was written and checked; max_difference_mg_dl is the largest gap found between ONNX and torch."""

    folder: Path
    model_hash: str
    manifest_hash: str
    max_difference_mg_dl: float


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A verified model, ready to forecast. Safe to use from several threads."""

    spec: ModelSpec
    model_hash: str
    card: ModelCard
    weights: Float32 = field(repr=False)
    _session: Any = field(repr=False)

    def predict(self, x: Float32, last: Float32) -> tuple[Float32, Float32]:
        """Forecast [B,12] and quantiles [B,12,5], mg/dL in 40..400, from x float32[B,T,F] and last float32[B] mg/dL."""
        steps = WindowSpec(history_minutes=self.spec.history_minutes).steps
        if x.ndim != 3 or x.shape[1:] != (steps, len(FEATURES)) or last.shape != x.shape[:1]:
            raise ValueError(f"expected x [B,{steps},{len(FEATURES)}] and last [B], got {x.shape} and {last.shape}")
        return _run(self._session, x, last)


def write_model(folder: Path, weights: Float32, spec: ModelSpec, card: ModelCard) -> ExportedModel:
    """Write the model folder, all of it or nothing, after checking that ONNX forecasts what torch forecasts.

    weights: float32[D]. An existing folder is kept if it already holds this model with this card.
    Raises BadInput (card incomplete or of another model, weights unfit, folder taken), CheckFailed, StorageFailed.
    """
    card = complete(card)
    _check_weights(weights, spec, card)
    onnx_bytes = _to_onnx(weights, spec)
    difference = _difference_mg_dl(onnx_bytes, weights, spec)
    if not difference <= TOLERANCE_MG_DL:
        raise CheckFailed(
            f"ONNX and torch disagree by {difference:.3g} mg/dL (allowed {TOLERANCE_MG_DL:g})",
            "the model was not exported; check the versions of torch and onnxruntime against the lock file",
        )
    contents = {
        "model.onnx": onnx_bytes,
        "weights.npz": _npz(weights),
        "model_card.json": card_bytes(card),
        "model_card.md": to_markdown(card).encode(),
    }
    manifest = canonical_bytes(_sealed({name: _digests(data) for name, data in contents.items()}))
    if folder.exists():
        _same_or_refuse(folder, card)
    else:
        _write_folder(folder, {**contents, MANIFEST: manifest})
    return ExportedModel(folder, card.model_hash, bytes_hash((folder / MANIFEST).read_bytes()), difference)


def load_model(folder: Path, threads: int = 1) -> LoadedModel:
    """Verify the whole folder, then load it. Raises BadInput (no model folder) or Tampered (file and offset)."""
    contents = verify_folder(folder)
    card = read_card(json.loads(contents["model_card.json"]))
    weights = _weights_of(contents["weights.npz"])
    if bytes_hash(weights.tobytes()) != card.model_hash:
        raise Tampered("weights.npz", 0, "weights are not those the card names", "fetch the model folder again")
    return LoadedModel(card.spec, card.model_hash, card, weights, _session(contents["model.onnx"], threads))


def verify_folder(folder: Path) -> dict[str, bytes]:
    """Every file's content, each block checked against the manifest. Raises BadInput or Tampered."""
    files = _read_manifest(folder)
    return {name: _verified(folder, name, files[name]) for name in FILES}


def _load_pyfunc(path: str) -> _PyfuncModel:
    """Loader hook of MLflow's python_function flavour: the folder as a model that takes and returns named arrays."""
    return _PyfuncModel(load_model(Path(path)))


class _PyfuncModel:
    """LoadedModel behind MLflow's predict(): {"x": ..., "last": ...} to {"forecast": ..., "quantiles": ...}."""

    def __init__(self, model: LoadedModel) -> None:
        self.model = model

    def predict(self, arrays: Mapping[str, Float32], params: Any = None) -> dict[str, Float32]:  # noqa: ARG002
        """Arrays by name, shapes as in LoadedModel.predict; MLflow passes `params`, and there are none."""
        forecast, quantiles = self.model.predict(arrays["x"], arrays["last"])
        return {"forecast": forecast, "quantiles": quantiles}


def _check_weights(weights: Float32, spec: ModelSpec, card: ModelCard) -> None:
    from pipeline.forecaster import ForecasterSpec, weight_count

    expected = weight_count(ForecasterSpec(hidden_size=spec.hidden_size))
    if weights.dtype != np.dtype("<f4") or weights.shape != (expected,):
        raise BadInput(f"expected float32[{expected}] weights", "give the flat weights of a forecaster of this spec")
    if not bool(np.isfinite(weights).all()):
        raise BadInput("weights hold a value that is not finite", "the run diverged; publish an earlier round")
    if card.spec != spec or card.model_hash != bytes_hash(weights.tobytes()):
        raise BadInput("the card describes another model", "make the card from these weights and this spec")


def _to_onnx(weights: Float32, spec: ModelSpec) -> bytes:
    """Make ONNX bytes, valid by ONNX's own checker, with the batch size left free."""
    import onnx
    import torch

    from pipeline.forecaster import ForecasterSpec, InferenceForecaster, unflatten

    model = InferenceForecaster(unflatten(weights, ForecasterSpec(hidden_size=spec.hidden_size)))
    x, last = (torch.from_numpy(a) for a in _probe(spec, 2))
    buffer = io.BytesIO()
    # The exporter warns that it is the older one, and that a free batch needs the zero start state this LSTM has.
    with _EXPORTING, warnings.catch_warnings(), torch.inference_mode(mode=False):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (x, last),
            buffer,  # type: ignore[arg-type]
            dynamo=False,
            opset_version=OPSET,
            input_names=["x", "last"],
            output_names=["forecast", "quantiles"],
            dynamic_axes={name: {0: "batch"} for name in ("x", "last", "forecast", "quantiles")},
        )
    onnx.checker.check_model(onnx.load_model_from_string(buffer.getvalue()), full_check=True)
    return buffer.getvalue()


def _difference_mg_dl(onnx_bytes: bytes, weights: Float32, spec: ModelSpec) -> float:
    """Largest absolute difference between ONNX and the training code over the probe batches."""
    from pipeline.forecaster import ForecasterSpec, predict, unflatten

    session = _session(onnx_bytes, threads=1)
    model = unflatten(weights, ForecasterSpec(hidden_size=spec.hidden_size))
    gaps = []
    for size in _PROBE_BATCHES:
        x, last = _probe(spec, size)
        pairs = zip(_run(session, x, last), predict(model, x, last), strict=True)
        gaps += [float(np.abs(ours - theirs).max()) for ours, theirs in pairs]
    return float(np.max(gaps))


def _probe(spec: ModelSpec, size: int) -> tuple[Float32, Float32]:
    """Repeatable inputs in the range of real ones: x float32[B,T,F], last float32[B]."""
    draw = np.random.default_rng(size)
    steps = WindowSpec(history_minutes=spec.history_minutes).steps
    x = draw.standard_normal((size, steps, len(FEATURES))).astype(np.float32)
    return x, draw.uniform(SENSOR_MIN_MG_DL, SENSOR_MAX_MG_DL, size).astype(np.float32)


def _session(onnx_bytes: bytes, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(onnx_bytes, options, providers=["CPUExecutionProvider"])


def _run(session: Any, x: Float32, last: Float32) -> tuple[Float32, Float32]:
    if not len(x):  # ONNX Runtime's LSTM ends the process on an empty batch
        shape = (0, len(HORIZON_MINUTES))
        return np.empty(shape, np.float32), np.empty((*shape, len(QUANTILES)), np.float32)
    inputs = {"x": np.ascontiguousarray(x, np.float32), "last": np.ascontiguousarray(last, np.float32)}
    forecast, quantiles = session.run(["forecast", "quantiles"], inputs)
    # Both come as float32 of these shapes; checked all the same, because everything behind here relies on it.
    if forecast.shape != (len(x), len(HORIZON_MINUTES)) or quantiles.shape != (*forecast.shape, len(QUANTILES)):
        raise ValueError("the model's outputs have other shapes than a forecaster's")
    return forecast.clip(SENSOR_MIN_MG_DL, SENSOR_MAX_MG_DL), quantiles.clip(SENSOR_MIN_MG_DL, SENSOR_MAX_MG_DL)


def _npz(weights: Float32) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, weights=weights)
    return buffer.getvalue()


def _weights_of(data: bytes) -> Float32:
    with np.load(io.BytesIO(data), allow_pickle=False) as archive:
        weights: Float32 = archive["weights"].astype("<f4")
    return weights


def _digests(data: bytes) -> dict[str, Any]:
    blocks = [bytes_hash(data[at : at + BLOCK_BYTES]) for at in range(0, len(data), BLOCK_BYTES)]
    return {"bytes": len(data), "sha256": bytes_hash(data), "blocks": blocks}


def _sealed(files: dict[str, dict[str, Any]]) -> dict[str, Any]:
    body = {"format": FORMAT, "block_bytes": BLOCK_BYTES, "files": files}
    return {**body, "seal": content_hash(body)}


def _read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the manifest's `files` after checking the manifest's own seal."""
    try:
        raw = (folder / MANIFEST).read_bytes()
    except OSError:
        raise BadInput(
            f"{folder.name} is not a model folder: it has no {MANIFEST}",
            "give the folder that `islet export` or a finished run wrote; it holds model.onnx and model_card.md too",
        ) from None
    try:
        manifest = json.loads(raw)
        intact = canonical_bytes(_sealed(manifest["files"])) == raw
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact or set(manifest["files"]) != set(FILES):
        raise Tampered(MANIFEST, 0, "the manifest was altered", "fetch the model folder again")
    files: dict[str, dict[str, Any]] = manifest["files"]
    return files


def _verified(folder: Path, name: str, expected: dict[str, Any]) -> bytes:
    try:
        data = (folder / name).read_bytes()
    except OSError:
        raise Tampered(name, 0, "the file is missing", "fetch the model folder again") from None
    found = _digests(data)
    if found == expected:
        return data
    pairs = zip(found["blocks"], expected["blocks"], strict=False)
    differing = [at * BLOCK_BYTES for at, (ours, theirs) in enumerate(pairs) if ours != theirs]
    offset = differing[0] if differing else min(len(data), expected["bytes"])
    raise Tampered(name, offset, f"the {BLOCK_BYTES}-byte block differs", "fetch the model folder again")


def _same_or_refuse(folder: Path, card: ModelCard) -> None:
    if load_model(folder).card != card:
        raise BadInput(
            f"{folder.name} already holds another model",
            "a published folder is never overwritten: give a new one",
        )


def _write_folder(folder: Path, contents: Mapping[str, bytes]) -> None:
    """All files durably in a sibling folder, then one rename."""
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    try:
        temporary.mkdir(parents=True)
        for name, data in contents.items():
            with (temporary / name).open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        _sync(temporary)
        temporary.rename(folder)
        _sync(folder.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            shutil.rmtree(temporary)
        raise StorageFailed(
            f"could not write the model folder {folder.name}: {error.strerror}", "free some space and try again"
        ) from error


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
