"""From the folder of exports to the store, part by part: read, validate, store, or refuse and change nothing."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd

from data_schemas.layout import Layout
from data_schemas.reading import QualityReport, ValidReadings
from hospital_node.account import NOTHING, Account, account_of
from hospital_node.intake import Part, read_parts
from hospital_node.judgement import Judge
from hospital_node.portrait import Portrait
from hospital_node.store import Store
from hospital_node.suites import Suite, load_suite
from hospital_node.validation import check, flag_cohort


@dataclass(frozen=True, slots=True)
class Export:
    """Where exports lie and how they are read; see intake.read_parts. only: these glucose files alone."""

    folder: Path
    layout: Layout
    zone: str | None
    pseudonym_key: bytes
    only: Container[Path] | None = None


@dataclass(frozen=True, slots=True)
class Intake:
    """What became of every row of an export.

    labels: what the files are called, by SHA-256.  past: what the store held before.  number: of the import in the
    store; None when nothing was stored.
    """

    account: Account
    labels: Mapping[str, str]
    past: Portrait
    number: int | None


def import_exports(
    folder: Path,
    layout: Layout,
    zone: str | None,
    pseudonym_key: bytes,
    store: Store,
    suite: Suite | None = None,
    only: Container[Path] | None = None,
) -> QualityReport:
    """Import every export file in `folder` (`only`: these) and return the counts; see take_in."""
    export = Export(folder, layout, zone, pseudonym_key, only)
    return take_in(export, store, suite or load_suite()).account.report


def take_in(export: Export, store: Store, suite: Suite) -> Intake:
    """Import an export and return the account of every row.

    Raises BadInput or StorageFailed with the store as it was. Importing the same files again adds nothing: their rows
    are counted as duplicates under store.FILE_ALREADY_IMPORTED.
    """
    judge, labels, people = Judge(suite), dict[str, str](), list[pd.DataFrame]()
    with store.importing() as incoming:
        for part, valid, quarantined, report in _checked(export, judge, people):
            labels |= part.labels
            incoming.add(valid, quarantined, report, part.rows_by_file)
        incoming.finish(flag_cohort(pd.concat(people, ignore_index=True), judge), str(export.folder))
    return Intake(incoming.account, labels, incoming.past, incoming.number)


def look_at(export: Export, past: Portrait, suite: Suite) -> Intake:
    """Return the account that an export would have in an empty store, and store nothing. Raises BadInput."""
    judge, labels, people = Judge(suite), dict[str, str](), list[pd.DataFrame]()
    account = NOTHING
    for part, valid, quarantined, report in _checked(export, judge, people):
        labels |= part.labels
        account += account_of(part.rows_by_file, valid.frame, quarantined, report)
    flagged = account.report.flagged | flag_cohort(pd.concat(people, ignore_index=True), judge)
    return Intake(replace(account, report=replace(account.report, flagged=flagged)), labels, past, None)


def _checked(
    export: Export, judge: Judge, people: list[pd.DataFrame]
) -> Iterator[tuple[Part, ValidReadings, pd.DataFrame, QualityReport]]:
    """Yield each part and what validation says of it; `people` gets a row for each person."""
    now = datetime.now(UTC)
    for part in read_parts(export.folder, export.layout, export.zone, export.pseudonym_key, export.only):
        valid, quarantined, report, them = check(part.readings, judge, now)
        people.append(them)
        yield part, valid, quarantined, report
