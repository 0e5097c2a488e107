"""`islet review`: a reviewer opens MLflow once and sees the runs in the columns that matter, without a click."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from aggregator.registry import Registry
from tests.aggregator.test_registry import MEMBERS, PLAN, model_folder, summary
from tests.browser.browsing import SHOTS

pytestmark = pytest.mark.browser
COLUMNS = ("epsilon_max", "rmse_30/pooled/federated", "rounds", "privacy.noise_multiplier", "islet.hospitals")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Two finished runs; the later one is better."""
    registry = Registry(tmp_path / "consortium")
    for number, error in ((1, 21.5), (2, 20.25)):
        run_id = registry.start_run(f"run-{number}", "trial", PLAN, MEMBERS)
        registry.log_round(run_id, summary(number))
        results = {"rmse_30/pooled/federated": error, "rmse_30/pooled/persistence": 23.0}
        exported = model_folder(tmp_path, number)
        registry.finish(run_id, exported, files={}, privacy={}, credit={}, results=results)
    return tmp_path / "consortium"


@contextmanager
def reviewing(store: Path, port: int) -> Iterator[str]:
    """Run `islet review` in a process of its own and yield the address it prints; Ctrl-C ends it.

    It starts with the signal ignored, as a shell starts what runs in the background.
    """
    islet = [sys.executable, "-c", "from pipeline.cli import main; main()", "review", str(store), "--port", str(port)]
    with subprocess.Popen(["env", "--ignore-signal=INT", *islet], stdout=subprocess.PIPE, text=True) as review:
        try:
            assert review.stdout is not None
            assert "Ctrl-C" in review.stdout.readline()
            yield review.stdout.readline().strip()
        finally:
            review.send_signal(signal.SIGINT)
            assert review.wait(60) == 0


def free_port() -> int:
    """A port of 127.0.0.1 that nobody has now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_review_opens_the_runs_with_their_columns(chromium: Browser, store: Path) -> None:
    """The printed address shows both runs, newest first, in the reviewer's columns; Ctrl-C ends all of it."""
    port = free_port()
    page = chromium.new_page(viewport={"width": 2200, "height": 700})
    page.set_default_timeout(60_000)
    with reviewing(store, port) as address:
        page.goto(address)
        expect(page.get_by_role("link", name="run-2")).to_be_visible(timeout=60_000)
        shown = page.get_by_role("columnheader").all_inner_texts()
        SHOTS.mkdir(exist_ok=True)
        page.screenshot(path=SHOTS / "review-desktop-light.png")
        first, second = (page.get_by_role("link", name=f"run-{number}").bounding_box() for number in (2, 1))
        page.close()
    assert set(COLUMNS) <= {text.strip() for text in shown}
    assert first is not None
    assert second is not None
    assert first["y"] < second["y"]
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0
