"""What a hospital decides for its node: its name, its exports, and privacy ceilings that nobody else can raise.

Read from node.toml, then from ISLET_NODE_* environment variables, which win. Parsed once into a frozen value.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any
from zoneinfo import ZoneInfo, available_timezones

from pydantic import AfterValidator, Field, ValidationError

from data_schemas.errors import BadInput, StorageFailed
from data_schemas.frozen import Frozen
from pipeline.signing import write_durably

ENVIRONMENT_PREFIX = "ISLET_NODE_"
# Says where the node folder is; it is read by the message boundary, not a setting.
_NOT_SETTINGS = frozenset({"ISLET_NODE_HOME"})


def _known_zone(name: str | None) -> str | None:
    if name is not None and name not in available_timezones():
        raise ValueError("not an IANA time zone")
    return name


class Source(Frozen):
    """One export: its path, the layout it is written in, and the IANA zone of its times if they carry none."""

    path: str = Field(min_length=1)
    layout: str = Field(min_length=1)
    zone: Annotated[str | None, AfterValidator(_known_zone)] = None

    @property
    def tz(self) -> ZoneInfo | None:
        """The zone object, or None when the layout's times carry their own."""
        return None if self.zone is None else ZoneInfo(self.zone)


class NodeSettings(Frozen):
    """A node's settings.

    declared_training_patients and declared_heldout_patients are numbers the hospital chooses and publishes. They are
    constants to the privacy mechanism: neither is computed from the store, so neither says who is in it.
    max_epsilon_training and max_epsilon_heldout bound what one patient of that cohort may spend over ALL runs, at
    delta data_schemas.units.DELTA.
    fleet_address (HOST:PORT) and approved_bundle (SHA-256) come with the invitation: where the node connects, and the
    one Flower bundle that it answers to.
    seed makes keys and noise repeatable. It is for tests and for the demo on public data: whoever knows it can
    subtract the noise.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")
    federation: str = Field(min_length=1, max_length=200)
    aggregator_public_key: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    sources: tuple[Source, ...] = ()
    declared_training_patients: int = Field(ge=1)
    declared_heldout_patients: int = Field(ge=0)
    heldout_fraction: float = Field(default=0.2, ge=0, lt=1)
    min_patients: int = Field(default=5, ge=1)
    max_epsilon_training: float = Field(default=8.0, gt=0)
    max_epsilon_heldout: float = Field(default=8.0, gt=0)
    fleet_address: str | None = Field(default=None, pattern=r"^.+:[0-9]+$")
    approved_bundle: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    seed: int | None = Field(default=None, ge=0)


def read_settings(path: Path, environment: Mapping[str, str] | None = None) -> NodeSettings:
    """Read a node.toml and the environment's overrides. Raises BadInput naming the key that is wrong."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadInput(f"{path}: there is no such settings file", "Make a node with `islet node init`.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: not valid TOML: {error}", "Correct the line it names.") from error
    except OSError as error:
        raise StorageFailed(f"{path}: cannot be read: {error.strerror}", "Check its owner and mode.") from error
    overrides = _overrides(os.environ if environment is None else environment)
    return _checked({**values, **overrides}, str(path), frozenset(overrides))


def write_settings(path: Path, settings: NodeSettings) -> None:
    """Write settings as TOML, whole or not at all, readable by the owner only. Raises StorageFailed."""
    write_durably(path, _toml(settings).encode(), mode=0o600)


def _overrides(environment: Mapping[str, str]) -> dict[str, Any]:
    """Values of ISLET_NODE_* by setting; an empty variable unsets an optional setting."""
    found: dict[str, Any] = {}
    for variable in sorted(environment):
        if variable.startswith(ENVIRONMENT_PREFIX) and variable not in _NOT_SETTINGS:
            key = variable.removeprefix(ENVIRONMENT_PREFIX).lower()
            if key not in NodeSettings.model_fields or key == "sources":
                raise BadInput(f"{variable}: there is no such node setting", f"Known: {_known_variables()}.")
            found[key] = environment[variable] or None
    return found


def _known_variables() -> str:
    keys = (key for key in NodeSettings.model_fields if key != "sources")
    return ", ".join(ENVIRONMENT_PREFIX + key.upper() for key in keys)


def _checked(values: dict[str, Any], where: str, from_environment: frozenset[str]) -> NodeSettings:
    try:
        return NodeSettings.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        top = str(first["loc"][0]) if first["loc"] else ""
        place = ENVIRONMENT_PREFIX + top.upper() if top in from_environment else f"{where}: {key}"
        what = "unknown setting" if first["type"] == "extra_forbidden" else first["msg"]
        known = ", ".join(NodeSettings.model_fields)
        raise BadInput(f"{place}: {what}", f"Known settings: {known}.") from error


def _toml(settings: NodeSettings) -> str:
    """TOML text; basic strings of TOML and JSON are the same for what JSON escapes."""
    values = settings.model_dump(mode="json", exclude={"sources"}, exclude_none=True)
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    for source in settings.sources:
        lines += ["", "[[sources]]"]
        lines += [f"{k} = {json.dumps(v)}" for k, v in source.model_dump(exclude_none=True).items()]
    return "\n".join(lines) + "\n"
