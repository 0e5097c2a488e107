"""Asking hospitals by name: who is connected, what each one answered, and a code for every one that did not.

Knows nothing of Flower: an `Exchange` carries the messages. Replies are sorted by hospital, so nothing depends on which
came first. More than one connected node may claim a hospital's name; all are asked, and the signature decides.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import attrgetter
from typing import Annotated, Any, Protocol

from numpy.typing import NDArray
from pydantic import Field, TypeAdapter

from aggregator.admission import RejectionCode
from data_schemas.canonical import canonical_bytes
from data_schemas.frozen import Frozen
from data_schemas.ledger import MemberEntry
from data_schemas.messages import (
    Cosigned,
    Hello,
    HelloTask,
    Installed,
    Refusal,
    Scored,
    SignedRelease,
    SignedUpdate,
    WitnessState,
)
from data_schemas.secure import Advertised, Checked, Confirmed, MaskedUpdate, SealedShares, Unmasked

# The action of the ClientApp that answers each task.
HELLO, TRAIN, SCORE = "query.hello", "train", "evaluate"
RELEASE, COSIGN, MODEL, CONTEST = "query.release", "query.cosign", "query.model", "query.contest"
MASK, SECURE = "train.masked", "query.secure"

Plain = Hello | Refusal | SignedUpdate | Scored | SignedRelease | WitnessState | Cosigned | Installed
Body = Plain | Advertised | SealedShares | MaskedUpdate | Confirmed | Unmasked | Checked
_BODY: TypeAdapter[Body] = TypeAdapter(Annotated[Body, Field(discriminator="kind")])
_log = logging.getLogger("islet.aggregator")


@dataclass(frozen=True)
class Outgoing:
    """One message to one connected node."""

    node_id: int
    message_type: str
    task: Frozen
    arrays: Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Incoming:
    """What came back from it: JSON bytes and arrays, or a failure code."""

    node_id: int
    body: bytes = b""
    arrays: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    failure: str | None = None


@dataclass(frozen=True)
class Reply:
    """A hospital's answer: a body (a Refusal has its code in `failure` too), or only a failure code."""

    node: str
    body: Body | None
    arrays: Mapping[str, NDArray[Any]]
    failure: str | None


class Exchange(Protocol):
    """Carries messages to nodes and waits for every reply or the end of the time."""

    def node_ids(self) -> Sequence[int]:
        """Nodes connected now."""

    def carry(self, messages: Sequence[Outgoing], group: str, timeout_s: float) -> Sequence[Incoming]:
        """One Incoming per message."""


class Courier:
    """Asks members of one federation over an exchange; remembers which connected node is which hospital."""

    def __init__(self, exchange: Exchange, federation: str, hello_timeout_s: float) -> None:
        self._exchange = exchange
        self._federation = federation
        self._hello_timeout_s = hello_timeout_s
        self._names: dict[int, str] = {}
        # Keys that members had before: a node that has not yet heard of its new key is still shown the ledger.
        self.former_keys: Mapping[str, Sequence[str]] = {}
        self._reported: set[int] = set()

    def connect(self, members: Mapping[str, MemberEntry]) -> dict[str, tuple[int, ...]]:
        """Find the connected nodes of each member; strangers are greeted only while a member is missing."""
        online = sorted(self._exchange.node_ids())
        roster = self._roster(online, members)
        strangers = [node_id for node_id in online if node_id not in self._names]
        if strangers and roster.keys() != members.keys():
            self._greet(strangers, members)
            roster = self._roster(online, members)
        return roster

    def wait_for(self, members: Mapping[str, MemberEntry], needed: int) -> None:
        """Wait until enough members are connected, at most hello_timeout_s; nodes come back after a restart."""
        end = time.monotonic() + self._hello_timeout_s
        while len(self.connect(members)) < needed and time.monotonic() < end:
            time.sleep(min(1.0, self._hello_timeout_s / 10))

    def ask(
        self,
        message_type: str,
        tasks: Mapping[str, Frozen],
        members: Mapping[str, MemberEntry],
        *,
        timeout_s: float,
        arrays: Mapping[str, NDArray[Any]] | None = None,
        group: str = "",
    ) -> list[Reply]:
        """Send each named member its task; at least one reply per name, sorted by name, a code for an absent one."""
        roster, shared = self.connect(members), arrays or {}
        letters = [
            (name, Outgoing(node_id, message_type, task, shared))
            for name, task in sorted(tasks.items())
            for node_id in roster.get(name, ())
        ]
        carried = self._exchange.carry([letter for _, letter in letters], group, timeout_s)
        replies = [_parse(name, back) for (name, _), back in zip(letters, carried, strict=True)]
        absent = [Reply(name, None, {}, RejectionCode.NOT_CONNECTED) for name in tasks if name not in roster]
        return sorted([*replies, *absent], key=lambda reply: reply.node)

    def _roster(self, online: Sequence[int], members: Mapping[str, MemberEntry]) -> dict[str, tuple[int, ...]]:
        roster: dict[str, tuple[int, ...]] = {}
        for node_id in online:
            name = self._names.get(node_id, "")
            if name in members:
                roster[name] = (*roster.get(name, ()), node_id)
        return roster

    def _greet(self, strangers: Sequence[int], members: Mapping[str, MemberEntry]) -> None:
        task = HelloTask(federation=self._federation)
        nothing = dict[str, NDArray[Any]]()
        letters = [Outgoing(node_id, HELLO, task, nothing) for node_id in strangers]
        for back in self._exchange.carry(letters, "hello", self._hello_timeout_s):
            body = _parse("", back).body
            member = members.get(body.node) if isinstance(body, Hello) else None
            if isinstance(body, Hello) and member is not None and self._knows(member, body.public_key):
                self._names[back.node_id] = body.node
            elif back.node_id not in self._reported:
                self._reported.add(back.node_id)
                _log.warning("connected node %d is no member (%s)", back.node_id, _why(body, back, member))

    def _knows(self, member: MemberEntry, public_key: str) -> bool:
        return public_key == member.public_key or public_key in self.former_keys.get(member.node, ())


def by_name(replies: Iterable[Reply]) -> dict[str, list[Reply]]:
    """Group what `ask` returned: several nodes may answer for one name."""
    return {name: list(group) for name, group in groupby(replies, key=attrgetter("node"))}


def _why(body: Body | None, back: Incoming, member: MemberEntry | None) -> str:
    if not isinstance(body, Hello):
        return back.failure or "no hello"
    return "unknown name" if member is None else "the key is not the member's"


def _parse(name: str, back: Incoming) -> Reply:
    if back.failure is not None:
        return Reply(name, None, {}, back.failure)
    try:
        body = _BODY.validate_json(back.body)
        canonical_bytes(body)  # what has no canonical form (an integer beyond 2^53) can be neither verified nor logged
    except ValueError:  # pydantic's ValidationError and rfc8785's CanonicalizationError are such
        return Reply(name, None, {}, RejectionCode.MALFORMED_REPLY)
    return Reply(name, body, back.arrays, body.code if isinstance(body, Refusal) else None)
