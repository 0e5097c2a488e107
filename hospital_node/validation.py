"""Validation: the Great Expectations suite in data_schemas/expectations decides which readings are accepted.

The JSON is what runs: rules, thresholds and severities are there; this module measures, runs the suite and keeps
the account. GX results hold raw values, so they stay inside this module; what leaves it is rows (to the node's own
store) and counts.
"""

from __future__ import annotations

import functools
import json
import logging
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
import pandas as pd

from data_schemas.errors import BadInput
from data_schemas.reading import COLUMNS, Flag, QualityReport, Readings, ValidReadings
from data_schemas.units import SENSOR_MAX_MG_DL, SENSOR_MIN_MG_DL

Severity = Literal["reject-file", "quarantine", "duplicate", "flag"]
Stage = Literal["reading", "stamp", "series"]
Bool: TypeAlias = npt.NDArray[np.bool_]

SUITE = Path(__file__).parents[1] / "data_schemas" / "expectations" / "cgm.json"
_CHANNELS = ("carbs_g", "bolus_u", "basal_u_per_h", "heart_rate")
# Two readings closer than a grid step are compared as if a step apart: rounding alone would look like a jump.
_JUMP_FLOOR_MIN = 5.0


@dataclass(frozen=True, slots=True)
class Rule:
    """One expectation: what GX runs (type, kwargs) and what it means here.

    stage: `reading` rules look at a row alone, `stamp` rules at the rows of one person and second, `series` rules
    at a person's accepted readings in order.
    """

    name: str
    severity: Severity
    stage: Stage
    explanation: str
    type: str
    kwargs: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Suite:
    """The rules in the order in which they claim a row: a row that breaks several is counted under the first."""

    name: str
    rules: tuple[Rule, ...]

    def at(self, stage: Stage) -> tuple[Rule, ...]:
        """Return the rules of one stage."""
        return tuple(rule for rule in self.rules if rule.stage == stage)


