"""What MLflow shows in words and numbers: descriptions, tags, parameters, the points of a round. No MLflow in here."""

from __future__ import annotations

import base64
import importlib.metadata
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from aggregator.progress import RoundSummary
from data_schemas.canonical import content_hash
from data_schemas.ledger import MemberEntry
from data_schemas.plan import RELATION, TrainingPlan
from data_schemas.units import RESEARCH_LABEL
from pipeline.model_card import MODEL_NAME, ModelCard, privacy_statement

_LIBRARIES = ("islet-fl", "flwr", "mlflow", "numpy", "onnxruntime", "opacus", "torch")
EXPERIMENT = "islet-federation"
EXPERIMENT_NOTE = f"""Each run is one federation run: hospitals train one glucose forecaster together, and no reading \
leaves a hospital.

**How to read a run.** *Overview* has the plan as parameters and, as datasets, the hospitals with their declared \
numbers of patients. *Model metrics* has one point per round: `epsilon/<hospital>` is the privacy spent so far \
(it only rises); `update_norm` and `cosine_to_mean` show what a hospital's update did, `credit_micro` what it \
earned in each credit epoch, in millionths. Series such as `rmse_30/<site>/<model>` are errors in mg/dL, 30 \
minutes ahead, on people nobody trained on; `mae`, `bias`, `skill`, `lag_minutes`, `coverage80` and the alarms \
stand beside it, and every baseline beside the model. *Artifacts* has the model card, the plots, the privacy and \
credit records, and `evaluation/scores.html` with every table (`scores.json` with every number).

{RESEARCH_LABEL}"""
MODEL_NOTE = f"""LSTM forecaster of glucose 5 to 60 minutes ahead, trained by several hospitals under patient-level \
differential privacy.

`champion` is the version to serve; `challenger` is the newest version that is not. Each version holds an ONNX model, \
the flat weights, a model card and a manifest of hashes. Where the package `islet-fl` is installed, load one with \
`mlflow.pyfunc.load_model("models:/{MODEL_NAME}@champion")`.

{RESEARCH_LABEL}"""


# What a reviewer looks at first, newest run first, as MLflow names the columns of its table of runs.
REVIEW_VIEW = "reviewer"
_REVIEW_COLUMNS = {
    "metrics.`epsilon_max`": 110,
    "metrics.`rmse_30/pooled/federated`": 200,
    "metrics.`rmse_30/pooled/personal`": 195,
    "metrics.`rmse_30/pooled/persistence`": 210,
    "metrics.`rmse_60/pooled/federated`": 200,
    "metrics.`rmse_60/pooled/persistence`": 210,
    "params.`rounds`": 80,
    "params.`privacy.noise_multiplier`": 190,
    "tags.`islet.hospitals`": 300,
    "tags.`privacy.noise`": 260,
}
_FIRST_COLUMNS = {"attributes.`Run Name`": 190, "runDateAndNestInfo": 150, "duration": 85}


def review_view() -> tuple[str, str]:
    """Tag of the experiment, name and value, that MLflow reads as a shared view of its runs: deflated JSON, base64."""
    widths = _FIRST_COLUMNS | _REVIEW_COLUMNS
    state = {
        "selectedColumns": list(_REVIEW_COLUMNS),
        "columnOrder": list(widths),
        "columnWidths": widths,
        "orderByKey": "attributes.start_time",
        "orderByAsc": False,
    }
    packed = base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()
    return f"mlflow.sharedViewState.{REVIEW_VIEW}", f"deflate;{packed}"


def round_values(summary: RoundSummary) -> dict[str, float]:
    """One point of every series: by hospital, then of the round."""
    values = {f"epsilon/{node}": value for node, value in summary.epsilon_by_node.items()}
    values |= {f"update_norm/{node}": value for node, value in summary.update_norms.items()}
    values |= {f"cosine_to_mean/{node}": value for node, value in summary.cosine_to_mean.items()}
    counts = {"round/admitted": len(summary.admitted), "round/rejected": len(summary.rejected)}
    values |= {name: float(count) for name, count in counts.items()} | {"round/seconds": summary.seconds}
    if summary.epsilon_by_node:
        values["epsilon_max"] = max(summary.epsilon_by_node.values())
    return values


def run_tags(
    run: str, federation: str, plan: TrainingPlan, members: Sequence[MemberEntry], git_sha: str | None
) -> dict[str, str]:
    """Tags that replace MLflow's own guesses at user, path and host."""
    names = ", ".join(member.node for member in members)
    tags = {
        "mlflow.user": "aggregator",
        "mlflow.source.name": "islet",
        "mlflow.source.type": "JOB",
        "mlflow.note.content": f"Federation run of {len(members)} hospitals ({names}). Training goes on.",
        "islet.run": run,
        "islet.federation": federation,
        "islet.hospitals": names,
        "islet.plan_hash": content_hash(plan),
        "privacy.unit": plan.privacy.unit,
        "privacy.relation": RELATION,
        "privacy.noise": "secure" if plan.seed is None else "seeded: a demonstration, no protection",
    }
    return tags | ({"mlflow.source.git.commit": git_sha} if git_sha else {})


def run_note(card: ModelCard, version: str, alias: str) -> str:
    """Describe a finished run: its model, its privacy and where to look."""
    hospitals = ", ".join(f"{t.node} ({t.declared_training_patients})" for t in card.trained_on)
    return (
        f"**Model {MODEL_NAME} version {version}, alias `{alias}`.** {privacy_statement(card)}\n\n"
        f"Hospitals, with declared training patients: {hospitals}.\n\nModel card, plots, privacy and credit records "
        "are under *Artifacts*; errors on held-out people, baselines beside the model, under *Model metrics*.\n\n"
        f"{RESEARCH_LABEL}"
    )


def privacy_tags(card: ModelCard) -> dict[str, str]:
    """Write the privacy statement as tags of a model version."""
    p = card.privacy
    values = {"unit": p.unit, "relation": p.relation, "epsilon": f"{p.epsilon:.6g}", "delta": f"{p.delta:g}"}
    values |= {"rounds": str(p.rounds), "noise": p.noise_source}
    return {f"privacy.{key}": value for key, value in values.items()}


def declaration(member: MemberEntry) -> dict[str, str]:
    """Describe a hospital's cohort as an MLflow dataset: what it declared, nothing computed from readings."""
    counts = {
        "declared_training_patients": member.declared_training_patients,
        "declared_heldout_patients": member.declared_heldout_patients,
    }
    return {
        "name": member.node,
        "digest": content_hash(member)[:16],
        "source_type": "hospital",
        "source": json.dumps({"readings": "stay at the hospital", "digest": "of the ledger's member entry"}),
        "profile": json.dumps(counts),
    }


def metric_name(name: str) -> str:
    """Replace what MLflow does not take in the name of a metric (anything but letters, digits and `_-. :/`) by `-`."""
    return re.sub(r"[^A-Za-z0-9_\-. :/]", "-", name)


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Write nested values under dotted names."""
    found: dict[str, str] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            found |= flat(item, f"{prefix}{key}.")
        else:
            found[prefix + key] = "none" if item is None else str(item)
    return found


def library_versions() -> dict[str, str]:
    """Name the libraries that a result depends on, as parameters."""
    return {f"version.{name}": _installed(name) or "source tree" for name in _LIBRARIES}


def requirements() -> list[str]:
    """Name what a model version needs to be loaded; a package run from its source tree has no version to ask for."""
    needed = ((name, _installed(name)) for name in ("islet-fl", "numpy", "onnxruntime"))
    return [f"{name}=={found}" for name, found in needed if found]


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
