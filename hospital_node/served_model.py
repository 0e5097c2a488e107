"""The model that requests share, and its quiet replacement by a newer one while requests go on.

The model folder is watched through its manifest: another inode, time or size is another model. It is verified and
loaded beside the one that answers, then takes its place in one assignment; a request keeps the model it began with.
A folder that does not verify, or that nobody decided to serve, changes nothing: the old model goes on and the refusal
is counted.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from data_schemas.errors import CheckFailed, IsletError
from data_schemas.forecast import NoForecast
from hospital_node.problems import Declined
from pipeline.export import MANIFEST, LoadedModel, load_model

LOOK_AGAIN_SECONDS = 1.0
_Version = tuple[int, int, int]


class ServedModel:
    """The model in one folder, read as soon as it is there and again when it is replaced. Safe between threads."""

    def __init__(
        self,
        folder: Path,
        tick: Callable[[], float] = time.monotonic,
        decided: Callable[[str], bool] = lambda _model_hash: True,
    ) -> None:
        """Watch a folder. decided: whether a model of this hash may be served; asked before each model takes over."""
        self._folder, self._tick, self._decided = folder, tick, decided
        self._lock = threading.Lock()
        self._model: LoadedModel | None = None
        self._version: _Version | None = None
        self._refused_version: _Version | None = None
        self._looked = -LOOK_AGAIN_SECONDS
        self._loading: threading.Thread | None = None
        self.refused = 0

    def find(self) -> LoadedModel | None:
        """Return the model, or None while there is none. Raises BadInput or CheckFailed for a wrong first folder.

        Looks at the folder once a second; a newer model is loaded in a thread of its own and nobody waits for it.
        """
        if self._model is None:
            return self._first()
        now = self._tick()
        if now - self._looked >= LOOK_AGAIN_SECONDS:
            self._looked = now
            if self._newer() is not None and (self._loading is None or not self._loading.is_alive()):
                self._loading = threading.Thread(target=self.replace, name="model-switch", daemon=True)
                self._loading.start()
        return self._model

    def model(self) -> LoadedModel:
        """Return the model or decline."""
        if model := self.find():
            return model
        raise Declined(NoForecast.NO_MODEL)

    def replace(self) -> bool:
        """Load a newer model now, if there is one; whether it took over."""
        with self._lock:
            version = self._newer()
            if version is None:
                return False
            try:
                self._model = self._load()
            except IsletError:
                self.refused += 1
                self._refused_version = version
                return False
            self._version = version
            return True

    def _first(self) -> LoadedModel | None:
        with self._lock:
            if self._model is None and self._folder.exists():
                version = _version(self._folder)
                self._model, self._version = self._load(), version
            return self._model

    def _load(self) -> LoadedModel:
        """Return the folder's model, verified and decided. Raises BadInput, Tampered, CheckFailed."""
        model = load_model(self._folder.resolve())
        if not self._decided(model.model_hash):
            raise CheckFailed(
                f"the members have not decided to serve the model {model.model_hash[:12]}",
                "propose it: `islet federation propose`, action promote",
            )
        return model

    def _newer(self) -> _Version | None:
        version = _version(self._folder)
        return None if version in (None, self._version, self._refused_version) else version


def _version(folder: Path) -> _Version | None:
    """Identity of the manifest: a model folder is written whole, so its manifest is as new as the folder."""
    try:
        status = (folder / MANIFEST).stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size
