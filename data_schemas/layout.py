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
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from data_schemas.errors import BadInput
from data_schemas.frozen import Frozen

LAYOUTS = Path(__file__).parent / "layouts"
ChannelName = Literal["carbs_g", "bolus_u", "basal_u_per_h", "heart_rate"]
Unit = Literal["mg/dL", "mmol/L"]
Reader = Literal["delimited", "json", "xml", "fhir"]
# Which rows count: column -> the value, or one of the values, that a row must have there.
Only = dict[str, str | tuple[str, ...]]


class Identity(Frozen):
    """Where the source says whose readings these are; the first of these that is declared and found counts.

    columns: names under which a column with the identity may go; stands alone.
    text_patterns: regular expressions with a group `patient`, searched in the first lines of the file (a preamble,
    or rows that hold a name); what they find is put together.
    file_pattern: the same, searched in the name of every file, channel files included.
    """

    columns: tuple[str, ...] = ()
    text_patterns: tuple[str, ...] = ()
    file_pattern: str | None = None

    @field_validator("file_pattern", "text_patterns")
    @classmethod
    def _has_patient_group(cls, value: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        for pattern in (value,) if isinstance(value, str) else value or ():
            if "patient" not in _compiled(pattern).groupindex:
                raise ValueError("the pattern needs a group (?P<patient>...)")
        return value

    @model_validator(mode="after")
    def _columns_or_patterns(self) -> Identity:
        if bool(self.columns) == bool(self.text_patterns or self.file_pattern is not None):
            raise ValueError("give columns, or text_patterns and file_pattern, one of them at least")
        return self


class Times(Frozen):
    """The time column, as strptime formats; local wall clock unless a format ends in %z.

    columns: the first that the header has. joined: all of them, put together with a space (a date and a time).
    formats: strptime, or "epoch_ms" and "epoch_s" for milliseconds and seconds since 1970 UTC.
    order = "declared": a stamp is read by the first format that fits. order = "auto": exactly one of the formats
    must fit every stamp of the export, or of each file (a day above 12 decides between DD/MM and MM/DD); when
    several fit and disagree, the import is refused. order = "file": of each file alone.
    clock_only: the stamps have no date; a new day begins whenever the clock goes back, and the first day is
    origin_date.
    counter: a column with seconds that a clock change does not touch, counted by the device in counter_of: settles
    the hour that the end of summer time repeats.
    """

    columns: tuple[str, ...] = Field(min_length=1)
    joined: bool = False
    formats: tuple[str, ...] = Field(min_length=1)
    order: Literal["declared", "auto", "file"] = "declared"
    clock_only: bool = False
    origin_date: date | None = None
    counter: str | None = None
    counter_of: str | None = None

    @model_validator(mode="after")
    def _clock_needs_origin(self) -> Times:
        if self.clock_only != (self.origin_date is not None):
            raise ValueError("clock_only and origin_date go together")
        if (self.counter is None) != (self.counter_of is None):
            raise ValueError("counter and counter_of go together")
        return self


class GlucoseColumn(Frozen):
    """The glucose column.

    columns: the first that the header has. combine: all that the header has; a row's value is the first that is
    filled. unit = "header": each name in `header_units` says which unit the column holds; "column": every row says it
    in `unit_column`. only: the rows that are glucose readings; the others may still carry channels. filled: of those,
    the ones whose value is not empty, for sources that write all sorts of events into one table.
    """

    columns: tuple[str, ...] = Field(min_length=1)
    combine: bool = False
    unit: Literal["mg/dL", "mmol/L", "header", "column"]
    header_units: dict[str, Unit] = Field(default_factory=dict)
    unit_column: str | None = None
    only: Only = Field(default_factory=dict)
    filled: bool = False
    low_words: tuple[str, ...] = ("Low", "LO", "Bajo", "Niedrig", "Bas", "Basso", "Baixo", "Laag")
    high_words: tuple[str, ...] = ("High", "HI", "Alto", "Hoch", "Haut", "Elevato", "Hoog")

    @model_validator(mode="after")
    def _units_are_told(self) -> GlucoseColumn:
        if self.unit == "header" and set(self.columns) != set(self.header_units):
            raise ValueError("unit = 'header' needs one header_units entry for each of the columns")
        if (self.unit == "column") != (self.unit_column is not None):
            raise ValueError("unit = 'column' and unit_column go together")
        return self


class Channel(Frozen):
    """An optional quantity beside glucose: in glucose rows, in rows of their own, or in `files` of their own.

    What stands in rows or files of its own goes to the first reading at or after it, never to an earlier one: at the
    time of that reading it was already known. Doses (carbs_g, bolus_u) of one reading add up, those of several blocks
    with one name too; rates take the last value.
    factor: what one unit of the column is in the channel's unit.  only: the rows that count.
    pattern: a regular expression with a group `value`, for a quantity inside a text.
    distinct: the source writes a dose twice; the same value of a person at the same second counts once.
    """

    name: ChannelName
    columns: tuple[str, ...] = Field(min_length=1)
    factor: float = Field(default=1.0, gt=0)
    files: str | None = None
    time_columns: tuple[str, ...] = ()
    only: Only = Field(default_factory=dict)
    pattern: str | None = None
    distinct: bool = False

    @field_validator("pattern")
    @classmethod
    def _has_value_group(cls, value: str | None) -> str | None:
        if value is not None and "value" not in _compiled(value).groupindex:
            raise ValueError("the pattern needs a group (?P<value>...)")
        return value

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
    """How one source's export looks. zone: IANA name used when the node's settings give none.

    glucose_files: glob below the export folder; `*.zip/cgm*.csv` looks into archives.
    delimiter: one character, or "auto": the one of , ; tab | under which the header is found.
    decimal: "auto" takes a comma too where the delimiter is not a comma.
    preamble: the header is the first line with a time column and a quantity, and may come again, changed.
    ragged: lines may lack fields at their end.  names: the header of files that have none.
    records: for reader = "json", keys under which the list of records may lie; columns are dotted paths.
    aliases: a column's name -> what it is called in other languages and versions.
    """

    name: str
    title: str
    glucose_files: str
    reader: Reader = "delimited"
    delimiter: str = Field(default=",", pattern=r"^(.|\t|auto)$")
    decimal: Literal[".", ",", "auto"] = "."
    encoding: str = "utf-8-sig"
    preamble: bool = False
    ragged: bool = False
    names: tuple[str, ...] = ()
    records: tuple[str, ...] = ()
    aliases: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    zone: str | None = None
    identity: Identity
    time: Times
    glucose: GlucoseColumn
    channels: tuple[Channel, ...] = ()
    interpolation: Interpolation | None = None

    @property
    def globs(self) -> tuple[str, ...]:
        """Every glob of files that the layout reads."""
        return (self.glucose_files, *(channel.files for channel in self.channels if channel.files is not None))


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
        return Layout.model_validate(_document(path))
    except OSError as error:
        raise BadInput(f"layout file {path} cannot be read: {error.strerror}", "check the path") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"layout file {path} is not TOML: {error}", "see docs/layouts.md") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BadInput(f"layout file {path}: {where}: {first['msg']}", "see docs/layouts.md") from None


def _document(path: Path) -> dict[str, Any]:
    """Return the file's keys, over those of the layout that comes with Islet and that it `extends`, if it does."""
    own = tomllib.loads(path.read_text(encoding="utf-8"))
    base = own.pop("extends", None)
    if base is None:
        return own
    if base not in known_layouts():
        raise BadInput(f"layout file {path}: extends an unknown layout", f"one of {', '.join(known_layouts())}")
    return _over(_document(LAYOUTS / f"{base}.toml"), own)


def _over(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in own.items():
        inside = base.get(key)
        merged[key] = _over(inside, value) if isinstance(inside, dict) and isinstance(value, dict) else value
    return merged


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from None
