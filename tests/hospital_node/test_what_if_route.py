"""What-if over HTTP: a labelled second curve for what was sent, and no way to be told what to take."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from data_schemas.forecast import SIMULATION_LABEL
from tests.hospital_node import serving_node
from tests.hospital_node.serving_node import LAST, OTHER, PERSON, Served

# What a scenario may hold, and nothing else of the API.
INPUTS = {"carbs_g", "insulin_u", "insulin_sensitivity", "carbohydrate_ratio"}
WORDS = ("dose", "dosing", "bolus", "basal", "insulin", "carb", "recommend", "advice", "suggest", "target", "goal")


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    made = serving_node.make(tmp_path, patients=2)
    with made.client:
        yield made


def body(**planned: Any) -> dict[str, Any]:
    times = [LAST - timedelta(minutes=5 * back) for back in range(23, -1, -1)]
    return {
        "units": "mg/dL",
        "readings": [{"at": at.isoformat(), "glucose": 110 + n} for n, at in enumerate(times)],
        "scenario": {
            "planned": [{"at": LAST.isoformat(), **planned}],
            "insulin_sensitivity": 43.21,
            "carbohydrate_ratio": 9.87,
        },
    }


def fields(schemas: dict[str, Any], root: Any) -> set[str]:
    """Names of every property that a schema reaches."""
    names: set[str] = set()
    seen: set[str] = set()

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            names.update(value.get("properties", {}))
            name = str(value.get("$ref", "")).rpartition("/")[2]
            if name and name not in seen:
                seen.add(name)
                walk(schemas[name])
            for item in value.values():
                walk(item)
        elif isinstance(value, list):
            for item in value:
                walk(item)

    walk(root)
    return names


def test_no_answer_can_carry_a_dose(served: Served) -> None:
    """No property of any answer speaks of a dose or its like; a request may name four inputs, and no target."""
    document = served.client.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    answers = fields(schemas, [operation["responses"] for operation in operations])
    assert {"p05", "probability_below_70_within_60", "reason", "simulation", "assumes"} <= answers
    assert not [name for name in answers if any(word in name.lower() for word in WORDS)]
    asked = fields(schemas, [operation.get("requestBody", {}) for operation in operations])
    assert {name for name in asked if any(word in name.lower() for word in WORDS)} == INPUTS
    reached = fields(schemas, list(schemas.values()))
    assert reached <= answers | asked


def test_a_scenario_returns_a_second_labelled_curve(served: Served) -> None:
    """The forecast is the same with and without it; the curve is labelled, and repeats nothing that was sent."""
    sent = body(carbs_g=34.56)
    plain = dict(sent)
    del plain["scenario"]
    without = served.client.post("/v1/forecast", json=plain, headers=served.key("one")).json()
    assert without["simulation"] is None
    answer = served.client.post("/v1/forecast", json=sent, headers=served.key("one"))
    told = answer.json()
    assert {**told, "simulation": None} == without
    assert told["simulation"]["label"] == SIMULATION_LABEL
    assert told["simulation"]["assumes"]
    assert len(told["simulation"]["points"]) == 12
    assert told["simulation"]["points"][-1]["p50"] > told["points"][-1]["p50"]
    assert not any(value in answer.text for value in ("34.56", "43.21", "9.87"))


def test_a_target_or_a_missing_number_is_refused(served: Served) -> None:
    """There is nothing to aim at, and what the node does not know is asked for by name."""
    for extra in ({"target": 110}, {"goal_mg_dl": 110}, {"solve": "insulin_u"}):
        sent = body(carbs_g=30)
        sent["scenario"] |= extra
        told = served.client.post("/v1/forecast", json=sent, headers=served.key("one"))
        assert (told.status_code, told.json()["type"]) == (422, "urn:islet:problem:invalid-request")
    sent = body(insulin_u=1)
    del sent["scenario"]["insulin_sensitivity"]
    answer = served.client.post("/v1/forecast", json=sent, headers=served.key("one"))
    told = answer.json()
    assert (answer.status_code, told["type"]) == (409, "urn:islet:problem:scenario-unusable")
    assert told["errors"][0]["pointer"] == "/body/scenario/insulin_sensitivity"


def test_stored_readings_may_be_asked_what_if(served: Served) -> None:
    """The same plan over a person's stored readings: the personal forecast stays, the labelled curve stands beside."""
    path, scenario = f"/v1/patients/{PERSON}/forecast", body(carbs_g=34.56)["scenario"]
    forecast = served.client.get(path, headers=served.key("one")).json()
    answer = served.client.post(path, json={"units": "mg/dL", "scenario": scenario}, headers=served.key("one"))
    told = answer.json()
    assert answer.status_code == 200
    assert told["personal"]
    assert {**told, "simulation": None} == forecast
    assert (told["simulation"]["label"], told["simulation"]["basis"]) == (SIMULATION_LABEL, "physiology")
    assert told["simulation"]["points"][-1]["p50"] > told["points"][-1]["p50"]
    assert not any(value in answer.text for value in ("34.56", "43.21", "9.87"))


def test_a_plan_for_somebody_else_or_for_another_hour_is_refused(served: Served) -> None:
    """Another person's key is 403 before the body is read; a moment outside the hour is named by its pointer."""
    sent = {"units": "mg/dL", "scenario": body(carbs_g=30)["scenario"]}
    other = served.client.post(f"/v1/patients/{OTHER}/forecast", json=sent, headers=served.key("one"))
    assert other.status_code == 403
    sent["scenario"]["planned"][0]["at"] = (LAST + timedelta(hours=2)).isoformat()
    late = served.client.post(f"/v1/patients/{PERSON}/forecast", json=sent, headers=served.key("one"))
    assert (late.status_code, late.json()["errors"][0]["pointer"]) == (409, "/body/scenario/planned/0/at")
