"""The node's copy of the ledger on disk, and what its entries have established so far.

    ledger.jsonl    the entries' canonical bytes, one a line, in order
    ledger.state    what they have established up to a place in it; signed by this node, line 1 of the file

A task reads ledger.state and the entries after its place, and no entry before it. The state is only a short cut: one
that is missing, torn, altered or ahead of the copy is made anew from the whole copy, with every signature. An altered
entry before its place changes no decision any more; `read(..., whole=True)`, which `islet federation status` calls,
finds it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from data_schemas.errors import StorageFailed, Tampered
from data_schemas.ledger import LedgerEntry, RoundEntry
from hospital_node.folder import NodeFolder
from pipeline.charter import Charter
from pipeline.frontier import Frontier
from pipeline.inclusion import split_payload
from pipeline.ledger_rules import Replay, fault, without_collector
from pipeline.merkle import leaf_hash
from pipeline.signing import verify, write_durably

COPY, STATE = "ledger.jsonl", "ledger.state"
_FORMAT = "islet-ledger-state-4"
_STATES = 4  # that a process remembers: before and after the entries of this sitting and of the last
# Of the next entry, not of those so far; and what has a place of its own in the file.
_NOT_KEPT = {"charter", "signatures", "vouched"}


@dataclass(eq=False)
class LedgerState:
    """What the entries so far have established; what read() and followed_by() return is shared, and not to be changed.

    frontier: the entries' tree; offset: their bytes in ledger.jsonl; closed: rounds among those taken in here.
    """

    replay: Replay = field(default_factory=Replay)
    frontier: Frontier = field(default_factory=Frontier)
    offset: int = 0
    closed: list[RoundEntry] = field(default_factory=list)

    def take(self, payload: bytes, public_key: str, *, signatures: bool) -> None:
        """Take the next entry in. signatures: check members' inside it, as for an entry that is new to this node.

        Raises Tampered when it is not the aggregator's or breaks the federation's rules.
        """
        index = self.frontier.size
        try:
            line = LedgerEntry.model_validate_json(payload)
        except ValidationError as error:
            raise Tampered(COPY, index, "an entry cannot be read") from error
        if line.index != index or not verify(public_key, *split_payload(payload)):
            raise Tampered(COPY, index, "an entry is not the one that the aggregator signed")
        self.replay.signatures = signatures
        if wrong := fault(line.entry, self.replay, payload, line.recorded_at):
            raise Tampered(COPY, index, f"an entry breaks the federation's rules ({wrong})")
        self.frontier = self.frontier.plus(leaf_hash(payload))
        self.offset += len(payload) + 1
        if isinstance(line.entry, RoundEntry):
            self.closed.append(line.entry)


_NOTHING = LedgerState()


def read(node: NodeFolder, *, whole: bool = False) -> LedgerState:
    """Return what the copy establishes; with `whole` from its first entry on. Raises Tampered, StorageFailed."""
    kept = _NOTHING if whole else _kept(node)
    return _taken(kept, lines(node, kept.offset), str(node.settings.aggregator_public_key), signatures=False)


@lru_cache(maxsize=_STATES)
def followed_by(state: LedgerState, new: tuple[bytes, ...], public_key: str) -> LedgerState:
    """Return what is established once these entries follow, members' signatures checked. Raises Tampered.

    Remembered, and so is what the state's file says: hospitals that one process simulates are all shown the same, and
    each would check it anew. A thousand of them would check a million updates a round.
    """
    return _taken(state, new, public_key, signatures=True)


def _taken(state: LedgerState, new: Iterable[bytes], public_key: str, *, signatures: bool) -> LedgerState:
    """The state with these entries taken in; where there are none, the very same."""
    taken = state
    with without_collector():
        for payload in new:
            if taken is state:
                taken = LedgerState(state.replay.copy(), state.frontier, state.offset)
            taken.take(payload, public_key, signatures=signatures)
    return taken


def lines(node: NodeFolder, offset: int = 0) -> Iterator[bytes]:
    """Go through the entries from a byte offset on. A line that a crash cut short does not count."""
    try:
        with (node.path / COPY).open("rb") as file:
            file.seek(offset)
            for line in file:
                if line.endswith(b"\n"):
                    yield line[:-1]
    except FileNotFoundError:
        return
    except OSError as error:
        raise StorageFailed(f"{COPY}: cannot be read", "Check its owner and mode.") from error


def round_entry(node: NodeFolder, run: str, number: int) -> RoundEntry:
    """Read a closed round's entry, with all that it admitted, from the copy. Raises Tampered where there is none."""
    named = f'"round":{number},"run":{json.dumps(run)}'.encode()  # as canonical JSON has it
    for payload in lines(node):
        if named in payload:
            entry = LedgerEntry.model_validate_json(payload).entry
            if isinstance(entry, RoundEntry) and (entry.run, entry.round) == (run, number):
                return entry
    raise Tampered(COPY, 0, f"round {number} is missing")


