"""The bytes of an export: found, fingerprinted and unpacked, or refused.

A file is named in errors by its place in name order and its SHA-256 prefix, never by its name: names carry
identities.
"""

from __future__ import annotations

import codecs
import functools
import gzip
import hashlib
import io
import zipfile
import zlib
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, TypeAlias

from data_schemas.errors import BadInput

# Size, time of the last change and SHA-256 of a file.
Print: TypeAlias = tuple[int, int, str]

_GZIP_MAGIC = b"\x1f\x8b"
_ZIP_MAGIC = b"PK\x03\x04"
PACKED = (_GZIP_MAGIC, _ZIP_MAGIC, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_BROKEN = (EOFError, OSError, zlib.error, zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError)
MAX_UNPACKED_BYTES = 2 << 30
_AGAIN = "export it again from the source and import the whole file"


@dataclass(frozen=True, slots=True)
class ExportFile:
    """One file as it was read: where it lies, what it was, and its bytes (unpacked).

    raw_sha256: of the bytes on the disk.  sha256: of the file, or of the member of an archive of several.
    """

    path: Path
    label: str
    size: int
    mtime_ns: int
    raw_sha256: str
    sha256: str
    content: bytes

    @property
    def print(self) -> Print:
        """Tells whether it is still the same file on the disk."""
        return (self.size, self.mtime_ns, self.raw_sha256)


def find_files(folder: Path, pattern: str) -> tuple[Path, ...]:
    """Return the paths that match the glob (its part before `.zip/`), in name order.

    Raises BadInput when there is none.
    """
    if not folder.is_dir():
        raise BadInput("the export folder does not exist", "give the folder that holds the export files")
    paths = tuple(sorted(path for path in folder.glob(outer(pattern)) if path.is_file()))
    if not paths:
        raise BadInput(
            f"no file matches {pattern!r} in the export folder",
            "check the folder and the layout: the pattern comes from the layout's glucose_files",
        )
    return paths


def passed_over(folder: Path, patterns: Iterable[str]) -> dict[str, int]:
    """Return how many files under the folder none of the globs reads, by their ending; hidden ones do not count."""
    read = {path for pattern in patterns for path in folder.glob(outer(pattern))}
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path not in read)
    seen = (path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))
    return dict(Counter(path.suffix.lower() for path in seen))


def read_files(folder: Path, pattern: str, only: Container[Path] | None = None) -> tuple[ExportFile, ...]:
    """Return every file under `folder` that matches the glob, in name order; `only`: of these paths.

    A pattern such as `*.zip/cgm*.csv` gives the matching members of every archive. Raises BadInput when there is none.
    """
    return tuple(each_file(folder, pattern, only))


def each_file(folder: Path, pattern: str, only: Container[Path] | None = None) -> Iterator[ExportFile]:
    """Yield what read_files returns, one at a time."""
    paths, (_, _, inner) = find_files(folder, pattern), pattern.partition(".zip/")
    for number, path in enumerate(paths, start=1):
        if only is None or path in only:
            yield from _read_path(path, place_of(number, len(paths)), inner)


def place_of(number: int, count: int) -> str:
    """Return what stands for a file's name."""
    return f"file {number} of {count} in name order"


def labelled(place: str, sha256: str) -> str:
    """Return what a file is called in errors and reports."""
    return f"{place} (sha256 {sha256[:12]})"


def outer(pattern: str) -> str:
    """Return the glob of the files themselves: of `*.zip/cgm*.csv`, the archives."""
    return pattern.split(".zip/", maxsplit=1)[0] + ".zip" if ".zip/" in pattern else pattern


def refuse_if_changed(files: tuple[ExportFile, ...]) -> None:
    """Refuse BadInput when a file is not, byte for byte, what was read: somebody is still writing the export."""
    for file in files:
        try:
            state = file.path.stat()
            same = (state.st_size, state.st_mtime_ns) == (file.size, file.mtime_ns) and _sha256(
                file.path.read_bytes()
            ) == file.raw_sha256
        except OSError:
            same = False
        if not same:
            raise changed(file.label)


def changed(label: str) -> BadInput:
    """Return the refusal of a file that somebody still writes."""
    return BadInput(f"{label} changed while it was imported", "wait until the export is complete and import it again")


def text_of(file: ExportFile, encoding: str) -> str:
    """Return the file's text; a UTF-16 byte order mark decides, else the layout's encoding. Raises BadInput."""
    encoding = "utf-16" if file.content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else encoding
    try:
        return file.content.decode(encoding)
    except UnicodeError:
        raise BadInput(
            f"{file.label} is not {encoding} text", "set `encoding` in the layout to the one of the export"
        ) from None


def _read_path(path: Path, place: str, inner: str) -> list[ExportFile]:
    try:
        raw, state = path.read_bytes(), path.stat()
    except OSError as error:
        raise BadInput(f"{place} cannot be read: {error.strerror}", "check its permissions") from None
    outer = _sha256(raw)
    label = labelled(place, outer)
    made = functools.partial(ExportFile, path, size=state.st_size, mtime_ns=state.st_mtime_ns, raw_sha256=outer)
    if not inner:
        return [made(label=label, sha256=outer, content=_unpack(raw, label))]
    return [
        made(label=f"{label}, member {number}", sha256=_sha256(content), content=content)
        for number, content in enumerate(_members(raw, label, inner), start=1)
    ]


def _unpack(raw: bytes, label: str) -> bytes:
    try:
        if raw.startswith(_GZIP_MAGIC):
            with gzip.open(io.BytesIO(raw)) as packed:
                return _bounded(packed, label)
        if raw.startswith(_ZIP_MAGIC):
            return _only_member(raw, label)
    except _BROKEN:
        raise BadInput(f"{label} is cut off: it does not unpack", _AGAIN) from None
    return raw


def _only_member(raw: bytes, label: str) -> bytes:
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        if len(names) != 1:
            raise BadInput(
                f"{label} is a zip with {len(names)} files",
                "unpack it into the export folder; spreadsheets: save as CSV",
            )
        with archive.open(names[0]) as packed:
            return _bounded(packed, label)


def _members(raw: bytes, label: str, pattern: str) -> list[bytes]:
    """Return what the archive's matching members hold, in name order, folders inside it aside."""
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            names = sorted(name for name in archive.namelist() if fnmatch(name.rsplit("/", 1)[-1], pattern))
            return [_bounded(archive.open(name), label) for name in names]
    except _BROKEN:
        raise BadInput(f"{label} is cut off: it does not unpack", _AGAIN) from None


def _bounded(packed: IO[bytes] | gzip.GzipFile, label: str) -> bytes:
    """Return the unpacked bytes; refuse what would not fit: a small archive can unpack to any size."""
    content = packed.read(MAX_UNPACKED_BYTES + 1)
    if len(content) > MAX_UNPACKED_BYTES:
        raise BadInput(
            f"{label} unpacks to more than {MAX_UNPACKED_BYTES >> 20} MiB", "unpack it and split it by person"
        )
    return content


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
