"""How long does an audit of the ledger take, and an append? Against a plain SQLite file in the same run.

    python -m benchmarks.ledger [--entries N] [--folder DIR]

Two logs: small entries (plans and published models), and a federation's own: runs of twenty rounds of six hospitals
with their signed updates and releases. An audit is `islet ledger verify`; beside it stands what any reader must pay:
reading every payload from the same file and hashing it, and what checking one Ed25519 signature per entry would cost.
"""

from __future__ import annotations

import argparse
import hashlib
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from aggregator.ledger import Ledger, signed_payload
from aggregator.verification import verify_ledger
from data_schemas.ledger import CreditEntry, Entry, MemberEntry, ModelEntry, PlanEntry, RoundEntry
from data_schemas.messages import EpochRelease, PrivacySpend, SignedRelease, SignedUpdate, UpdateManifest
from data_schemas.plan import RELATION, PrivacyEvent
from pipeline import merkle
from pipeline.checkpoint import cosign, verify_note
from pipeline.contribution import credit
from pipeline.signing import PrivateKey, verify

KEY, AT, ROUNDS, POT = PrivateKey.from_seed(b"A" * 32), "2026-01-31T12:00:00+00:00", 20, 1_000_000
NODES = ("east", "hill", "lake", "north", "south", "west")
KEYS = {node: PrivateKey.from_seed(node.encode().ljust(32, b"-")) for node in NODES}
EVENT = PrivacyEvent(sample_rate=0.3, noise_multiplier=1.1, steps=5)
SPEND = PrivacySpend(unit="patient", event=EVENT, epsilon_after=1.0, delta=1e-5)


def digest(*parts: object) -> str:
    """Make up a hash."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def members() -> Iterator[Entry]:
    """Six hospitals join."""
    for node in NODES:
        yield MemberEntry(
            node=node, public_key=KEYS[node].public.hex, declared_training_patients=30, declared_heldout_patients=10
        )


def small(count: int) -> Iterator[Entry]:
    """Entries of a plan or a published model each."""
    for number in range(count):
        run = f"run-{number // 2:06d}"
        yield PlanEntry(run=run, plan_hash=digest(run)) if number % 2 == 0 else published(run)


def published(run: str) -> ModelEntry:
    """Publish a run's model."""
    values = dict.fromkeys(NODES, 7.5)
    return ModelEntry(
        run=run, round=20, model_hash=digest(run, 20), unit="patient", relation=RELATION, delta=1e-5,
        epsilon_by_node=values,
    )  # fmt: skip


