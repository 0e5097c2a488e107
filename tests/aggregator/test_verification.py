"""Whatever is changed in a ledger file is found and named, and what a ledger claims follows from what was signed."""

from __future__ import annotations

import json
import random
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from aggregator import ledger_file
from aggregator.ledger import CHECKPOINT_FILE, Ledger
from aggregator.verification import export, render_verification, show_entry, verify_ledger
from data_schemas.canonical import canonical_bytes
from data_schemas.errors import BadInput, StorageFailed, Tampered
from data_schemas.ledger import CreditEntry, Entry, MemberEntry, ModelEntry, PlanEntry, RejectedUpdate, RoundEntry
from data_schemas.messages import EpochRelease, PrivacySpend, SignedRelease, SignedUpdate, UpdateManifest
from data_schemas.plan import RELATION, PrivacyEvent
from pipeline import merkle
from pipeline.checkpoint import add_cosignatures, cosign, verify_note
from pipeline.contribution import credit
from pipeline.signing import PrivateKey
from tests.aggregator import independent_audit

KEY = PrivateKey.from_seed(b"A" * 32)
ORIGIN = "islet.example/test"
NOW = "2026-01-31T12:00:00+00:00"
NODES = ("clinic-a", "clinic-b", "clinic-c")
ELEVEN = (*NODES, *(f"clinic-{letter}" for letter in "defghijk"))
KEYS = {node: PrivateKey.from_seed(node.encode().ljust(32, b"-")) for node in ELEVEN}
POT = 1_000_000
SPEND = PrivacySpend(
    unit="patient",
    event=PrivacyEvent(sample_rate=0.1, noise_multiplier=1.0, steps=10),
    epsilon_after=1.0,
    delta=1e-5,
)


def _hash(number: int) -> str:
    return f"{number:064x}"


def _member(node: str) -> MemberEntry:
    return MemberEntry(
        node=node, public_key=KEYS[node].public.hex, declared_training_patients=30, declared_heldout_patients=10
    )


def _update(node: str, number: int, **changes: object) -> SignedUpdate:
    manifest = UpdateManifest(
        federation="test",
        run="run",
        round=number,
        node=node,
        plan_hash=_hash(7),
        base_model_hash=_hash(100 + number),
        update_hash=_hash(1000 * number + ELEVEN.index(node)),
        declared_patients=30,
        spend=SPEND,
        budget_head=_hash(0),
    ).model_copy(update=changes)
    return SignedUpdate(manifest=manifest, signature=KEYS[node].sign(manifest))


def _round(number: int, **changes: object) -> RoundEntry:
    return RoundEntry(
        run="run",
        round=number,
        plan_hash=_hash(7),
        base_model_hash=_hash(100 + number),
        new_model_hash=_hash(101 + number),
        admitted=tuple(_update(node, number) for node in NODES),
        rejected=(RejectedUpdate(node="clinic-x", update_hash=None, code="late"),),
    ).model_copy(update=changes)


def _release(node: str, epoch: int = 1, **changes: object) -> SignedRelease:
    release = EpochRelease(
        federation="test",
        run="run",
        epoch=epoch,
        node=node,
        nodes=NODES,
        shapley_mg_dl=(1.5 + ELEVEN.index(node) / 8, 0.5, -0.25),
        noise_std_mg_dl=0.125,
        declared_heldout_patients=10,
        abstained=False,
        spend=SPEND,
        budget_head=_hash(0),
    ).model_copy(update=changes)
    return SignedRelease(release=release, signature=KEYS[node].sign(release))


def _credit(epoch: int = 1, **changes: object) -> CreditEntry:
    releases = tuple(_release(node, epoch) for node in NODES)
    lines, unpaid = credit([r.release for r in releases], NODES, POT)
    return CreditEntry(
        run="run",
        epoch=epoch,
        rounds=(2 * epoch - 1, 2 * epoch),
        mode="exact-shapley-weighted-median",
        pot_micro_credits=POT,
        unpaid_micro_credits=unpaid,
        lines=lines,
        releases=releases,
    ).model_copy(update=changes)


def _model(**changes: object) -> ModelEntry:
    return ModelEntry(
        run="run",
        round=4,
        model_hash=_hash(105),
        unit="patient",
        relation=RELATION,
        delta=1e-5,
        epsilon_by_node=dict.fromkeys(NODES, 2.0),
    ).model_copy(update=changes)


