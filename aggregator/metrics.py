"""The federation's state for Prometheus, read from ledger, state folder and certificate at each scrape.

Only what the ledger tells every member anyway: hospitals, rounds, codes, epsilon, credit.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from aggregator.governance import Federation, replay
from aggregator.ledger import read_entries
from aggregator.settings import AggregatorFolder
from aggregator.state import StateFolder
from data_schemas.errors import IsletError
from pipeline.certificates import expires_at
from pipeline.prometheus import Metric


def federation_metrics(folder: AggregatorFolder) -> tuple[Metric, ...]:
    """Members, rounds, admissions, rejections by code, time, epsilon, credit, ledger size, end of the certificate."""
    ledger = folder.path / "ledger.db"
    entries = read_entries(ledger) if ledger.exists() else ()
    state = replay(entries)
    return (
        Metric("islet_members", "gauge", "Hospitals in the federation.", [({}, len(state.members))]),
        Metric("islet_ledger_entries", "gauge", "Entries of the ledger.", [({}, len(entries))]),
        *_rounds(folder, state),
        Metric(
            "islet_micro_credits",
            "gauge",
            "Credit of a hospital over all runs.",
            [({"node": node}, float(sum_)) for node, sum_ in sorted(_credits(state).items())],
        ),
        Metric(
            "islet_certificate_expires_timestamp_seconds",
            "gauge",
            "End of the server certificate's validity.",
            _expiry(folder.path / "tls" / "server.crt"),
        ),
    )


def _rounds(folder: AggregatorFolder, state: Federation) -> tuple[Metric, ...]:
    runs = list(state.plans)
    closed = {run: sorted(number for (of, number) in state.rounds if of == run) for run in runs}
    admitted = Counter((run, s.manifest.node) for (run, _), e in state.rounds.items() for s in e.admitted)
    rejected = Counter((run, r.node, r.code) for (run, _), e in state.rounds.items() for r in e.rejected)
    last = {run: found[-1] for run in runs if (found := StateFolder(folder.state).summaries(run))}
    spent = {(run, node): value for run, summary in last.items() for node, value in summary.epsilon_by_node.items()}
    return (
        Metric(
            "islet_rounds_closed_total",
            "counter",
            "Rounds in the ledger.",
            [({"run": run}, float(len(numbers))) for run, numbers in closed.items()],
        ),
        Metric(
            "islet_updates_admitted_total",
            "counter",
            "Updates that are in the model.",
            [({"run": run, "node": node}, float(n)) for (run, node), n in sorted(admitted.items())],
        ),
        Metric(
            "islet_updates_rejected_total",
            "counter",
            "Updates that are not, and why.",
            [({"run": run, "node": node, "code": code}, float(n)) for (run, node, code), n in sorted(rejected.items())],
        ),
        Metric(
            "islet_round_seconds",
            "gauge",
            "From asking to the new model, last round.",
            [({"run": run}, summary.seconds) for run, summary in last.items()],
        ),
        Metric(
            "islet_epsilon",
            "gauge",
            "Patient-level epsilon that a hospital last reported.",
            [({"run": run, "node": node}, value) for (run, node), value in sorted(spent.items())],
        ),
    )


def _credits(state: Federation) -> Counter[str]:
    total: Counter[str] = Counter()
    for entry in state.credits.values():
        total.update(entry.earned())
    return total


def _expiry(certificate: Path) -> list[tuple[dict[str, str], float]]:
    try:
        return [({}, expires_at(certificate.read_bytes()).timestamp())]
    except (OSError, IsletError):
        return []
