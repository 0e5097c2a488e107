"""Coverage-guided fuzzing of the readers: `make fuzz`, or python -m tests.hospital_node.fuzz_readers LAYOUT SECONDS.

Runs where atheris is installed. Two properties: any bytes are read or refused with a hint, in bounded time; and a
series that a source wrote comes back equal, or is refused, whatever harmless changes of form its file went through.
"""

from __future__ import annotations

import os
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

import atheris  # type: ignore[import-not-found]

with atheris.instrument_imports(include=["hospital_node", "data_schemas"]):
    from data_schemas.errors import BadInput
    from data_schemas.layout import load_layout
    from hospital_node.intake import read_exports
from tests.hospital_node.written_exports import START, Series, put, written

KEY = b"k" * 32
_BOM = "\ufeff".encode()


def read_back(folder: Path, name: str, content: bytes) -> list[tuple[object, float]] | None:
    """Return times and values, or None for a refusal, which must say what to do."""
    put(folder, name, content)
    try:
        frame = read_exports(folder, LAYOUTS[name], "Europe/Madrid", KEY).frame
    except BadInput as refusal:
        if not refusal.hint:
            raise AssertionError("a refusal without a hint") from refusal
        return None
    return list(zip(frame["measured_at"].tolist(), frame["glucose_mg_dl"].tolist(), strict=True))


def series_of(data: atheris.FuzzedDataProvider) -> Series:
    """Return a series that the fuzzer chose."""
    minutes = dict.fromkeys(data.ConsumeIntInRange(0, 17 * 1440) for _ in range(data.ConsumeIntInRange(1, 12)))
    return [(START + timedelta(minutes=minute), data.ConsumeIntInRange(40, 400)) for minute in minutes]


def reshaped(name: str, content: bytes, how: int) -> bytes:
    """Return the same content with another form: byte order marks, line ends, empty lines at the end."""
    if name in {"glooko", "ipro2", "fhir", "ohio", "nightscout", "tidepool"}:
        return content
    content = _BOM + content.removeprefix(_BOM) if how & 1 else content
    content = content.replace(b"\n", b"\r\n") if how & 2 else content
    return content + b"\n" * (how >> 2 & 3)


def one_input(name: str, folder: Path, raw: bytes) -> None:
    """Test one input of the fuzzer."""
    data = atheris.FuzzedDataProvider(raw)
    rows = series_of(data)
    how = data.ConsumeIntInRange(0, 31)
    content = reshaped(name, written(name, rows), how)
    if how >> 4:
        got = read_back(folder, name, content)
        want = [(when, float(value)) for when, value in rows]
        if got is not None and (
            [when for when, _ in got] != [when for when, _ in want]
            or any(abs(a - b) > 1e-3 for (_, a), (_, b) in zip(got, want, strict=True))
        ):
            raise AssertionError("a value or time changed")
        return
    at = data.ConsumeIntInRange(0, len(content))
    drop = data.ConsumeIntInRange(0, 300)
    read_back(folder, name, content[:at] + data.ConsumeBytes(data.remaining_bytes()) + content[at + drop :])


LAYOUTS = {sys.argv[1]: load_layout(sys.argv[1])} if len(sys.argv) > 2 else {}


def main() -> None:
    """Fuzz one layout's reader; the working folder gets what breaks it."""
    name, seconds = sys.argv[1], sys.argv[2]
    folder = Path(tempfile.mkdtemp())
    os.environ["TZ"] = "UTC"
    arguments = [sys.argv[0], f"-max_total_time={seconds}", "-timeout=20", "-rss_limit_mb=2048", "-max_len=1024"]
    # Long inputs from the start: what is short names no place in the file to damage.
    arguments.append("-len_control=0")
    atheris.Setup(arguments, lambda raw: one_input(name, folder, raw))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
