"""A node's cohorts: kept between messages, fresh after an import, and safe to use from several threads."""

from __future__ import annotations

import resource
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from data_schemas.errors import StorageFailed
from data_schemas.reading import QualityReport
from hospital_node import cohorts, local_round
from hospital_node.folder import NodeFolder
from hospital_node.store import Store
from pipeline.windows import Series
from tests.hospital_node.small_node import NOW, base_weights, fill, make_node, plan, readings, train_task


def test_windows_are_read_once_and_again_after_an_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second message gets the same windows without reading; a new import is noticed by both cohorts."""
    path = make_node(tmp_path / "north")
    fill(path, 8)
    read = []
    original = Store.series
    monkeypatch.setattr(Store, "series", lambda self, people: read.append(1) or original(self, people))
    with NodeFolder.open(path) as node:
        first = cohorts.training_windows(node, 60)
        assert cohorts.training_windows(node, 60) is first
        before = len(first) + len(cohorts.held_out_windows(node, 60))
        assert len(read) == 2
        valid = readings(12, seed=5)
        count = len(valid.frame)
        moved = valid.frame.assign(measured_at=valid.frame["measured_at"] + pd.Timedelta(days=3))
        nothing = valid.frame.iloc[:0].assign(rule=pd.Series(dtype="str"))
        report = QualityReport(count, count, {}, {}, {}, 12)
        Store(node.store).add(type(valid)(moved.astype(valid.frame.dtypes)), nothing, report, [f"{5:064x}"])
        after = len(cohorts.training_windows(node, 60)) + len(cohorts.held_out_windows(node, 60))
    assert len(read) == 4
    assert after > 2 * before


def test_windows_over_a_store_take_the_memory_of_a_batch(tmp_path: Path) -> None:
    """Reading, cutting and gathering allocate as much over four times the people: the arrays lie in files."""
    peaks, sizes = [], []
    for people in (10, 40):
        path = make_node(tmp_path / f"north-{people}")
        fill(path, people, hours=24 * 60)
        with NodeFolder.open(path) as node:
            tracemalloc.start()
            windows = cohorts.training_windows(node, 60)
            batch = windows.gather(windows.anchors[:: len(windows) // 256])
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
            sizes.append(windows.series.time_s.nbytes + windows.series.glucose_mg_dl.nbytes)
            assert len(batch.x) > 256
        cohorts._cut.cache_clear()

    assert sizes[1] > 3 * sizes[0]
    assert peaks[1] < 1.1 * peaks[0]
    # What was allocated for the windows of more people: nothing that grows with them.
    assert peaks[1] - peaks[0] < 0.05 * (sizes[1] - sizes[0])


def test_files_of_the_windows_have_no_name_and_a_full_disk_is_an_error(tmp_path: Path) -> None:
    """Nobody can open them, they end with the process, and what does not fit says so before it is used."""
    path = make_node(tmp_path / "north")
    fill(path, 8)
    before = sorted(path.rglob("*"))
    with NodeFolder.open(path) as node:
        assert len(cohorts.training_windows(node, 60))
    assert [found for found in sorted(path.rglob("*")) if found.name != "lock"] == [
        found for found in before if found.name != "lock"
    ]

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(StorageFailed, match="no room"):
            Store(path / "store").series()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_the_store_gives_the_series_of_its_frame(tmp_path: Path) -> None:
    """Read column by column, a series is what the data frame gives: names, order, seconds and values."""
    path = make_node(tmp_path / "north")
    fill(path, 5)
    got = Store(path / "store").series()
    want = Series.from_frame(readings(5).frame)
    assert got.patients == want.patients
    for name in ("starts", "time_s", "glucose_mg_dl"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name))


def test_nodes_in_threads_train_as_they_do_alone(tmp_path: Path) -> None:
    """Reading and training in several threads at once, time and again, gives every node its own update, bit for bit."""
    paths = [make_node(tmp_path / f"node-{n}", name=f"node-{n}", max_epsilon_training=1e6) for n in range(4)]
    for path in paths:
        fill(path, 8, hours=6)
    weights = base_weights(plan())

    def update(path: Path, task_id: str) -> bytes:
        task = train_task(plan(), weights, run=task_id)
        with NodeFolder.open(path) as node:
            answer = local_round.train(node, task, weights, NOW)
        assert isinstance(answer, tuple)
        return answer[1].tobytes()

    together: list[list[bytes]] = []
    with ThreadPoolExecutor(len(paths)) as pool:
        for turn in range(3):
            cohorts._cut.cache_clear()
            together.append(list(pool.map(update, paths, [f"run-{turn}"] * len(paths))))
    others = [make_node(tmp_path / "again" / f"node-{n}", name=f"node-{n}", max_epsilon_training=1e6) for n in range(4)]
    for path in others:
        fill(path, 8, hours=6)
    alone = [[update(path, f"run-{turn}") for path in others] for turn in range(3)]
    assert together == alone
