"""A hospital that missed a sitting is shown the ledger before the next round, and trains in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from aggregator import settings
from tests.federation import small_house
from tests.federation.small_house import NAMES
from tests.federation.test_secure_aggregation import SHORT, closed, run
from tests.hospital_node import small_node


def test_who_missed_the_sitting_after_a_round_trains_in_the_next(tmp_path: Path) -> None:
    """Cut off while round 1 is shown, a hospital would not know round 2's model; it is shown round 1 again before."""
    house = small_house.build(tmp_path)
    for home in house.homes.values():
        small_node.fill(home, 6)
    np.savez(house.folder.path / "start.npz", weights=small_node.base_weights(SHORT))
    changed = {"initial_weights": "start.npz", "min_updates": 4, "max_attempts": 1}
    house.folder = settings.AggregatorFolder(house.folder.path, house.folder.settings.model_copy(update=changed))
    house.folder.plan_path.write_text(SHORT.model_dump_json())
    trained, cut = set[int](), list[int]()

    def meddle(name: str, action: str, body: dict[str, Any], _message: object) -> None:
        if action.startswith("train"):
            trained.add(body["round"])
        missed = action.startswith("query.cosign") and name == "birch" and trained == {1}
        if missed and not cut:
            cut.append(len(body["entries"]))
            raise OSError("gone")

    run(house, meddle)
    assert len(cut) == 1
    assert [[signed.manifest.node for signed in entry.admitted] for entry in closed(house)] == [list(NAMES)] * 2
