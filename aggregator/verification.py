"""Verify a ledger from its bytes alone: every hash, signature, rule and sum. What is wrong is named, with its place.

What this proves, and what not. A change to any logged byte is found. Bytes that carry nothing (free space inside pages,
values SQLite ignores) may change unseen: they do not belong to the log. A file cut back to an earlier state together
with its checkpoint.txt is a valid, shorter ledger: only a checkpoint kept elsewhere (every hospital keeps the one it
cosigned) shows the cut, so give it as `witnessed`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from aggregator.governance import governance_summary
from aggregator.ledger import CHECKPOINT_FILE, once_mark
from aggregator.ledger_file import HINT, LedgerFile, check_structure, open_ledger_file
from data_schemas.canonical import canonical_bytes
from data_schemas.errors import BadInput, CheckFailed, Tampered
from data_schemas.ledger import (
    ContestEntry,
    CreditEntry,
    Entry,
    LedgerEntry,
    MemberEntry,
    ModelEntry,
    PlanEntry,
    RoundEntry,
)
from pipeline import checkpoint as notes
from pipeline import merkle
from pipeline.charter_text import contest_text
from pipeline.checkpoint import Checkpoint, SignedCheckpoint
from pipeline.inclusion import split_payload
from pipeline.ledger_rules import Replay, fault, nickname, without_collector
from pipeline.signing import verify, write_durably


@dataclass(frozen=True)
class VerifyReport:
    """What a verified ledger holds. `head` is its tree; `anchor` the newest checkpoint.txt or witnessed note."""

    name: str
    counts: dict[str, int]
    members: tuple[str, ...]
    micro_credits: dict[str, int]
    unpaid_micro_credits: int
    head: Checkpoint
    anchor: Checkpoint | None
    cosigned_by: tuple[str, ...]


def verify_ledger(
    path: Path, aggregator_public_key: str, witnessed: Sequence[str] = (), *, every_signature: bool = False
) -> VerifyReport:
    """Rebuild everything from the entries and compare. Raises Tampered with the file's name and the byte offset.

    A signature on a checkpoint stands for its signer's signatures in the entries under it: the aggregator's on the
    newest for the entries, a member's cosignature for the updates and releases in that member's name, because its node
    cosigns nothing before it has checked them (hospital_node.ledger_view). All others, and with `every_signature`
    all there are, are checked one by one; so are proposals, votes and attestations. Members' keys come from the log;
    `witnessed` are checkpoint notes kept outside this folder. BadInput: no such file. StorageFailed: it cannot be read.
    The file is not changed, save that SQLite rolls back what a killed writer left half done.
    """
    if not path.is_file():
        raise BadInput(f"{path}: no such ledger", "Give the path of the ledger.db file.")
    with open_ledger_file(path) as file, without_collector():
        check_structure(file)
        replay, tree, heads = _check_log(file, aggregator_public_key, every_signature)
        _check_once(file, tree)
    anchors = [
        (name, note, *_check_anchor(name, note, tree, replay, aggregator_public_key))
        for name, note in [*_published(path), *((f"witnessed checkpoint {n + 1}", w) for n, w in enumerate(witnessed))]
    ]
    _, _, anchor, cosigned_by = max(anchors, key=lambda a: (a[2].size, len(a[3])), default=("", "", None, ()))
    known = [*heads.values(), *(a[2] for a in anchors)]
    return VerifyReport(
        name=path.name,
        counts=replay.counts,
        members=tuple(sorted(replay.members)),
        micro_credits=replay.micro_credits,
        unpaid_micro_credits=replay.unpaid,
        head=Checkpoint(known[0].origin if known else "unnamed", tree.size, tree.root().hex()),
        anchor=anchor,
        cosigned_by=cosigned_by,
    )


# What is in it.


def _check_log(file: LedgerFile, key: str, every_signature: bool) -> tuple[Replay, merkle.Tree, dict[int, Checkpoint]]:
    """Check entries, checkpoints and cosignatures; where these do not fit, every signature says which entry it is."""
    sizes = {} if every_signature else _vouched_sizes(file, key)
    replay, tree = _check_entries(file, key, sizes)
    try:
        heads = _check_checkpoints(file, tree, key)
        _check_cosignatures(file, heads, replay)
    except Tampered:
        if sizes:
            _check_entries(file, key, {})
        raise
    return replay, tree, heads


def _vouched_sizes(file: LedgerFile, key: str) -> dict[bytes, int]:
    """How many entries each member's newest cosignature covers, and the log's own newest checkpoint under b"".

    That the cosignatures are the members' and the roots those of the tree is checked when the tree is built.
    """
    sizes: dict[bytes, int] = {}
    for size, note in file.rows("SELECT size, note FROM checkpoints ORDER BY size DESC LIMIT 1"):
        with suppress(UnicodeDecodeError, BadInput, CheckFailed):
            if notes.verify_note(note.decode(), key).size == size:
                sizes[b""] = int(size)
    return sizes | dict(file.rows("SELECT name, max(size) FROM cosignatures GROUP BY name"))


def _check_entries(file: LedgerFile, key: str, sizes: dict[bytes, int]) -> tuple[Replay, merkle.Tree]:
    replay, tree = Replay(), merkle.Tree()
    steps = {0, *sizes.values()}
    for expected, (index, leaf, payload) in enumerate(file.rows("SELECT idx, leaf, payload FROM entries ORDER BY idx")):
        if index != expected:
            raise file.tampered(payload, f"entry {expected} is missing: entry {index} follows")
        if index in steps:
            replay.vouched = frozenset(name.decode("utf-8", "replace") for name, size in sizes.items() if index < size)
        wrong = _bytes_fault(leaf, payload, None if "" in replay.vouched else key)
        entry = _parse(payload)
        if not wrong:
            wrong = _content_fault(entry, payload, index, replay)
        if wrong:
            name = f" ({nickname(entry.entry)})" if entry else ""
            raise file.tampered(payload, f"entry {index}{name}: {wrong}")
        tree.append(leaf)
    return replay, tree


def _bytes_fault(leaf: bytes, payload: bytes, key: str | None) -> str:
    if merkle.leaf_hash(payload) != leaf:
        return "leaf hash differs"
    if key is None:
        return ""
    signed, signature = split_payload(payload)
    return "" if verify(key, signed, signature) else "the aggregator's signature is wrong"


def _content_fault(entry: LedgerEntry | None, payload: bytes, index: int, replay: Replay) -> str:
    if entry is None:
        return "not a ledger entry"
    if entry.index != index:
        return f"it says it is entry {entry.index}"
    return fault(entry.entry, replay, payload, entry.recorded_at)


def _parse(payload: bytes) -> LedgerEntry | None:
    try:
        return LedgerEntry.model_validate_json(payload)
    except ValidationError:
        return None


def _check_once(file: LedgerFile, tree: merkle.Tree) -> None:
    for key, index, mark in file.rows("SELECT unique_key, idx, mark FROM once"):
        if not 0 <= index < tree.size or once_mark(key, index, tree.leaf(index)) != mark:
            raise file.tampered(mark, f"the key of entry {index} is damaged")


def _check_checkpoints(file: LedgerFile, tree: merkle.Tree, key: str) -> dict[int, Checkpoint]:
    """Check the stored checkpoints; return them by size."""
    heads: dict[int, Checkpoint] = {}
    for size, note in file.rows("SELECT size, note FROM checkpoints ORDER BY size"):
        try:
            head = _verified_head(note.decode(), tree, key)
        except (UnicodeDecodeError, BadInput, CheckFailed) as error:
            raise file.tampered(note, f"checkpoint of size {size}: {_reason(error)}") from error
        if head.size != size or any(head.origin != other.origin for other in heads.values()):
            raise file.tampered(note, f"checkpoint of size {size} is that of another size or log")
        heads[size] = head
    return heads


def _check_cosignatures(file: LedgerFile, heads: dict[int, Checkpoint], replay: Replay) -> None:
    for size, name, line in file.rows("SELECT size, name, line FROM cosignatures"):
        if size not in heads:
            raise file.tampered(line, f"cosignature of a checkpoint of size {size} that is not there")
        try:
            _verify_cosigner(heads[size], line.decode(), name.decode(), replay)
        except (UnicodeDecodeError, BadInput, CheckFailed) as error:
            raise file.tampered(line, f"cosignature of the checkpoint of size {size}: {_reason(error)}") from error


def _published(path: Path) -> list[tuple[str, str]]:
    """Name and text of checkpoint.txt, when it is there."""
    published = path.with_name(CHECKPOINT_FILE)
    return [(CHECKPOINT_FILE, published.read_text(encoding="utf-8", errors="replace"))] if published.exists() else []


def _check_anchor(
    name: str, note: str, tree: merkle.Tree, replay: Replay, key: str
) -> tuple[Checkpoint, tuple[str, ...]]:
    """Compare a checkpoint kept outside the database with the tree; return it and the members who cosigned it."""
    try:
        head = _verified_head(note, tree, key)
        signatures = SignedCheckpoint.from_text(note).signatures[1:]
        for signature in signatures:
            _verify_cosigner(head, signature.to_text(), signature.name, replay)
    except (BadInput, CheckFailed) as error:
        raise Tampered(name, 0, _reason(error), HINT) from error
    return head, tuple(sorted({signature.name for signature in signatures}))


def _verified_head(note: str, tree: merkle.Tree, key: str) -> Checkpoint:
    head = notes.verify_note(note, key)
    if head.size > tree.size:
        raise CheckFailed(f"it was signed over {head.size} entries, the ledger has {tree.size}")
    if head.root != tree.root(head.size):
        raise CheckFailed(f"the first {head.size} entries are not those it was signed over")
    return head


def _verify_cosigner(head: Checkpoint, line: str, name: str, replay: Replay) -> None:
    keys = replay.charter.keys.get(name)
    if keys is None:
        raise CheckFailed(f"cosigned by {name!r}, not a member")
    for older in keys[:-1]:  # a key that was rotated out still vouches for what it cosigned then
        with suppress(CheckFailed):
            notes.verify_cosignature(head, line, name, older)
            return
    notes.verify_cosignature(head, line, name, keys[-1])


def _reason(error: Exception) -> str:
    return error.message if isinstance(error, BadInput | CheckFailed) else "not text"


# For people.


def render_verification(report: VerifyReport) -> str:
    """Write a report as lines for a terminal."""
    counts = ", ".join(f"{number} {kind}" for kind, number in sorted(report.counts.items())) or "none"
    paid = sum(report.micro_credits.values())
    lines = [
        f"{report.name}: verified",
        f"  entries     {report.head.size} ({counts})",
        f"  members     {', '.join(report.members) or 'none'}",
        f"  credit      {paid / 1e6:.6f} paid, {report.unpaid_micro_credits / 1e6:.6f} unpaid",
        f"  head        {report.head.root_hex} ({report.head.origin})",
    ]
    if report.anchor is None:
        lines.append("  checkpoint  none: nothing outside the database vouches for its length")
    else:
        who = ", ".join(report.cosigned_by) or "no hospital"
        lines.append(f"  checkpoint  {report.anchor.size} of {report.head.size} entries, cosigned by {who}")
    return "\n".join(lines)


def show_entry(entry: LedgerEntry) -> str:
    """Write an entry as one line."""
    return f"{entry.index:>6}  {entry.recorded_at}  {entry.entry.kind:<7} {_summary(entry.entry)}"


def _summary(entry: Entry) -> str:  # noqa: PLR0911
    match entry:
        case MemberEntry():
            patients = f"{entry.declared_training_patients} + {entry.declared_heldout_patients} held-out patients"
            return f"{entry.node} joins with {patients}, key {entry.public_key[:8]}"
        case PlanEntry():
            return f"run {entry.run}: plan {entry.plan_hash[:8]}"
        case RoundEntry():
            rejected = ", ".join(f"{r.node} ({r.code})" for r in entry.rejected) or "none"
            return (
                f"run {entry.run} round {entry.round}: {len(entry.admitted)} admitted"
                f"{'' if entry.sum is None else ' as a sum'}, rejected {rejected}, "
                f"model {entry.base_model_hash[:8]} -> {entry.new_model_hash[:8]}"
            )
        case CreditEntry():
            lines = ", ".join(f"{line.node} {line.micro_credits}" for line in entry.lines)
            recipe = "".join(f"; for the recipe {share.node} {share.micro_credits}" for share in entry.algorithm)
            unpaid = entry.unpaid_micro_credits
            return f"run {entry.run} epoch {entry.epoch}: micro-credits {lines}{recipe}; unpaid {unpaid}"
        case ContestEntry():
            return f"run {entry.run}: {contest_text(entry)}"
        case ModelEntry():
            worst = max(entry.epsilon_by_node.values(), default=0.0)
            privacy = f"epsilon <= {worst:.2f}, delta {entry.delta:g} per {entry.unit}"
            return f"run {entry.run} round {entry.round}: model {entry.model_hash[:8]}, {privacy}"
        case _:
            return governance_summary(entry)


def export(path: Path, out: Path) -> int:
    """Write the entries' canonical bytes, one a line, then {"checkpoint": note}. Returns the number of entries."""
    with open_ledger_file(path) as file:
        payloads = [bytes(row[0]) for row in file.rows("SELECT payload FROM entries ORDER BY idx")]
    lines = list(payloads)
    published = path.with_name(CHECKPOINT_FILE)
    if published.exists():
        lines.append(canonical_bytes({"checkpoint": published.read_text(encoding="utf-8")}))
    write_durably(out, b"".join(line + b"\n" for line in lines))
    return len(payloads)
