"""The aggregator's folder: its key, its ledger, its state, and one settings file. Nothing else configures a server.

Layout:

    aggregator.toml          AggregatorSettings
    keys/aggregator.ed25519  signing key of the ledger (mode 0600)
    ledger.db                the credit ledger
    state/                   checkpoints (aggregator.state)
    released/                released models (aggregator.release)
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, ValidationError

from aggregator.ledger import Ledger
from data_schemas.errors import BadInput
from data_schemas.frozen import Frozen
from data_schemas.plan import TrainingPlan
from pipeline.plans import load_calibrated
from pipeline.signing import PrivateKey, write_durably

SETTINGS_FILE, KEY_FILE = "aggregator.toml", "keys/aggregator.ed25519"


class AggregatorSettings(Frozen):
    """How the rounds of one federation are run.

    plan: JSON of a calibrated plan; initial_weights: an .npz with the start model (empty: the public warm start). Both
    relative to the folder. min_updates admitted updates close a round; a round is
    tried at most max_attempts times, retry_pause_s apart. port: where the SuperLink listens on the loopback address;
    the joining desk has the next one. fleet_address and desk_address: HOST:PORT where hospitals reach the two.
    mlflow_database: a PostgreSQL URL without a password (libpq finds it in PGPASSFILE); empty: SQLite in mlruns/.
    """

    federation: str = Field(min_length=1, max_length=200, pattern=r"^[^\s+]+$")
    plan: str = "plan.json"
    initial_weights: str = ""
    min_updates: int = Field(default=2, ge=1)
    max_attempts: int = Field(default=3, ge=1, le=100)
    retry_pause_s: float = Field(default=5.0, ge=0)
    hello_timeout_s: float = Field(default=60.0, gt=0)
    round_timeout_s: float = Field(default=600.0, gt=0)
    score_timeout_s: float = Field(default=600.0, gt=0)
    cosign_timeout_s: float = Field(default=60.0, gt=0)
    port: int = Field(default=8000, ge=1024, le=65_534)
    fleet_address: str = Field(default="127.0.0.1:8000", pattern=r"^.+:[0-9]+$")
    desk_address: str = Field(default="127.0.0.1:8001", pattern=r"^.+:[0-9]+$")
    mlflow_database: str = Field(default="", pattern=r"^(postgresql\+psycopg://[^:@/]+@[^@]+)?$")


@dataclass(frozen=True)
class AggregatorFolder:
    """An aggregator folder that exists and whose settings are valid."""

    path: Path
    settings: AggregatorSettings

    @property
    def state(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "state"

    @property
    def released(self) -> Path:
        """Folder of the released models."""
        return self.path / "released"

    @property
    def plan_path(self) -> Path:
        """File of the plan."""
        return self.path / self.settings.plan

    def key(self) -> PrivateKey:
        """Load the signing key. Raises BadInput when it is missing or readable by others."""
        return PrivateKey.load(self.path / KEY_FILE)

    def open_ledger(self) -> Ledger:
        """Open the ledger to append, creating it at first use; its origin is the federation's name."""
        return Ledger(self.path / "ledger.db", self.key(), self.settings.federation)

    def load_plan(self) -> TrainingPlan:
        """Read the calibrated plan. Raises BadInput naming what is wrong."""
        return load_calibrated(self.plan_path)


def create(path: Path, settings: AggregatorSettings, seed: int | None = None) -> AggregatorFolder:
    """Make an aggregator folder with a new key (derived from `seed` for the demo and tests: then it is no secret).

    Settings are written last, so an interrupted creation can be repeated. Raises BadInput when the folder is in use.
    """
    if (path / SETTINGS_FILE).exists():
        raise BadInput(f"{path} already is an aggregator folder", "use it as it is, or give another path")
    (path / "keys").mkdir(parents=True, exist_ok=True, mode=0o700)
    if not (path / KEY_FILE).exists():
        key = PrivateKey.generate() if seed is None else PrivateKey.from_seed(_seeded(settings.federation, seed))
        key.save(path / KEY_FILE)
    write_durably(path / SETTINGS_FILE, _toml(settings))
    return open_folder(path)


def open_folder(path: Path) -> AggregatorFolder:
    """Read a folder's settings. Raises BadInput naming the key that is wrong."""
    try:
        raw = tomllib.loads((path / SETTINGS_FILE).read_text(encoding="utf-8"))
        return AggregatorFolder(path=path, settings=AggregatorSettings.model_validate(raw))
    except OSError as error:
        raise BadInput(f"{path} is no aggregator folder", "make one with `islet aggregator init`") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"{SETTINGS_FILE} is not TOML: {error}", "mend the line it names") from error
    except ValidationError as error:
        raise BadInput(f"{SETTINGS_FILE} has wrong values at: {_places(error)}", "correct these settings") from error


def _toml(settings: AggregatorSettings) -> bytes:
    """Every value is a string or a number, and JSON spells those as TOML does."""
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.model_dump().items()).encode()


def _places(error: ValidationError) -> str:
    return ", ".join(".".join(map(str, detail["loc"])) for detail in error.errors())


def _seeded(federation: str, seed: int) -> bytes:
    return hashlib.sha256(f"islet aggregator key\n{federation}\n{seed}".encode()).digest()
