"""A crew: two processes that do the reading and checking of a large import, in the order of its parts.

They change no file: what they find comes back to the process that asked, and they end when it does.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from multiprocessing.connection import Connection
from typing import Any, Protocol, TypeVar

from data_schemas.errors import BadInput, IsletError

Item = TypeVar("Item")
Result = TypeVar("Result")

# Below this a second process takes longer to start than it saves.
CREW_BYTES = 64 << 20
# Two, however many cores there are: each takes some 500 MB.
SIZE = 2
# Great Expectations is not: it makes a semaphore, which only a process that ends by itself takes back.
_LOADED_ONCE = ["pyarrow.csv", "hospital_node.importing"]
_PATIENCE_S = 30


class Run(Protocol):
    """Does the work on every item and yields what came out, in the order of the items."""

    def __call__(self, work: Callable[[Item], Result], items: Iterable[Item], /) -> Iterator[Result]:
        """Start with the first item when the first result is asked for."""


def in_turn(work: Callable[[Item], Result], items: Iterable[Item], /) -> Iterator[Result]:
    """Do the work in this process."""
    return map(work, items)


@contextmanager
def crew(size_bytes: int) -> Iterator[Run]:
    """Give what runs the work of an import of this size: a crew, or this process alone when it is small."""
    if size_bytes <= CREW_BYTES or len(os.sched_getaffinity(0)) < SIZE:
        yield in_turn
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_LOADED_ONCE)
    links = [_start(context) for _ in range(SIZE)]
    try:
        yield lambda work, items: _shared(links, work, items)
    finally:
        for link, _ in links:
            link.close()
        for _, process in links:
            process.join(_PATIENCE_S)
            process.kill()


def _start(context: Any) -> tuple[Connection, Any]:
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there,), daemon=True)
    process.start()
    # The process holds the only other end now: each sees when the other is gone.
    there.close()
    return here, process


def _serve(link: Connection) -> None:
    """Work until the process that asks has gone."""
    # A signal to the whole group is for the process that asks: it ends the import in good order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    work: Callable[[Any], Any] | None = None
    with suppress(EOFError, OSError):
        while True:
            new, item = link.recv()
            work = new or work
            if work is None:
                return
            try:
                answer: tuple[bool, Any] = (True, work(item))
            except IsletError as error:
                answer = (False, error)
            link.send(answer)


def _shared(
    links: list[tuple[Connection, Any]], work: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[Result]:
    """Give every process an item, and a new one as soon as its result is fetched."""
    left, busy = iter(items), deque[Connection]()
    try:
        for (link, _), item in zip(links, left, strict=False):
            # It keeps the work, and what the work has learnt, for the items that follow.
            link.send((work, item))
            busy.append(link)
        while busy:
            link = busy.popleft()
            done, answer = link.recv()
            if not done:
                raise answer
            for item in islice(left, 1):
                link.send((None, item))
                busy.append(link)
            yield answer
    except (EOFError, OSError):
        raise BadInput(
            "a process that read the export ended early: nothing was changed",
            "import again; if it comes again, there was too little memory: import fewer files at a time",
        ) from None
