"""Readings that apps send: idempotent, judged by the suite's own rules, kept through crashes, folded into the store."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from data_schemas.reading import COLUMNS, Readings
from hospital_node.journal import Journal
from hospital_node.row_rules import row_rules
from hospital_node.store import Store
from hospital_node.validation import load_suite, validate
from tests.hospital_node import serving_node
from tests.hospital_node.serving_node import LAST, NOW, PERSON, Served, upload

URL = f"/v1/patients/{PERSON}/readings"
NOTHING = np.zeros(0, np.int64), np.zeros(0, np.float32)
# The node's clock stands an hour after the last stored reading.
LATER = NOW + 3600


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    made = serving_node.make(tmp_path, now=LATER)
    with made.client:
        yield made


def stored_of(served: Served, person: str = PERSON) -> pd.DataFrame:
    return Store(served.home / "store").readings(person)


def last_value(served: Served) -> float:
    return float(stored_of(served)["glucose_mg_dl"].iloc[-1])


def test_what_is_sent_is_used_and_stored(served: Served) -> None:
    """A stale patient has a forecast again after the app sent readings, and the store holds them after the end."""
    url = f"/v1/patients/{PERSON}/forecast"
    assert served.client.get(url, headers=served.key("one")).status_code == 409
    before = len(stored_of(served))
    sent = upload(12, value=last_value(served))
    answer = served.client.post(URL, json=sent, headers=served.key("writer"))
    assert answer.status_code == 200, answer.text
    assert answer.json()["stored"] == 12
    told = served.client.get(url, headers=served.key("one")).json()
    assert datetime.fromisoformat(told["last_reading_at"]) == LAST + timedelta(hours=1)
    served.client.__exit__()
    assert len(stored_of(served)) == before + 12
    served.client.__enter__()
    again = served.client.post(URL, json=sent, headers=served.key("writer")).json()
    assert (again["stored"], again["already_stored"]) == (0, 12)


def test_sending_again_changes_nothing(served: Served) -> None:
    """The same post twice stores once; with an Idempotency-Key the answer is repeated byte for byte."""
    sent, key = upload(3, value=last_value(served)), {"Idempotency-Key": "a1"}
    first = served.client.post(URL, json=sent, headers=served.key("writer") | key)
    assert first.json()["stored"] == 3
    assert served.client.post(URL, json=sent, headers=served.key("writer") | key).content == first.content
    plain = served.client.post(URL, json=sent, headers=served.key("writer")).json()
    assert (plain["stored"], plain["already_stored"]) == (0, 3)
    other = served.client.post(URL, json=upload(4), headers=served.key("writer") | key)
    assert other.status_code == 409
    # Another caller's key of the same name is another request.
    theirs = served.client.post(URL, json=sent, headers=served.key("collector") | key)
    assert theirs.json()["already_stored"] == 3


def test_rows_that_break_a_rule_are_named_and_quarantined(served: Served) -> None:
    """Each refused row comes back with its position and rule, without its value, and reaches the quarantine."""
    base = last_value(served)
    sent = upload(6, value=base)
    sent["readings"][1]["glucose"] = 38
    sent["readings"][2]["glucose"] = 502
    sent["readings"][3]["at"] = datetime.fromtimestamp(LATER + 3600, tz=UTC).isoformat()
    sent["readings"][4]["at"] = "2000-01-01T00:00:00Z"
    close = LAST + timedelta(minutes=7)
    sent["readings"].append({"at": close.isoformat(), "glucose": base + 90})
    sent["readings"].append({"at": LAST.isoformat(), "glucose": base + 5})
    told = served.client.post(URL, json=sent, headers=served.key("writer")).json()
    assert {r["row"]: r["rule"] for r in told["held"]} == {
        1: "sensor-error-code",
        2: "above-sensor-range",
        3: "in-the-future",
        4: "clock-reset",
        6: "conflicting-neighbour",
        7: "conflicts-with-stored",
    }
    assert told["stored"] + told["already_stored"] + told["quarantined"] == len(sent["readings"])
    served.client.__exit__()
    rules = Store(served.home / "store").quarantined()["rule"].tolist()
    served.client.__enter__()
    assert sorted(rules) == sorted(r["rule"] for r in told["held"])


def test_row_rules_are_the_suites(tmp_path: Path) -> None:
    """For single rows, this module and Great Expectations name the same rule."""
    values = [0.1, 38.0, 38.9, 39.0, 40.0, 120.0, 400.0, 500.9, 501.0, 501.1, 900.0, 120.0, 120.0, 120.0]
    now = datetime(2026, 1, 1, tzinfo=UTC)
    times = [now - timedelta(minutes=30 * n) for n in range(len(values) - 3)]
    times += [now + timedelta(minutes=9), now + timedelta(minutes=11), datetime(2004, 12, 31, tzinfo=UTC)]
    frame = pd.DataFrame({"patient": "p", "measured_at": times, "glucose_mg_dl": values})
    frame = frame.assign(row=range(len(frame)), zone="UTC", flags=0, source="0" * 64)
    readings = Readings(frame.reindex(columns=list(COLUMNS)).astype(COLUMNS), len(frame))
    _, quarantined, _ = validate(readings, load_suite(), now)
    theirs = dict(zip(quarantined["row"], quarantined["rule"], strict=True))
    rules = row_rules()
    broken = [rules.broken(int(t.timestamp()), v, now.timestamp()) for t, v in zip(times, values, strict=True)]
    assert {n: rule for n, rule in enumerate(broken) if rule} == theirs


def test_journal_survives_its_process(tmp_path: Path) -> None:
    """A reading that was acknowledged is there when the journal is opened again; folding twice stores it once."""
    (tmp_path / "store").mkdir()
    journal = Journal(tmp_path / "store", row_rules())
    rows = [(int(NOW) - 300 * n, 120.0 + n) for n in range(5)]
    assert journal.add("p", rows, NOTHING, NOW).count("stored") == 5
    del journal
    again = Journal(tmp_path / "store", row_rules())
    assert len(again) == 5
    store = Store(tmp_path / "store")
    assert again.fold(store) == 5
    assert len(again) == 0
    # As after a crash between the store's commit and the journal's: the same rows are folded once more.
    again.add("p", rows, NOTHING, NOW)
    assert again.fold(store) == 5
    assert len(store.readings("p")) == 5


def test_thousands_of_posts_make_one_segment(tmp_path: Path) -> None:
    """Posts of one reading each gather in the journal; the store gets one file for all of them."""
    (tmp_path / "store").mkdir()
    journal = Journal(tmp_path / "store", row_rules())
    for n in range(500):
        journal.add(f"p{n % 7}", [(int(NOW) - 300 * n, 100.0 + n % 50)], NOTHING, NOW)
    store = Store(tmp_path / "store")
    assert journal.fold(store) == 500
    assert len(list((tmp_path / "store" / "segments").iterdir())) == 1
    assert store.counts().readings == 500


def entries(count: int, value: int) -> list[dict[str, Any]]:
    """What xDrip sends: fields of its own, milliseconds, mg/dL."""
    return [
        {
            "device": "xDrip-DexcomG6",
            "date": int((LAST + timedelta(minutes=5 * (n + 1))).timestamp() * 1000),
            "dateString": (LAST + timedelta(minutes=5 * (n + 1))).isoformat(),
            "sgv": value + n % 3,
            "delta": 0.5,
            "direction": "Flat",
            "type": "sgv",
            "filtered": 1000.0,
            "noise": 1,
            "rssi": 100,
        }
        for n in range(count)
    ]


def test_nightscout_uploader_works_unchanged(served: Served) -> None:
    """SHA-1 of the key in api-secret uploads entries, which come back newest first and draw a forecast."""
    headers = {"api-secret": hashlib.sha1(served.secrets["writer"].encode(), usedforsecurity=False).hexdigest()}
    assert served.client.get("/api/v1/status.json").json()["status"] == "ok"
    sent = [*entries(12, round(last_value(served))), {"type": "mbg", "date": 1767240000000, "mbg": 99}]
    for path in ("/api/v1/entries", "/api/v1/entries.json"):
        told = served.client.post(path, json=sent, headers=headers)
        assert told.status_code == 200, told.text
        assert len(told.json()) == 12
    newest = served.client.get("/api/v1/entries.json", params={"count": 2}, headers=headers).json()
    assert [e["date"] for e in newest] == [sent[11]["date"], sent[10]["date"]]
    assert served.client.post("/api/v1/entries", json=sent[0], headers=headers).status_code == 200
    status = served.client.get("/v1/nightscout/devicestatus.json", headers=headers).json()[0]
    predicted = status["loop"]["predicted"]
    assert len(predicted["values"]) == 13
    assert datetime.fromisoformat(predicted["startDate"]) == LAST + timedelta(hours=1)
    assert not {"enacted", "recommendedBolus", "openaps", "iob", "cob"} & {*status, *status["loop"]}


def test_nightscout_needs_a_key_for_one_patient_that_may_write(served: Served) -> None:
    """No secret, a reader's key and a key for everybody are refused."""
    sent = entries(1, 120)
    sha1 = {name: hashlib.sha1(s.encode(), usedforsecurity=False).hexdigest() for name, s in served.secrets.items()}
    for headers, status in (
        ({}, 401),
        ({"api-secret": "0" * 40}, 401),
        ({"api-secret": sha1["one"]}, 403),
        ({"api-secret": sha1["collector"]}, 403),
    ):
        assert served.client.post("/api/v1/entries", json=sent, headers=headers).status_code == status


