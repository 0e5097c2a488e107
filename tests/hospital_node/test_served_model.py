"""The model that answers is replaced by a newer one without a request that fails or waits."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from data_schemas.canonical import bytes_hash
from data_schemas.errors import Tampered
from hospital_node.problems import Declined
from hospital_node.served_model import ServedModel
from pipeline.export import write_model
from pipeline.model_card import CardPrivacy, ModelCard, TrainedOn
from tests.hospital_node import small_node

PLAN = small_node.plan()


def exported(folder: Path, version: str, seed: int) -> Path:
    weights = small_node.base_weights(PLAN, seed)
    card = ModelCard(
        version=version,
        model_hash=bytes_hash(weights.tobytes()),
        spec=PLAN.model,
        trained_on=(TrainedOn(node="north", declared_training_patients=10, declared_heldout_patients=4),),
        privacy=CardPrivacy(unit="patient", epsilon=3.0, delta=1e-5, rounds=4, noise_source="secure"),
    )
    return write_model(folder, weights, PLAN.model, card).folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    place = tmp_path_factory.mktemp("models")
    return exported(place / "one", "1", 0), exported(place / "two", "2", 1)


def point_at(link: Path, folder: Path) -> None:
    """Replace a link in one step, as an operator's deployment does."""
    fresh = link.with_name("fresh")
    fresh.symlink_to(folder)
    fresh.replace(link)


def test_newer_model_takes_over_while_requests_go_on(models: tuple[Path, Path], tmp_path: Path) -> None:
    """Threads that ask all the time get an answer of the old or the new model, never an error; then of the new one."""
    link = tmp_path / "model"
    link.symlink_to(models[0])
    served = ServedModel(link)
    assert served.model().card.version == "1"
    failures: list[BaseException] = []
    versions: set[str] = set()
    done = threading.Event()

    def ask() -> None:
        x, last = np.zeros((1, 13, 7), np.float32), np.array([120], np.float32)
        try:
            while not done.is_set():
                model = served.model()
                model.predict(x, last)
                versions.add(model.card.version)
        except BaseException as error:  # noqa: BLE001 the test is that there is none
            failures.append(error)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    point_at(link, models[1])
    assert served.replace() or served.model().card.version == "2"
    while "2" not in versions and not failures:
        done.wait(0.01)
    done.set()
    for thread in threads:
        thread.join()
    assert failures == []
    assert served.model().card.version == "2"


def test_looking_once_a_second_notices_a_newer_model(models: tuple[Path, Path], tmp_path: Path) -> None:
    """find() itself starts the replacement, when a second has passed, and nobody waits for it."""
    now = [0.0]
    link = tmp_path / "model"
    link.symlink_to(models[0])
    served = ServedModel(link, lambda: now[0])
    served.model()
    point_at(link, models[1])
    assert served.model().card.version == "1"
    now[0] = 2.0
    waiting = threading.Event()
    for _ in range(3000):
        if served.model().card.version == "2":
            break
        waiting.wait(0.01)
    assert served.model().card.version == "2"


def test_damaged_newer_model_changes_nothing(models: tuple[Path, Path], tmp_path: Path) -> None:
    """A folder that does not verify is refused and counted, the old model goes on; a sound one is taken later."""
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in models[1].iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / "weights.npz").write_bytes(b"x")
    link = tmp_path / "model"
    link.symlink_to(models[0])
    served = ServedModel(link)
    served.model()
    point_at(link, broken)
    assert not served.replace()
    assert served.refused == 1
    assert not served.replace()  # looked at once, not again and again
    assert served.refused == 1
    assert served.model().card.version == "1"
    point_at(link, models[1])
    assert served.replace()
    assert served.model().card.version == "2"
    with pytest.raises(Tampered):
        ServedModel(broken).model()
    with pytest.raises(Declined):
        ServedModel(tmp_path / "absent").model()
