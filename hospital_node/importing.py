"""From the folder of exports to the store, part by part: read, validate, store, or refuse and change nothing."""

from __future__ import annotations

from collections.abc import Container, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

import pandas as pd

from data_schemas.layout import Layout
from data_schemas.reading import QualityReport
from hospital_node.account import NOTHING, Account
from hospital_node.checked import CheckedPart
from hospital_node.crew import crew
from hospital_node.export_files import find_files
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
    labels, people = dict[str, str](), list[pd.DataFrame]()
    with store.importing(suite) as incoming, closing(_checked(export, suite)) as parts:
        for part in parts:
            labels |= part.labels
            people.append(part.people)
            incoming.add(part)
        incoming.finish(flag_cohort(pd.concat(people, ignore_index=True), Judge(suite)), str(export.folder))
    return Intake(incoming.account, labels, incoming.past, incoming.number)


def look_at(export: Export, past: Portrait, suite: Suite) -> Intake:
    """Return the account that an export would have in an empty store, and store nothing. Raises BadInput."""
    labels, people, account = dict[str, str](), list[pd.DataFrame](), NOTHING
    with closing(_checked(export, suite)) as parts:
        for part in parts:
            labels |= part.labels
            people.append(part.people)
            account += part.account
    flagged = account.report.flagged | flag_cohort(pd.concat(people, ignore_index=True), Judge(suite))
    return Intake(replace(account, report=replace(account.report, flagged=flagged)), labels, past, None)


def _checked(export: Export, suite: Suite) -> Generator[CheckedPart]:
    """Yield each part, read and checked; a large export is shared by two processes."""
    what = (export.folder, export.layout, export.zone, export.pseudonym_key, export.only)
    paths = find_files(export.folder, export.layout.glucose_files)
    size = sum(path.stat().st_size for path in paths if export.only is None or path in export.only)
    with crew(size) as run:
        yield from read_parts(*what, run=run, then=Check(suite, datetime.now(UTC)))


@dataclass(frozen=True)
class Check:
    """Validates parts of one import. now: what "in the future" is measured against."""

    suite: Suite
    now: datetime

    @cached_property
    def _judge(self) -> Judge:
        return Judge(self.suite)

    def __call__(self, part: Part) -> CheckedPart:
        """Return the part as the store takes it. Raises BadInput when a rule rejects the export."""
        valid, quarantined, report, people = check(part.readings, self._judge, self.now)
        packed = CheckedPart.of(valid, quarantined, report, part.rows_by_file)
        return replace(packed, people=people, labels=part.labels)
