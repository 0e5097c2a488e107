"""One import from the folder of exports to the store: read, validate, store, or refuse and change nothing."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path

from data_schemas.layout import Layout
from data_schemas.reading import QualityReport
from hospital_node.intake import read_exports
from hospital_node.store import Store
from hospital_node.suites import Suite, load_suite
from hospital_node.validation import validate


def import_exports(
    folder: Path,
    layout: Layout,
    zone: str | None,
    pseudonym_key: bytes,
    store: Store,
    suite: Suite | None = None,
    only: Container[Path] | None = None,
) -> QualityReport:
    """Import every export file in `folder` (`only`: these) and return the account of every row.

    suite: what the rows must pass; None takes Islet's own. Raises BadInput or StorageFailed with the store as it was.
    Importing the same files again adds nothing: their rows are counted as duplicates under
    store.FILE_ALREADY_IMPORTED.
    """
    readings = read_exports(folder, layout, zone, pseudonym_key, only)
    valid, quarantined, report = validate(readings, suite or load_suite())
    return store.add(valid, quarantined, report, sorted(set(readings.frame["source"])))
