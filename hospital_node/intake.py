"""Intake: the files of one export become one table of canonical readings, or a refusal that changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import pandas as pd

from data_schemas.errors import BadInput
from data_schemas.layout import Interpolation, Layout
from data_schemas.reading import COLUMNS, Flag, Readings
from data_schemas.units import MG_DL_PER_MMOL_L, SENSOR_MAX_MG_DL, SENSOR_MIN_MG_DL
from hospital_node.crew import Run, in_turn
from hospital_node.events import Elsewhere, add_channels
from hospital_node.export_files import find_files
from hospital_node.parts import Share, split
from hospital_node.rows import Raw, number, pseudonym, pseudonyms, read_raw, repeated, stamps_of
from hospital_node.stamps import Stamps, zone_of

__all__ = ["KEY_BYTES", "Part", "pseudonym", "read_exports", "read_parts"]

Bool: TypeAlias = npt.NDArray[np.bool_]
Int: TypeAlias = npt.NDArray[np.int64]

KEY_BYTES = 32
# The median of anybody's day lies far above 35 mg/dL and far below 35 mmol/L.
_UNIT_BORDER = 35.0


Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Part:
    """Everything of some of the people of an import.

    rows_by_file: rows in, by the file's SHA-256.  labels: what errors and reports call the files.
    """

    readings: Readings
    rows_by_file: Mapping[str, int]
    labels: Mapping[str, str]


def _as_it_is(part: Any) -> Any:
    return part


def read_exports(
    folder: Path, layout: Layout, zone: str | None, pseudonym_key: bytes, only: Container[Path] | None = None
) -> Readings:
    """Return every reading of the export in `folder`, in canonical columns (COLUMNS), in file and line order.

    As read_parts, in one part: what is read must fit the memory.
    """
    elsewhere = _checked(folder, layout, zone, pseudonym_key)
    paths = tuple(path for path in find_files(folder, layout.glucose_files) if only is None or path in only)
    return _read(Share(paths), elsewhere).readings


def read_parts(
    folder: Path,
    layout: Layout,
    zone: str | None,
    pseudonym_key: bytes,
    only: Container[Path] | None = None,
    *,
    run: Run = in_turn,
    then: Callable[[Part], Result] = _as_it_is,
) -> Iterator[Result]:
    """Yield what `then` makes of each part of the export in `folder`: bounded in size, with people of its own.

    zone: IANA name from the node's settings; None takes the layout's. pseudonym_key: 32 secret bytes of this node.
    only: read these glucose files alone. run: where the work is done. Values that do not parse stay as rows without a
    value (Flag.UNREADABLE) or without a time; validation quarantines them. Raises BadInput for a missing column, an
    empty or truncated file, an ambiguous or contradicted date order or unit, an unknown zone, and a file that changed
    meanwhile.
    """
    elsewhere = _checked(folder, layout, zone, pseudonym_key)
    parts = split(folder, layout, only, run)
    yield from run(_ReadThen(replace(elsewhere, layout=parts.layout(layout)), then), parts.shares)
    parts.refuse_if_changed()


@dataclass(frozen=True, slots=True)
class _ReadThen(Generic[Result]):
    """Reads a part and makes something of it. What both learn stays for the parts that follow."""

    elsewhere: Elsewhere
    then: Callable[[Part], Result]

    def __call__(self, share: Share) -> Result:
        return self.then(_read(share, self.elsewhere))


def _checked(folder: Path, layout: Layout, zone: str | None, pseudonym_key: bytes) -> Elsewhere:
    if len(pseudonym_key) < KEY_BYTES:
        raise BadInput("the pseudonym key is too short", f"give {KEY_BYTES} random bytes, kept at this node for ever")
    zone_name = zone or layout.zone
    if zone_name is not None:
        zone_of(zone_name)
    return Elsewhere(folder, layout, zone_name, pseudonym_key)


def _read(share: Share, elsewhere: Elsewhere) -> Part:
    """Return what the files of a share hold."""
    layout, zone_name = elsewhere.layout, elsewhere.zone
    files = share.read(elsewhere.folder, layout)
    beside = tuple(channel for channel in layout.channels if channel.files is None)
    everything = read_raw(files, layout, beside, layout.time.columns, glucose=True)
    rows = everything.table["reading"].to_numpy(dtype=np.bool_)
    raw = everything.where(rows)
    stamps = stamps_of(raw, layout, zone_name)
    glucose, flags = _glucose(raw, layout)
    if layout.interpolation is not None:
        made = _interpolated(raw.table["glucose"], stamps.local, raw.file, layout.interpolation)
        flags = flags | np.where(made, int(Flag.INTERPOLATED), 0)
    flags = flags | np.where(stamps.clock_change, int(Flag.CLOCK_CHANGE), 0)
    frame = _frame(raw, stamps, glucose, flags, zone_name or "UTC")
    frame["patient"] = pseudonyms(raw, layout, elsewhere.key)
    add_channels(frame, raw, everything.where(~rows), elsewhere)
    share.refuse_if_changed(files)
    frame["row"] += share.first_row
    counts = np.bincount(raw.file, minlength=len(files)).tolist()
    rows_by_file: dict[str, int] = {}
    for file, count in zip(files, counts, strict=True):
        rows_by_file[file.sha256] = rows_by_file.get(file.sha256, 0) + count
    return Part(
        Readings(frame[list(COLUMNS)].astype(COLUMNS), len(frame)),
        rows_by_file,
        {file.sha256: file.label for file in reversed(files)},
    )


def _glucose(raw: Raw, layout: Layout) -> tuple[npt.NDArray[np.float64], Int]:
    """mg/dL (nan: none) and flags of every row. Raises BadInput when a file's values contradict its unit."""
    column = layout.glucose
    unit_code, units = pd.factorize(raw.table["unit"])
    unit = pd.Series(units, dtype="str").str.strip().str.casefold()
    mmol = np.append(unit.isin(["mmol/l", "mmol"]), False)[unit_code].astype(np.bool_)
    mg_dl = np.append(unit.isin(["mg/dl"]), False)[unit_code].astype(np.bool_)
    code, words = pd.factorize(raw.table["glucose"])
    text = pd.Series(words, dtype="str").str.strip()
    value = np.append(number(text, layout), np.nan)[code]
    unknown = ~(mmol | mg_dl) & ~np.isnan(value)
    if unknown.any():
        raise BadInput(
            f"{raw.labels[raw.file[int(np.argmax(unknown))]]} has readings without a unit, or in one that is not known",
            "Islet reads mg/dL and mmol/L; set the unit in the layout if the export does not tell it",
        )
    _refuse_wrong_unit(value, mmol, raw)
    value = np.where(mmol, value * MG_DL_PER_MMOL_L, value)
    folded = text.str.casefold()
    low = np.append(folded.isin([word.casefold() for word in column.low_words]), False)[code].astype(np.bool_)
    high = np.append(folded.isin([word.casefold() for word in column.high_words]), False)[code].astype(np.bool_)
    value = np.select([low, high], [SENSOR_MIN_MG_DL, SENSOR_MAX_MG_DL], value)
    unreadable = np.isnan(value) & (code >= 0)
    flags = np.select([low, high, unreadable], [Flag.CENSORED_LOW, Flag.CENSORED_HIGH, Flag.UNREADABLE], 0)
    return value, flags.astype(np.int64)


