"""A node's noise: from the operating system's cryptographic generator, unless plan AND hospital name a seed."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from data_schemas.canonical import canonical_bytes
from data_schemas.plan import TrainingPlan
from hospital_node.ceilings import seeded
from hospital_node.settings import NodeSettings

if TYPE_CHECKING:
    from hospital_node.budget import NoiseKind
    from pipeline.noise import NoiseSource


def noise_kind(settings: NodeSettings, plan: TrainingPlan) -> NoiseKind:
    """Name the source that noise_source gives, for the budget book."""
    return "seeded" if seeded(settings, plan) else "secure"


def noise_source(settings: NodeSettings, plan: TrainingPlan, run: str, purpose: str) -> NoiseSource:
    """Randomness of one task; `purpose` names it within the run, for instance "round 3".

    Seeded randomness follows from both seeds, node, run and purpose, so a replay after a crash is identical.
    """
    from pipeline.noise import SecureNoise, SeededNoise

    if not seeded(settings, plan):
        return SecureNoise()
    value = {
        "plan_seed": str(plan.seed),
        "node_seed": str(settings.seed),
        "node": settings.name,
        "run": run,
        "purpose": purpose,
    }
    return SeededNoise(int.from_bytes(hashlib.sha256(canonical_bytes(value)).digest()[:7], "big"))
