"""The exported model folder: equal to torch, sealed, written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from data_schemas.canonical import bytes_hash
from data_schemas.errors import BadInput, Tampered
from data_schemas.plan import ModelSpec
from pipeline import export
from pipeline.export import Float32, load_model, write_model
from pipeline.forecaster import Forecaster, ForecasterSpec, flatten, predict, unflatten
from pipeline.model_card import CardPrivacy, ModelCard, TrainedOn
from pipeline.windows import FEATURES

SPEC = ModelSpec(history_minutes=180, hidden_size=32)
STEPS, CHANNELS = 37, len(FEATURES)


def weights_of(seed: int) -> Float32:
    """Random weights large enough for forecasts to hit both ends of the range."""
    return (3 * flatten(Forecaster(ForecasterSpec(hidden_size=SPEC.hidden_size), seed=seed))).astype(np.float32)


def card_for(weights: Float32, version: str = "1") -> ModelCard:
    return ModelCard(
        version=version,
        model_hash=bytes_hash(weights.tobytes()),
        spec=SPEC,
        trained_on=(TrainedOn(node="north", declared_training_patients=20, declared_heldout_patients=5),),
        privacy=CardPrivacy(unit="patient", epsilon=3.0, delta=1e-5, rounds=10, noise_source="secure"),
    )


@pytest.fixture(scope="module")
def weights() -> Float32:
    return weights_of(1)


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory, weights: Float32) -> Path:
    folder = tmp_path_factory.mktemp("models") / "one"
    write_model(folder, weights, SPEC, card_for(weights))
    return folder


@pytest.fixture
def copy(sealed: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in sealed.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize("size", [1, 7])
def test_served_forecast_is_torchs_forecast(sealed: Path, weights: Float32, size: int) -> None:
    """ONNX equals the training code within 1e-3 mg/dL at any batch size, inside 40..400, quantiles in order."""
    draw = np.random.default_rng(5)
    x = draw.standard_normal((size, STEPS, CHANNELS)).astype(np.float32)
    last = draw.uniform(40, 400, size).astype(np.float32)
    forecast, quantiles = load_model(sealed).predict(x, last)
    expected, expected_quantiles = predict(unflatten(weights, ForecasterSpec(hidden_size=32)), x, last)
    assert forecast.shape == (size, 12)
    assert quantiles.shape == (size, 12, 5)
    assert forecast.dtype == quantiles.dtype == np.float32
    np.testing.assert_allclose(forecast, expected, atol=1e-3, rtol=0)
    np.testing.assert_allclose(quantiles, expected_quantiles, atol=1e-3, rtol=0)
    assert quantiles.min() >= 40
    assert quantiles.max() <= 400
    assert (np.diff(quantiles, axis=2) >= 0).all()


def test_an_empty_batch_gets_an_empty_answer(sealed: Path) -> None:
    """Nobody's windows give nobody's forecasts; ONNX Runtime itself would end the process."""
    forecast, quantiles = load_model(sealed).predict(
        np.zeros((0, STEPS, CHANNELS), np.float32), np.zeros(0, np.float32)
    )
    assert forecast.shape == (0, 12)
    assert quantiles.shape == (0, 12, 5)
    assert forecast.dtype == quantiles.dtype == np.float32


def test_loaded_model_carries_weights_card_and_hash(sealed: Path, weights: Float32) -> None:
    """What was written comes back: the flat weights, their hash and the card."""
    model = load_model(sealed)
    assert model.card == card_for(weights)
    assert model.model_hash == bytes_hash(model.weights.tobytes()) == bytes_hash(weights.tobytes())
    assert model.spec == SPEC


def test_wrong_shape_is_refused(sealed: Path) -> None:
    """A history of another length is an error, not a forecast."""
    with pytest.raises(ValueError, match=r"expected x \[B,37,"):
        load_model(sealed).predict(np.zeros((1, STEPS - 1, CHANNELS), np.float32), np.zeros(1, np.float32))


@pytest.mark.parametrize("name", ["model.onnx", "weights.npz", "model_card.json", "model_card.md"])
@pytest.mark.parametrize("share", [0.0, 0.37, 1.0])
def test_flipped_bit_is_found_with_its_file_and_block(copy: Path, name: str, share: float) -> None:
    """One flipped bit anywhere stops loading, and the error names the file and the block it lies in."""
    data = bytearray((copy / name).read_bytes())
    at = min(int(share * len(data)), len(data) - 1)
    data[at] ^= 0x10
    (copy / name).write_bytes(data)
    with pytest.raises(Tampered) as caught:
        load_model(copy)
    assert caught.value.name == name
    assert caught.value.offset == at - at % 4096


def test_cut_extended_or_missing_file_is_found(copy: Path) -> None:
    """A file that lost its end, grew, or is gone is named with the place where it goes wrong."""
    whole = (copy / "model.onnx").read_bytes()
    for data, offset in ((whole[:8192], 8192), (whole + b"x", len(whole) - len(whole) % 4096)):
        (copy / "model.onnx").write_bytes(data)
        with pytest.raises(Tampered) as caught:
            load_model(copy)
        assert (caught.value.name, caught.value.offset) == ("model.onnx", offset)
    (copy / "model.onnx").unlink()
    with pytest.raises(Tampered, match=r"model\.onnx: the file is missing"):
        load_model(copy)


def test_altered_manifest_is_found(copy: Path) -> None:
    """A manifest edited to fit other bytes no longer fits its own seal."""
    manifest = json.loads((copy / "manifest.json").read_bytes())
    manifest["files"]["model.onnx"]["sha256"] = "0" * 64
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(Tampered, match=r"manifest\.json"):
        load_model(copy)


def test_folder_that_is_no_model_folder_gets_a_hint(tmp_path: Path) -> None:
    """A missing or unrelated folder is bad input that says what a model folder is."""
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(BadInput, match="not a model folder") as caught:
            load_model(folder)
        assert "model.onnx" in caught.value.hint


def test_card_of_other_weights_is_refused(tmp_path: Path, weights: Float32) -> None:
    """Weights and card must belong together; nothing is written otherwise."""
    with pytest.raises(BadInput, match="another model"):
        write_model(tmp_path / "m", weights, SPEC, card_for(weights_of(2)))
    assert not list(tmp_path.iterdir())


def test_diverged_or_misshapen_weights_are_refused(tmp_path: Path, weights: Float32) -> None:
    """Weights that are not finite or not of the spec's length are refused."""
    diverged = weights.copy()
    diverged[3] = np.nan
    with pytest.raises(BadInput, match="not finite"):
        write_model(tmp_path / "m", diverged, SPEC, card_for(diverged))
    with pytest.raises(BadInput, match="expected float32"):
        write_model(tmp_path / "m", weights[:-1], SPEC, card_for(weights[:-1]))