def load_suite(path: Path = SUITE) -> Suite:
    """Return the suite stored as JSON.

    Raises BadInput when a rule lacks its name, severity, stage or explanation.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        rules = tuple(
            Rule(**{key: entry["meta"][key] for key in ("name", "severity", "stage", "explanation")}, **_run_by(entry))
            for entry in document["expectations"]
        )
    except OSError as error:
        raise BadInput(f"suite {path} cannot be read: {error.strerror}", "check the path") from None
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(
            f"suite {path} is not a suite: {error}", "compare it with the one that comes with Islet"
        ) from None
    wrong = [rule.name for rule in rules if not _known(rule)]
    if wrong:
        raise BadInput(
            f"suite {path}: rules {', '.join(wrong)} have an unknown severity or stage",
            f"severities: {', '.join(get_args(Severity))}; stages: {', '.join(get_args(Stage))}",
        )
    return Suite(document["name"], rules)


def validate(
    readings: Readings, suite: Suite, now: datetime | None = None
) -> tuple[ValidReadings, pd.DataFrame, QualityReport]:
    """Return accepted readings, quarantined rows (canonical columns and the `rule` each broke) and the account.

    now: what "in the future" is measured against; None takes the clock. The report is always balanced. Raises
    BadInput when a rule of severity reject-file is broken.
    """
    frame = readings.frame.reset_index(drop=True)
    first = _claims(suite.at("reading"), _measure_reading(frame, now or datetime.now(UTC)))
    left = frame[first.isna()]
    claims = pd.concat([first.dropna(), _claims(suite.at("stamp"), _measure_stamp(left))])
    claims = claims.dropna()
    rule_of = pd.Series(claims.to_numpy(), index=claims.index, dtype="str")
    dropped = rule_of[rule_of.isin(_names(suite, "duplicate"))]
    accepted = _clamp(_keep_doses(left, dropped.index).drop(index=rule_of.index, errors="ignore"))
    accepted = accepted.sort_values(["patient", "measured_at"], ignore_index=True).astype(COLUMNS)
    held = rule_of.drop(index=dropped.index)
    quarantined = frame.loc[held.index].assign(rule=held).sort_values("row", ignore_index=True)
    report = QualityReport(
        rows_in=readings.rows_in,
        accepted=len(accepted),
        quarantined=_count(held),
        duplicates=_count(dropped),
        flagged=_flagged(suite.at("series"), accepted),
        patients=int(accepted["patient"].nunique()),
    )
    return ValidReadings(accepted), quarantined, report


def render_report(report: QualityReport) -> str:
    """Return the account in plain text: one line that adds up, then counts by rule; no values."""
    quarantined, duplicates = sum(report.quarantined.values()), sum(report.duplicates.values())
    total = f"rows in {report.rows_in:,} = {report.accepted:,} accepted + {quarantined:,} quarantined"
    lines = [
        f"{total} + {duplicates:,} duplicates",
        f"people {report.patients:,}",
    ]
    for title, counts in (
        ("quarantined", report.quarantined),
        ("duplicate", report.duplicates),
        ("flagged", report.flagged),
    ):
        lines += [f"  {title:<11} {rule:<24} {count:>10,}" for rule, count in sorted(counts.items())]
    return "\n".join(lines)


def _run_by(entry: dict[str, Any]) -> dict[str, Any]:
    return {"type": entry["type"], "kwargs": entry["kwargs"]}


def _known(rule: Rule) -> bool:
    return rule.severity in get_args(Severity) and rule.stage in get_args(Stage)


def _names(suite: Suite, severity: Severity) -> list[str]:
    return [rule.name for rule in suite.rules if rule.severity == severity]


def _count(rules: pd.Series) -> dict[str, int]:
    return {str(name): int(count) for name, count in rules.value_counts().sort_index().items()}


def _bit(frame: pd.DataFrame, flag: Flag) -> pd.Series:
    return ((frame["flags"] & int(flag)) != 0).astype("int64")


def _measure_reading(frame: pd.DataFrame, now: datetime) -> pd.DataFrame:
    """Return the rows with what the rules on single rows look at."""
    ahead = (frame["measured_at"] - pd.Timestamp(now)).dt.total_seconds() / 60
    return frame.assign(
        clock_change=_bit(frame, Flag.CLOCK_CHANGE),
        unreadable=_bit(frame, Flag.UNREADABLE),
        minutes_ahead_of_now=ahead,
        year=frame["measured_at"].dt.year,
    )


def _measure_stamp(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the rows with what else the same person has at their second and right beside it."""
    stamp = frame.groupby(["patient", "measured_at"], sort=False)
    value = frame.groupby(["patient", "measured_at", "glucose_mg_dl"], sort=False)
    return pd.DataFrame(
        {
            "row": frame["row"],
            "values_at_stamp": stamp["glucose_mg_dl"].transform("nunique"),
            "copy": value.cumcount(),
            "difference_within_150_s_mg_dl": _difference_beside(frame),
        },
        index=frame.index,
    )


def _difference_beside(frame: pd.DataFrame) -> pd.Series:
    """Return the larger difference to the readings before and after; of those within 150 s (half a grid step)."""
    ordered = frame.sort_values(["patient", "measured_at", "row"])
    same = (ordered["patient"] == ordered["patient"].shift()).to_numpy()
    near = same & (ordered["measured_at"].diff().dt.total_seconds() <= 150).to_numpy()
    before = ordered["glucose_mg_dl"].diff().abs().where(near)
    return pd.concat([before, before.shift(-1)], axis=1).max(axis=1).reindex(frame.index)


def _measure_series(frame: pd.DataFrame) -> pd.DataFrame:
    """Return accepted rows with their distance to the sensor's own reading before; interpolated rows have none."""
    own = frame[(frame["flags"] & int(Flag.INTERPOLATED)) == 0]
    same = (own["patient"] == own["patient"].shift()).to_numpy()
    minutes = (own["measured_at"].diff().dt.total_seconds() / 60).where(same)
    step = own["glucose_mg_dl"].diff().abs().where(same)
    inside = own["glucose_mg_dl"].between(SENSOR_MIN_MG_DL, SENSOR_MAX_MG_DL, inclusive="neither")
    run = (~(same & (step == 0) & inside)).cumsum()
    censored = int(Flag.CENSORED_LOW | Flag.CENSORED_HIGH)
    return pd.DataFrame(
        {
            "patient": frame["patient"],
            "minutes_since_last": minutes,
            "step_mg_dl_per_min": step / minutes.clip(lower=_JUMP_FLOOR_MIN),
            "flat_minutes": minutes.fillna(0.0).where(same & (step == 0) & inside, 0.0).groupby(run).cumsum(),
            "interpolated": _bit(frame, Flag.INTERPOLATED),
            "censored": ((frame["flags"] & censored) != 0).astype("int64"),
        },
        index=frame.index,
    )