def _story() -> list[Entry]:
    """Three hospitals, four rounds in two epochs, one model: entries 0 to 10."""
    return [
        *(_member(node) for node in NODES),
        PlanEntry(run="run", plan_hash=_hash(7)),
        _round(1),
        _round(2),
        _credit(1),
        _round(3),
        _round(4),
        _credit(2),
        _model(),
    ]


def _build(folder: Path, entries: list[Entry], witnesses: tuple[str, ...] = NODES) -> Path:
    """Write a ledger in the ordinary way, cosigned after the fourth entry and at the end."""
    ledger = Ledger(folder / "ledger.db", KEY, ORIGIN)
    for number, entry in enumerate(entries):
        ledger.append_once((entry.kind, number), entry, NOW)
        if number in (3, len(entries) - 1):
            head = verify_note(ledger.checkpoint(), KEY.public.hex)
            for node in witnesses:
                ledger.add_cosignature(cosign(head, KEYS[node], node, 1_790_000_000 + number))
            ledger.publish()
    ledger.close()
    return folder / "ledger.db"


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build an honest ledger, shared by the tests that read or copy it."""
    return _build(tmp_path_factory.mktemp("honest"), _story())


@pytest.fixture
def copy(honest: Path, tmp_path: Path) -> Path:
    """Copy the honest ledger's folder, to be damaged."""
    shutil.copytree(honest.parent, tmp_path / "copy")
    return tmp_path / "copy" / "ledger.db"


def _verify(path: Path) -> object:
    return verify_ledger(path, KEY.public.hex)


def _finding(path: Path) -> Tampered | None:
    try:
        _verify(path)
    except Tampered as error:
        return error
    return None


def _dump(path: Path) -> list[object]:
    """Everything the log consists of: all rows of all tables, and the schema."""
    connection = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)
    connection.text_factory = bytes
    tables = ("entries", "once", "checkpoints", "cosignatures")
    rows: list[object] = [connection.execute(f"SELECT * FROM {table}").fetchall() for table in tables]
    rows.append(connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_schema WHERE sql NOT NULL").fetchall())
    connection.close()
    return rows


def _payload_span(path: Path, index: int) -> tuple[int, bytes]:
    """Offset and bytes of an entry, for one that lies in one piece."""
    connection = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)
    payload = bytes(connection.execute("SELECT payload FROM entries WHERE idx = ?", (index,)).fetchone()[0])
    connection.close()
    return path.read_bytes().find(payload), payload


def _plan_again() -> PlanEntry:
    return PlanEntry(run="again", plan_hash=_hash(7))