def test_fhir_never_codes_a_forecast_as_a_measurement(served: Served) -> None:
    """Readings carry LOINC 99504-3; the forecast has a code of its own, is preliminary and says what it is."""
    sent = upload(12, value=last_value(served))
    served.client.post(URL, json=sent, headers=served.key("writer"))
    answer = served.client.get("/fhir/R4/Observation", params={"patient": PERSON}, headers=served.key("one"))
    assert answer.headers["content-type"] == "application/fhir+json"
    readings = [entry["resource"] for entry in answer.json()["entry"]]
    assert {r["code"]["coding"][0]["code"] for r in readings} == {"99504-3"}
    assert readings[0]["valueQuantity"]["code"] == "mg/dL"
    query = {"patient": PERSON, "code": "urn:islet:code-system:observation|glucose-forecast"}
    answer = served.client.get("/fhir/R4/Observation", params=query, headers=served.key("one"))
    forecast = answer.json()["entry"][0]["resource"]
    assert "99504-3" not in answer.text
    assert "valueQuantity" not in forecast
    assert forecast["status"] == "preliminary"
    assert len(forecast["component"][0]["valueSampledData"]["data"].split()) == 12
    assert "Research use" in forecast["note"][0]["text"]
    assert forecast["derivedFrom"][0]["reference"] == f"Observation/{readings[0]['id']}"
    assert served.client.get("/fhir/R4/metadata").json()["fhirVersion"] == "4.0.1"


def test_an_absurd_time_is_quarantined_and_folds(served: Served) -> None:
    """A row of the year 1 or 9998 is refused by name and does not keep the journal from the store."""
    sent = upload(2, value=last_value(served))
    sent["readings"][0]["at"] = "0001-01-02T00:00:00Z"
    sent["readings"][1]["at"] = "9998-01-01T00:00:00Z"
    told = served.client.post(URL, json=sent, headers=served.key("writer")).json()
    assert [r["rule"] for r in told["held"]] == ["clock-reset", "in-the-future"]
    served.client.__exit__()
    assert len(Store(served.home / "store").quarantined()) == 2
    served.client.__enter__()