def _keep_doses(frame: pd.DataFrame, copies: pd.Index) -> pd.DataFrame:
    """Return the rows, where a reading's first row takes the largest dose and rate that its copies carry."""
    if copies.empty:
        return frame
    same = ["patient", "measured_at", "glucose_mg_dl"]
    return frame.assign(**frame.groupby(same, sort=False)[list(_CHANNELS)].transform("max"))


def _clamp(frame: pd.DataFrame) -> pd.DataFrame:
    """Values at or beyond an end of the sensor's range become that end, marked as censored."""
    glucose = frame["glucose_mg_dl"]
    low = np.where(glucose <= SENSOR_MIN_MG_DL, int(Flag.CENSORED_LOW), 0)
    high = np.where(glucose >= SENSOR_MAX_MG_DL, int(Flag.CENSORED_HIGH), 0)
    return frame.assign(
        glucose_mg_dl=glucose.clip(SENSOR_MIN_MG_DL, SENSOR_MAX_MG_DL), flags=frame["flags"] | low | high
    )


def _claims(rules: tuple[Rule, ...], measured: pd.DataFrame) -> pd.Series:
    """Return per row the name of the first rule that it breaks, or NaN.

    Raises BadInput when the file as a whole is rejected.
    """
    claim = pd.Series(np.nan, index=measured.index, dtype="object")
    at = pd.Series(measured.index, index=measured["row"])
    for rule, result in reversed(list(zip(rules, _run(rules, measured), strict=True))):
        if rule.severity == "reject-file":
            if not result["success"]:
                raise BadInput(f"the export breaks the rule {rule.name}", rule.explanation)
            continue
        broken = result["result"].get("unexpected_index_list") or []
        claim[at[[entry["row"] for entry in broken]]] = rule.name
    return claim


def _flagged(rules: tuple[Rule, ...], accepted: pd.DataFrame) -> dict[str, int]:
    """Return rows that break a flag rule, by rule; a rule about the whole cohort counts 1."""
    if accepted.empty:
        return {}
    results = zip(rules, _run(rules, _measure_series(accepted), counts_only=True), strict=True)
    counts = {rule.name: int(r["result"].get("unexpected_count", 0 if r["success"] else 1)) for rule, r in results}
    return {name: count for name, count in counts.items() if count}


def _run(rules: tuple[Rule, ...], frame: pd.DataFrame, *, counts_only: bool = False) -> list[dict[str, Any]]:
    """Return GX's result for each rule, in order."""
    if not len(frame):
        return [{"success": True, "result": {}} for _ in rules]
    batch = _batch_definition().get_batch(batch_parameters={"dataframe": frame})
    wanted: dict[str, Any] = {"result_format": "BASIC"}
    if not counts_only:
        wanted = {
            "result_format": "COMPLETE",
            "unexpected_index_column_names": ["row"],
            "include_unexpected_rows": False,
        }
    outcome = batch.validate(_gx_suite(rules), result_format=wanted)
    by_name = {result.expectation_config.meta["name"]: result for result in outcome.results}
    return [_plain(by_name[rule.name], rule) for rule in rules]


def _plain(result: Any, rule: Rule) -> dict[str, Any]:
    if result.exception_info and result.exception_info.get("raised_exception"):
        # GX's own text can quote values, so only the rule is named.
        raise BadInput(f"the rule {rule.name} cannot run on these columns", "compare the suite with the one of Islet")
    return {"success": bool(result.success), "result": dict(result.result)}


def _gx_suite(rules: tuple[Rule, ...]) -> Any:
    import great_expectations as gx

    entries = [{"type": rule.type, "kwargs": rule.kwargs, "meta": {"name": rule.name}} for rule in rules]
    return gx.ExpectationSuite(name="stage", expectations=entries)


@functools.cache
def _batch_definition() -> Any:
    """Return where GX takes a frame from: an ephemeral context, so nothing is written, and no analytics."""
    os.environ["GX_ANALYTICS_ENABLED"] = "false"
    logging.getLogger("great_expectations").setLevel(logging.WARNING)
    import great_expectations as gx

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False, "metric_calculations": False}
    asset = context.data_sources.add_pandas("node").add_dataframe_asset("readings")
    return asset.add_batch_definition_whole_dataframe("all")