def _flip(path: Path, offset: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1 << bit
    path.write_bytes(content)


def test_an_honest_ledger_verifies(honest: Path) -> None:
    """Counts, members, credit, head and cosignatures are reported."""
    report = verify_ledger(honest, KEY.public.hex)

    assert report.counts == {"member": 3, "plan": 1, "round": 4, "credit": 2, "model": 1}
    assert report.members == NODES
    assert report.head.size == 11
    assert report.anchor == report.head
    assert report.cosigned_by == NODES
    assert sum(report.micro_credits.values()) + report.unpaid_micro_credits == 2 * POT
    assert report.micro_credits["clinic-a"] > report.micro_credits["clinic-b"] > report.micro_credits["clinic-c"] == 0


def test_verification_changes_nothing(honest: Path) -> None:
    """Reading leaves the folder as it is, byte for byte."""
    before = {p.name: p.read_bytes() for p in honest.parent.iterdir()}
    _verify(honest)

    assert {p.name: p.read_bytes() for p in honest.parent.iterdir()} == before


def test_the_report_reads_well(honest: Path) -> None:
    """The rendering names entries, members, credit, head and witnesses."""
    text = render_verification(verify_ledger(honest, KEY.public.hex))

    assert "ledger.db: verified" in text
    assert "11 (2 credit, 3 member, 1 model, 1 plan, 4 round)" in text
    assert "2.000000 paid, 0.000000 unpaid" in text
    assert "11 of 11 entries, cosigned by clinic-a, clinic-b, clinic-c" in text


def test_a_ledger_without_checkpoint_says_so(tmp_path: Path) -> None:
    """Without an anchor the report does not pretend to one."""
    ledger = Ledger(tmp_path / "ledger.db", KEY, ORIGIN)
    ledger.append(_member("clinic-a"), NOW)
    report = verify_ledger(ledger.path, KEY.public.hex)

    assert report.anchor is None
    assert "nothing outside the database vouches" in render_verification(report)


def test_entries_show_as_one_line_each(honest: Path) -> None:
    """Every kind of entry has a one-line form with what matters."""
    ledger = Ledger(honest, KEY, ORIGIN)
    lines = [show_entry(entry) for entry in ledger.entries()]
    ledger.close()

    assert all("\n" not in line for line in lines)
    assert "clinic-a joins with 30 + 10 held-out patients" in lines[0]
    assert "plan 00000000" in lines[3]
    assert "run run round 2: 3 admitted, rejected clinic-x (late), model" in lines[5]
    assert "epoch 1: micro-credits clinic-a" in lines[6]
    assert "epsilon <= 2.00, delta 1e-05 per patient" in lines[10]


def test_export_carries_the_whole_proof(honest: Path, tmp_path: Path) -> None:
    """From the exported lines alone anybody rebuilds the root that the exported checkpoint signs."""
    count = export(honest, tmp_path / "out.jsonl")
    lines = (tmp_path / "out.jsonl").read_bytes().splitlines()
    head = verify_note(json.loads(lines[-1])["checkpoint"], KEY.public.hex)

    assert count == len(lines) - 1 == head.size == 11
    assert merkle.root([merkle.leaf_hash(line) for line in lines[:-1]]) == head.root


# Damage.


def test_an_auditor_written_from_the_specifications_agrees(honest: Path, tmp_path: Path) -> None:
    """Code that shares nothing with the product finds the same root, and every entry and cosignature rightly signed."""
    export(honest, tmp_path / "ledger.jsonl")
    lines = (tmp_path / "ledger.jsonl").read_bytes()
    found = independent_audit.audit(lines, KEY.public.raw, {node: KEYS[node].public.raw for node in NODES})
    report = verify_ledger(honest, KEY.public.hex)

    assert (found["size"], found["root"]) == (report.head.size, report.head.root_hex)
    assert tuple(found["witnesses"]) == report.cosigned_by == NODES
    for damaged in (lines.replace(b'"round":2', b'"round":3', 1), lines.replace(b"clinic-b ", b"clinic-a ", 1)):
        with pytest.raises(AssertionError):
            independent_audit.audit(damaged, KEY.public.raw, {node: KEYS[node].public.raw for node in NODES})


@pytest.mark.parametrize("seed", range(40))
def test_a_flipped_bit_is_found_or_carries_nothing(honest: Path, copy: Path, seed: int) -> None:
    """One bit flipped anywhere in the used part of the file is named, or every row of the log is still the same."""
    content = honest.read_bytes()
    draw = random.Random(seed)  # noqa: S311 - a repeatable choice of places
    used = [i for i in range(len(content)) if any(content[max(0, i - 2) : i + 3])]
    offset, bit = draw.choice(used), draw.randrange(8)
    _flip(copy, offset, bit)
    found = _finding(copy)

    if found is None:
        assert _dump(copy) == _dump(honest)
    else:
        assert found.name == "ledger.db"
        assert 0 <= found.offset < len(content)
        assert found.hint


@pytest.mark.parametrize("index", [0, 3, 10])
@pytest.mark.parametrize("place", [0.0, 0.3, 0.6, 0.95, 1.0])
def test_a_flip_in_an_entry_names_entry_and_offset(copy: Path, index: int, place: float) -> None:
    """A bit flipped anywhere in an entry's bytes names that entry and where its bytes begin."""
    start, payload = _payload_span(copy, index)
    _flip(copy, start + round(place * (len(payload) - 1)), 0)

    with pytest.raises(Tampered, match=f"entry {index}.*: leaf hash differs") as caught:
        _verify(copy)
    assert caught.value.offset == start


def test_a_flip_in_a_long_entry_names_the_round_and_page(honest: Path, copy: Path) -> None:
    """An entry that SQLite spreads over several pages is named with its round and the place of its first part."""
    content = honest.read_bytes()
    head = canonical_bytes(_round(4))[:300]
    start = content.find(b'{"entry":' + head)
    update = content.find(_update("clinic-b", 4).manifest.update_hash.encode())
    _flip(copy, update + 60, 0)

    with pytest.raises(Tampered, match=r"entry 8 \(round 4\): leaf hash differs") as caught:
        _verify(copy)
    assert caught.value.offset == start > 0


def test_a_flip_in_the_stored_leaf_hash_is_found(honest: Path, copy: Path) -> None:
    """The stored hashes are checked against the entries, not believed."""
    _, payload = _payload_span(honest, 0)
    offset = honest.read_bytes().find(merkle.leaf_hash(payload))
    _flip(copy, offset + 5, 3)

    with pytest.raises(Tampered, match=r"entry 0.*: leaf hash differs"):
        _verify(copy)


@pytest.mark.parametrize("offset", [0, 17, 18, 20, 24, 29, 47, 59, 63, 70, 75])
def test_a_flip_in_the_header_names_its_byte(copy: Path, offset: int) -> None:
    """The file's header is compared byte by byte."""
    _flip(copy, offset, 1)

    with pytest.raises(Tampered, match="header") as caught:
        _verify(copy)
    assert caught.value.offset // 4 == offset // 4


@pytest.mark.parametrize("page", range(1, 6))
def test_a_damaged_page_structure_names_the_page(copy: Path, page: int) -> None:
    """When a page's own structure is destroyed the file and an offset are named; SQLite's failure does not leak."""
    offset = (page - 1) * 4096 + (100 if page == 1 else 0)
    _flip(copy, offset, 6)

    with pytest.raises(Tampered) as caught:
        _verify(copy)
    assert caught.value.offset in (0, (page - 1) * 4096)


@pytest.mark.parametrize("bit", [0, 5, 7])
@pytest.mark.parametrize("table", ["entries", "once", "checkpoints", "cosignatures"])
def test_a_damaged_table_definition_is_found(copy: Path, table: str, bit: int) -> None:
    """A flip in the text that defines a table is found, also when SQLite's message about it is no text any more."""
    offset = copy.read_bytes().find(f"CREATE TRIGGER {table}_UPDATE".encode())
    _flip(copy, offset + 16, bit)

    with pytest.raises(Tampered) as caught:
        _verify(copy)
    assert caught.value.offset < 4096
    with pytest.raises(Tampered):
        Ledger(copy, KEY, ORIGIN).append(_plan_again(), NOW)


@pytest.mark.parametrize("length", [-1, -4096, 1, 4096])
def test_a_file_of_another_length_is_found(copy: Path, length: int) -> None:
    """A truncated or lengthened file is named."""
    content = copy.read_bytes()
    copy.write_bytes(content[:length] if length < 0 else content + bytes(length))

    with pytest.raises(Tampered):
        _verify(copy)


def test_stray_bytes_in_free_space_do_not_matter(honest: Path, copy: Path) -> None:
    """A byte that SQLite does not use is no part of the log: verification says the same as before."""
    content = honest.read_bytes()
    free = content.find(bytes(200)) + 100
    _flip(copy, free, 0)

    assert _verify(copy) == _verify(honest)


def _sql(path: Path, *statements: str) -> None:
    """Change the file past its triggers, as someone with the file in hand can, and put the triggers back."""
    connection = sqlite3.connect(path)
    triggers = connection.execute("SELECT name, sql FROM sqlite_schema WHERE type = 'trigger'").fetchall()
    for name, _ in triggers:
        connection.execute(f"DROP TRIGGER {name}")
    for statement in statements:
        connection.execute(statement)
    for _, sql in triggers:
        connection.execute(sql)
    connection.execute("PRAGMA writable_schema=ON")
    connection.commit()
    connection.close()
    # Dropping and creating raises the schema's counter; a forger puts that back as well.
    content = bytearray(path.read_bytes())
    content[40:44] = (12).to_bytes(4, "big")
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("DELETE FROM entries WHERE idx = 5", "entry 5 is missing"),
        ("UPDATE entries SET idx = 99 WHERE idx = 10", "entry 10 is missing"),
        ("DELETE FROM entries WHERE idx = 10", "signed over 11 entries, the ledger has 10"),
        ("UPDATE once SET idx = 4 WHERE idx = 5", "the key of entry 4 is damaged"),
        ("UPDATE checkpoints SET size = 5 WHERE size = 4", "checkpoint of size 5 is that of another size"),
        ("UPDATE checkpoints SET note = x'ff' WHERE size = 4", "checkpoint of size 4: not text"),
        ("UPDATE cosignatures SET name = x'78' WHERE name = x'636c696e69632d61'", "cosigned by 'x', not a member"),
        ("UPDATE cosignatures SET line = x'00' WHERE size = 4", "cosignature of the checkpoint of size 4"),
        ("DELETE FROM checkpoints WHERE size = 4", "cosignature of a checkpoint of size 4 that is not there"),
        ("CREATE TABLE extra (x)", "tables or append-only triggers"),
    ],
)
def test_edits_past_the_triggers_are_found(copy: Path, statement: str, message: str) -> None:
    """Someone who drops the triggers, edits and puts them back is found by what was signed."""
    _sql(copy, statement)

    with pytest.raises(Tampered, match=message):
        _verify(copy)


