"""The model card: what a model is for, how private its training was, and how well it did on people nobody trained on.

Follows the sections of Mitchell et al., "Model Cards for Model Reporting" (2019). A card cannot be made without the
unit, relation, epsilon, delta and number of rounds of its privacy statement.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationError

from data_schemas.canonical import canonical_bytes
from data_schemas.errors import BadInput
from data_schemas.frozen import Frozen
from data_schemas.messages import Hex32
from data_schemas.plan import RELATION, ModelSpec, PrivacyUnit
from data_schemas.units import RESEARCH_LABEL

MODEL_NAME = "islet-forecaster"

MECHANISM = (
    "Poisson sampling of patients, per-patient gradient clipping and Gaussian noise (DP-SGD), "
    "in full at each hospital before anything left it"
)
INTENDED_USE = (
    "Research on short-term glucose forecasting: from at least one hour of readings of one person, the glucose "
    "5 to 60 minutes after the newest reading, with quantiles."
)
LIMITS: tuple[str, ...] = (
    "Not a medical device. It gives no dose, no treatment advice and no alarm.",
    "It sees glucose readings only: a meal, a bolus or exercise that has not yet moved the glucose is invisible to it.",
    "Lows are rare in training data; a forecast misses some of them. Read the results at the low end before any use.",
    "Its quantiles were measured on the held-out people above; for others they may be too narrow.",
    "The privacy statement covers what hospitals sent while training, not readings sent to a forecast endpoint.",
)

NoiseSource = Literal["secure", "seeded"]
_NOISE_WORDS: dict[str, str] = {
    "secure": "cryptographically secure randomness of each hospital's operating system",
    "seeded": "a repeatable seed: the run can be repeated, so this is a demonstration and no protection",
}


class TrainedOn(Frozen):
    """One hospital of the federation, with the numbers of patients it declared."""

    node: str
    declared_training_patients: int = Field(ge=1)
    declared_heldout_patients: int = Field(ge=0)


class CardPrivacy(Frozen):
    """The privacy statement, field by field. epsilon is the largest over the hospitals."""

    unit: PrivacyUnit
    relation: str = Field(default=RELATION, min_length=1)
    epsilon: float = Field(gt=0)
    delta: float = Field(gt=0, lt=1)
    rounds: int = Field(ge=1)
    mechanism: str = Field(default=MECHANISM, min_length=1)
    noise_source: NoiseSource


class CardResult(Frozen):
    """Errors of one model at one site and horizon, on held-out people; errors in mg/dL unless named otherwise."""

    site: str
    model: str
    horizon_minutes: int = Field(ge=5, le=60)
    patients: int = Field(ge=0)
    forecasts: int = Field(ge=0)
    rmse_mg_dl: float = Field(ge=0)
    mae_mg_dl: float = Field(ge=0)
    mard_percent: float | None = Field(default=None, ge=0)
    clarke_ab_percent: float | None = Field(default=None, ge=0, le=100)
    coverage_90_percent: float | None = Field(default=None, ge=0, le=100)


class CardMembership(Frozen):
    """A membership-inference attack on one model: area under its ROC curve and the 95% interval over people."""

    model: str = Field(min_length=1)
    auc: float = Field(ge=0, le=1)
    low: float = Field(ge=0, le=1)
    high: float = Field(ge=0, le=1)
    members: int = Field(ge=1)
    others: int = Field(ge=1)


class ModelCard(Frozen):
    """A model version as its reader should know it; model_hash is the SHA-256 of the flat float32 weights."""

    name: str = MODEL_NAME
    version: str = Field(min_length=1)
    model_hash: Hex32 = Field(pattern=r"^[0-9a-f]{64}$")
    spec: ModelSpec
    trained_on: tuple[TrainedOn, ...] = Field(min_length=1)
    privacy: CardPrivacy
    results: tuple[CardResult, ...] = ()
    membership: tuple[CardMembership, ...] = ()
    intended_use: str = INTENDED_USE
    use: str = RESEARCH_LABEL
    limits: tuple[str, ...] = LIMITS


def read_card(value: Any) -> ModelCard:
    """Make a card from a JSON value. Raises BadInput naming every field that is missing or wrong."""
    try:
        return ModelCard.model_validate(value)
    except ValidationError as error:
        fields = sorted({".".join(str(part) for part in e["loc"]) or "card" for e in error.errors()})
        raise BadInput(
            f"the model card lacks or misstates: {', '.join(fields)}",
            "a model is published only with unit, relation, epsilon, delta and rounds of its training",
        ) from None


def complete(card: ModelCard) -> ModelCard:
    """Return the card after a second look, which refuses one built around validation. Raises BadInput."""
    return read_card(card.model_dump(mode="json", warnings=False))


def card_bytes(card: ModelCard) -> bytes:
    """Canonical JSON (RFC 8785) of the card."""
    return canonical_bytes(card)


def privacy_statement(card: ModelCard) -> str:
    """One sentence for every answer of the endpoint and every page."""
    p = card.privacy
    bound = f"(epsilon {p.epsilon:.3g}, delta {p.delta:g})-differential privacy per {p.unit}"
    text = f"{bound} ({p.relation}), over {p.rounds} rounds, noise added at each hospital"
    if p.noise_source == "seeded":
        return f"Demonstration with a repeatable noise seed, no protection; with secure noise it would be: {text}."
    return f"{text}."


def to_markdown(card: ModelCard) -> str:
    """Write the card as a page of Markdown."""
    parts = (_head(card), _privacy(card), _membership(card), _cohort(card), _results(card), _limits(card))
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(card: ModelCard) -> str:
    return "\n".join(
        (
            f"# {card.name}, version {card.version}",
            "",
            f"**{card.use}**",
            "",
            card.intended_use,
            "",
            f"- Weights (SHA-256): `{card.model_hash}`",
            f"- Input: {card.spec.history_minutes} minutes of glucose readings",
            f"- Model: one LSTM layer of {card.spec.hidden_size} units; it forecasts the change from the last reading",
            "- Output: glucose every 5 minutes up to 60, with the 5, 25, 50, 75 and 95% quantiles, 40 to 400 mg/dL",
        )
    )


def _privacy(card: ModelCard) -> str:
    p = card.privacy
    rows = (
        ("unit", p.unit),
        ("neighbouring data sets", p.relation),
        ("epsilon (largest over the hospitals)", f"{p.epsilon:.4g}"),
        ("delta", f"{p.delta:g}"),
        ("rounds", str(p.rounds)),
        ("mechanism", p.mechanism),
        ("noise drawn from", _NOISE_WORDS[p.noise_source]),
    )
    return f"## Privacy\n\n{privacy_statement(card)}\n\n{_table(('statement', 'value'), rows)}"


def _membership(card: ModelCard) -> str:
    if not card.membership:
        return ""
    note = (
        "An attacker with a person's readings, the model and its public start guesses whether the person was trained "
        "on, from how much the model improved on that person. AUC 0.5 is a coin toss, 1 is certainty. A measured "
        "attack is no bound; the epsilon above is."
    )
    head = ("model", "AUC", "95% interval", "trained on", "held out")
    rows = tuple(
        (m.model, f"{m.auc:.2f}", f"{m.low:.2f} to {m.high:.2f}", str(m.members), str(m.others))
        for m in card.membership
    )
    return f"## Membership inference\n\n{note}\n\n{_table(head, rows)}"


def _cohort(card: ModelCard) -> str:
    rows = tuple((t.node, str(t.declared_training_patients), str(t.declared_heldout_patients)) for t in card.trained_on)
    note = "Numbers of patients are those each hospital declared; nobody is in both columns."
    return f"## Trained on\n\n{note}\n\n{_table(('hospital', 'trained on', 'held out'), rows)}"


def _results(card: ModelCard) -> str:
    if not card.results:
        return "## Results on held-out people\n\nNone were recorded: do not use this model before measuring it."
    head = (
        *("site", "model", "minutes", "people", "forecasts", "RMSE mg/dL", "MAE mg/dL", "MARD %"),
        *("Clarke A+B %", "90% interval covers %"),
    )
    rows = tuple(_result_row(r) for r in card.results)
    note = "Nobody below was trained on. Baselines stand beside the model; lower errors are better."
    return f"## Results on held-out people\n\n{note}\n\n{_table(head, rows)}"


def _result_row(r: CardResult) -> tuple[str, ...]:
    numbers = (r.rmse_mg_dl, r.mae_mg_dl, r.mard_percent, r.clarke_ab_percent, r.coverage_90_percent)
    names = (r.site, r.model, str(r.horizon_minutes), str(r.patients), str(r.forecasts))
    return (*names, *("" if n is None else f"{n:.1f}" for n in numbers))


def _limits(card: ModelCard) -> str:
    return "## Limits\n\n" + "\n".join(f"- {limit}" for limit in card.limits)


def _table(head: tuple[str, ...], rows: tuple[tuple[str, ...], ...]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
