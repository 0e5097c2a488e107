"""The comparison of models on a hospital's own held-out people: right numbers, honest words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hospital_node.cohorts import held_out_windows
from hospital_node.folder import NodeFolder
from hospital_node.own_patients import PER_PERSON, OwnComparison, OwnPatients, OwnScore, compare
from pipeline.export import LoadedModel, load_model
from tests.hospital_node import serving_node, small_node

SCORE = OwnScore("champion", "7", "c" * 64, 20.0, 30.0, 0.8)


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> NodeFolder:
    home = small_node.make_node(tmp_path_factory.mktemp("own") / "north")
    small_node.fill(home, patients=20, hours=24)
    return NodeFolder(home, small_node.settings())


@pytest.fixture(scope="module")
def champion() -> LoadedModel:
    return load_model(serving_node.shared_model())


def test_errors_are_those_of_the_held_out_people(node: NodeFolder, champion: LoadedModel) -> None:
    """The last value's RMSE is what the windows themselves give; everybody held out counts, nobody else."""
    found = compare(node, champion)
    assert found is not None
    windows = held_out_windows(node, champion.spec.history_minutes)
    picked = [windows.anchors[a:b][:: max(1, (b - a) // PER_PERSON)] for a, b in windows.by_patient()]
    batch = windows.gather(np.concatenate(picked))
    error = (batch.last - batch.y[:, 5])[batch.mask[:, 5]].astype(np.float64)
    last, ours = found.scores
    assert last.rmse_30 == pytest.approx(float(np.sqrt(np.mean(error**2))))
    assert (ours.version, ours.model_hash) == ("7", champion.model_hash)
    assert ours.inside_80 is not None
    assert 0 <= ours.inside_80 <= 1
    assert found.people == len(windows.by_patient())
    assert found.gain_30 is None


def test_a_model_is_not_better_than_itself(node: NodeFolder, champion: LoadedModel) -> None:
    """The same model as its own challenger gains nothing, and the words claim nothing."""
    found = compare(node, champion, champion)
    assert found is not None
    assert found.gain_30 == (0.0, 0.0, 0.0)
    assert "no clear difference" in replace(found, people=9).verdict


@pytest.mark.parametrize(
    ("gain", "better", "told"),
    [
        ((0.5, 0.2, 0.9), "challenger", "between 0.20 and 0.90 lower"),
        ((-0.5, -0.9, -0.2), "champion", "between 0.20 and 0.90 lower"),
        ((0.5, -0.1, 0.9), "challenger", "anything from 0.10 higher to 0.90 lower, so no clear difference"),
        ((-0.5, -0.9, 0.1), "champion", "anything from 0.10 higher to 0.90 lower, so no clear difference"),
    ],
)
def test_the_verdict_says_which_and_how_sure(gain: tuple[float, float, float], better: str, told: str) -> None:
    """The sentence names the better model and the interval in its direction."""
    verdict = OwnComparison(9, 100, (SCORE, SCORE), gain).verdict
    assert f"the {better}'s error is 0.50 mg/dL lower than the " in verdict
    assert told in verdict


def test_few_people_decide_nothing() -> None:
    """An interval over four people is not shown as if it were one."""
    assert "too few" in OwnComparison(4, 100, (SCORE, SCORE), (0.5, 0.2, 0.9)).verdict


def test_the_page_never_waits(node: NodeFolder, champion: LoadedModel) -> None:
    """The first look starts the work; a later one finds it, made once for the same models and readings."""
    desk = OwnPatients()
    assert desk.comparison(node, None, None) is None
    desk.comparison(node, champion, None)
    desk.wait()
    found = desk.comparison(node, champion, None)
    assert found is not None
    assert desk.comparison(node, champion, None) is found


def test_a_node_that_holds_nobody_out_has_no_comparison(tmp_path: Path, champion: LoadedModel) -> None:
    """Without held-out people there is nothing honest to compare on."""
    home = small_node.make_node(tmp_path / "north", heldout_fraction=0.0)
    small_node.fill(home, patients=3)
    assert compare(NodeFolder(home, small_node.settings(heldout_fraction=0.0)), champion) is None
