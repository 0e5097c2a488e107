"""Where secrets are: in key files that their owner alone may read, and nowhere else, in any spelling."""

from __future__ import annotations

import base64
from datetime import UTC, datetime
from pathlib import Path

import pytest

from aggregator import governance, settings, superlink
from aggregator.invitations import invite
from data_schemas.invitation import Invitation
from data_schemas.ledger import MemberEntry
from hospital_node import masks
from hospital_node.api_keys import create_key
from hospital_node.budget import book_key
from hospital_node.client_app import note
from hospital_node.folder import NodeFolder
from hospital_node.identity import propose_new_key
from hospital_node.link import _make_link
from hospital_node.local_round import train
from pipeline.signing import PrivateKey
from tests.faults.house import plan_of
from tests.hospital_node.small_node import NOW, base_weights, fill, make_node, train_task

FEDERATION = "trial"


class Sides:
    """A hospital's and an aggregator's folders after everything that makes or uses a secret."""

    def __init__(self, path: Path) -> None:
        self.hub, self.node = path / "hub", path / "north"
        folder = settings.create(self.hub, settings.AggregatorSettings(federation=FEDERATION))
        (self.hub / "plan.json").write_text(plan_of(4).model_dump_json())
        superlink.prepare(folder)
        self.invitation: Invitation = invite(folder, "north", datetime.now(UTC))
        make_node(self.node, seed=None, max_epsilon_training=40.0, max_epsilon_heldout=40.0)
        fill(self.node, 12)
        _make_link(self.node, self.invitation)
        self.api_key = create_key(self.node, "all", NOW)[1]
        ledger = folder.open_ledger()
        governance.found_federation(ledger, governance.founding_of(FEDERATION, plan_of(4)), "2026-01-01T00:00:00+00:00")
        with NodeFolder.open(self.node) as node:
            member = MemberEntry(
                node="north",
                public_key=node.key.public.hex,
                declared_training_patients=10,
                declared_heldout_patients=4,
            )
            governance.admit_member(ledger, member, "2026-01-01T00:00:00+00:00")
            propose_new_key(node, ledger.charter(), 14, datetime.now(UTC))
            weights = base_weights(plan_of(4))
            assert isinstance(train(node, train_task(plan_of(4), weights), weights, NOW), tuple)
            self.book = book_key(node.key)
            self.mask = masks.begin(node, train_task(plan_of(4), weights), "0" * 64)
        ledger.close()
        note(self.node, "info", "a line in the log")

    def secrets(self) -> dict[str, bytes]:
        """Every secret by the file that may hold it; one that no file may hold has a name in angle brackets."""
        files = {
            "north/keys/node.ed25519": self.node,
            "north/keys/next.ed25519": self.node,
            "north/keys/pseudonym.key": self.node,
            "north/link/superexec.secret": self.node,
            "hub/keys/aggregator.ed25519": self.hub,
            "hub/keys/superexec.secret": self.hub,
        }
        held = {name: bytes.fromhex((root.parent / name).read_text().strip()) for name, root in files.items()}
        for name in ("north/link/transport.key", "hub/tls/ca.key", "hub/tls/server.key"):
            lines = (self.hub.parent / name).read_text().splitlines()
            held[name] = base64.b64decode("".join(lines[1:-1]))
        held[f"north/masks/{self.mask.session.task_id[:32]}.json"] = bytes.fromhex(self.mask.seed)
        held["<invitation token>"] = bytes.fromhex(self.invitation.token)
        held["<api key>"] = self.api_key.encode()
        held["<budget book's key>"] = self.book
        return held


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> Sides:
    return Sides(tmp_path_factory.mktemp("sides"))


def spellings(secret: bytes) -> set[bytes]:
    """Raw, hexadecimal and base64; of a long secret its second half too, which no public part shares."""
    parts = {secret, secret[len(secret) // 2 :]} if len(secret) > 64 else {secret}
    return {form for part in parts for form in (part, part.hex().encode(), part.hex().upper().encode())} | {
        base64.b64encode(secret)
    }


def test_a_secret_is_in_its_own_file_and_nowhere_else(sides: Sides) -> None:
    """After joining, keys for apps, a proposed new key and a round: each secret is in the one file made for it."""
    files = {f: f.read_bytes() for root in (sides.node, sides.hub) for f in root.rglob("*") if f.is_file()}
    for owner, secret in sides.secrets().items():
        holders = {
            file.relative_to(sides.hub.parent).as_posix()
            for file, content in files.items()
            if any(form in content for form in spellings(secret))
        }
        assert holders <= {owner}, f"{owner} is in {sorted(holders - {owner})}"


def test_a_file_with_a_secret_is_for_its_owner_alone(sides: Sides) -> None:
    """Mode 0600, in a folder that nobody else may enter; a key file that others may read is refused."""
    for owner in sides.secrets():
        if owner.startswith("<"):
            continue
        file = sides.hub.parent / owner
        assert file.stat().st_mode & 0o777 == 0o600, owner
        assert file.parent.stat().st_mode & 0o077 == 0, owner


def test_readings_and_books_are_for_their_owner_alone(sides: Sides) -> None:
    """Nothing that a node keeps can be read by another user of the machine: its folder is closed."""
    assert sides.node.stat().st_mode & 0o077 == 0


def test_a_key_does_not_print_itself() -> None:
    """Neither repr nor str of a key, nor an error about one, holds its seed."""
    key = PrivateKey.from_seed(b"0123456789abcdef" * 2)
    shown = f"{key!r} {key}"
    assert key.seed.hex() not in shown
    assert "0123456789abcdef" not in shown
