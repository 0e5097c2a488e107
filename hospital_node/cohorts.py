"""The two cohorts of a node: a person is in training or held out for ever, by a keyed hash of the pseudonym."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from hospital_node.folder import NodeFolder
from hospital_node.split import heldout
from hospital_node.store import Store

if TYPE_CHECKING:
    from pipeline.windows import Windows

# Arrow's way back to pandas parses column names with `ast`, where CPython 3.11 can fail when two threads do it at once;
# in the embedded federation every node is a thread.
_READING = threading.Lock()


def training_windows(node: NodeFolder, history_minutes: int) -> Windows:
    """Windows of every training patient in the store; interpolated readings are left out."""
    return _windows(node, history_minutes, held_out=False)


def held_out_windows(node: NodeFolder, history_minutes: int) -> Windows:
    """Windows of every held-out patient in the store; interpolated readings are left out."""
    return _windows(node, history_minutes, held_out=True)


def _windows(node: NodeFolder, history_minutes: int, *, held_out: bool) -> Windows:
    from pipeline.windows import WindowSpec, cut_windows

    with _READING:
        series = Store(node.store).series()
    key, fraction = node.pseudonym_key, node.settings.heldout_fraction
    chosen = [patient for patient in series.patients if heldout(patient, key, fraction) == held_out]
    return cut_windows(series.select(chosen), WindowSpec(history_minutes=history_minutes))
