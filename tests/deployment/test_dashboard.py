"""The dashboard asks for what the code writes."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"


def test_the_dashboard_shows_only_metrics_that_exist() -> None:
    """Each name in a panel is written by one of the three modules that make metrics."""
    panels = json.loads((DEPLOY / "grafana-dashboard.json").read_text())["panels"]
    asked = {name for p in panels for t in p["targets"] for name in re.findall(r"islet_\w+", t["expr"])}
    modules = ("aggregator/metrics.py", "hospital_node/task_record.py", "hospital_node/traffic.py")
    written = set(re.findall(r"islet_\w+", "".join((ROOT / module).read_text() for module in modules)))

    assert asked - written == set()
    assert len(asked) >= 12
