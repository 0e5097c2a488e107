"""The registry's place on disk: where it lies, how its locations stay relative, what a failure is. No MLflow here."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from aggregator.registry_text import EXPERIMENT, REVIEW_VIEW, review_view
from data_schemas.errors import BadInput, IsletError
from pipeline.model_card import MODEL_NAME

STORE = Path("mlruns")
DATABASE = STORE / "mlflow.db"
ARTIFACTS = STORE / "artifacts"
_LOCATIONS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "storage_location"),
)


class RegistryFailed(IsletError):
    """MLflow could not record or return something. The run itself is unharmed."""


def relocate(root: Path) -> int:
    """Make every location in root/mlruns/mlflow.db relative to root; return how many were absolute.

    Run it on a store that other tools wrote to with absolute paths, after moving it. Raises BadInput, RegistryFailed.
    """
    database = root / DATABASE
    if not database.exists():
        raise BadInput(f"{root} holds no {DATABASE}", "give the folder that contains mlruns/")
    try:
        with closing(sqlite3.connect(database, timeout=30)) as connection, connection:
            connection.create_function("relative", 1, _relative, deterministic=True)
            statements = [
                f"UPDATE {table} SET {column} = relative({column}) WHERE {column} <> relative({column})"  # noqa: S608
                for table, column in _LOCATIONS
            ]
            return sum(connection.execute(statement).rowcount for statement in statements)
    except sqlite3.Error as error:
        raise RegistryFailed("the store's locations were not changed", "check that it is an MLflow store") from error


def review_path(root: Path) -> str:
    """Path within MLflow of the newest runs in the reviewer's view, which is put into the store if need be.

    Raises BadInput, RegistryFailed.
    """
    database = root / DATABASE
    if not database.exists():
        raise BadInput(f"{root} holds no {DATABASE}", "give the folder of a run; `islet demo` makes one")
    try:
        with closing(sqlite3.connect(database, timeout=30)) as connection, connection:
            named = "SELECT experiment_id FROM experiments WHERE name = ? AND lifecycle_stage = 'active'"
            found = connection.execute(named, (EXPERIMENT,)).fetchone()
            if found is None:
                raise BadInput(f"{database} holds no run of Islet", "finish a run first")
            put = "INSERT OR REPLACE INTO experiment_tags (key, value, experiment_id) VALUES (?, ?, ?)"
            connection.execute(put, (*review_view(), found[0]))
    except sqlite3.Error as error:
        raise RegistryFailed("the store cannot be read", "check that it is an MLflow store") from error
    return f"#/experiments/{found[0]}/runs?viewStateShareKey={REVIEW_VIEW}&workflowType=machine_learning"


def _relative(location: str | None) -> str | None:
    """mlruns/artifacts/... of a location inside a store; any other location unchanged."""
    if location is None:
        return None
    mark = f"{ARTIFACTS.as_posix()}"
    before, found, after = location.rpartition(f"/{mark}")
    return mark + after if found and (before or after.startswith("/")) else location


def parse_uri(uri: str) -> tuple[str, str, str]:
    """Name, alias and version of a models:/ URI; one of the last two is empty."""
    rest, _, alias = uri.removeprefix("models:/").partition("@")
    name, _, version = rest.partition("/")
    if not uri.startswith("models:/") or not name or bool(alias) == bool(version):
        raise BadInput(f"{uri} is not a model URI", f"write models:/{MODEL_NAME}@champion or models:/{MODEL_NAME}/3")
    return name, alias, version
