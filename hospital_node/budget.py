"""The privacy budget book: what each release cost, written down before it happens and never forgotten.

reserve -> compute -> commit, keyed by the task's identity. A reservation counts as spent from the moment it is on the
disk, whatever happens next, so a crash never under-counts. A committed task gives back its stored reply and draws no
new noise. A task that was reserved but not committed uses its reservation again: a reply leaves the node only after
its commit, so nothing of the first attempt was ever seen, and the one release that will be seen has been counted once.

On disk: budget.db (SQLite) holds rows chained by HMAC-SHA256 under a key derived from the node's identity;
budget.head, replaced atomically AFTER each transaction, names the last row and the hash of every 4096-byte page.
Whoever lacks the key can neither alter, insert, reorder or remove a row, nor cut rows off the end, unnoticed.
A kill between the transaction and the new budget.head leaves the book one valid row ahead of it. That is told apart
from tampering by the extra row's MAC, and sealed at the next opening; the other order would make a kill look like a
cut-off row. Nothing can have left because of the row that is ahead: replies are handed out after the head is written.
Not detectable here: putting back an older copy of BOTH files. Each signed update names the book's head of its time, so
the ledger shows it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from data_schemas.canonical import bytes_hash, canonical_bytes
from data_schemas.errors import BadInput, IsletError
from data_schemas.plan import PrivacyEvent, PrivacyUnit
from data_schemas.units import DELTA
from hospital_node import book_file

if TYPE_CHECKING:
    from pipeline.signing import PrivateKey

Cohort = Literal["training", "heldout"]
# Where a release's randomness came from; "not recorded" is what a row without it says.
NoiseKind = Literal["secure", "seeded", "not recorded"]
COHORTS: tuple[Cohort, ...] = ("training", "heldout")
# More rounds than any plan may have; beyond it the answer is "practically without limit".
MOST_ROUNDS = 10_000


class BudgetExhausted(IsletError):
    """A release would take a cohort past its ceiling. Carries epsilon spent, epsilon needed and the ceiling."""

    def __init__(self, cohort: Cohort, spent: float, needed: float, ceiling: float) -> None:
        super().__init__(
            f"the {cohort} cohort has spent epsilon {spent:.3f}; this would make it {needed:.3f}, above {ceiling:g}",
            f"Only the hospital can raise max_epsilon_{cohort} in node.toml; spent budget never comes back.",
        )
        self.cohort, self.spent, self.needed, self.ceiling = cohort, spent, needed, ceiling


@dataclass(frozen=True)
class Reservation:
    """A release that is counted.

    epsilon_after: its cohort's total at `delta`; head: the book's right after it; noise: "secure" is the operating
    system's cryptographic generator, "seeded" can be repeated and protects nobody.
    """

    task_id: str
    cohort: Cohort
    unit: PrivacyUnit
    event: PrivacyEvent
    asked_by: str
    run: str
    at: str
    epsilon_after: float
    delta: float
    noise: NoiseKind
    head: str


class BudgetBook:
    """A node's budget book, open. Use it under the node folder's lock: it keeps the verified rows in memory."""

    def __init__(self, path: Path, key: bytes) -> None:
        self._path, self._key = path, key
        self.verify()

    @staticmethod
    def create(path: Path, key: bytes) -> None:
        """Make an empty book; one that is already there is verified and kept, never replaced."""
        if path.exists():
            BudgetBook(path, key)
            return
        book_file.make_book(path, key)

    def verify(self) -> None:
        """Read everything again from the disk. Raises Tampered, naming the row and its byte offset in budget.db."""
        self._rows: list[tuple[dict[str, Any], bytes]] = book_file.load(self._path, self._key)
        self._reserved: dict[str, Reservation] = {}
        self._committed: dict[str, int] = {}
        for value, mac in self._rows:
            self._index(value, mac)

    def head(self) -> str:
        """MAC of the newest row, hex; changes with every row and tells nothing about it without the key."""
        return self._last_mac().hex()

    def rows(self) -> tuple[Reservation, ...]:
        """Every reservation, oldest first: committed or not, each is spent."""
        return tuple(self._reserved.values())

    def stored_reply(self, task_id: str) -> bytes | None:
        """Reply of a committed task, or None."""
        number = self._committed.get(task_id)
        return None if number is None else book_file.read_reply(self._path, number)

    def reservation(self, task_id: str) -> Reservation | None:
        """Return the reservation of a task, or None."""
        return self._reserved.get(task_id)

    def events(self, cohort: Cohort) -> tuple[PrivacyEvent, ...]:
        """All that was ever spent on a cohort."""
        return tuple(row.event for row in self._reserved.values() if row.cohort == cohort)

    def spent(self, cohort: Cohort, delta: float = DELTA) -> float:
        """Epsilon a patient of this cohort has spent over all runs."""
        return epsilon(self.events(cohort), delta)

    def projected(self, cohort: Cohort, event: PrivacyEvent, times: int, delta: float = DELTA) -> float:
        """Epsilon of the cohort after `times` more of these events."""
        return epsilon((*self.events(cohort), *_repeat(event, times)), delta)

    def rounds_left(self, cohort: Cohort, event: PrivacyEvent, ceiling: float, delta: float = DELTA) -> int:
        """How many more of these events fit under the ceiling, at most MOST_ROUNDS."""
        low, high = 0, MOST_ROUNDS
        while low < high:
            middle = (low + high + 1) // 2
            if self.projected(cohort, event, middle, delta) <= ceiling:
                low = middle
            else:
                high = middle - 1
        return low

    def reserve(
        self,
        task_id: str,
        cohort: Cohort,
        unit: PrivacyUnit,
        event: PrivacyEvent,
        *,
        asked_by: str,
        run: str,
        at: str,
        ceiling_epsilon: float,
        noise: NoiseKind,
        delta: float = DELTA,
    ) -> Reservation | bytes:
        """Count a release before it is computed; on the disk when this returns.

        Returns the stored reply of a task that was already committed, and the old reservation of one that was not (see
        the module docstring for why that is one release). Raises BudgetExhausted, and then nothing was written, and
        BadInput for a unit weaker than a patient: what a window spends says nothing about what its patient spends.
        """
        if unit != "patient":
            raise BadInput(f"an event per {unit} cannot be added up per patient", "Plans account per patient.")
        if (reply := self.stored_reply(task_id)) is not None:
            return reply
        if (earlier := self._reserved.get(task_id)) is not None:
            if (earlier.cohort, earlier.event) != (cohort, event):
                raise BadInput("a task came again with another cohort or event", "Task ids name their content.")
            return earlier
        needed = self.projected(cohort, event, 1, delta)
        if not needed <= ceiling_epsilon:
            raise BudgetExhausted(cohort, self.spent(cohort, delta), needed, ceiling_epsilon)
        self._append(
            {
                "kind": "reserve",
                "task_id": task_id,
                "cohort": cohort,
                "unit": unit,
                "event": event.model_dump(),
                "asked_by": asked_by,
                "run": run,
                "at": at,
                "epsilon_after": needed,
                "delta": delta,
                "noise": noise,
            },
            reply=None,
        )
        return self._reserved[task_id]

    def commit(self, task_id: str, reply: bytes) -> bytes:
        """Store a reserved task's reply and return the one that counts: the first, if there already is one.

        Only what this returns may leave the node. Raises BadInput for a task without reservation.
        """
        if (earlier := self.stored_reply(task_id)) is not None:
            return earlier
        if task_id not in self._reserved:
            raise BadInput("a reply without a reservation cannot be committed", "Reserve before computing.")
        self._append({"kind": "commit", "task_id": task_id, "reply_hash": bytes_hash(reply)}, reply=reply)
        return reply

    def _append(self, value: dict[str, Any], *, reply: bytes | None) -> None:
        value = {**value, "number": len(self._rows) + 1}
        body = canonical_bytes(value)
        mac = book_file.chained(self._key, self._last_mac(), body)
        book_file.append(self._path, value["number"], body, mac, reply)
        data = self._path.read_bytes()
        book_file.write_seal(self._path, self._key, rows=value["number"], head=mac, data=data)
        self._rows.append((value, mac))
        self._index(value, mac)

    def _index(self, value: dict[str, Any], mac: bytes) -> None:
        if value["kind"] == "commit":
            self._committed[value["task_id"]] = value["number"]
            return
        fields = {k: v for k, v in value.items() if k not in ("kind", "number", "event")}
        event = PrivacyEvent.model_validate(value["event"])
        fields.setdefault("noise", "not recorded")
        self._reserved[value["task_id"]] = Reservation(**fields, event=event, head=mac.hex())

    def _last_mac(self) -> bytes:
        return self._rows[-1][1] if self._rows else book_file.genesis(self._key)


def book_key(key: PrivateKey) -> bytes:
    """HMAC key of a node's book: hash of a deterministic Ed25519 signature (RFC 8032) that nobody is ever shown."""
    return hashlib.sha256(bytes.fromhex(key.sign({"purpose": "islet budget book key"}))).digest()


