"""What this hospital earned, proved from its own copy of the ledger: nothing is asked of anybody.

RFC 6962 tree and inclusion paths, C2SP checkpoint, Ed25519; the credit of every epoch is computed again from the
releases that the hospitals signed (pipeline.ledger_rules). The page shows each check with what it looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from data_schemas.canonical import canonical_bytes
from data_schemas.errors import CheckFailed, IsletError
from data_schemas.ledger import CreditEntry, LedgerEntry, ModelEntry, RoundEntry
from hospital_node.folder import NodeFolder
from hospital_node.ledger_view import payloads
from hospital_node.settings import NodeSettings
from hospital_node.witness import witnessed_note
from pipeline import checkpoint, merkle
from pipeline.charter import Charter
from pipeline.inclusion import split_payload
from pipeline.ledger_rules import Replay, fault
from pipeline.signing import verify


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was verified: what in a few words, what exactly, and whether it holds."""

    what: str
    told: str
    holds: bool = True


@dataclass(frozen=True, slots=True)
class EarnedEpoch:
    """What one credit epoch paid this hospital, for data and recipe, with the 95% interval of its score in mg/dL."""

    run: str
    epoch: int
    rounds: tuple[int, ...]
    micro_credits: int
    pot_micro_credits: int
    shapley_mg_dl: float
    low_mg_dl: float
    high_mg_dl: float


@dataclass(frozen=True, slots=True)
class LedgerProof:
    """The ledger as this hospital holds it. checks: in order, up to the first that does not hold."""

    checks: tuple[Check, ...]
    epochs: tuple[EarnedEpoch, ...] = ()
    entries: int = 0
    root_hex: str = ""
    last_round: LedgerEntry | None = None
    models: tuple[ModelEntry, ...] = ()
    charter: Charter | None = None

    @property
    def holds(self) -> bool:
        """Whether everything was verified."""
        return bool(self.checks) and all(check.holds for check in self.checks)

    @property
    def micro_credits(self) -> int:
        """All that was earned."""
        return sum(epoch.micro_credits for epoch in self.epochs)


