"""The Flower bundle that comes with Islet: a pointer to installed code (pipeline/flower_bundle), and its hash."""

from __future__ import annotations

from pathlib import Path

from data_schemas.canonical import bytes_hash

BUNDLE = Path(__file__).with_name("flower_bundle")


def bundle_hash() -> str:
    """SHA-256 of the bundle as Flower builds it from these files: the same wherever the same Islet is installed."""
    from flwr.cli.build import build_fab_from_disk

    return bytes_hash(build_fab_from_disk(BUNDLE))
