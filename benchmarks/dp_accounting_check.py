"""Epsilon of exported budget books by Google's dp-accounting: run by a Python that has it, and nothing of ours.

    islet node budget NODE --json | python benchmarks/dp_accounting_check.py

Reads JSON values, one after another. The Renyi accountant gets the same orders, so it has to agree to 1e-6. The
privacy loss distribution gives nearly the true epsilon, which the book's must cover. Exit status 1: something differs.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import dp_accounting
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

ORDERS = (*range(2, 64), 128, 256)
AGREES = 1e-6


def values(text: str) -> list[dict[str, Any]]:
    """All JSON values of a text."""
    decoder, found, at = json.JSONDecoder(), [], 0
    while at < len(text):
        value, at = decoder.raw_decode(text, at)
        found.append(value)
        at += len(text[at:]) - len(text[at:].lstrip())
    return found


def epsilon(accountant: Any, releases: list[dict[str, Any]], delta: float) -> float:
    """Compose every release's event and convert; 0 for none."""
    for release in releases:
        event: Any = dp_accounting.GaussianDpEvent(release["noise_multiplier"])
        if release["sample_rate"] < 1:
            event = dp_accounting.PoissonSampledDpEvent(release["sample_rate"], event)
        accountant.compose(event, release["steps"])
    return float(accountant.get_epsilon(delta)) if releases else 0.0


def main() -> int:
    """Print one line for each book and cohort."""
    print("| releases | cohort | unit | epsilon, the book | dp-accounting, Renyi | difference | dp-accounting, exact |")
    print("|---|---|---|---|---|---|---|")
    seen = wrong = 0
    for book in values(sys.stdin.read()):
        for cohort, spent in book["spent"].items():
            releases = [r for r in book["releases"] if r["cohort"] == cohort]
            if not releases:
                continue
            seen += 1
            renyi = epsilon(RdpAccountant(ORDERS), releases, book["delta"])
            exact = epsilon(PLDAccountant(), releases, book["delta"])
            wrong += not (abs(renyi - spent) <= AGREES and exact <= spent)
            units = ", ".join(sorted({r["unit"] for r in releases}))
            figures = (f"{spent:.6f}", f"{renyi:.6f}", f"{renyi - spent:.0e}", f"{exact:.4f}")
            print("| " + " | ".join([str(len(releases)), cohort, units, *figures]) + " |", flush=True)
    print(f"{seen} epsilons recomputed, {wrong} differ by more than {AGREES:g}")
    return int(wrong > 0 or seen == 0)


if __name__ == "__main__":
    raise SystemExit(main())
