"""The training plan: what the aggregator proposes and every hospital checks against its own ceilings.

Clip, sampler, noise and the event that accounts for them travel as one frozen value, so they cannot disagree
(after the execution plan of jax_privacy).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from data_schemas.frozen import Frozen, later
from data_schemas.units import DELTA, HORIZON_MINUTES

# The unit of privacy is part of every statement; weaker units are named, never implied.
PrivacyUnit = Literal["patient", "day (weaker than patient)", "window (weaker than patient)"]
# How a round's updates become one step; defined in pipeline/robust.py.
AggregationRule = Literal["patient-weighted-mean", "norm-bounded-mean"]
# Whether the aggregator sees updates, or their sum alone (docs/secure-aggregation.md).
AggregationMode = Literal["plain", "secure"]
RELATION = "add or remove one patient's whole record at one hospital"


class PrivacyEvent(Frozen):
    """One accountable release: `steps` Gaussian mechanisms on Poisson samples; sample_rate 1 takes everybody.

    noise_multiplier 0 is no privacy at all: its epsilon is infinite, so no ceiling admits it.
    """

    sample_rate: float = Field(gt=0, le=1)
    noise_multiplier: float = Field(ge=0)
    steps: int = Field(ge=1)


class PrivacyPlan(Frozen):
    """Per-patient clipping and noise of every local step, at each hospital in full."""

    unit: PrivacyUnit = "patient"
    epsilon: float = Field(gt=0)
    delta: float = Field(default=DELTA, gt=0, lt=1)
    max_grad_norm: float = Field(gt=0)
    sample_rate: float = Field(gt=0, le=1)
    noise_multiplier: float = Field(gt=0)


class ModelSpec(Frozen):
    """Shape of the forecaster: history in minutes, LSTM hidden size."""

    history_minutes: int = Field(ge=60, le=1440, multiple_of=5)
    hidden_size: int = Field(ge=4, le=512)


class LocalSpec(Frozen):
    """One hospital's share of a round: Poisson-sampled patients, k windows each, plain SGD.

    horizon_curves: cosine curves over the 12 horizons that a step may bend forecasts along; 12 is freely.
    """

    steps_per_round: int = Field(ge=1, le=1000)
    windows_per_patient: int = Field(ge=1, le=256)
    learning_rate: float = Field(gt=0)
    trainable: Literal["all", "head"]
    horizon_curves: int = later(len(HORIZON_MINUTES), ge=1, le=len(HORIZON_MINUTES))


class ServerSpec(Frozen):
    """The server step on the mean of updates under the federation's rule; the last rounds' models are averaged."""

    learning_rate: float = Field(gt=0)
    momentum: float = Field(ge=0, lt=1)
    average_last_rounds: int = Field(ge=1)
    rule: AggregationRule = "patient-weighted-mean"


class CreditPlan(Frozen):
    """One noised vector per node and credit epoch. Held-out people have their own budget."""

    rounds_per_epoch: int = Field(ge=1)
    windows_per_patient: int = Field(ge=1)
    clip_mg_dl: float = Field(gt=0)
    noise_multiplier: float = Field(gt=0)
    epsilon: float = Field(gt=0)
    pot_micro_credits_per_round: int = Field(ge=1, lt=2**53)


class TrainingPlan(Frozen):
    """Everything a round needs to be repeated, except readings and randomness.

    seed None draws Poisson samples and noise from a cryptographically secure source; a number makes a run repeatable
    and is for tests and for the demo on public data only.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")
    model: ModelSpec
    rounds: int = Field(ge=1, le=10_000)
    local: LocalSpec
    server: ServerSpec
    privacy: PrivacyPlan
    credit: CreditPlan
    seed: int | None = Field(default=None, ge=0)

    @property
    def round_event(self) -> PrivacyEvent:
        """What one local round costs a patient of the training cohort."""
        p = self.privacy
        return PrivacyEvent(
            sample_rate=p.sample_rate, noise_multiplier=p.noise_multiplier, steps=self.local.steps_per_round
        )

    @property
    def release_event(self) -> PrivacyEvent:
        """What one credit epoch's vector costs a held-out patient."""
        return PrivacyEvent(sample_rate=1.0, noise_multiplier=self.credit.noise_multiplier, steps=1)

    @property
    def credit_epochs(self) -> int:
        """Number of credit epochs in the run."""
        return -(-self.rounds // self.credit.rounds_per_epoch)

    @model_validator(mode="after")
    def _average_within_run(self) -> TrainingPlan:
        if self.server.average_last_rounds > self.rounds:
            raise ValueError("server.average_last_rounds exceeds rounds")
        return self
