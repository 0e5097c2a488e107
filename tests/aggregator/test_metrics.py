"""What the aggregator's operator sees: metrics from the ledger, a structured log, and no secret in either."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from pathlib import Path

from aggregator.desk import create_app
from aggregator.invitations import invite
from aggregator.metrics import federation_metrics
from aggregator.server_app import LogObserver
from aggregator.settings import open_folder
from aggregator.superlink import prepare
from pipeline.log_lines import JsonLines
from pipeline.prometheus import Metric, render
from tests.aggregator.small_federation import build, run


class Nowhere:
    """A recorder without MLflow."""

    registry = None

    def round_closed(self, *_: object) -> None:
        """Keep nothing."""

    def epoch_closed(self, *_: object) -> None:
        """Keep nothing."""


def test_metrics_and_log_tell_the_run_and_no_secret(tmp_path: Path) -> None:
    """Rounds, codes and credit are there; keys, the invitation's token, and what a hospital's error said are not."""
    folder = build(tmp_path, {"cedar": "raise"})
    prepare(folder)
    token = invite(folder, "dogwood", datetime.now(UTC)).token
    log, handler = logging.getLogger("islet.aggregator"), JsonLines("serverapp", tmp_path / "aggregator.log")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        run(tmp_path, LogObserver(Nowhere()))  # type: ignore[arg-type]
    finally:
        log.removeHandler(handler)

    text = render(federation_metrics(open_folder(folder.path)))
    lines = [json.loads(line) for line in (tmp_path / "aggregator.log").read_text().splitlines()]
    assert "islet_members 3" in text
    assert 'islet_rounds_closed_total{run="tiny-' in text
    assert 'node="cedar",code="node-raised"} 3' in text
    assert 'islet_micro_credits{node="alder"}' in text
    assert "islet_certificate_expires_timestamp_seconds" in text
    assert {line["program"] for line in lines} == {"serverapp"}
    assert any(line["message"].startswith("round 3/3: 2 admitted") for line in lines)
    secrets = [
        token,
        folder.key().seed.hex(),
        (folder.path / "keys" / "superexec.secret").read_text(),
        "Jane Doe",
        "123 mg",
    ]
    assert [s for s in secrets if s in text + json.dumps(lines)] == []


def test_a_folder_without_a_ledger_has_metrics_too(tmp_path: Path) -> None:
    """Before the founding the counts are zero."""
    folder = build(tmp_path, members=())
    (folder.path / "ledger.db").unlink()

    assert "islet_members 0" in render(federation_metrics(folder))


def test_labels_are_escaped_and_empty_metrics_left_out() -> None:
    """A quote, a backslash or a new line in a label cannot end the label or the line."""
    odd = Metric("a", "gauge", "A.", [({"b": 'x"y\\z\n'}, 1.5)])

    assert render([odd, Metric("none", "counter", "None.", [])]) == (
        '# HELP a A.\n# TYPE a gauge\na{b="x\\"y\\\\z\\n"} 1.5\n'
    )


def test_the_desk_has_three_routes_and_no_documentation(tmp_path: Path) -> None:
    """What is reachable is counted: join for hospitals, health and metrics for this machine."""
    app = create_app(build(tmp_path))

    assert sorted(getattr(route, "path", "") for route in app.routes) == ["/healthz", "/metrics", "/v1/join"]