def test_published_folder_is_never_overwritten(copy: Path, weights: Float32) -> None:
    """Writing the same model again changes nothing; another model is refused."""
    before = (copy / "manifest.json").read_bytes()
    again = write_model(copy, weights, SPEC, card_for(weights))
    assert again.manifest_hash == bytes_hash(before)
    with pytest.raises(BadInput, match="already holds another model"):
        write_model(copy, weights, SPEC, card_for(weights, version="2"))
    assert (copy / "manifest.json").read_bytes() == before


def test_interrupted_write_leaves_no_folder(tmp_path: Path, weights: Float32, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the disk fails before the rename there is no model folder and no leftover."""

    def full_disk(_folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "_sync", full_disk)
    with pytest.raises(export.StorageFailed, match="No space left"):
        write_model(tmp_path / "m", weights, SPEC, card_for(weights))
    assert not list(tmp_path.iterdir())


def test_pyfunc_hook_gives_the_same_forecast(sealed: Path) -> None:
    """MLflow's loader hook returns named arrays equal to predict()."""
    x, last = np.zeros((2, STEPS, CHANNELS), np.float32), np.array([90, 210], np.float32)
    answer = export._load_pyfunc(str(sealed)).predict({"x": x, "last": last})
    forecast, quantiles = load_model(sealed).predict(x, last)
    np.testing.assert_array_equal(answer["forecast"], forecast)
    np.testing.assert_array_equal(answer["quantiles"], quantiles)
