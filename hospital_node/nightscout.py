"""Nightscout's shapes (API v1): entries that uploaders send, and the device status that draws a forecast.

The status has Loop's shape, `loop.predicted`, which Nightscout draws as a dashed line. There is no enacted, suggested
or recommended field: nothing here tells anybody to do anything.
"""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from data_schemas.forecast import Forecast, NoForecast
from data_schemas.units import RESEARCH_LABEL
from hospital_node.problems import NO_FORECAST
from pipeline.forecasting import Float32, Int64

DEVICE = "islet"
MOST_ENTRIES = 1000
_LATEST_MS = 4_102_444_800_000  # the year 2100


class Entry(BaseModel):
    """One entry of an uploader. Uploaders add fields of their own, which are left alone.

    date: epoch milliseconds; sgv: mg/dL, whatever the site shows.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False, strict=True)

    type: str = Field(default="sgv", max_length=40)
    date: float = Field(gt=0, lt=_LATEST_MS)
    sgv: float | None = Field(default=None, ge=0, le=10_000)


_ENTRIES: TypeAdapter[list[Entry]] = TypeAdapter(list[Entry])


def read_entries(body: bytes) -> list[Entry]:
    """Parse one entry or a list of them. Raises pydantic.ValidationError."""
    if body.lstrip()[:1] == b"{":
        return [Entry.model_validate_json(body)]
    return _ENTRIES.validate_json(body)


def sensor_rows(entries: list[Entry]) -> list[tuple[float, float]]:
    """Epoch seconds and mg/dL of the sensor's readings; finger sticks and calibrations are not among them."""
    return [(e.date / 1000, e.sgv) for e in entries if e.type == "sgv" and e.sgv is not None]


def entry(patient: str, time_s: int, glucose_mg_dl: float) -> dict[str, Any]:
    """Return one stored reading as Nightscout tells it."""
    identity = hashlib.sha256(f"{patient} {time_s}".encode()).hexdigest()[:24]
    told = datetime.fromtimestamp(time_s, tz=UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return {
        "_id": identity,
        "type": "sgv",
        "sgv": round(glucose_mg_dl),
        "date": time_s * 1000,
        "dateString": told,
        "sysTime": told,
        "utcOffset": 0,
        "device": DEVICE,
    }


def newest_entries(patient: str, time_s: Int64, glucose_mg_dl: Float32, count: int) -> list[dict[str, Any]]:
    """The newest readings, newest first."""
    pairs = list(zip(time_s.tolist(), glucose_mg_dl.tolist(), strict=True))[-count:]
    return [entry(patient, at, value) for at, value in reversed(pairs)]


def status_document(version: str, now_s: float) -> dict[str, Any]:
    """What an uploader asks before it sends."""
    return {
        "status": "ok",
        "name": DEVICE,
        "version": version,
        "serverTime": _iso(now_s),
        "apiEnabled": True,
        "careportalEnabled": False,
        "settings": {"units": "mg/dl"},
    }


def device_status(made: Forecast | NoForecast, last_mg_dl: float | None, now_s: float) -> list[dict[str, Any]]:
    """Device status with the forecast's medians every 5 minutes from the newest reading on, or why there is none."""
    loop: dict[str, Any] = {"name": DEVICE, "timestamp": _iso(now_s), "use": RESEARCH_LABEL}
    if isinstance(made, Forecast) and last_mg_dl is not None:
        values = [round(last_mg_dl), *(round(point.p50) for point in made.points)]
        loop["version"] = made.model_version
        loop["predicted"] = {"startDate": _iso(made.last_reading_at.timestamp()), "values": values}
    elif isinstance(made, NoForecast):
        loop["failureReason"] = NO_FORECAST[made][1]
    return [{"_id": f"{int(now_s):024x}", "device": DEVICE, "created_at": _iso(now_s), "loop": loop}]


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, tz=UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