def epsilon(events: Iterable[PrivacyEvent], delta: float) -> float:
    """Epsilon of all events together at delta; 0 for none. Equal mechanisms are merged first, so a book stays quick."""
    steps: dict[tuple[float, float], int] = {}
    for event in events:
        mechanism = (event.sample_rate, event.noise_multiplier)
        steps[mechanism] = steps.get(mechanism, 0) + event.steps
    return _epsilon(tuple(sorted((*mechanism, count) for mechanism, count in steps.items())), delta)


@lru_cache(maxsize=4096)
def _epsilon(merged: tuple[tuple[float, float, int], ...], delta: float) -> float:
    if not merged:
        return 0.0
    from pipeline.accounting import epsilon_of

    events = [PrivacyEvent(sample_rate=q, noise_multiplier=z, steps=n) for q, z, n in merged]
    value = epsilon_of(events, delta)
    return value if not math.isnan(value) else math.inf


def _repeat(event: PrivacyEvent, times: int) -> tuple[PrivacyEvent, ...]:
    return (event.model_copy(update={"steps": event.steps * times}),) if times else ()


def exported(book: BudgetBook) -> dict[str, Any]:
    """Every release as it was accounted for, and each cohort's epsilon: all that an independent recomputation needs."""
    rows = [
        {"cohort": r.cohort, "unit": r.unit, "delta": r.delta, "epsilon_after": r.epsilon_after, **r.event.model_dump()}
        for r in book.rows()
    ]
    return {"delta": DELTA, "spent": {cohort: book.spent(cohort) for cohort in COHORTS}, "releases": rows}


