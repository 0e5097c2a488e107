"""What-if: what somebody plans to eat and inject, sent with readings to see a second, simulated curve.

These are inputs only. No answer repeats them, and there is no field for a target: the simulation can be asked what a
plan would do, never which plan to follow.
"""

from __future__ import annotations

from pydantic import Field

from data_schemas.frozen import Frozen
from data_schemas.moment import Moment


class Planned(Frozen, strict=True):
    """One planned meal or rapid-acting insulin, or both, between the newest reading and 60 minutes after it."""

    at: Moment
    carbs_g: float = Field(default=0.0, ge=0, le=300)
    insulin_u: float = Field(default=0.0, ge=0, le=50)


class Scenario(Frozen, strict=True):
    """A plan, and the two numbers of this person that it is simulated with.

    insulin_sensitivity: by how much one unit lowers this person's glucose in the end, in the request's unit.
    carbohydrate_ratio: grams of carbohydrate that one unit covers. Neither has a default: they differ several-fold
    between people, and the node does not know them.
    """

    planned: tuple[Planned, ...] = Field(min_length=1, max_length=20)
    insulin_sensitivity: float | None = Field(default=None, gt=0, le=500)
    carbohydrate_ratio: float | None = Field(default=None, gt=0, le=200)
