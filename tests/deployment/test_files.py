"""The files in deploy/ agree with the code and with each other, without running any of them."""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"


def test_every_container_is_hardened() -> None:
    """Not root, a read-only root, no capability, no new privilege, restarted always, in compose and pods alike."""
    for name in ("node.compose.yaml", "aggregator.compose.yaml"):
        for service in yaml.safe_load((DEPLOY / name).read_text())["services"].values():
            assert service["restart"] == "always"
            assert (service["read_only"], service["user"], service["cap_drop"]) == (True, "10001:10001", ["ALL"])
            assert service["security_opt"] == ["no-new-privileges:true"]
    for name in ("node.pod.yaml", "aggregator.pod.yaml"):
        pod = list(yaml.safe_load_all((DEPLOY / name).read_text()))[-1]["spec"]
        assert pod["restartPolicy"] == "Always"
        assert pod["securityContext"]["runAsNonRoot"]
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "readOnlyRootFilesystem": True,
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }


def test_the_proxy_passes_the_fleet_api_and_the_desk_only() -> None:
    """Three locations: Flower's Fleet API, joining, and nothing."""
    text = (DEPLOY / "nginx.conf").read_text()

    assert re.findall(r"location (.*?) \{", text) == ["/v1/fleet/", "= /v1/join", "/"]
    assert "location / { return 404; }" in text


def test_the_image_holds_what_runs_and_nothing_else() -> None:
    """The build context is an allow-list, and what the image copies is in it."""
    allowed = {line[1:] for line in (ROOT / ".containerignore").read_text().splitlines() if line.startswith("!")}
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (DEPLOY / "Containerfile").read_text(), re.M)

    assert {name for line in copied for name in line.split()} <= allowed
    assert not any("tests" in name or name == "data" for name in allowed)