def test_a_missing_trigger_is_found(copy: Path) -> None:
    """A ledger that is no longer append-only is named as such."""
    connection = sqlite3.connect(copy)
    connection.execute("DROP TRIGGER entries_DELETE")
    connection.execute("CREATE TRIGGER entries_DELETE BEFORE DELETE ON entries BEGIN SELECT 1; END")
    connection.commit()
    connection.close()
    content = bytearray(copy.read_bytes())
    content[40:44] = (12).to_bytes(4, "big")
    copy.write_bytes(content)

    with pytest.raises(Tampered, match="append-only triggers"):
        _verify(copy)


# Anchors outside the database.


def _rewritten(folder: Path) -> Path:
    """Write a whole new history, signed throughout with the real keys: only those who saw the old one can tell."""
    story = _story()
    story[8] = _round(4, new_model_hash=_hash(666))
    return _build(folder, story, witnesses=())


def test_a_rewritten_history_is_found_by_what_hospitals_keep(honest: Path, tmp_path: Path) -> None:
    """A consistent rewrite by the holder of the key verifies alone, and fails against a checkpoint kept elsewhere."""
    note = (honest.parent / CHECKPOINT_FILE).read_text()
    forged = _rewritten(tmp_path)

    assert verify_ledger(forged, KEY.public.hex).cosigned_by == ()
    with pytest.raises(Tampered, match="witnessed checkpoint 1: the first 11 entries are not those"):
        verify_ledger(forged, KEY.public.hex, [note])


