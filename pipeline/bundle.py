"""What a hospital approves: the Flower bundle, a pointer to installed code (pipeline/flower_bundle), and that code."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from data_schemas.canonical import bytes_hash, content_hash
from data_schemas.errors import BadInput

BUNDLE = Path(__file__).with_name("flower_bundle")
# What trains and scores at a node.
_ROOMS = ("data_schemas", "pipeline", "hospital_node")


def bundle_hash() -> str:
    """SHA-256 of the bundle as Flower builds it from these files: the same wherever the same Islet is installed."""
    from flwr.cli.build import build_fab_from_disk

    return bytes_hash(build_fab_from_disk(BUNDLE))


@lru_cache(maxsize=1)
def code_hash() -> str:
    """Hash of the Python files that are installed here and run at a node: the same for the same wheel."""
    root = Path(__file__).parents[1]
    found = (path for room in _ROOMS for path in (root / room).rglob("*.py"))
    return _of({path.relative_to(root).as_posix(): path.read_bytes() for path in found})


def wheel_hash(wheel: Path) -> str:
    """Return the code_hash of a node where this wheel is installed. Raises BadInput when it is no wheel of Islet."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            named = [name for name in archive.namelist() if name.endswith(".py") and name.split("/")[0] in _ROOMS]
            files = {name: archive.read(name) for name in named}
    except (OSError, zipfile.BadZipFile) as error:
        raise BadInput(f"{wheel} is no wheel", "build one: `pip wheel --no-deps .`") from error
    if not files:
        raise BadInput(f"{wheel} holds nothing that runs at a node", "give a wheel of Islet")
    return _of(files)


def _of(files: Mapping[str, bytes]) -> str:
    return content_hash({name: bytes_hash(content) for name, content in files.items()})
