"""The two cohorts of a node: a person is in training or held out for ever, by a keyed hash of the pseudonym.

The windows of the last stores are kept for as long as the process lives: every message of a round asks for them, and
reading, checking and cutting cost more than a round's arithmetic. An import changes the store's state and thus the key.
They are views of arrays that lie in files, so a store of any size is trained on in the memory of a batch.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from hospital_node.folder import NodeFolder
from hospital_node.scratch import scratch
from hospital_node.split import heldout
from hospital_node.store import Store

if TYPE_CHECKING:
    from pipeline.windows import Windows

# More nodes in one process than this read their stores again for every message.
_NODES_REMEMBERED = 12


def training_windows(node: NodeFolder, history_minutes: int) -> Windows:
    """Windows of every training patient in the store; interpolated readings are left out."""
    return _of(node, history_minutes)[0]


def held_out_windows(node: NodeFolder, history_minutes: int) -> Windows:
    """Windows of every held-out patient in the store; interpolated readings are left out."""
    return _of(node, history_minutes)[1]


def _of(node: NodeFolder, history_minutes: int) -> tuple[Windows, Windows]:
    state = Store(node.store).state()
    fraction = node.settings.heldout_fraction
    return _cut(node.store.resolve(), state, node.pseudonym_key, fraction, history_minutes)


@lru_cache(maxsize=_NODES_REMEMBERED)
def _cut(
    store: Path, _state: tuple[str, ...], key: bytes, fraction: float, history_minutes: int
) -> tuple[Windows, Windows]:
    """Training and held-out windows of one state of a store."""
    from pipeline.windows import WindowSpec, cut_windows

    held, spec, allocate = Store(store), WindowSpec(history_minutes=history_minutes), scratch(store)
    people = held.patients()
    aside = {patient for patient in people if heldout(patient, key, fraction)}
    parts = (frozenset(people) - aside, aside)
    training, held_out = (cut_windows(held.series(part), spec, allocate=allocate) for part in parts)
    return training, held_out