def test_a_rewritten_history_under_the_old_checkpoint_file_is_found(honest: Path, tmp_path: Path) -> None:
    """checkpoint.txt is compared as well, and the finding carries its name."""
    forged = _rewritten(tmp_path)
    shutil.copy(honest.parent / CHECKPOINT_FILE, tmp_path / CHECKPOINT_FILE)

    with pytest.raises(Tampered, match=r"checkpoint\.txt: the first 11 entries") as caught:
        verify_ledger(forged, KEY.public.hex)
    assert caught.value.name == CHECKPOINT_FILE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda note: note.replace("\n11\n", "\n12\n"), "signature on the checkpoint is wrong"),
        (lambda note: note[:-1], "does not end with a newline"),
        (lambda note: note.replace("clinic-b", "clinic-d"), "cosigned by 'clinic-d', not a member"),
        (lambda note: note.replace("clinic-b", "clinic-a"), "not from the key of clinic-a"),
    ],
)
def test_a_changed_checkpoint_file_is_found(copy: Path, change: Callable[[str], str], message: str) -> None:
    """Every part of checkpoint.txt is checked."""
    path = copy.with_name(CHECKPOINT_FILE)
    path.write_text(change(path.read_text()))

    with pytest.raises(Tampered, match=message):
        _verify(copy)