class ProofDesk:
    """Proves a node's copy when it has changed, and remembers the outcome until then."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._seen: tuple[tuple[int, ...], LedgerProof] | None = None

    def proof(self, settings: NodeSettings) -> LedgerProof | None:
        """Return the proof, or None for a node that has cosigned nothing. Takes as long as the ledger is long."""
        version = _version(self._home)
        if self._seen is None or self._seen[0] != version:
            found = prove(self._home, settings)
            if found is None:
                return None
            self._seen = (version, found)
        return self._seen[1]


def prove(home: Path, settings: NodeSettings) -> LedgerProof | None:
    """Verify the copy of the ledger in a node folder; None where there is no copy, or no aggregator to follow."""
    public = settings.aggregator_public_key
    node = NodeFolder(home, settings)
    held = payloads(node)
    if public is None or not held:
        return None
    checks: list[Check] = []
    try:
        checks += _checkpoint(home, public, held)
        replay, lines = _replayed(held, public)
        own = [(at, line.entry) for at, line in enumerate(lines) if isinstance(line.entry, CreditEntry)]
        checks += _entries(replay, lines, len(own))
        checks += _own(node, replay.charter, held, own)
    except (IsletError, ValidationError) as error:
        told = error.message if isinstance(error, IsletError) else "an entry cannot be read"
        return LedgerProof((*checks, Check("Does not hold", told, holds=False)), entries=len(held))
    rounds = [line for line in lines if isinstance(line.entry, RoundEntry)]
    return LedgerProof(
        checks=tuple(checks),
        epochs=tuple(_earned(own, settings.name)),
        entries=len(held),
        root_hex=merkle.root([merkle.leaf_hash(payload) for payload in held]).hex(),
        last_round=rounds[-1] if rounds else None,
        models=tuple(line.entry for line in lines if isinstance(line.entry, ModelEntry)),
        charter=replay.charter,
    )


def _checkpoint(home: Path, public: str, held: tuple[bytes, ...]) -> list[Check]:
    """The aggregator signed a checkpoint, this node cosigned it, and the copy is what it commits to."""
    note = witnessed_note(home)
    if note is None:
        raise CheckFailed("this node has cosigned no checkpoint of its copy")
    head = checkpoint.verify_note(note, public)
    root = merkle.root([merkle.leaf_hash(payload) for payload in held[: head.size]])
    if len(held) < head.size or root != head.root:
        raise CheckFailed("the copy is not the ledger that this node cosigned", "Compare it with another member's.")
    return [
        Check("Checkpoint", f"signed by the aggregator, cosigned by this node: {head.size:,} entries"),
        Check("Copy", f"the {head.size:,} entries here hash to its root {head.root_hex[:16]}"),
    ]


def _replayed(held: tuple[bytes, ...], public: str) -> tuple[Replay, list[LedgerEntry]]:
    replay, lines = Replay(), []
    for index, payload in enumerate(held):
        line = LedgerEntry.model_validate_json(payload)
        if line.index != index or not verify(public, *split_payload(payload)):
            raise CheckFailed(f"entry {index} is not the one that the aggregator signed")
        if wrong := fault(line.entry, replay, payload, line.recorded_at):
            raise CheckFailed(f"entry {index} breaks the federation's rules: {wrong}")
        lines.append(line)
    return replay, lines


def _entries(replay: Replay, lines: list[LedgerEntry], credited: int) -> list[Check]:
    updates = sum(len(line.entry.admitted) for line in lines if isinstance(line.entry, RoundEntry))
    releases = sum(len(line.entry.releases) for line in lines if isinstance(line.entry, CreditEntry))
    paid, unpaid = sum(replay.micro_credits.values()), replay.unpaid
    return [
        Check(
            "Signatures", f"aggregator on {len(lines):,} entries; members on {updates:,} updates, {releases:,} releases"
        ),
        Check(
            "Amounts",
            f"{credited} epochs computed again from the releases: {paid / 1e6:,.2f} paid, {unpaid / 1e6:,.2f} unpaid",
        ),
    ]


def _own(
    node: NodeFolder, charter: Charter, held: tuple[bytes, ...], own: list[tuple[int, CreditEntry]]
) -> list[Check]:
    """Each epoch that names this node is under the root, and carries what this node itself signed."""
    leaves = [merkle.leaf_hash(payload) for payload in held]
    root, tree = merkle.root(leaves), merkle.Tree(leaves)
    longest = 0
    for at, _ in own:
        path = tree.inclusion_path(at)
        longest = max(longest, len(path))
        if not merkle.verify_inclusion(leaves[at], at, len(leaves), path, root):
            raise CheckFailed(f"entry {at} is not under the root of the copy")
    keys = charter.keys.get(node.settings.name, [])
    if node.key.public.hex not in keys:
        raise CheckFailed("this node's key is not a member's of the ledger", "Ask the members to admit it.")
    signed = [s for _, e in own for s in e.releases if s.release.node == node.settings.name]
    if not all(any(verify(key, canonical_bytes(s.release), s.signature) for key in keys) for s in signed):
        raise CheckFailed("a release under this hospital's name was not signed by this node", "Its key may be stolen.")
    if not own:
        return []
    return [
        Check(
            "Inclusion", f"each of {len(own)} credit entries is under the root by a path of at most {longest} hashes"
        ),
        Check("Own releases", f"{len(signed)} in the ledger under this name, all signed with its own key"),
    ]


def _earned(own: list[tuple[int, CreditEntry]], name: str) -> Iterator[EarnedEpoch]:
    for _, entry in own:
        line = next((line for line in entry.lines if line.node == name), None)
        earned = entry.earned()
        if name in earned:
            yield EarnedEpoch(
                entry.run,
                entry.epoch,
                entry.rounds,
                earned[name],
                entry.pot_micro_credits,
                0.0 if line is None else line.shapley_mg_dl,
                0.0 if line is None else line.interval_low_mg_dl,
                0.0 if line is None else line.interval_high_mg_dl,
            )


def _version(home: Path) -> tuple[int, ...]:
    """Identity of the two files that the proof is made from."""
    found: list[int] = []
    for name in ("ledger.jsonl", "witness.json"):
        try:
            status = (home / name).stat()
        except OSError:
            continue
        found += [status.st_ino, status.st_mtime_ns, status.st_size]
    return tuple(found)
