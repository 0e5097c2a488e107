"""The embedded grid keeps the promises of a SuperLink: copies, codes, ttl, no shared state."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from aggregator import grid_exchange
from aggregator.courier import Outgoing
from aggregator.embedded_grid import EmbeddedGrid
from data_schemas.errors import BadInput
from data_schemas.messages import HelloTask
from pipeline.wire import from_record, to_record

app = ClientApp()
running: list[int] = []
peak: list[list[int]] = []
lock = threading.Lock()


@app.query("echo")
def echo(message: Message, context: Context) -> Message:
    content = message.content
    content["home"] = ConfigRecord({"home": str(context.node_config["home"])})
    return Message(content, reply_to=message)


@app.query("state")
def state(message: Message, context: Context) -> Message:
    seen = len(context.state)
    context.state["seen"] = ConfigRecord({"n": 1})
    return Message(RecordDict({"seen": ConfigRecord({"n": seen})}), reply_to=message)


@app.query("scribble")
def scribble(message: Message, context: Context) -> Message:
    message.content.config_records["body"]["json"] = b"scribbled"
    return Message(RecordDict(), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    raise PermissionError("glucose of Jane Doe was 123 mg/dL")


@app.query("sleep")
def sleep(message: Message, context: Context) -> Message:
    with lock:
        running.append(context.node_id)
        peak.append(list(running))
    time.sleep(0.2)
    with lock:
        running.remove(context.node_id)
    return Message(RecordDict(), reply_to=message)


@app.query("stuck")
def stuck(message: Message, context: Context) -> Message:
    if context.node_id == 2:
        time.sleep(30)
    return Message(RecordDict(), reply_to=message)


@pytest.fixture
def grid(tmp_path: Path) -> EmbeddedGrid:
    """Three nodes, two workers."""
    return EmbeddedGrid(app, {name: tmp_path / name for name in ("c", "a", "b")}, workers=2)


def letter(node_id: int, kind: str = "query.echo", ttl: float = 20.0) -> Message:
    """Write a message in our own format."""
    record = to_record(HelloTask(federation="f"), {"weights": np.arange(3, dtype=np.float32)})
    return Message(record, node_id, kind, ttl=ttl, group_id="7")


def test_it_is_a_flower_grid_with_ids_in_the_order_of_names(grid: EmbeddedGrid) -> None:
    """Ids depend on the names only, whatever order the homes were given in."""
    assert isinstance(grid, Grid)
    assert list(grid.get_node_ids()) == [2, 3, 4]
    homes = {
        reply.metadata.src_node_id: reply.content.config_records["home"]["home"]
        for reply in grid.send_and_receive([letter(i) for i in (4, 2, 3)], timeout=20)
    }
    assert [str(homes[i])[-1] for i in (2, 3, 4)] == ["a", "b", "c"]


def test_content_arrives_and_returns_unchanged(grid: EmbeddedGrid) -> None:
    """Body and arrays survive the way there and back; the reply names the message it answers."""
    sent = letter(2)
    (message_id,) = grid.push_messages([sent])
    (reply,) = wait(grid, [message_id])
    body, arrays = from_record(reply.content)
    assert HelloTask.model_validate_json(body).federation == "f"
    assert np.array_equal(arrays["weights"], np.arange(3, dtype=np.float32))
    assert reply.metadata.reply_to_message_id == message_id
    assert reply.metadata.group_id == "7"


def wait(grid: EmbeddedGrid, ids: list[str]) -> list[Message]:
    """Pull until every id has its reply."""
    replies: list[Message] = []
    end = time.monotonic() + 20
    while len(replies) < len(ids) and time.monotonic() < end:
        replies += grid.pull_messages(ids)
        time.sleep(0.005)
    return replies


def test_nothing_is_shared_by_reference(grid: EmbeddedGrid) -> None:
    """A node that writes into its message changes neither the sender's record nor another node's copy."""
    record = to_record(HelloTask(federation="f"))
    messages = [Message(record, i, "query.scribble", ttl=20) for i in (2, 3, 4)]
    assert len(grid.send_and_receive(messages, timeout=20)) == 3
    assert from_record(record)[0] == b'{"federation":"f"}'


def test_a_node_that_raises_answers_with_a_code_and_no_text(grid: EmbeddedGrid) -> None:
    """Error code 2 arrives; the exception's text does not."""
    (reply,) = grid.send_and_receive([letter(2, "train")], timeout=20)
    assert reply.has_error()
    assert reply.error.code == 2
    assert "Jane" not in str(reply)


