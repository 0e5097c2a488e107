"""What a hospital earned is proved from its own copy of the ledger, and a false copy is told from a true one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from data_schemas.canonical import canonical_bytes
from hospital_node.credit_proof import LedgerProof, ProofDesk, prove
from hospital_node.ledger_copy import COPY
from hospital_node.settings import read_settings
from tests.hospital_node import small_ledger
from tests.hospital_node.small_ledger import PLAN
from tests.hospital_node.small_node import fill, make_node
from tests.hospital_node.test_ledger_view import AGGREGATOR


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = make_node(tmp_path_factory.mktemp("lived") / "north", aggregator_public_key=AGGREGATOR.public.hex)
    fill(home, 12)
    small_ledger.live(home, "c" * 64)
    return home


@pytest.fixture
def home(lived: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "north"
    for name in ("node.toml", COPY, "witness.json", "keys/node.ed25519"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(lived / name, copy / name)
    return copy


def proved(home: Path) -> LedgerProof:
    found = prove(home, read_settings(home / "node.toml"))
    assert found is not None
    return found


def test_a_true_copy_proves_every_epoch(home: Path) -> None:
    """Checkpoint, copy, signatures, amounts, inclusion and own releases hold, and the credit is what the log says."""
    found = proved(home)
    assert found.holds
    assert [c.what for c in found.checks] == [
        "Checkpoint",
        "Copy",
        "Signatures",
        "Amounts",
        "Inclusion",
        "Own releases",
    ]
    logged = [json.loads(line)["entry"] for line in (home / COPY).read_bytes().splitlines()]
    lines = [
        line for entry in logged if entry["kind"] == "credit" for line in entry["lines"] if line["node"] == "north"
    ]
    assert found.micro_credits == sum(line["micro_credits"] for line in lines) > 0
    assert [epoch.rounds for epoch in found.epochs] == [(1, 2), (3, 4)]
    assert found.last_round is not None
    assert found.last_round.entry.round == PLAN.rounds  # type: ignore[union-attr]
    assert found.models[0].model_hash == "c" * 64


def damage(home: Path, kind: str) -> None:
    path = home / COPY
    lines = path.read_bytes().splitlines(keepends=True)
    if kind == "an entry cut off":
        lines = lines[:-1]
    elif kind == "an entry changed":
        at = next(n for n, line in enumerate(lines) if b'"kind":"credit"' in line)
        value = json.loads(lines[at])
        value["entry"]["lines"][1]["micro_credits"] += 1
        lines[at] = canonical_bytes(value) + b"\n"
    elif kind == "entries exchanged":
        lines[5], lines[6] = lines[6], lines[5]
    path.write_bytes(b"".join(lines))


@pytest.mark.parametrize("kind", ["an entry cut off", "an entry changed", "entries exchanged"])
def test_a_false_copy_proves_nothing(home: Path, kind: str) -> None:
    """The first thing that does not hold is named, and no credit is shown as earned."""
    damage(home, kind)
    found = proved(home)
    assert not found.holds
    assert [c.holds for c in found.checks][-1] is False
    assert found.epochs == ()
    assert found.micro_credits == 0


def test_a_ledger_of_another_aggregator_proves_nothing(home: Path) -> None:
    """The checkpoint must be signed by the key that this node was made with."""
    text = (home / "node.toml").read_text().replace(AGGREGATOR.public.hex, "ab" * 32)
    (home / "node.toml").write_text(text)
    assert not proved(home).holds


def test_the_desk_proves_again_when_the_copy_changes(home: Path) -> None:
    """An unchanged copy is proved once; a changed one is looked at anew."""
    desk, settings = ProofDesk(home), read_settings(home / "node.toml")
    first = desk.proof(settings)
    assert desk.proof(settings) is first
    damage(home, "an entry changed")
    again = desk.proof(settings)
    assert again is not None
    assert not again.holds


def test_a_node_without_a_ledger_has_no_proof(tmp_path: Path) -> None:
    """A node that has cosigned nothing, or follows no aggregator, shows no credit and claims no proof."""
    home = make_node(tmp_path / "north")
    assert prove(home, read_settings(home / "node.toml")) is None
