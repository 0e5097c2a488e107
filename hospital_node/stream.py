"""Server-sent events (WHATWG HTML, 9.2) about one patient: forecast, stale, model, and a heartbeat.

Nothing is pushed by a clock alone but the heartbeat: an event follows a new reading, a newer model, or the newest
reading growing too old, and only then is a forecast made. Its id names reading and model, so a client that comes back
is not told the same again.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import TypeAlias

from data_schemas.forecast import Forecast, GlucoseUnit, NoForecast
from data_schemas.units import RESEARCH_LABEL
from hospital_node.problems import Declined, no_forecast
from hospital_node.services import Services
from pipeline.reading_rules import age_reason

HEARTBEAT_SECONDS = 15.0
LOOK_SECONDS = 1.0
# A client that stays longer is sent away and comes back: a revoked key does not stream for ever.
LONGEST_SECONDS = 3600.0
# Model, how many readings, the newest one, and what its age says against a forecast.
_Standing: TypeAlias = tuple[str | None, int, int, NoForecast | None]


async def events(services: Services, patient: str, units: GlucoseUnit, seen: str | None) -> AsyncIterator[str]:
    """Yield events of one patient until the client leaves. seen: the Last-Event-ID of an earlier connection."""
    loop = asyncio.get_running_loop()
    began = quiet_since = loop.time()
    model_hash: str | None = None
    told: _Standing | None = None
    yield f"retry: {int(LOOK_SECONDS * 5000)}\n\n"
    while loop.time() - began < LONGEST_SECONDS:
        model = services.served.find()
        if model is not None and model.model_hash != model_hash:
            if model_hash is not None:
                quiet_since = loop.time()
                yield _event("model", {"model_version": model.card.version, "model_hash": model.model_hash}, None)
            model_hash = model.model_hash
        if (standing := await _standing(services, patient, model_hash)) != told:
            told = standing
            name, data, identity = await _state(services, patient, units)
            if identity != seen:
                seen, quiet_since = identity, loop.time()
                yield _event(name, data, identity)
        if loop.time() - quiet_since >= HEARTBEAT_SECONDS:
            quiet_since = loop.time()
            yield ": alive\n\n"
        await asyncio.sleep(LOOK_SECONDS)


async def _standing(services: Services, patient: str, model_hash: str | None) -> _Standing:
    """What a forecast follows from. While it is the same so is the forecast, and nothing is worked out again."""
    try:
        times, _ = await services.stored(patient)
    except Declined:
        return model_hash, 0, 0, NoForecast.UNKNOWN_PATIENT
    newest = int(times[-1])
    return model_hash, len(times), newest, age_reason(services.clock() - newest)


async def _state(services: Services, patient: str, units: GlucoseUnit) -> tuple[str, dict[str, object], str]:
    """Return event name, data and id of the present forecast or of the reason why there is none."""
    try:
        time_s, glucose = await services.stored(patient)
        made = await services.personal_forecast(patient, (time_s, glucose), units)
    except Declined as error:
        return "no-forecast", no_forecast(error.reason).model_dump(mode="json", exclude_defaults=True), error.reason
    if isinstance(made, Forecast):
        identity = f"{int(made.last_reading_at.timestamp())}-{made.model_hash[:12]}"
        return "forecast", made.model_dump(mode="json"), identity
    newest = int(time_s.max())
    told: dict[str, object] = {
        "reason": made.value,
        "last_reading_at": datetime.fromtimestamp(newest, tz=UTC).isoformat(),
        "use": RESEARCH_LABEL,
    }
    return ("stale" if made is NoForecast.STALE else "no-forecast"), told, f"{newest}-{made.value}"


def _event(name: str, data: dict[str, object], identity: str | None) -> str:
    head = "" if identity is None else f"id: {identity}\n"
    return f"{head}event: {name}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n"
