"""The courier's messages over a Flower Grid, and a code for everything that can go wrong with one."""

from __future__ import annotations

import time
from collections.abc import Sequence

from flwr.app import Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from aggregator.admission import RejectionCode
from aggregator.courier import Incoming, Outgoing
from pipeline.wire import TooLarge, from_record, to_record

# The widest forecaster that a plan can name has 5 MB of weights.
_MOST_REPLY_BYTES = 16 * 2**20
_FAILURES = {
    ErrorCode.LOAD_CLIENT_APP_EXCEPTION: RejectionCode.BUNDLE_REFUSED,
    ErrorCode.CLIENT_APP_RAISED_EXCEPTION: RejectionCode.NODE_RAISED,
    ErrorCode.CLIENT_APP_CRASHED: RejectionCode.NODE_RAISED,
    ErrorCode.MESSAGE_UNAVAILABLE: RejectionCode.EXPIRED,
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE: RejectionCode.EXPIRED,
    ErrorCode.NODE_UNAVAILABLE: RejectionCode.NODE_UNAVAILABLE,
}


class GridExchange:
    """The courier's Exchange over a Flower Grid."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def node_ids(self) -> Sequence[int]:
        """Nodes connected now."""
        return list(self._grid.get_node_ids())

    def carry(self, messages: Sequence[Outgoing], group: str, timeout_s: float) -> Sequence[Incoming]:
        """Push with an explicit ttl and pull until every message has its reply or the ttl has passed.

        Flower reports an error with the SuperLink as its sender, so replies are matched by the message they answer.
        """
        if not messages:
            return []
        pushed = self._grid.push_messages(_sealed(messages, group, timeout_s))
        # A SuperLink that takes nothing answers with an empty list, one that takes some with gaps.
        ids = list(pushed) or [""] * len(messages)
        replies: dict[str, Message] = {}
        started = time.monotonic()
        while len(replies) < len([i for i in ids if i]) and time.monotonic() - started < timeout_s + 1:
            waiting = [i for i in ids if i and i not in replies]
            replies |= {r.metadata.reply_to_message_id: r for r in self._grid.pull_messages(waiting)}
            # A tenth of the time waited so far: prompt for quick nodes, gentle with a SuperLink during long rounds.
            time.sleep(min(0.5, 0.002 + 0.1 * (time.monotonic() - started)))
        return [_incoming(outgoing.node_id, replies.get(i)) for outgoing, i in zip(messages, ids, strict=True)]


def _sealed(messages: Sequence[Outgoing], group: str, ttl: float) -> list[Message]:
    """Write each task and its arrays once, however many nodes get them."""
    written: dict[tuple[int, int], RecordDict] = {}
    letters = []
    for outgoing in messages:
        what = (id(outgoing.task), id(outgoing.arrays))
        if what not in written:
            written[what] = to_record(outgoing.task, dict(outgoing.arrays))
        content = RecordDict(dict(written[what]))
        letters.append(Message(content, outgoing.node_id, outgoing.message_type, ttl=ttl, group_id=group))
    return letters


def _incoming(node_id: int, reply: Message | None) -> Incoming:
    if reply is None:
        return Incoming(node_id, failure=RejectionCode.NO_REPLY)
    if reply.has_error():
        return Incoming(node_id, failure=_FAILURES.get(reply.error.code, RejectionCode.TRANSPORT_ERROR))
    try:
        body, arrays = from_record(reply.content, _MOST_REPLY_BYTES)
    except TooLarge:
        return Incoming(node_id, failure=RejectionCode.TOO_LARGE)
    except Exception:  # noqa: BLE001 a hostile reply may fail the parser in any way
        return Incoming(node_id, failure=RejectionCode.MALFORMED_REPLY)
    return Incoming(node_id, body=body, arrays=arrays)
