"""Joining: what an invitation may change at a node, and what stops a join before anything is asked."""

import contextlib
import socket
import subprocess
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from data_schemas.errors import BadInput, NodeBusy
from data_schemas.invitation import Invitation, parse_invitation
from hospital_node.folder import NodeFolder
from hospital_node.link import _make_link, join, programs, running, settings_after
from hospital_node.settings import read_settings
from pipeline.bundle import bundle_hash
from pipeline.certificates import make_authority
from tests.hospital_node.small_node import FEDERATION, settings


def invitation(**changes: Any) -> Invitation:
    values: dict[str, Any] = {
        "federation": FEDERATION,
        "node": "north",
        "fleet_address": "127.0.0.1:9",
        "desk_url": "https://127.0.0.1:9",
        "root_certificate": make_authority(FEDERATION, datetime.now(UTC)).certificate.decode(),
        "aggregator_public_key": "ab" * 32,
        "bundle_hash": bundle_hash(),
        "max_epsilon_training": 100.0,
        "max_epsilon_heldout": 100.0,
        "token": "cd" * 32,
        "expires_at": "2030-01-01T00:00:00+00:00",
    }
    return Invitation(**{**values, **changes})


def test_an_invitation_sets_address_key_and_bundle_and_no_ceiling() -> None:
    """Whatever a patient may be asked for there, the hospital's own ceilings and numbers stay."""
    before = settings()
    after = settings_after(before, invitation())

    changed = {name for name in type(before).model_fields if getattr(before, name) != getattr(after, name)}
    assert changed == {"aggregator_public_key", "fleet_address", "approved_bundle"}
    assert after.max_epsilon_training == 8.0


def test_another_hospitals_invitation_is_refused() -> None:
    """Name, federation and, once known, the aggregator's key must be this node's."""
    with pytest.raises(BadInput, match="is for south"):
        settings_after(settings(), invitation(node="south"))
    with pytest.raises(BadInput, match="of elsewhere"):
        settings_after(settings(), invitation(federation="elsewhere"))
    with pytest.raises(BadInput, match="another aggregator key"):
        settings_after(settings(aggregator_public_key="00" * 32), invitation())


def test_a_node_joins_only_a_federation_that_runs_what_is_installed_here(tmp_path: Path) -> None:
    """Another bundle is named as such before a key is made."""
    NodeFolder.create(tmp_path / "node", settings())
    with pytest.raises(BadInput, match="another bundle"):
        join(tmp_path / "node", invitation(bundle_hash="00" * 32))

    assert not (tmp_path / "node" / "link").exists()


def test_an_aggregator_that_does_not_answer_leaves_keys_and_no_settings(tmp_path: Path) -> None:
    """The same command given again goes on with the same keys; until then the node cannot run."""
    home = tmp_path / "node"
    NodeFolder.create(home, settings())
    with pytest.raises(BadInput, match="cannot be reached"):
        join(home, invitation())
    first = (home / "link" / "transport.pub").read_text()
    with pytest.raises(BadInput, match="cannot be reached"):
        join(home, invitation())

    assert (home / "link" / "transport.pub").read_text() == first
    assert (home / "link" / "transport.key").stat().st_mode & 0o077 == 0
    assert read_settings(home / "node.toml", {}).fleet_address is None
    with pytest.raises(BadInput, match="has not joined"):
        programs(home, home / "model", "127.0.0.1", 0)


def test_a_node_runs_once(tmp_path: Path) -> None:
    """A second `islet node run` of the same folder is refused."""
    (tmp_path / "link").mkdir()
    with running(tmp_path), pytest.raises(NodeBusy, match="runs already"), running(tmp_path):
        pass


def test_a_node_starts_while_a_round_of_an_earlier_start_is_at_work(tmp_path: Path) -> None:
    """A killed node's ClientApp may live for seconds and hold the folder; the node is started again without a wait."""
    home = tmp_path / "node"
    NodeFolder.create(home, settings(fleet_address="127.0.0.1:1"))
    _make_link(home, invitation(fleet_address="127.0.0.1:1"))
    with NodeFolder.open(home):
        assert [program.name for program in programs(home, home / "model", "127.0.0.1", 0)] == [
            "supernode",
            "superexec",
        ]


def test_a_damaged_invitation_is_named_without_its_token() -> None:
    """The text says which field is wrong and never repeats the secret."""
    text = invitation().model_dump_json().replace('"version":1', '"version":"cdcdcdcd"')
    with pytest.raises(BadInput, match="version") as refused:
        parse_invitation(text)

    assert "cdcd" not in refused.value.message + refused.value.hint
    assert "cdcd" not in repr(invitation())


def test_a_supernode_whose_tls_handshake_breaks_ends(tmp_path: Path) -> None:
    """So that the supervisor starts it again: Flower's own process lives on, deaf, as a cut network leaves it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        NodeFolder.create(tmp_path / "node", settings(fleet_address=address))
        _make_link(tmp_path / "node", invitation(fleet_address=address))
        threading.Thread(target=_breaks_handshakes, args=(listener,), daemon=True).start()
        supernode = programs(tmp_path / "node", tmp_path, "127.0.0.1", 0)[0]
        ended = subprocess.run(
            supernode.command, env=supernode.environment, capture_output=True, text=True, timeout=120, check=False
        )
    assert ended.returncode == 1
    assert "SSL" in ended.stderr


def _breaks_handshakes(listener: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)  # all of it: an end, not a reset
