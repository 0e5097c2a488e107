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


def test_every_container_of_the_aggregator_is_asked_how_it_is_where_it_listens() -> None:
    """MLflow and the pages share the aggregator's image, whose own check would tell of the aggregator alone."""
    services = yaml.safe_load((DEPLOY / "aggregator.compose.yaml").read_text())["services"]
    pod = yaml.safe_load((DEPLOY / "aggregator.pod.yaml").read_text())["spec"]
    composed = {name: service["healthcheck"]["test"][1:] for name, service in services.items()}

    assert composed == {c["name"]: c["livenessProbe"]["exec"]["command"] for c in pod["containers"]}
    asked = {name: re.findall(r"https?://127\.0\.0\.1:\d+/\w+", command[-1]) for name, command in composed.items()}
    assert asked == {
        "aggregator": ["https://127.0.0.1:8001/healthz"],
        "proxy": ["http://127.0.0.1:8082/healthz"],
        "mlflow": ["http://127.0.0.1:5000/health"],
        "pages": ["http://127.0.0.1:8090/healthz"],
    }


def test_the_proxy_passes_the_fleet_api_and_the_desk_only() -> None:
    """Three locations: Flower's Fleet API, joining, and nothing; the health check's is for this machine alone."""
    text = (DEPLOY / "nginx.conf").read_text()

    assert re.findall(r"location (.*?) \{", text) == ["/v1/fleet/", "= /v1/join", "/", "= /healthz"]
    assert re.findall(r"listen (.*?);", text) == ["8443 ssl", "[::]:8443 ssl", "127.0.0.1:8082"]
    assert "location / { return 404; }" in text


def test_the_image_holds_what_runs_and_nothing_else() -> None:
    """The build context is an allow-list, and what the image copies is in it."""
    allowed = {line[1:] for line in (ROOT / ".containerignore").read_text().splitlines() if line.startswith("!")}
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (DEPLOY / "Containerfile").read_text(), re.M)

    assert {name for line in copied for name in line.split()} <= allowed
    assert not any("tests" in name or name == "data" for name in allowed)
