"""What an artefact is: a name, what it tries, the code that must refuse it, and how to find out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Case:
    """One hostile artefact. observe: hands it to the real code in an empty folder and returns the code it got."""

    name: str
    tries: str
    code: str
    observe: Callable[[Path], str]