def render(book: BudgetBook, ceilings: Mapping[Cohort, float]) -> str:
    """Text for a terminal: each cohort's ceiling, epsilon spent, rounds left at the present noise, every release."""
    parts = [_render_cohort(book, cohort, ceilings[cohort]) for cohort in COHORTS]
    return "\n\n".join(parts) + "\n"


def _render_cohort(book: BudgetBook, cohort: Cohort, ceiling: float) -> str:
    releases = [row for row in book.rows() if row.cohort == cohort]
    if not releases:
        return f"{cohort} cohort: nothing spent of epsilon {ceiling:g} (unit patient, delta {DELTA:g})"
    last = releases[-1]
    spent = book.spent(cohort)
    left = book.rounds_left(cohort, last.event, ceiling)
    more = f"{left} or more" if left == MOST_ROUNDS else str(left)
    what = "rounds" if cohort == "training" else "releases"
    head = (
        f"{cohort} cohort: spent epsilon {spent:.3f} of {ceiling:g}"
        f" (unit {last.unit}, delta {DELTA:g}); {more} {what} left at the present noise"
    )
    return "\n".join([head, *_table(releases)])


def _table(releases: Sequence[Reservation]) -> list[str]:
    heads = ("at", "asked by", "run", "sample rate", "noise", "steps", "epsilon after", "unit, delta", "drawn")
    cells = [heads, *(_cells(row) for row in releases)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(heads))]
    return ["  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]


def _cells(row: Reservation) -> tuple[str, ...]:
    event = row.event
    return (
        row.at,
        row.asked_by,
        row.run,
        f"{event.sample_rate:g}",
        f"{event.noise_multiplier:.4g}",
        str(event.steps),
        f"{row.epsilon_after:.3f}",
        f"{row.unit}, {row.delta:g}",
        row.noise,
    )
