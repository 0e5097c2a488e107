"""Layouts: how one source's export looks, declared in TOML.

The reader in the hospital node is generic; layouts differ.

A layout never guesses. Where a file leaves a choice open (date order, unit, zone) the layout or the node's
settings declare it, and an export that contradicts the declaration is refused.
"""

from __future__ import annotations

import re
import tomllib
from datetime import date
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from data_schemas.errors import BadInput
from data_schemas.frozen import Frozen

LAYOUTS = Path(__file__).parent / "layouts"
ChannelName = Literal["carbs_g", "bolus_u", "basal_u_per_h", "heart_rate"]
Unit = Literal["mg/dL", "mmol/L"]


class Identity(Frozen):
    """Where the source says whose readings these are: in the file's name, or in a column.

    file_pattern: regular expression with a group `patient`, searched in the name of every file, channel files
    included.
    columns: names under which a column with the identity may go.
    """

    file_pattern: str | None = None
    columns: tuple[str, ...] = ()

    @field_validator("file_pattern")
    @classmethod
    def _has_patient_group(cls, value: str | None) -> str | None:
        if value is not None and "patient" not in re.compile(value).groupindex:
            raise ValueError("file_pattern needs a group (?P<patient>...)")
        return value

    @model_validator(mode="after")
    def _exactly_one(self) -> Identity:
        if (self.file_pattern is None) == (not self.columns):
            raise ValueError("give either file_pattern or columns")
        return self


class Times(Frozen):
    """The time column, as strptime formats; local wall clock unless a format ends in %z.

    order = "declared": a stamp is read by the first format that fits. order = "auto": exactly one of the formats
    must fit every stamp of the export (a day above 12 decides between DD/MM and MM/DD); when several fit and
    disagree, the import is refused.
    clock_only: the stamps have no date; a new day begins whenever the clock goes back, and the first day is
    origin_date.
    """

    columns: tuple[str, ...] = Field(min_length=1)
    formats: tuple[str, ...] = Field(min_length=1)
    order: Literal["declared", "auto"] = "declared"
    clock_only: bool = False
    origin_date: date | None = None

    @model_validator(mode="after")
    def _clock_needs_origin(self) -> Times:
        if self.clock_only != (self.origin_date is not None):
            raise ValueError("clock_only and origin_date go together")
        return self


class GlucoseColumn(Frozen):
    """The glucose column. unit = "header": each name in `header_units` says which unit the column holds."""

    columns: tuple[str, ...] = Field(min_length=1)
    unit: Literal["mg/dL", "mmol/L", "header"]
    header_units: dict[str, Unit] = Field(default_factory=dict)
    low_words: tuple[str, ...] = ("Low", "LO")
    high_words: tuple[str, ...] = ("High", "HI")

    @model_validator(mode="after")
    def _header_names_units(self) -> GlucoseColumn:
        if self.unit == "header" and set(self.columns) != set(self.header_units):
            raise ValueError("unit = 'header' needs one header_units entry for each of the columns")
        return self


class Channel(Frozen):
    """An optional quantity beside glucose, in the glucose file or, when `files` is given, in files of its own.

    Events of separate files go to the first reading at or after them, never to an earlier one: at the time of that
    reading they were already known. Doses (carbs_g, bolus_u) of one reading add up; rates take the last value.
    factor: what one unit of the column is in the channel's unit.  only: column -> the value a row must have to
    count.
    """

    name: ChannelName
    columns: tuple[str, ...] = Field(min_length=1)
    factor: float = Field(default=1.0, gt=0)
    files: str | None = None
    time_columns: tuple[str, ...] = ()
    only: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _separate_files_have_times(self) -> Channel:
        if (self.files is None) != (not self.time_columns):
            raise ValueError("files and time_columns go together")
        return self


class Interpolation(Frozen):
    """The source's authors filled a grid; tells which rows the sensor itself made.

    A row is the sensor's own when its value is a whole number, it lies on a multiple of sensor_minutes past the
    hour, and it is not inside a straight line that lasts straight_minutes or more (a filled gap). A file in which
    at least dense_share of the rows between those multiples are whole numbers comes from a sensor as fine as the
    grid: there the position does not count.
    """

    sensor_minutes: int = Field(gt=0, le=60)
    straight_minutes: int = Field(gt=0)
    dense_share: float = Field(default=0.6, gt=0, le=1)


class Layout(Frozen):
    """How one source's export looks. zone: IANA name used when the node's settings give none."""

    name: str
    title: str
    glucose_files: str
    delimiter: str = Field(default=",", min_length=1, max_length=1)
    encoding: str = "utf-8-sig"
    zone: str | None = None
    identity: Identity
    time: Times
    glucose: GlucoseColumn
    channels: tuple[Channel, ...] = ()
    interpolation: Interpolation | None = None


def known_layouts() -> tuple[str, ...]:
    """Return names of the layouts that come with Islet, sorted."""
    return tuple(sorted(path.stem for path in LAYOUTS.glob("*.toml")))


def load_layout(name_or_path: str | Path) -> Layout:
    """Return the layout of that name, or the one in that TOML file.

    Raises BadInput with what is wrong and what is known.
    """
    text = str(name_or_path)
    path = Path(text) if text.endswith(".toml") else LAYOUTS / f"{text}.toml"
    if not text.endswith(".toml") and text not in known_layouts():
        raise BadInput(
            f"unknown layout {text!r}",
            f"use one of {', '.join(known_layouts())}, or the path of a layout file that ends in .toml",
        )
    try:
        return Layout.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise BadInput(f"layout file {path} cannot be read: {error.strerror}", "check the path") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"layout file {path} is not TOML: {error}", "see docs/layouts.md") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BadInput(f"layout file {path}: {where}: {first['msg']}", "see docs/layouts.md") from None