def _refuse_wrong_unit(value: npt.NDArray[np.float64], mmol: Bool, raw: Raw) -> None:
    """A warm-up is written as 0 by some sources: only what is above 0 tells the unit."""
    for declared, unit, other in ((~mmol, "mg/dL", "mmol/L"), (mmol, "mmol/L", "mg/dL")):
        rows = declared & (value > 0)
        median = pd.Series(value[rows]).groupby(raw.file[rows]).median()
        wrong = median < _UNIT_BORDER if unit == "mg/dL" else median > _UNIT_BORDER
        if wrong.any():
            raise BadInput(
                f"{raw.labels[wrong.index[wrong.to_numpy()][0]]}: declared as {unit}, but its values look like {other}",
                f"set the unit in the layout to {other}, or check the export's own unit setting",
            )


def _interpolated(text: pd.Series, local: pd.Series, file: Int, rule: Interpolation) -> Bool:
    """Return which rows the source's authors made (see data_schemas.layout.Interpolation)."""
    value = pd.to_numeric(text, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    second = local.to_numpy().astype("datetime64[s]").astype(np.int64)
    whole = np.abs(value - np.round(value)) < 1e-6
    between = second % (rule.sensor_minutes * 60) != 0
    dense = pd.Series(whole & between).groupby(file).sum() > rule.dense_share * pd.Series(between).groupby(file).sum()
    own = whole & (~between | dense.to_numpy()[file])
    return np.asarray(~own | _filled_line(value, second, file, rule.straight_minutes * 60), dtype=np.bool_)


def _filled_line(value: npt.NDArray[np.float64], second: Int, file: Int, shortest_s: int) -> Bool:
    """Return the rows strictly inside an exact straight line over evenly spaced rows that lasts shortest_s or more.

    A line at an end of the sensor's range is not a filled gap: there a sensor repeats itself.
    """
    step = np.diff(second)
    straight = np.zeros(len(value), dtype=np.bool_)
    even = (step[1:] == step[:-1]) & (file[2:] == file[:-2])
    straight[1:-1] = even & (np.abs(value[2:] - 2 * value[1:-1] + value[:-2]) < 1e-6)
    straight &= (value > SENSOR_MIN_MG_DL) & (value < SENSOR_MAX_MG_DL)
    run = np.cumsum(~straight)
    rows_inside = np.bincount(run[straight], minlength=len(value) + 1)[run]
    step_s = np.append(step, 0)
    return np.asarray(straight & ((rows_inside + 1) * step_s >= shortest_s), dtype=np.bool_)


def _frame(raw: Raw, stamps: Stamps, glucose: npt.NDArray[np.float64], flags: Int, zone: str) -> pd.DataFrame:
    frame = pd.DataFrame(
        {
            "row": np.arange(len(raw.table), dtype=np.int64),
            "measured_at": stamps.measured_at,
            "zone": repeated([zone], np.zeros(len(raw.table), dtype=np.int64)),
            "glucose_mg_dl": glucose,
            "flags": flags,
            "source": repeated([file.sha256 for file in raw.files], raw.file),
        }
    )
    for name in ("carbs_g", "bolus_u", "basal_u_per_h", "heart_rate"):
        frame[name] = np.nan
    return frame