def test_the_most_cosigned_of_equal_anchors_is_reported(honest: Path, tmp_path: Path) -> None:
    """A note kept by a hospital adds its cosignature to what the report can say."""
    path = _build(tmp_path, _story(), witnesses=())
    note = path.with_name(CHECKPOINT_FILE).read_text()
    head = verify_note(note, KEY.public.hex)
    kept = add_cosignatures(note, [cosign(head, KEYS["clinic-b"], "clinic-b", 1_790_000_000)])

    assert verify_ledger(path, KEY.public.hex).cosigned_by == ()
    assert verify_ledger(path, KEY.public.hex, [kept]).cosigned_by == ("clinic-b",)


def test_another_aggregator_key_is_refused(honest: Path) -> None:
    """A ledger verifies under its own aggregator's key only."""
    with pytest.raises(Tampered, match=r"entry 0.*the aggregator's signature is wrong"):
        verify_ledger(honest, KEYS["clinic-a"].public.hex)


# What an aggregator that signs everything correctly can still not claim.


def _credit_with(**changes: object) -> CreditEntry:
    return _credit(1, **changes)


def _forged_line() -> CreditEntry:
    entry = _credit(1)
    first, second, third = entry.lines
    lines = (
        first.model_copy(update={"micro_credits": first.micro_credits - 5}),
        second.model_copy(update={"micro_credits": second.micro_credits + 5}),
        third,
    )
    return entry.model_copy(update={"lines": lines})


def _forged_release(epoch: int = 1, **changes: object) -> CreditEntry:
    entry = _credit(1)
    releases = (_release("clinic-a", epoch, **changes), *entry.releases[1:])
    return entry.model_copy(update={"releases": releases})


def _unsigned_release() -> CreditEntry:
    entry = _credit(1)
    wrong = entry.releases[0].model_copy(update={"signature": entry.releases[1].signature})
    return entry.model_copy(update={"releases": (wrong, *entry.releases[1:])})


def _round_with(update: SignedUpdate) -> RoundEntry:
    return _round(2, admitted=(update, _update("clinic-b", 2), _update("clinic-c", 2)))


@pytest.mark.parametrize(
    ("position", "entry", "message"),
    [
        (2, _member("clinic-c").model_copy(update={"node": "clinic-d"}), "clinic-c: not a member"),
        (3, PlanEntry(run="run", plan_hash=_hash(8)), "does not follow the run's plan"),
        (5, _round(3), "base model is not the model of the round before"),
        (5, _round(1), "round 1 of run run follows round 1"),
        (5, _round(2, admitted=(_update("clinic-a", 2),) * 2), "admitted twice"),
        (5, _round_with(_update("clinic-a", 1)), "made for round 1 of run run"),
        (5, _round_with(_update("clinic-a", 2, base_model_hash=_hash(5))), "another plan or base model"),
        (5, _round_with(_update("clinic-a", 2, declared_patients=3000)), "another number of patients"),
        (5, _round_with(_update("clinic-a", 2, federation="other")), "another federation"),
        (
            5,
            _round_with(_update("clinic-a", 2).model_copy(update={"signature": "0" * 128})),
            "update of clinic-a: the member's signature is wrong",
        ),
        (7, PlanEntry(run="run", plan_hash=_hash(8)), "plan changes after the run's first round"),
        (6, _forged_line(), "credits do not follow from releases"),
        (6, _credit_with(pot_micro_credits=POT + 1), "do not sum to the pot"),
        (6, _credit_with(rounds=(1, 3)), "credits a round that is not in the ledger"),
        (6, _credit_with(rounds=(1, 1)), "credits a round twice"),
        (6, _credit_with(mode="sampled-shapley-weighted-median"), "scored as exact-shapley-weighted-median"),
        (9, _credit(1), "the epoch was credited before"),
        (9, _credit(2, rounds=(2, 3)), "credits a round twice"),
        (6, _forged_release(shapley_mg_dl=(1.5, 9.0, -0.25)), "credits do not follow from releases"),
        (6, _forged_release(declared_heldout_patients=900), "another number of held-out patients"),
        (6, _forged_release(epoch=2), "made for epoch 2"),
        (6, _forged_release(shapley_mg_dl=(1.5,)), "one value per node"),
        (6, _unsigned_release(), "release of clinic-a: the member's signature is wrong"),
        (10, _model(epsilon_by_node={"clinic-z": 1.0}), "it names clinic-z, not a member"),
    ],
)
def test_a_claim_that_does_not_follow_is_found(tmp_path: Path, position: int, entry: Entry, message: str) -> None:
    """An entry that the aggregator signed and the hospitals' signatures, or the rules, do not support is named."""
    story = _story()
    story[position] = entry
    path = _build(tmp_path, story, witnesses=())

    with pytest.raises(Tampered, match=message) as caught:
        _verify(path)
    assert caught.value.name == "ledger.db"
    assert caught.value.offset > 0


