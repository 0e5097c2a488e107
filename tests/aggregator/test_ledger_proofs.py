"""An entry can be proved to somebody who has neither the ledger nor a network, and a damaged ledger can be rebuilt."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from aggregator.ledger import CHECKPOINT_FILE, Ledger
from aggregator.ledger_fsck import prove, rebuild
from aggregator.verification import verify_ledger
from data_schemas.errors import BadInput, CheckFailed
from data_schemas.ledger import EntryProof, MemberEntry, PlanEntry
from pipeline.checkpoint import cosign, verify_note
from pipeline.inclusion import verify_proof
from pipeline.signing import PrivateKey

KEY = PrivateKey.from_seed(b"L" * 32)
MEMBER = PrivateKey.from_seed(b"M" * 32)
NOW = "2026-01-31T12:00:00+00:00"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return a ledger of one member and twelve plans, cosigned by the member."""
    file = tmp_path / "ledger.db"
    ledger = Ledger(file, KEY, "islet.example/proofs")
    member = MemberEntry(
        node="clinic-a", public_key=MEMBER.public.hex, declared_training_patients=30, declared_heldout_patients=10
    )
    ledger.append(member, NOW)
    for number in range(12):
        run = f"run-{number}"
        ledger.append_once(("plan", run), PlanEntry(run=run, plan_hash=f"{number:064x}"), NOW)
    head = verify_note(ledger.checkpoint(), KEY.public.hex)
    ledger.add_cosignature(cosign(head, MEMBER, "clinic-a", 1_800_000_000))
    ledger.publish()
    ledger.close()
    return file


def test_every_entry_can_be_proved(path: Path) -> None:
    """A proof of any entry holds under the log's key, and names who cosigned the checkpoint."""
    for index in range(13):
        shown = verify_proof(prove(path, index), KEY.public.hex, None, {"clinic-a": MEMBER.public.hex})

        assert shown.entry.index == index
        assert shown.checkpoint.size == 13
        assert shown.checked_cosigners == shown.claimed_cosigners == ("clinic-a",)


def test_an_altered_proof_does_not_hold(path: Path) -> None:
    """A changed entry, place, path, checkpoint, key or cosigner is refused."""
    proof, public = prove(path, 5), KEY.public.hex
    receipt = proof.receipt
    wrong = [
        proof.model_copy(update={"entry": proof.entry.replace("run-4", "run-5")}),
        proof.model_copy(update={"receipt": receipt.model_copy(update={"index": 6})}),
        proof.model_copy(update={"receipt": receipt.model_copy(update={"path": receipt.path[::-1]})}),
        proof.model_copy(update={"receipt": receipt.model_copy(update={"tree_size": 12})}),
    ]
    for altered in wrong:
        with pytest.raises(CheckFailed):
            verify_proof(EntryProof.model_validate(altered.model_dump()), public)
    with pytest.raises(CheckFailed):
        verify_proof(proof, MEMBER.public.hex)
    with pytest.raises(CheckFailed):
        verify_proof(proof, public, None, {"clinic-a": KEY.public.hex})
    with pytest.raises(CheckFailed):
        verify_proof(proof, public, None, {"clinic-b": MEMBER.public.hex})


def test_a_proof_holds_under_the_readers_own_checkpoint_only_when_made_for_it(path: Path) -> None:
    """Whoever keeps a checkpoint gets a proof under that one; one of another size is refused."""
    own = path.with_name(CHECKPOINT_FILE).read_text()
    ledger = Ledger(path, KEY, "islet.example/proofs")
    ledger.append(PlanEntry(run="later", plan_hash="0" * 64), NOW)
    ledger.checkpoint()
    ledger.close()

    assert verify_proof(prove(path, 3, own), KEY.public.hex, own).checkpoint.size == 13
    assert prove(path, 13).receipt.tree_size == 14
    with pytest.raises(CheckFailed):
        verify_proof(prove(path, 3), KEY.public.hex, own)
    with pytest.raises(BadInput):
        prove(path, 13, own)
    with pytest.raises(BadInput):
        prove(path, 14)


def test_a_damaged_ledger_is_rebuilt_from_what_verifies(path: Path, tmp_path: Path) -> None:
    """Damaged leaf hashes and keys are made anew; a damaged entry ends the copy; the copy verifies."""
    with sqlite3.connect(path) as db:
        for trigger in ("entries_UPDATE", "once_UPDATE"):
            db.execute(f"DROP TRIGGER {trigger}")
        db.execute("UPDATE entries SET leaf = zeroblob(32) WHERE idx = 3")
        db.execute("UPDATE once SET mark = zeroblob(32)")
    whole = rebuild(path, KEY.public.hex, tmp_path / "whole" / "ledger.db")

    assert (whole.entries, whole.checkpoints, whole.cosignatures, whole.stopped) == (13, 1, 1, "")
    report = verify_ledger(tmp_path / "whole" / "ledger.db", KEY.public.hex, every_signature=True)
    assert report.cosigned_by == ("clinic-a",)
    reopened = Ledger(tmp_path / "whole" / "ledger.db", KEY, "islet.example/proofs")
    assert reopened.find(("plan", "run-7")) is not None
    reopened.close()

    with sqlite3.connect(path) as db:
        db.execute("UPDATE entries SET payload = CAST(replace(payload, 'run-8', 'run-x') AS BLOB) WHERE idx = 9")
    cut = rebuild(path, KEY.public.hex, tmp_path / "cut" / "ledger.db")
    assert (cut.entries, cut.checkpoints) == (9, 0)
    assert "entry 9" in cut.stopped
    with pytest.raises(BadInput):
        rebuild(path, KEY.public.hex, tmp_path / "cut" / "ledger.db")