def append(node: NodeFolder, state: LedgerState, held_bytes: int, new: Sequence[bytes]) -> None:
    """Write new entries after the first held_bytes of the copy, then what all of them establish; durable afterwards."""
    try:
        descriptor = os.open(node.path / COPY, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            os.ftruncate(descriptor, held_bytes)  # a line that a crash cut short
            os.lseek(descriptor, held_bytes, os.SEEK_SET)
            data = b"".join(payload + b"\n" for payload in new)
            while data:
                data = data[os.write(descriptor, data) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise StorageFailed(f"{COPY}: not written ({error.strerror})", "Free space or mend the disk.") from error
    body = _packed(state)
    write_durably(node.path / STATE, f"{node.key.sign_bytes(body)}\n".encode() + body, mode=0o600)


def _kept(node: NodeFolder) -> LedgerState:
    """The state on disk, or the empty one where it cannot be used."""
    try:
        signature, _, body = (node.path / STATE).read_bytes().partition(b"\n")
        copied = (node.path / COPY).stat().st_size
    except OSError:
        return _NOTHING
    if not verify(node.key.public.hex, body, signature.decode("ascii", "replace")):
        return _NOTHING
    state = _parsed(body)
    return state if state.offset <= copied else _NOTHING


@lru_cache(maxsize=_STATES)
def _parsed(body: bytes) -> LedgerState:
    """What a state's file says; nothing when it is of another format."""
    told = json.loads(body)
    if told["format"] != _FORMAT:
        return _NOTHING
    replay = Replay(charter=Charter(**_unpacked(Charter, told["charter"])), **_unpacked(Replay, told["replay"]))
    frontier = Frontier(told["size"], tuple(bytes.fromhex(peak) for peak in told["peaks"]))
    return LedgerState(replay, frontier, told["offset"])


@lru_cache(maxsize=_STATES)
def _packed(state: LedgerState) -> bytes:
    told = {
        "format": _FORMAT,
        "size": state.frontier.size,
        "offset": state.offset,
        "peaks": [peak.hex() for peak in state.frontier.peaks],
        "charter": _fields(state.replay.charter),
        "replay": _fields(state.replay),
    }
    return json.dumps(told, separators=(",", ":")).encode()


def _fields(value: Charter | Replay) -> dict[str, Any]:
    return {
        name: adapter.dump_python(list(held.items()) if listed else held, mode="json")
        for name, (adapter, listed) in _adapters(type(value).__name__).items()
        for held in [getattr(value, name)]
    }


def _unpacked(kind: type[Charter | Replay], told: dict[str, Any]) -> dict[str, Any]:
    return {
        name: dict(adapter.validate_python(told[name])) if listed else adapter.validate_python(told[name])
        for name, (adapter, listed) in _adapters(kind.__name__).items()
    }


@cache
def _adapters(name_of_kind: str) -> dict[str, tuple[TypeAdapter[Any], bool]]:
    """How each field is written; a dict whose keys JSON cannot have is written as a list of pairs."""
    found: dict[str, tuple[TypeAdapter[Any], bool]] = {}
    kind = {"Charter": Charter, "Replay": Replay}[name_of_kind]
    for name, hint in get_type_hints(kind).items():
        if name in _NOT_KEPT:
            continue
        parts = get_args(hint)
        listed = get_origin(hint) is dict and get_origin(parts[0]) is tuple
        wanted: Any = list[tuple[parts[0], parts[1]]] if listed else hint  # type: ignore[valid-type]
        found[name] = TypeAdapter(wanted), listed
    return found
