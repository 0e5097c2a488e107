"""A node as a clinic has it after some weeks: two weeks of readings, rounds, credit, a model and the next one."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from fastapi import FastAPI

import hospital_node
from data_schemas.layout import load_layout
from data_schemas.reading import COLUMNS, QualityReport, ValidReadings
from hospital_node.api_keys import create_key
from hospital_node.audit_log import Access, AuditLog
from hospital_node.endpoint import create_app
from hospital_node.importing import Export, look_at
from hospital_node.intake_report import report_page
from hospital_node.portrait import Portrait
from hospital_node.rate_limit import RateLimit
from hospital_node.settings import Source
from hospital_node.store import Store
from hospital_node.suites import load_suite
from pipeline.export import load_model
from tests.hospital_node import serving_node, small_ledger, small_node
from tests.hospital_node.test_ledger_view import AGGREGATOR

DAYS = 14
PEOPLE = 18
FIRST = datetime(2026, 3, 2, tzinfo=UTC)
LAST = FIRST + timedelta(days=DAYS, hours=12, minutes=20)
ASKED = (
    (64, "train round 3 of demo-7", "answered"),
    (62, "score round 3 of demo-7", "answered"),
    (47, "train round 4 of demo-7", "node-busy"),
    (46, "train round 4 of demo-7", "answered"),
    (41, "release credit of epoch 2 of demo-7", "answered"),
)
PERSON, FLAT, OLD = "person-000", "person-001", "person-002"


@dataclass
class Clinic:
    """The application, its folder, the secrets of its keys by name, and the clock's hands."""

    app: FastAPI
    home: Path
    secrets: dict[str, str]
    turn_clock: Callable[[float], None]


def make(place: Path) -> Clinic:
    """Make the node and its keys `all`, `operator` and `one`."""
    sources = (
        Source(path=str(place / "libreview"), layout="libreview", zone="Europe/Madrid"),
        Source(path=str(place / "clarity"), layout="clarity", zone="Europe/Madrid"),
    )
    home = small_node.make_node(place / "north", aggregator_public_key=AGGREGATOR.public.hex, sources=sources)
    model = load_model(serving_node.shared_model()).model_hash
    shutil.copytree(serving_node.shared_model(), home / "models" / model)
    for number, source in enumerate(sources):
        fill(home, source.path, [f"person-{n:03d}" for n in range(number, PEOPLE, 2)], number)
    small_ledger.live(home, model)
    now = [(LAST + timedelta(minutes=3)).timestamp()]
    keys: dict[str, dict[str, Any]] = {
        "all": {"scope": "all"},
        "operator": {"scope": "all", "operates": True},
        "one": {"scope": PERSON},
    }
    suite, exports = load_suite(), Path(hospital_node.__file__).parent / "sample_exports" / "duke"
    one = frozenset({exports / "001.csv"})
    looked = look_at(Export(exports, load_layout("duke"), "Europe/Madrid", b"k" * 32, one), Portrait.empty(), suite)
    page = report_page(looked, suite, "Validation, nothing stored", "Node north")
    (home / "reports" / "validation-1.html").write_text(page)
    with closing(sqlite3.connect(home / "store" / "catalogue.db")) as db, db:
        db.execute("UPDATE origins SET imported_s = ?", (int(now[0]) - 3600,))
    tasks = AuditLog(home / "reports" / "tasks.jsonl")
    for minutes, asked, outcome in ASKED:
        tasks.write(Access(at=now[0] - 60 * minutes, who="federation", operation=asked, outcome=outcome))
    secrets = {name: create_key(home, now_s=now[0], **how)[1] for name, how in keys.items()}
    following = serving_node.export_model(place / "next", "8", 5)
    app = create_app(home, None, lambda: now[0], RateLimit(10**6, 10**6), following)

    def turn_clock(minutes: float) -> None:
        now[0] += 60 * minutes

    return Clinic(app, home, secrets, turn_clock)


def fill(home: Path, origin: str, names: list[str], seed: int) -> None:
    """Store two weeks of these people, and set some rows aside."""
    draw = np.random.default_rng(seed)
    frames = [person(name, draw) for name in names]
    frame = pd.concat(frames, ignore_index=True).assign(source=f"{seed:064x}")
    good = ValidReadings(frame.assign(row=np.arange(len(frame))).reindex(columns=list(COLUMNS)).astype(COLUMNS))
    rules = ["below-sensor-range"] * (3 + seed) + ["conflicting-stamp"] * 2
    aside = good.frame.iloc[: len(rules)].assign(rule=rules, row=np.arange(len(frame), len(frame) + len(rules)))
    counts = {rule: rules.count(rule) for rule in rules}
    total = len(frame) + len(rules)
    report = QualityReport(total, len(frame), counts, {}, {}, len(names))
    Store(home / "store").add(good, aside, report, [f"{seed:064x}"], origin)


def person(name: str, draw: np.random.Generator) -> pd.DataFrame:
    """One person: nights, three meals a day of changing size, a few lows before noon, a sensor gap."""
    minutes = np.arange(0, int((LAST - FIRST).total_seconds()) // 60 + 1, 5)
    level = np.full(len(minutes), draw.uniform(104, 122))
    for day in range(DAYS + 1):
        for hour, size in ((7.8, 85), (13.4, 70), (20.2, 95)):
            since = minutes - (day * 1440 + (hour + draw.normal(0, 0.4)) * 60)
            rise = np.where(since > 0, since / 55 * np.exp(1 - since / 55), 0.0)
            level += draw.uniform(0.4, 1.5) * size * rise
        dip = minutes - (day * 1440 + 11.2 * 60)
        level -= draw.uniform(0, 55) * np.exp(-((dip / 40) ** 2))
    noise = np.convolve(draw.normal(0, 9, len(minutes) + 11), np.ones(12) / 12, "valid")
    glucose = (level + noise).clip(42, 390).round()
    if name == FLAT:
        glucose[-20:] = 131
    keep = (minutes < 3 * 1440) | (minutes > 3 * 1440 + 400)
    if name == OLD:
        keep &= minutes < minutes[-1] - 95
    stamps = pd.Timestamp(FIRST) + pd.to_timedelta(minutes[keep], unit="min")
    return pd.DataFrame(
        {"patient": name, "measured_at": stamps, "zone": "Europe/Madrid", "glucose_mg_dl": glucose[keep], "flags": 0}
    )
