"""The model card: nothing is published without its privacy statement."""

from __future__ import annotations

from typing import Any

import pytest

from data_schemas.errors import BadInput
from data_schemas.units import RESEARCH_LABEL
from pipeline.model_card import CardPrivacy, ModelCard, complete, privacy_statement, read_card, to_markdown

PRIVACY = {"unit": "patient", "relation": "add or remove one patient", "epsilon": 3.5, "delta": 1e-5, "rounds": 40}


def card_value() -> dict[str, Any]:
    return {
        "version": "7",
        "model_hash": "ab" * 32,
        "spec": {"history_minutes": 180, "hidden_size": 32},
        "trained_on": [{"node": "north", "declared_training_patients": 20, "declared_heldout_patients": 5}],
        "privacy": PRIVACY | {"noise_source": "secure"},
        "results": [
            {
                "site": "north",
                "model": "persistence",
                "horizon_minutes": 30,
                "patients": 5,
                "forecasts": 900,
                "rmse_mg_dl": 22.25,
                "mae_mg_dl": 16.0,
            }
        ],
    }


@pytest.mark.parametrize("field", ["unit", "epsilon", "delta", "rounds"])
def test_card_without_a_privacy_field_is_refused_by_name(field: str) -> None:
    """A missing unit, epsilon, delta or number of rounds is named in the refusal."""
    value = card_value()
    del value["privacy"][field]
    with pytest.raises(BadInput, match=f"privacy.{field}"):
        read_card(value)


def test_card_without_relation_is_refused() -> None:
    """An emptied neighbouring relation is refused; the default is the project's own relation."""
    value = card_value()
    value["privacy"]["relation"] = ""
    with pytest.raises(BadInput, match=r"privacy\.relation"):
        read_card(value)


def test_card_built_around_validation_is_refused() -> None:
    """A card made with model_construct does not get past the second look."""
    card = read_card(card_value())
    hollow = ModelCard.model_construct(
        **{**dict(card), "privacy": CardPrivacy.model_construct(unit="patient", noise_source="secure")}
    )
    with pytest.raises(BadInput, match=r"privacy\.epsilon"):
        complete(hollow)


def test_markdown_states_privacy_results_and_label() -> None:
    """The page shows every part of the privacy statement, the results and the research label."""
    page = to_markdown(read_card(card_value()))
    for text in (
        RESEARCH_LABEL,
        "| epsilon (largest over the hospitals) | 3.5 |",
        "| delta | 1e-05 |",
        "| rounds | 40 |",
    ):
        assert text in page
    assert "| north | persistence | 30 | 5 | 900 | 22.2 | 16.0 |  |  |  |" in page
    assert PRIVACY["relation"] in page


def test_markdown_without_results_warns() -> None:
    """A model nobody measured says so."""
    assert "do not use this model" in to_markdown(read_card(card_value() | {"results": []}))


def test_seeded_noise_is_never_called_protection() -> None:
    """The one-sentence statement of a repeatable run calls itself a demonstration."""
    value = card_value()
    secure = privacy_statement(read_card(value))
    value["privacy"]["noise_source"] = "seeded"
    seeded = privacy_statement(read_card(value))
    assert "epsilon 3.5, delta 1e-05" in secure
    assert "per patient" in secure
    assert "no protection" in seeded
    assert "no protection" not in secure