def test_a_members_cosignature_stands_for_its_own_signatures_alone(tmp_path: Path) -> None:
    """A false signature in a member's name is found until this member cosigns it; the full check always finds it."""
    story = _story()
    story[4] = _round(1, admitted=(_update("clinic-a", 1), _update("clinic-b", 1), _unsigned("clinic-c")))
    for number, witnesses in enumerate([("clinic-a", "clinic-b"), NODES]):
        (tmp_path / str(number)).mkdir()
        path = _build(tmp_path / str(number), story, witnesses=witnesses)
        with pytest.raises(Tampered, match=r"round 1\): update of clinic-c: the member's signature is wrong"):
            verify_ledger(path, KEY.public.hex, every_signature=True)
        if "clinic-c" in witnesses:
            assert "clinic-c" in verify_ledger(path, KEY.public.hex).cosigned_by
        else:
            assert "clinic-c" in str(_finding(path))


def _unsigned(node: str) -> SignedUpdate:
    return _update(node, 1).model_copy(update={"signature": "0" * 128})


@pytest.mark.parametrize("mode", ["sampled-shapley-weighted-median", "exact-shapley-weighted-median"])
def test_credit_of_eleven_nodes_follows_from_sampled_scores(tmp_path: Path, mode: str) -> None:
    """Above ten admitted updates credit is recomputed all the same, and must say that it rests on a sample."""
    values = tuple(np.linspace(-0.5, 2.0, 11).tolist())
    signed = tuple(_release(node, nodes=ELEVEN, shapley_mg_dl=values) for node in ELEVEN)
    declared = dict.fromkeys(ELEVEN, 30)
    lines, unpaid = credit([s.release for s in signed], ELEVEN, POT, declared)
    rounds = [_round(n, admitted=tuple(_update(node, n) for node in ELEVEN)) for n in (1, 2)]
    paid = _credit(1, mode=mode, lines=lines, unpaid_micro_credits=unpaid, releases=signed)
    story = [*(_member(node) for node in ELEVEN), PlanEntry(run="run", plan_hash=_hash(7)), *rounds, paid]
    path = _build(tmp_path, story, witnesses=())

    if mode.startswith("sampled"):
        assert sum(_verify(path).micro_credits.values()) == POT
    else:
        with pytest.raises(Tampered, match="scored as sampled-shapley-weighted-median"):
            _verify(path)


# Files.


def test_a_missing_ledger_is_named(tmp_path: Path) -> None:
    """A path without a file is wrong use, not tampering."""
    with pytest.raises(BadInput, match="no such ledger"):
        _verify(tmp_path / "ledger.db")


@pytest.mark.parametrize("content", [b"", b"x", bytes(4096), b"SQLite format 3\x00" + bytes(5000)])
def test_a_file_that_is_no_ledger_is_named(tmp_path: Path, content: bytes) -> None:
    """Any other file is refused as a damaged ledger."""
    (tmp_path / "ledger.db").write_bytes(content)

    with pytest.raises(Tampered, match=r"ledger\.db"):
        _verify(tmp_path / "ledger.db")


def test_a_busy_ledger_is_not_called_tampered(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that holds the file is reported as such."""
    monkeypatch.setattr(ledger_file, "_BUSY_SECONDS", 0.1)
    holder = sqlite3.connect(copy, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")

    with pytest.raises(StorageFailed, match="locked"):
        _verify(copy)
    holder.close()


def test_a_running_aggregator_does_not_disturb(tmp_path: Path) -> None:
    """A ledger is verified while its aggregator has it open and goes on appending."""
    ledger = Ledger(tmp_path / "ledger.db", KEY, ORIGIN)
    for number, entry in enumerate(_story()):
        ledger.append(entry, NOW)

        assert verify_ledger(ledger.path, KEY.public.hex).head.size == number + 1
