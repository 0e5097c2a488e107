"""The second line of a release: what holds even where the checks before it are passed by."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_schemas.errors import StorageFailed
from data_schemas.messages import Refusal, RefusalCode, ReleaseTask, SignedRelease
from hospital_node import release, scores
from hospital_node.folder import NodeFolder
from hospital_node.local_round import reserve
from tests.hospital_node.small_node import FEDERATION, NOW, make_node, plan


def task(**changes: object) -> ReleaseTask:
    values = {"federation": FEDERATION, "run": "run-1", "epoch": 1, "plan": plan(), "nodes": ("east", "north")}
    return ReleaseTask.model_validate({**values, "deadline_unix": NOW + 60, **changes})


def test_the_book_holds_the_ceiling_whatever_was_checked_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the plan's checks out of the way the reservation itself refuses, and nothing is spent or released."""
    monkeypatch.setattr(release, "check_release", lambda *_: None)
    path = make_node(tmp_path / "north", max_epsilon_heldout=0.1)

    with NodeFolder.open(path) as node:
        assert release.release(node, task(), NOW) == Refusal(code=RefusalCode.BUDGET_EXHAUSTED)
        assert node.budget().rows() == ()


def test_a_committed_release_is_never_reserved_again(tmp_path: Path) -> None:
    """A task that has its answer cannot come as far as a second draw of noise."""
    path = make_node(tmp_path / "north")
    with NodeFolder.open(path) as node:
        assert isinstance(release.release(node, task(), NOW), SignedRelease)

        with pytest.raises(TypeError, match="answered before"):
            reserve(node, node.budget(), task(), "heldout", NOW)

        assert [row.noise for row in node.budget().rows()] == ["seeded"]


def test_damaged_scores_are_reported_and_release_nothing(tmp_path: Path) -> None:
    """A scores.db that SQLite cannot read stops the release before it is reserved."""
    path = make_node(tmp_path / "north")
    with NodeFolder.open(path) as node:
        scores.put(node.scores_db, scores.Place("run-1", 1, 1), "t", ("east", "north"), {"a": np.ones(2)})
        node.scores_db.write_bytes(b"no database" * 100)

        with pytest.raises(StorageFailed, match=r"scores\.db"):
            release.release(node, task(), NOW)

        assert node.budget().rows() == ()
