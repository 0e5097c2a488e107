"""The kept state is what the whole copy says; whatever happens to it, the node decides the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data_schemas.canonical import content_hash
from data_schemas.errors import Tampered
from data_schemas.ledger import LedgerEntry, PlanEntry, RoundEntry
from data_schemas.messages import Cosigned
from hospital_node import ledger_copy, ledger_view
from hospital_node.folder import NodeFolder
from hospital_node.ledger_copy import COPY, STATE
from tests.hospital_node import small_ledger
from tests.hospital_node.small_node import make_node
from tests.hospital_node.test_client_app import promote
from tests.hospital_node.test_ledger_view import AGGREGATOR, PLAN, RUN, Log, founding, log_of, member, show


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return make_node(tmp_path / "north", aggregator_public_key=AGGREGATOR.public.hex)


@pytest.fixture
def log(path: Path) -> Log:
    """Show the node, in four steps, a log with members, plan, model, proposal, vote and decision."""
    made = log_of(founding(), member(path), PlanEntry(run=RUN, plan_hash=content_hash(PLAN)))
    promote(made, path, "5" * 64)
    whole, made.lines = made.lines, []
    for upto in (2, 3, 6, len(whole)):
        before = len(made.lines)
        made.lines = whole[:upto]
        assert isinstance(show(path, made.task(before)), Cosigned)
        assert_same(path)
    return made


def assert_same(path: Path) -> None:
    """What is kept is what a replay of the whole copy gives, field by field."""
    with NodeFolder.open(path) as node:
        kept, replayed = ledger_copy.read(node), ledger_copy.read(node, whole=True)
    assert vars(kept.replay.charter) == vars(replayed.replay.charter)
    drop = {"charter", "signatures"}
    assert {k: v for k, v in vars(kept.replay).items() if k not in drop} == {
        k: v for k, v in vars(replayed.replay).items() if k not in drop
    }
    assert (kept.frontier, kept.offset) == (replayed.frontier, replayed.offset)


def kept_without_replaying(path: Path, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the state on disk was enough: no entry was taken in."""
    taken: list[Any] = []
    monkeypatch.setattr(ledger_copy.LedgerState, "take", lambda *a, **_: taken.append(a))
    with NodeFolder.open(path) as node:
        ledger_copy.read(node)
    monkeypatch.undo()
    return not taken


def test_a_task_reads_no_entry_again(path: Path, log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the node has taken entries in, it knows what they say without reading one of them."""
    assert kept_without_replaying(path, monkeypatch)
    with NodeFolder.open(path) as node:
        assert ledger_view.decided(node).champion == "5" * 64
        assert ledger_view.size(node) == len(log.lines)


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "foreign", "ahead"])
def test_a_state_that_cannot_be_used_is_made_anew(
    path: Path, log: Log, damage: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Altered, torn, missing, of another node, or ahead of a copy that was cut: the copy itself decides."""
    file = path / STATE
    content = bytearray(file.read_bytes())
    match damage:
        case "flip":
            content[len(content) // 2] ^= 1
            file.write_bytes(content)
        case "cut":
            file.write_bytes(content[:-9])
        case "gone":
            file.unlink()
        case "foreign":
            other = make_node(tmp_path / "other", name="other", seed=2)
            with NodeFolder.open(other) as node:
                body = bytes(content).partition(b"\n")[2]
                file.write_bytes(node.key.sign_bytes(body).encode() + b"\n" + body)
        case _:
            copy = path / COPY
            copy.write_bytes(b"".join(line + b"\n" for line in log.lines[:4]))
    assert not kept_without_replaying(path, monkeypatch)
    assert_same(path)


def test_an_altered_entry_decides_nothing_and_is_found(path: Path, log: Log) -> None:
    """A byte changed in the copy changes no decision, and a look at the whole copy names the entry."""
    copy = path / COPY
    content = copy.read_bytes()
    copy.write_bytes(content.replace(b'"max_epsilon_training":8', b'"max_epsilon_training":9', 1))
    with NodeFolder.open(path) as node:
        privacy = ledger_view.decided(node).privacy
        assert privacy is not None
        assert privacy.max_epsilon_training == 8
        with pytest.raises(Tampered, match="not the one that the aggregator signed at offset 0"):
            ledger_view.decided(node, whole=True)


def test_a_state_is_as_large_however_many_updates_rounds_admit(path: Path) -> None:
    """What hospitals signed stays in the copy, where a round's entry is found again; the state says what came of it."""
    log = small_ledger.live(path, "6" * 64)
    entries = [LedgerEntry.model_validate_json(line).entry for line in log.lines]
    rounds = [entry for entry in entries if isinstance(entry, RoundEntry)]
    state = (path / STATE).read_text()

    assert_same(path)
    with NodeFolder.open(path) as node:
        assert rounds
        assert [ledger_copy.round_entry(node, entry.run, entry.round) for entry in rounds] == rounds
        with pytest.raises(Tampered):
            ledger_copy.round_entry(node, rounds[0].run, len(rounds) + 1)
    for entry in rounds:
        assert entry.new_model_hash in state
        assert not [signed for signed in entry.admitted if signed.signature in state]
        assert not [signed for signed in entry.admitted if signed.manifest.update_hash in state]
