"""A Flower Grid inside one process: the same ServerApp and ClientApp as in production, without port, daemon or Ray.

What a SuperLink guarantees holds here too: every message is serialised, so nothing is shared by reference; a ClientApp
that raises becomes an error reply (code 2), and its text stays where it was raised; a message unanswered when its
ttl ends becomes an error reply (code 3). A node works on one message at a time and gets an empty Context.state each
time, as after a restart: whatever must last belongs in the node's home folder.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from data_schemas.errors import BadInput

_POLL_S = 0.005


@dataclass(frozen=True)
class _Letter:
    """One message on its way to a node, as bytes."""

    message_id: str
    node_id: int
    wire: bytes
    expires_unix: float


class EmbeddedGrid(Grid):
    """Runs `client_app` for every node of `node_homes` (name -> home folder), at most `workers` messages at once.

    Node ids are 2, 3, ... in the order of the names. A message past its ttl gives its worker back although its thread
    may still be busy, so a stuck node delays nobody else; such threads are daemons and end with the process.
    """

    def __init__(self, client_app: ClientApp, node_homes: Mapping[str, Path], workers: int = 2) -> None:
        if not node_homes or workers < 1:
            raise BadInput(
                "an embedded federation needs at least one node and one worker", "give node_homes and workers"
            )
        first = SUPERLINK_NODE_ID + 1
        self._homes = {first + i: node_homes[name] for i, name in enumerate(sorted(node_homes))}
        self._client_app = client_app
        self._workers = workers
        self._lock = threading.Lock()
        self._pushed = 0
        self._open: dict[str, _Letter] = {}
        self._queue: list[_Letter] = []
        self._running: dict[str, _Letter] = {}
        self._replies: dict[str, bytes] = {}
        self.set_run(Run.create_empty(run_id=1))

    def set_run(self, run: Run) -> None:
        """Set the run; Flower's Message() reads the sender from a process-wide identity, set here too."""
        self._run = run
        TaskIdentity.task_id = 1
        TaskIdentity.run_id = run.run_id
        TaskIdentity.node_id = SUPERLINK_NODE_ID

    @property
    def run(self) -> Run:
        """Run information."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Create a message to one node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """All node ids, ascending."""
        return list(self._homes)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Serialise and queue messages; returns their ids in order."""
        letters = [self._seal(message) for message in messages]
        with self._lock:
            self._open.update({letter.message_id: letter for letter in letters})
            self._queue.extend(letters)
        self._dispatch()
        return [letter.message_id for letter in letters]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Hand out, once, the replies that are there and an error reply for each message whose ttl has passed."""
        self._dispatch()
        with self._lock:
            letters = [self._open[i] for i in message_ids if i in self._open]
            due = [letter for letter in letters if letter.message_id in self._replies or _expired(letter)]
            for letter in due:
                del self._open[letter.message_id]
            replies = [self._replies.pop(letter.message_id, None) for letter in due]
        return [
            _error_reply(letter, ErrorCode.MESSAGE_UNAVAILABLE) if wire is None else _parse(wire)
            for letter, wire in zip(due, replies, strict=True)
        ]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Push, then pull until every message is answered or `timeout` seconds have passed."""
        waiting = set(self.push_messages(messages))
        end = None if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        while waiting and (end is None or time.monotonic() < end):
            new = self.pull_messages(sorted(waiting))
            waiting -= {reply.metadata.reply_to_message_id for reply in new}
            replies.extend(new)
            if waiting:
                time.sleep(_POLL_S)
        return replies

    def _seal(self, message: Message) -> _Letter:
        if message.metadata.dst_node_id not in self._homes:
            raise BadInput("a message is addressed to no node of this federation", "use ids of get_node_ids()")
        with self._lock:
            self._pushed += 1
            message_id = f"embedded-{self._pushed}"
        message.metadata.__dict__["_message_id"] = message_id
        return _Letter(
            message_id=message_id,
            node_id=message.metadata.dst_node_id,
            wire=_wire(message),
            expires_unix=message.metadata.created_at + message.metadata.ttl,
        )

    def _dispatch(self) -> None:
        """Start queued messages while there are free workers; expired ones are dropped unopened."""
        with self._lock:
            self._queue = [letter for letter in self._queue if not _expired(letter)]
            for letter in list(self._queue):
                active = sum(not _expired(running) for running in self._running.values())
                busy = {running.node_id for running in self._running.values()}
                if active < self._workers and letter.node_id not in busy:
                    self._queue.remove(letter)
                    self._running[letter.message_id] = letter
                    threading.Thread(target=self._work, args=(letter,), daemon=True).start()

    def _work(self, letter: _Letter) -> None:
        reply = self._answer(letter)
        with self._lock:
            del self._running[letter.message_id]
            if letter.message_id in self._open and not _expired(letter):
                self._replies[letter.message_id] = reply
        self._dispatch()

    def _answer(self, letter: _Letter) -> bytes:
        context = Context(
            run_id=self._run.run_id,
            node_id=letter.node_id,
            node_config={"home": str(self._homes[letter.node_id])},
            state=RecordDict(),
            run_config={},
        )
        # The boundary of a node: whatever happens inside, only a code leaves.
        try:
            return _wire(self._client_app(_parse(letter.wire), context))
        except Exception:  # noqa: BLE001
            return _wire(_error_reply(letter, ErrorCode.CLIENT_APP_RAISED_EXCEPTION))


def _expired(letter: _Letter) -> bool:
    return time.time() > letter.expires_unix


def _wire(message: Message) -> bytes:
    return bytes(message_to_proto(message).SerializeToString())


def _parse(wire: bytes) -> Message:
    return message_from_proto(ProtoMessage.FromString(wire))


def _error_reply(letter: _Letter, code: int) -> Message:
    return Message(Error(code=code, reason=""), reply_to=_parse(letter.wire))
