"""Cuts the sample exports out of the full ones: `python -m hospital_node.cut_exports SOURCE DESTINATION`.

SOURCE holds <site>/exports/ for each site. The one rule: of every person, the lines of the first DAYS[site] dates
on which the person has glucose lines are kept byte for byte, in glucose and other files alike; a file without a
line left is not written.
"""

from __future__ import annotations

import csv
import re
import sys
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd

from data_schemas.layout import Layout, load_layout
from hospital_node.delimited import header_names
from hospital_node.export_files import ExportFile, read_files
from hospital_node.stamps import read_stamps

# People with type 1 diabetes get more days: their glucose moves, so their days teach more.
DAYS = {"arizona": 15, "manchester": 30, "madrid": 6, "stanford": 4, "mostoles": 1, "duke": 5}


def cut_site(source: Path, destination: Path, layout: Layout, days: int) -> int:
    """Write the cut of one site's export folder in the same layout and names; returns the bytes written."""
    written = 0
    dates: dict[str, frozenset[date]] = {}
    for file in read_files(source, layout.glucose_files):
        lines, day = _dated_lines(file, layout, layout.time.columns)
        kept = frozenset(sorted(set(day))[:days])
        dates[_person(file, layout)] = kept
        written += _write(file, source, destination, lines, [at in kept for at in day])
    for channel in layout.channels:
        if channel.files is None:
            continue
        for file in read_files(source, channel.files):
            lines, day = _dated_lines(file, layout, channel.time_columns)
            kept = dates[_person(file, layout)]
            written += _write(file, source, destination, lines, [at in kept for at in day])
    return written


def _dated_lines(file: ExportFile, layout: Layout, names: tuple[str, ...]) -> tuple[list[bytes], list[date]]:
    """Return the file's lines with their ends, the header first, and the local date of every line after it."""
    lines = file.content.splitlines(keepends=True)
    header = header_names(lines[0].decode(layout.encoding).strip(), layout.delimiter, {})
    position = next(header.index(name) for name in names if name in header)
    text = [line.decode(layout.encoding) for line in lines[1:]]
    stamps = pd.Series([row[position] for row in csv.reader(text, delimiter=layout.delimiter)], dtype="str")
    one_file = np.zeros(len(stamps), dtype=np.int64)
    local = read_stamps(stamps, one_file, (file.label,), layout.time, layout.zone).local
    return lines, list(local.ffill().dt.date)


def _person(file: ExportFile, layout: Layout) -> str:
    found = re.search(layout.identity.file_pattern or "", file.path.name)
    return found["patient"] if found else file.path.name


def _write(file: ExportFile, source: Path, destination: Path, lines: list[bytes], keep: list[bool]) -> int:
    if not any(keep):
        return 0
    target = destination / file.path.relative_to(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    content = lines[0] + b"".join(line for line, kept in zip(lines[1:], keep, strict=True) if kept)
    target.write_bytes(content)
    return len(content)


def main(source: Path, destination: Path) -> None:
    """Cut every site and say how many bytes each takes."""
    for site, days in DAYS.items():
        size = cut_site(source / site / "exports", destination / site, load_layout(site), days)
        sys.stdout.write(f"{site}: {days} days each, {size:,} bytes\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
