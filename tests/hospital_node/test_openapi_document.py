"""The committed OpenAPI document is what the endpoint serves, and every operation of it keeps its word."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.hospital_node import contract, serving_node

DOCUMENT = Path(__file__).parents[2] / "docs" / "openapi.json"


def test_committed_document_is_the_served_one(tmp_path: Path) -> None:
    """docs/openapi.json differs from the endpoint's own only when somebody changed the contract: `make openapi`."""
    served = serving_node.make(tmp_path, patients=1)
    with served.client:
        document = served.client.get("/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    assert json.loads(DOCUMENT.read_text()) == document
    described = [o for path in document["paths"].values() for o in path.values()]
    assert all(o.get("description") for o in described)
    assert len({o["operationId"] for o in described}) == len(described)


@pytest.mark.slow
def test_answers_to_generated_requests_keep_the_contract(tmp_path: Path) -> None:
    """A few generated requests to each operation of a real server; `make contract` sends a thousand to each."""
    with contract.endpoint(tmp_path) as (url, headers):
        assert contract.run(url, headers, cases=3, seed=1, phases="fuzzing") == 0
