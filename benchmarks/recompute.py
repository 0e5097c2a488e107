"""Budget books, exported for an independent recomputation: `python -m benchmarks.recompute [NODE ...]`.

Prints the JSON of `islet node budget --json` for each node folder; without any, of trial books that hold the rounds of
every shipped plan, of several plans after one another, and of releases. `make recompute` hands it to dp-accounting.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measuring import ROOT
from data_schemas.plan import PrivacyEvent
from hospital_node.budget import BudgetBook, Cohort, exported
from hospital_node.folder import NodeFolder
from pipeline.plans import load_plan

Release = tuple[Cohort, PrivacyEvent]


def trials() -> list[list[Release]]:
    """Books to write: what each shipped plan spends, and a mixture no plan spends."""
    books: list[list[Release]] = []
    for path in sorted((ROOT / "data_schemas" / "plans").glob("*.toml")):
        plan = load_plan(path)
        training: list[Release] = [("training", plan.round_event)] * plan.rounds
        books.append([*training, *[("heldout", plan.release_event)] * plan.credit_epochs])
    mixture = [(0.2, 1.1, 10), (0.05, 0.9, 40), (0.5, 6.0, 3), (1.0, 4.0, 2), (0.3, 2.5, 20)]
    books.append([("training", PrivacyEvent(sample_rate=q, noise_multiplier=z, steps=n)) for q, z, n in mixture])
    return books


def write(path: Path, releases: Sequence[Release]) -> BudgetBook:
    """Reserve every release, as a node does, and open the book again."""
    key = b"trial book of the recomputation."
    BudgetBook.create(path, key)
    book = BudgetBook(path, key)
    for number, (cohort, event) in enumerate(releases):
        book.reserve(
            f"task {number}",
            cohort,
            "patient",
            event,
            asked_by="trial",
            run="trial",
            at="2026-01-01T00:00:00+00:00",
            ceiling_epsilon=math.inf,
            noise="secure",
        )
    return BudgetBook(path, key)


def main(arguments: Sequence[str]) -> None:
    """Print each book's JSON."""
    for path in map(Path, arguments):
        with NodeFolder.open(path) as node:
            print(json.dumps(exported(node.budget())))
    if not arguments:
        with tempfile.TemporaryDirectory() as home:
            for number, releases in enumerate(trials()):
                print(json.dumps(exported(write(Path(home) / f"{number}.db", releases))))


if __name__ == "__main__":
    main(sys.argv[1:])
