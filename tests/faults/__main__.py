"""`make faults`: at least 200 seeded rounds under random faults, and what befell them."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

from tests.faults.drill import drill
from tests.faults.house import template


def main() -> None:
    """Run federations of ten rounds each until the rounds asked for are done; print one line each and a summary."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=200)
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--each", type=int, default=10, help="rounds of one federation")
    given = options.parse_args()
    total: Counter[str] = Counter()
    rounds = starts = 0
    with tempfile.TemporaryDirectory(prefix="islet-faults-") as folder:
        start = template(Path(folder) / "template")
        for number in range(-(-given.rounds // given.each)):
            outcome = drill(start, Path(folder) / f"{number}", given.seed + number, given.each)
            total += outcome.faults
            rounds, starts = rounds + outcome.rounds, starts + outcome.starts
            sys.stdout.write(
                f"seed {outcome.seed}: {outcome.rounds} rounds finished, aggregator started {outcome.starts} times, "
                f"{sum(outcome.faults.values())} faults, {outcome.seconds:.0f} s\n"
            )
            sys.stdout.flush()
    sys.stdout.write(f"\n{rounds} rounds, aggregator started {starts} times; every history is whole\n")
    for what, count in sorted(total.items()):
        sys.stdout.write(f"{count:>6}  {what}\n")


if __name__ == "__main__":
    main()
