"""The federation's page says what the ledger says, to anybody, and does nothing else."""

from __future__ import annotations

import itertools
import re
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from aggregator.federation_page import create_app
from aggregator.page_chart import credit_chart
from aggregator.settings import AggregatorFolder, open_folder
from data_schemas.errors import BadInput
from pipeline.inclusion import parse_proof, verify_proof
from tests.aggregator import governed_ledger
from tests.aggregator import small_federation as small


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> AggregatorFolder:
    return governed_ledger.build(tmp_path_factory.mktemp("governed"))


@pytest.fixture(scope="module")
def client(folder: AggregatorFolder) -> Iterator[TestClient]:
    with TestClient(create_app(folder)) as made:
        yield made


def test_the_page_shows_what_the_ledger_holds(client: TestClient) -> None:
    """Members, votes by name, decisions, policy, credits, rounds, champion, verification and checkpoint."""
    text = client.get("/").text
    for words in (
        f"Federation {small.FEDERATION}",
        "privacy-policy",
        "needs two thirds",
        "cosigned by alder, birch, cedar",
        "ε 2.50 training, 1.25 held out",
        "at most ε 8 for a training patient",
        "Credits over time",
        "Champions, newest first",
        "Verified",
    ):
        assert words in text, words
    assert re.search(r"yes 1</span> cedar.*not yet 2</span> alder, birch", text)
    assert re.search(r'accepted</span></td><th scope="row">promote', text)
    assert re.search(r'rejected</span></td><th scope="row">pause', text)
    assert text.count("<svg") == 1


def test_it_is_read_only_and_loads_nothing(client: TestClient) -> None:
    """No script, no inline style, no form, no foreign address; a strict policy; nothing but GET."""
    answer = client.get("/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"<script|<form|\sstyle=|\son\w+=|https?://", answer.text)
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        assert client.request(method, "/").status_code == 405
    assert client.get("/static/federation.css").headers["content-type"].startswith("text/css")
    assert client.get("/healthz").json() == {"status": "ok"}


def test_a_reader_verifies_with_what_the_page_hands_out(client: TestClient, folder: AggregatorFolder) -> None:
    """The proof of an entry verifies offline against the checkpoint, the aggregator's key and a hospital's."""
    key, note = folder.key().public.hex, client.get("/checkpoint.txt").text
    text = client.get("/").text
    assert key in text
    index = int(re.findall(r'href="/proofs/(\d+)"', text)[0])
    proof = parse_proof(client.get(f"/proofs/{index}").content)
    shown = verify_proof(proof, key, note, {"cedar": small.key_of("cedar").public.hex})
    assert (shown.entry.entry.kind, shown.checked_cosigners) == ("decision", ("cedar",))
    assert client.get("/proofs/999999").status_code == 404
    assert client.get("/proofs/x").status_code == 422


def test_a_changed_ledger_shows_at_the_next_request(folder: AggregatorFolder, tmp_path: Path) -> None:
    """A new entry is on the page at once; a forged byte makes it say that the ledger does not verify."""
    shutil.copytree(folder.path, tmp_path / "copy")
    copy = open_folder(tmp_path / "copy")
    with TestClient(create_app(copy)) as client:
        before = re.findall(r"ledger, (\d+) entries", client.get("/").text)
        book = copy.open_ledger()
        book.append(small.member("alder").model_copy(update={"declared_training_patients": 31}), governed_ledger.AT)
        book.close()
        after = re.findall(r"ledger, (\d+) entries", client.get("/").text)
        assert int(after[0]) == int(before[0]) + 1
        with sqlite3.connect(copy.path / "ledger.db") as db:
            db.execute("DROP TRIGGER entries_UPDATE")
            db.execute("UPDATE entries SET payload = CAST(replace(payload, 'alder', 'older') AS BLOB) WHERE idx = 0")
        text = client.get("/").text
        assert "does not verify" in text
        assert "Verified" not in text


def test_without_a_ledger_there_is_no_page(tmp_path: Path) -> None:
    """An aggregator that has admitted nobody is told what to do first."""
    from aggregator.settings import AggregatorSettings, create

    with pytest.raises(BadInput, match="no ledger yet"):
        create_app(create(tmp_path / "hub", AggregatorSettings(federation="f"), seed=1))


def test_names_at_the_lines_ends_keep_their_distance() -> None:
    """Twelve hospitals with equal credits: every name is in the drawing, none over another or outside."""
    names = [f"hospital-{n}" for n in range(12)]
    drawn = str(credit_chart(["1", "2"], {name: [1.0, 2.0] for name in names}))
    heights = sorted(float(y) for y in re.findall(r'<text class="t\d" x="[\d.]+" y="([\d.]+)"', drawn))
    assert len(heights) == 12
    assert min(b - a for a, b in itertools.pairwise(heights)) >= 16
    assert heights[0] > 0
    assert heights[-1] < 320