def rounds(count: int) -> Iterator[Entry]:
    """A federation's log: per run a plan, twenty rounds, credit and a model."""
    for number in range(count // (ROUNDS + 3)):
        run = f"run-{number:06d}"
        yield PlanEntry(run=run, plan_hash=digest(run))
        for place in range(1, ROUNDS + 1):
            yield RoundEntry(
                run=run, round=place, plan_hash=digest(run), base_model_hash=digest(run, place - 1),
                new_model_hash=digest(run, place), admitted=tuple(update(run, place, node) for node in NODES),
                rejected=(),
            )  # fmt: skip
        yield paid(run)
        yield published(run)


def update(run: str, number: int, node: str) -> SignedUpdate:
    """One hospital's signed manifest."""
    manifest = UpdateManifest(
        federation="bench", run=run, round=number, node=node, plan_hash=digest(run),
        base_model_hash=digest(run, number - 1), update_hash=digest(run, number, node), declared_patients=30,
        spend=SPEND, budget_head=digest(run, number, node, "book"),
    )  # fmt: skip
    return SignedUpdate(manifest=manifest, signature=KEYS[node].sign(manifest))


def paid(run: str) -> CreditEntry:
    """Pay a run's one epoch."""
    made = [
        EpochRelease(
            federation="bench", run=run, epoch=1, node=node, nodes=NODES,
            shapley_mg_dl=tuple(0.1 * (i + 1) for i in range(6)), noise_std_mg_dl=0.1, declared_heldout_patients=10,
            abstained=False, spend=SPEND, budget_head=digest(run, node),
        )
        for node in NODES
    ]  # fmt: skip
    lines, unpaid = credit(made, NODES, POT * ROUNDS, dict.fromkeys(NODES, 30))
    return CreditEntry(
        run=run, epoch=1, rounds=tuple(range(1, ROUNDS + 1)), mode="exact-shapley-weighted-median",
        pot_micro_credits=POT * ROUNDS, unpaid_micro_credits=unpaid, lines=lines,
        releases=tuple(SignedRelease(release=r, signature=KEYS[r.node].sign(r)) for r in made),
    )  # fmt: skip


def build(folder: Path, entries: Iterator[Entry]) -> int:
    """Write a log in one transaction (an entry at a time would wait for the disk), checkpointed and cosigned by all."""
    ledger = Ledger(folder / "ledger.db", KEY, "islet.example/bench")
    ledger.close()
    with sqlite3.connect(folder / "ledger.db") as db:
        size = 0
        for entry in members():
            size = _insert(db, size, entry)
        for entry in entries:
            size = _insert(db, size, entry)
    db.close()
    ledger = Ledger(folder / "ledger.db", KEY, "islet.example/bench")
    head = verify_note(ledger.checkpoint(), KEY.public.hex)
    for node in NODES:
        ledger.add_cosignature(cosign(head, KEYS[node], node, 1_790_000_000))
    ledger.publish()
    ledger.close()
    return size


def _insert(db: sqlite3.Connection, index: int, entry: Entry) -> int:
    payload = signed_payload(index, AT, entry, KEY)
    db.execute("INSERT INTO entries VALUES (?, ?, ?)", (index, merkle.leaf_hash(payload), payload))
    return index + 1


def seconds(call: Callable[[], object]) -> float:
    """Processor time of a call, the best of two; on an idle machine the wall shows the same."""
    times = []
    for _ in range(2):
        begun = time.process_time()
        call()
        times.append(time.process_time() - begun)
    return min(times)


def hashed(path: Path) -> None:
    """Read and hash every payload: the least that any audit does."""
    with sqlite3.connect(path) as db:
        for (payload,) in db.execute("SELECT payload FROM entries ORDER BY idx"):
            merkle.leaf_hash(payload)


def checked() -> None:
    """Check a thousand Ed25519 signatures."""
    message = b"m" * 300
    signature = KEY.sign_bytes(message)
    for _ in range(1000):
        verify(KEY.public.hex, message, signature)


def audits(count: int, folder: Path) -> None:
    """Audit both logs."""
    for name, entries in (("small entries", small(count)), ("rounds of six", rounds(count // 10))):
        place = folder / name.replace(" ", "-")
        if not place.exists():
            place.mkdir(parents=True)
            build(place, entries)
        file = place / "ledger.db"
        size = verify_ledger(file, KEY.public.hex).head.size
        audit = seconds(partial(verify_ledger, file, KEY.public.hex))
        floor, one = seconds(partial(hashed, file)), seconds(checked) / 1000
        print(
            f"{name}: {size:,} entries, {file.stat().st_size / 1e6:.0f} MB: audit {audit:.2f} s,"
            f" {1e6 * audit / size:.0f} us an entry; {audit / floor:.1f} times reading and hashing;"
            f" {audit / size / one:.2f} times one Ed25519 check an entry",
            flush=True,
        )


def appends(folder: Path, count: int = 200) -> None:
    """Append durably, beside durable inserts of the same bytes into a plain SQLite file in the same folder."""
    place = Path(tempfile.mkdtemp(dir=folder))
    ledger = Ledger(place / "ledger.db", KEY, "islet.example/bench")
    entries = list(small(count))
    begun = time.perf_counter()
    for entry in entries:
        ledger.append(entry, AT)
    ours = (time.perf_counter() - begun) / count
    ledger.close()
    plain = sqlite3.connect(place / "plain.db", isolation_level=None)
    plain.execute("PRAGMA synchronous=EXTRA")
    plain.execute("CREATE TABLE entries (idx INTEGER PRIMARY KEY, payload BLOB)")
    payloads = [signed_payload(i, AT, entry, KEY) for i, entry in enumerate(entries)]
    begun = time.perf_counter()
    for index, payload in enumerate(payloads):
        plain.execute("INSERT INTO entries VALUES (?, ?)", (index, payload))
    theirs = (time.perf_counter() - begun) / count
    plain.close()
    print(f"append, durable: {1e3 * ours:.2f} ms, {ours / theirs:.2f} times a plain SQLite insert", flush=True)


def main() -> None:
    """Run both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--entries", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, help="keeps the logs for another run")
    asked = parser.parse_args()
    folder = asked.folder or Path(tempfile.mkdtemp())
    audits(asked.entries, folder)
    appends(folder)


if __name__ == "__main__":
    main()
