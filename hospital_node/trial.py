"""Trying export files with the layouts that fit them: what would go in and out, without a node and storing nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data_schemas.errors import BadInput
from data_schemas.layout import load_layout
from hospital_node.importing import Export, look_at
from hospital_node.portrait import Portrait
from hospital_node.proposal import fitting_layouts
from hospital_node.suites import Suite

_HEAD = ("layout", "file", "rows in", "accepted", "quarantined", "duplicates")


@dataclass(frozen=True, slots=True)
class Trial:
    """One file read by one layout: rows in and out, or why it was refused."""

    layout: str
    file: str
    rows: tuple[int, int, int, int] | None
    refused: str


def try_file(path: Path, zone: str, suite: Suite) -> list[Trial]:
    """Try a file with every layout of Islet that finds its columns in it; file names stay with whoever asks."""
    names = fitting_layouts(path)
    if not names:
        return [Trial("none", path.name, None, "no layout of Islet finds its columns")]
    return [_try(path, name, zone, suite) for name in names]


def markdown(trials: list[Trial]) -> str:
    """Return the trials as a table."""
    lines = [" | ".join(_HEAD), " | ".join("---" for _ in _HEAD)]
    for trial in trials:
        told = [f"{count:,}" for count in trial.rows] if trial.rows else [f"refused: {trial.refused}", "", "", ""]
        lines.append(" | ".join((f"`{trial.layout}`", trial.file, *told)))
    return "\n".join(f"| {line} |" for line in lines)


def _try(path: Path, name: str, zone: str, suite: Suite) -> Trial:
    layout = load_layout(name)
    _, archive, inner = layout.glucose_files.partition(".zip/")
    wanted = f"{path.name}/{inner}" if archive else path.name
    export = Export(path.parent, layout.model_copy(update={"glucose_files": wanted}), zone, bytes(32), {path})
    try:
        report = look_at(export, Portrait.empty(), suite).account.report
    except BadInput as refusal:
        return Trial(name, path.name, None, refusal.message)
    aside, copies = sum(report.quarantined.values()), sum(report.duplicates.values())
    return Trial(name, path.name, (report.rows_in, report.accepted, aside, copies), "")