def test_a_message_without_a_handler_is_an_error_reply(grid: EmbeddedGrid) -> None:
    """An unknown action is the node's failure, not the grid's."""
    (reply,) = grid.send_and_receive([letter(2, "query.nothing")], timeout=20)
    assert reply.error.code == 2


def test_state_does_not_outlive_a_message(grid: EmbeddedGrid) -> None:
    """As after a restart of a SuperNode, Context.state is empty each time."""
    for _ in range(2):
        (reply,) = grid.send_and_receive([letter(2, "query.state")], timeout=20)
        assert reply.content.config_records["seen"]["n"] == 0


def test_an_expired_message_is_an_error_reply_and_delays_nobody(grid: EmbeddedGrid) -> None:
    """A stuck node is reported with code 3 when the ttl ends; later messages to others are answered."""
    replies = grid.send_and_receive([letter(i, "query.stuck", ttl=0.3) for i in (2, 3, 4)], timeout=20)
    codes = {reply.metadata.src_node_id: reply.error.code if reply.has_error() else 0 for reply in replies}
    assert codes == {2: 3, 3: 0, 4: 0}
    assert len(grid.send_and_receive([letter(i, "query.stuck") for i in (3, 4)], timeout=20)) == 2


def test_no_more_messages_run_at_once_than_there_are_workers(grid: EmbeddedGrid) -> None:
    """Six messages on two workers: never three at a time, never two for one node."""
    peak.clear()
    replies = grid.send_and_receive([letter(i, "query.sleep") for i in (2, 2, 3, 4, 4, 3)], timeout=20)
    assert len(replies) == 6
    assert all(len(busy) <= 2 and len(set(busy)) == len(busy) for busy in peak)


def test_each_reply_is_handed_out_once(grid: EmbeddedGrid) -> None:
    """A second pull of the same id finds nothing."""
    (message_id,) = grid.push_messages([letter(2)])
    assert len(wait(grid, [message_id])) == 1
    assert grid.pull_messages([message_id]) == []


def test_a_timeout_returns_what_is_there(grid: EmbeddedGrid) -> None:
    """send_and_receive stops at its timeout although a message is still unanswered."""
    replies = grid.send_and_receive([letter(2, "query.stuck"), letter(3)], timeout=1.0)
    assert [reply.metadata.src_node_id for reply in replies] == [3]


@pytest.mark.parametrize(("homes", "workers"), [({}, 2), ({"a": "x"}, 0)])
def test_a_grid_without_nodes_or_workers_is_refused(homes: dict[str, Path], workers: int) -> None:
    """Settings that could never answer a message are bad input."""
    with pytest.raises(BadInput, match="at least one"):
        EmbeddedGrid(app, homes, workers=workers)


def test_a_message_to_nobody_is_refused(grid: EmbeddedGrid) -> None:
    """An id outside the federation is a mistake of the caller."""
    with pytest.raises(BadInput, match="no node"):
        grid.push_messages([letter(99)])


def test_a_task_is_written_once_however_many_nodes_get_it(grid: EmbeddedGrid, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its body and arrays are made bytes of once for each task, not for each node; every node gets them whole."""
    written: list[str] = []

    def counted(task: HelloTask, arrays: dict[str, np.ndarray]) -> RecordDict:
        written.append(task.federation)
        return to_record(task, arrays)

    monkeypatch.setattr(grid_exchange, "to_record", counted)
    arrays = {"x": np.arange(3, dtype=np.float32)}
    common, own = HelloTask(federation="common"), HelloTask(federation="own")
    tasks = {2: common, 3: common, 4: own}
    letters = [Outgoing(node_id, "query.echo", task, arrays) for node_id, task in tasks.items()]
    replies = grid_exchange.GridExchange(grid).carry(letters, "group", timeout_s=20)

    assert written == ["common", "own"]
    assert {back.node_id: HelloTask.model_validate_json(back.body) for back in replies} == tasks
    assert all(np.array_equal(back.arrays["x"], arrays["x"]) for back in replies)
