"""The node's pages: what they say, that nobody sees another's, and that they load nothing from elsewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from zoneinfo import ZoneInfo

import numpy as np
import pytest

from data_schemas.plan import PrivacyEvent
from data_schemas.units import RESEARCH_LABEL
from hospital_node.folder import NodeFolder
from hospital_node.participation import participation
from hospital_node.profile import profile
from tests.hospital_node import serving_node
from tests.hospital_node.serving_node import NOW, OTHER, PERSON, Served


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    made = serving_node.make(tmp_path_factory.mktemp("pages"))
    with NodeFolder.open(made.home) as node:
        node.budget().reserve(
            "task",
            "training",
            "patient",
            PrivacyEvent(sample_rate=0.5, noise_multiplier=4.0, steps=4),
            asked_by="ab" * 32,
            run="run-1",
            at="2026-01-01T10:00:00+00:00",
            ceiling_epsilon=8.0,
            noise="secure",
        )
    with made.client:
        yield made


def signed_in(served: Served, key: str) -> Served:
    """Sign in afresh with one of the node's keys."""
    served.client.cookies.clear()
    answer = served.client.post("/login", data={"key": served.secrets[key]}, follow_redirects=False)
    assert answer.status_code == 303
    assert "HttpOnly" in answer.headers["set-cookie"]
    assert "samesite=strict" in answer.headers["set-cookie"].lower()
    return served


def test_clinic_page_tells_the_nodes_state(served: Served) -> None:
    """Round, model, freshness, counts, budget with rounds left, and who asked, on one page."""
    text = signed_in(served, "all").client.get("/").text
    for words in (
        "<h1>north</h1>",
        "01 Jan 10:00",
        "version 7",
        "3 min ago",
        "3 of 3 patients",
        "Privacy budget",
        "more rounds fit",
    ):
        assert words in text, words
    assert re.search(r"epsilon \d\.\d\d of 8 spent", text)
    assert "POST /login" in text
    assert RESEARCH_LABEL in text


def test_patient_page_says_it_in_one_sentence(served: Served) -> None:
    """Newest reading with its age, the likely range with its clock time, the drawing, and 14 days."""
    text = signed_in(served, "one").client.get("/").text
    assert re.search(r"Likely \d+ to \d+ mg/dL at 12:25, 8 in 10\.", text)
    assert "3 min ago" in text
    assert text.count('class="chart"') == 2
    assert "Less than 70% of 14 days" in text
    assert RESEARCH_LABEL in text
    in_mmol = served.client.get(f"/patients/{PERSON}", params={"units": "mmol/L"}).text
    assert re.search(r"Likely \d+\.\d to \d+\.\d mmol/L", in_mmol)


def test_no_forecast_shows_its_reason(tmp_path: Path) -> None:
    """Where there is no forecast there is no band and no sentence, but the reason."""
    made = serving_node.make(tmp_path, now=NOW + 3600)
    with made.client:
        text = signed_in(made, "one").client.get(f"/patients/{PERSON}").text
    assert "No forecast now" in text
    assert "The newest reading is too old" in text
    assert "Likely" not in text
    assert 'class="fan' not in text


def test_pages_need_a_session_of_the_right_scope(served: Served) -> None:
    """Without a session there is only the sign-in; a patient's key opens no other patient's page, nor the clinic's."""
    served.client.cookies.clear()
    assert "Sign in" in served.client.get("/").text
    assert served.client.get(f"/patients/{PERSON}", follow_redirects=False).status_code == 303
    assert served.client.post("/login", data={"key": "islet_wrong"}).status_code == 401
    signed_in(served, "one")
    assert served.client.get(f"/patients/{OTHER}").status_code == 403
    assert "Who asked for what" not in served.client.get("/").text
    assert served.client.post("/logout").status_code == 403
    assert served.client.post("/logout", data={"form_token": token(served)}).status_code == 200
    assert "Sign in" in served.client.get("/").text


def token(served: Served) -> str:
    """Return the token that the forms of this session carry."""
    found = re.search(r'name="form_token" value="([^"]{40,})"', served.client.get("/").text)
    assert found
    return found[1]


def test_pages_load_nothing_from_elsewhere(served: Served) -> None:
    """The policy names this node alone; no page holds a script, a style or an address of its own making."""
    signed_in(served, "all")
    for path in ("/", f"/patients/{PERSON}", "/docs"):
        answer = served.client.get(path)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert re.findall(r"<script[^>]*>", answer.text) == ['<script src="/static/islet.js" defer>'], path
        assert not re.search(r"\sstyle=|\son\w+=|https?://", answer.text), path
    assert served.client.get("/static/islet.css").headers["content-type"].startswith("text/css")
    assert served.client.get("/static/islet.js").headers["content-type"].startswith("text/javascript")
    assert served.client.get("/static/..%2Fpages.py").status_code == 404


def test_the_switch_needs_an_operators_key_and_a_form_of_ours(served: Served) -> None:
    """Without the session's token, from another site, or with a key that only looks, the switch stays as it is."""
    signed_in(served, "all")
    mine = {"form_token": token(served), "turn": "pause"}
    assert served.client.post("/participation", data=mine).status_code == 403
    assert served.client.get("/leave").status_code == 403
    signed_in(served, "operator")
    mine = {"form_token": token(served), "turn": "pause", "confirm": "north"}
    for path in ("/participation", "/leave"):
        assert served.client.post(path, data={**mine, "form_token": "x" * 43}).status_code == 403
        assert served.client.post(path, data={"turn": "pause", "confirm": "north"}).status_code == 403
        foreign = {"Sec-Fetch-Site": "cross-site"}
        assert served.client.post(path, data=mine, headers=foreign).status_code == 403
    assert participation(served.home).state == "taking part"
    assert served.client.post("/participation", data=mine).status_code == 200
    assert participation(served.home).state == "paused"
    assert ">paused</span>" in served.client.get("/").text
    served.client.post("/participation", data={**mine, "turn": "resume"})
    assert participation(served.home).state == "taking part"
    assert served.client.get("/leaving.json").status_code == 404


def test_api_page_shows_every_operation(served: Served) -> None:
    """The page about the API is made from the OpenAPI document: each path, each shape."""
    document = served.client.get("/openapi.json").json()
    text = served.client.get("/docs").text
    for path in document["paths"]:
        assert path in text
    for shape in document["components"]["schemas"]:
        assert shape in text


def test_times_in_ranges_follow_the_convention() -> None:
    """Ranges are disjoint and add up; 70 and 180 are in range, 54 is low, 250 is high; days are clock days."""
    values = np.array([53, 54, 69, 70, 180, 181, 250, 251], np.float32)
    times = (np.arange(8) * 300 + 1_700_000_000).astype(np.int64)
    found = profile(times, values, float(times[-1]) + 1, ZoneInfo("UTC"))
    assert found is not None
    shares = {r.name: r.share * 8 for r in found.ranges}
    assert shares == {"Very high": 1, "High": 2, "In range": 2, "Low": 2, "Very low": 1}
    assert profile(times, values, float(times[-1]) + 15 * 86400, ZoneInfo("UTC")) is None
