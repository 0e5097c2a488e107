"""Training plans as TOML: what an experiment is, in one file. The noise is solved for, never typed in."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from data_schemas.errors import BadInput
from data_schemas.plan import TrainingPlan
from data_schemas.units import DELTA


def load_plan(
    path: Path, *, rounds: int | None = None, epsilon: float | None = None, seed: int | None = None
) -> TrainingPlan:
    """Read a plan and solve for the noise multipliers that its epsilons need at its rates and steps.

    rounds, epsilon and seed replace the file's own. Raises BadInput naming the key that is wrong.
    """
    from pipeline.accounting import calibrate

    try:
        raw: dict[str, Any] = tomllib.loads(path.read_text())
        privacy, credit, local = raw["privacy"], raw["credit"], raw["local"]
        raw["rounds"] = rounds or raw["rounds"]
        raw["seed"] = seed if seed is not None else raw.get("seed")
        privacy["epsilon"] = epsilon or privacy["epsilon"]
        delta = privacy.setdefault("delta", DELTA)
        raw["server"]["average_last_rounds"] = min(raw["server"]["average_last_rounds"], raw["rounds"])
        steps = raw["rounds"] * local["steps_per_round"]
        epochs = -(-raw["rounds"] // credit["rounds_per_epoch"])
        privacy["noise_multiplier"] = calibrate(privacy["epsilon"], delta, privacy["sample_rate"], steps)
        credit["noise_multiplier"] = calibrate(credit["epsilon"], delta, 1.0, epochs)
        return TrainingPlan.model_validate(raw)
    except OSError as error:
        raise BadInput(f"cannot read plan {path.name}", "give the path of a plan's TOML file") from error
    except tomllib.TOMLDecodeError as error:
        raise BadInput(f"plan {path.name} is not TOML: {error}", "mend the line it names") from error
    except KeyError as error:
        raise BadInput(f"plan {path.name} lacks {error}", "compare with data_schemas/plans/demo.toml") from error
    except ValidationError as error:
        where = ", ".join(".".join(map(str, e["loc"])) for e in error.errors())
        raise BadInput(f"plan {path.name} has wrong values at: {where}", "see docs/plans.md") from error


def load_calibrated(path: Path) -> TrainingPlan:
    """Read the JSON of a plan whose noise was solved for before. Raises BadInput naming what is wrong."""
    try:
        return TrainingPlan.model_validate_json(path.read_bytes())
    except OSError as error:
        raise BadInput(f"cannot read plan {path.name}", "put the plan into the aggregator's folder") from error
    except ValidationError as error:
        where = ", ".join(".".join(map(str, e["loc"])) for e in error.errors())
        raise BadInput(f"plan {path.name} has wrong values at: {where}", "see docs/plans.md") from error
