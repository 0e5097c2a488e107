"""What a node's copy of the ledger costs at every task, beside a replay of the whole copy: seconds and their ratio.

    python -m benchmarks.ledger_copy [--entries 100000]

A third of the entries are rounds with two signed updates, the rest declare numbers of patients anew, plan and publish.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data_schemas.canonical import canonical_bytes, content_hash
from data_schemas.governance import CreditPolicy, FoundingEntry, PrivacyPolicy
from data_schemas.ledger import Entry, MemberEntry, ModelEntry, PlanEntry, RoundEntry
from data_schemas.messages import PrivacySpend, SignedUpdate, UpdateManifest
from data_schemas.plan import PrivacyEvent
from hospital_node import ledger_copy
from hospital_node.folder import NodeFolder
from hospital_node.settings import NodeSettings
from pipeline.signing import PrivateKey

KEY = PrivateKey.from_seed(b"b" * 32)
MEMBERS = {name: PrivateKey.from_seed(name.encode().ljust(32, b".")) for name in ("north", "south")}
FEDERATION, ROUNDS = "bench", 20


def member(name: str, patients: int) -> MemberEntry:
    """Return a member's declaration."""
    key = MEMBERS[name].public.hex
    return MemberEntry(node=name, public_key=key, declared_training_patients=patients, declared_heldout_patients=5)


def entries() -> Iterator[Entry]:
    """Runs without end: plan, rounds with declarations between them, model."""
    privacy = PrivacyPolicy(max_epsilon_training=8, max_epsilon_heldout=8, min_patients=1)
    credit = CreditPolicy(max_pot_micro_credits_per_round=1000)
    yield FoundingEntry(federation=FEDERATION, privacy=privacy, credit=credit)
    run = 0
    while True:
        run += 1
        yield from (member(name, 10) for name in MEMBERS)
        yield PlanEntry(run=f"run-{run}", plan_hash=content_hash(run))
        for number in range(1, ROUNDS + 1):
            yield closed(run, number)
            yield from (member(name, 10) for name in MEMBERS)
        told: dict[str, Any] = {"unit": "patient", "relation": "", "delta": 1e-5, "epsilon_by_node": {}}
        yield ModelEntry(run=f"run-{run}", round=ROUNDS, model_hash=content_hash(["model", run]), **told)


def closed(run: int, number: int) -> RoundEntry:
    """Return a round with an update of every member."""
    base, new = (content_hash([run, n]) for n in (number - 1, number))
    spend = PrivacySpend(
        unit="patient",
        event=PrivacyEvent(sample_rate=0.5, noise_multiplier=1.0, steps=1),
        epsilon_after=1.0,
        delta=1e-5,
    )
    said = [
        UpdateManifest(
            federation=FEDERATION,
            run=f"run-{run}",
            round=number,
            node=name,
            plan_hash=content_hash(run),
            base_model_hash=base,
            update_hash=content_hash([run, number, name]),
            declared_patients=10,
            spend=spend,
            budget_head="0" * 64,
        )
        for name in MEMBERS
    ]
    return RoundEntry(
        run=f"run-{run}",
        round=number,
        plan_hash=content_hash(run),
        base_model_hash=base,
        new_model_hash=new,
        admitted=tuple(SignedUpdate(manifest=m, signature=MEMBERS[m.node].sign(m)) for m in said),
        rejected=(),
    )


def write(node: NodeFolder, count: int) -> None:
    """Give a node a copy of so many entries."""
    with (node.path / ledger_copy.COPY).open("wb") as file:
        for index, entry in zip(range(count), entries(), strict=False):
            told = {"index": index, "recorded_at": "2026-01-01T00:00:00+00:00", "entry": entry.model_dump(mode="json")}
            file.write(canonical_bytes({**told, "signature": KEY.sign(told)}) + b"\n")


def seconds(call: Callable[[], object]) -> float:
    """Processor seconds of a call."""
    started = time.process_time()
    call()
    return time.process_time() - started


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--entries", type=int, default=100_000)
    count = parser.parse_args().entries
    with tempfile.TemporaryDirectory() as place:
        settings = NodeSettings(
            name="north",
            federation=FEDERATION,
            aggregator_public_key=KEY.public.hex,
            declared_training_patients=10,
            declared_heldout_patients=5,
        )
        NodeFolder.create(Path(place) / "north", settings)
        with NodeFolder.open(Path(place) / "north") as node:
            write(node, count)
            state = ledger_copy.LedgerState()
            whole = seconds(lambda: vars(state).update(vars(ledger_copy.read(node, whole=True))))
            saved = seconds(lambda: ledger_copy.append(node, state, state.offset, []))
            kept = min(seconds(lambda: ledger_copy.read(node)) for _ in range(5))
            sizes = [(node.path / name).stat().st_size / 1e6 for name in (ledger_copy.COPY, ledger_copy.STATE)]
    print(f"{count:,} entries, {sizes[0]:.0f} MB; state {sizes[1]:.1f} MB; processor seconds")
    print(f"whole copy {whole:.2f}   at a task {kept:.3f}   after new entries {saved:.3f}   ratio {whole / kept:.0f}")


if __name__ == "__main__":
    main()
