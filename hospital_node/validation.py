"""Validation: the Great Expectations suite in data_schemas/expectations decides which readings are accepted.

The JSON is what runs: rules, thresholds and severities are there; this module measures, runs the suite and keeps
the account. GX results hold raw values, so they stay inside this module; what leaves it is rows (to the node's own
store) and counts.
"""

from __future__ import annotations

import functools
import logging
import os
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pandas as pd

from data_schemas.errors import BadInput
from data_schemas.reading import COLUMNS, Flag, QualityReport, Readings, ValidReadings
from data_schemas.units import SENSOR_MAX_MG_DL, SENSOR_MIN_MG_DL
from hospital_node.measures import measure_people, measure_reading, measure_series, measure_stamp
from hospital_node.suites import SUITE, Rule, Severity, Suite, load_suite

Bool: TypeAlias = npt.NDArray[np.bool_]

__all__ = ["SUITE", "Rule", "Suite", "check", "flag_cohort", "load_suite", "render_report", "validate"]
_CHANNELS = ("carbs_g", "bolus_u", "basal_u_per_h", "heart_rate")


def validate(
    readings: Readings, suite: Suite, now: datetime | None = None
) -> tuple[ValidReadings, pd.DataFrame, QualityReport]:
    """Return accepted readings, quarantined rows (canonical columns and the `rule` each broke) and the account.

    now: what "in the future" is measured against; None takes the clock. The report is always balanced. Raises
    BadInput when a rule of severity reject-file is broken.
    """
    valid, quarantined, report, people = check(readings, suite, now or datetime.now(UTC))
    return valid, quarantined, replace(report, flagged=report.flagged | flag_cohort(people, suite))


def check(
    readings: Readings, suite: Suite, now: datetime
) -> tuple[ValidReadings, pd.DataFrame, QualityReport, pd.DataFrame]:
    """Return what validate() does, but for the cohort's rules, and one row for each person (measure_people).

    For a part of an import that holds everything of the people in it.
    """
    frame = readings.frame.reset_index(drop=True)
    first = _claims(suite.at("reading"), measure_reading(frame, now))
    left = frame[first.isna()]
    claims = pd.concat([first.dropna(), _claims(suite.at("stamp"), measure_stamp(left)).dropna()])
    rule_of = pd.Series(claims.to_numpy(), index=claims.index, dtype="str")
    dropped = rule_of[rule_of.isin(_names(suite, "duplicate"))]
    accepted = _clamp(_keep_doses(left, dropped.index).drop(index=rule_of.index, errors="ignore"))
    if not _in_order(accepted):
        accepted = accepted.sort_values(["patient", "measured_at"])
    accepted = accepted.reset_index(drop=True).astype(COLUMNS)
    held = rule_of.drop(index=dropped.index)
    quarantined = frame.loc[held.index].assign(rule=held).sort_values("row", ignore_index=True)
    people = measure_people(accepted)
    report = QualityReport(
        rows_in=readings.rows_in,
        accepted=len(accepted),
        quarantined=_count(held),
        duplicates=_count(dropped),
        flagged=_flagged(suite.at("series"), measure_series(accepted)),
        patients=len(people),
    )
    return ValidReadings(accepted), quarantined, report, people


def flag_cohort(people: pd.DataFrame, suite: Suite) -> dict[str, int]:
    """Return how many people break each rule about people; a rule about all of them together counts 1."""
    return _flagged(suite.at("cohort"), people)


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


def _names(suite: Suite, severity: Severity) -> list[str]:
    return [rule.name for rule in suite.rules if rule.severity == severity]


def _count(rules: pd.Series) -> dict[str, int]:
    return {str(name): int(count) for name, count in rules.value_counts().sort_index().items()}


def _in_order(frame: pd.DataFrame) -> bool:
    """Whether the rows are sorted by person and time already, each person's rows together."""
    person, second = frame["patient"].to_numpy(), frame["measured_at"]
    changes = person[1:] != person[:-1]
    rising = bool((second.diff().dt.total_seconds().to_numpy()[1:][~changes] > 0).all())
    starts = person[np.append(True, changes)] if len(person) else person
    return rising and all(starts[1:] > starts[:-1])


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
    claim = np.full(len(measured), None, dtype=object)
    for rule, (success, broken) in reversed(list(zip(rules, _broken(rules, measured), strict=True))):
        if rule.severity != "reject-file":
            claim[broken] = rule.name
        elif not success:
            raise BadInput(f"the export breaks the rule {rule.name}", rule.explanation)
    return pd.Series(claim, index=measured.index, dtype="object").where(claim != None, np.nan)  # noqa: E711


def _flagged(rules: tuple[Rule, ...], measured: pd.DataFrame) -> dict[str, int]:
    """Return rows that break a flag rule, by rule; a rule about the whole table counts 1."""
    if measured.empty:
        return {}
    counts = {
        rule.name: int(not success) if rule.of_whole_table else int(broken.sum())
        for rule, (success, broken) in zip(rules, _broken(rules, measured), strict=True)
    }
    return {name: count for name, count in counts.items() if count}


def _broken(rules: tuple[Rule, ...], measured: pd.DataFrame) -> list[tuple[bool, Bool]]:
    """Return for each rule whether it holds as GX says, and which rows break it.

    A rule about one column alone says the same of equal rows: GX looks at each different row once, so that millions
    of readings cost what thousands do. A rule about the whole table gets the whole table.
    """
    if not len(measured):
        return [(True, np.zeros(0, dtype=np.bool_)) for _ in rules]
    single = tuple(rule for rule in rules if not rule.of_whole_table)
    whole = tuple(rule for rule in rules if rule.of_whole_table)
    columns = list(dict.fromkeys(rule.kwargs["column"] for rule in single))
    valued = {rule.kwargs["column"] for rule in single if rule.type != "expect_column_values_to_not_be_null"}
    which, first = _different([measured[name] if name in valued else measured[name].isna() for name in columns])
    # A name of its own for the row's number: the suite's columns keep theirs.
    sample = measured[columns].iloc[first].assign(_at=np.arange(len(first)))
    found: dict[str, tuple[bool, Bool]] = {}
    for rule, result in zip(single, _run(single, sample), strict=True):
        bad = np.zeros(len(first), dtype=np.bool_)
        bad[[entry["_at"] for entry in result["result"].get("unexpected_index_list") or []]] = True
        found[rule.name] = (result["success"], bad[which])
    for rule in whole:
        # The names of the columns need one row; a share needs the one column.
        table = measured[[rule.kwargs["column"]]] if "column" in rule.kwargs else measured.head(1)
        found[rule.name] = (_run((rule,), table, counts_only=True)[0]["success"], np.zeros(len(measured), np.bool_))
    return [found[rule.name] for rule in rules]


def _different(columns: list[pd.Series]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return, per row, the number of its combination of values, and where each combination first is."""
    code = np.zeros(len(columns[0]) if columns else 0, dtype=np.int64)
    for column in columns:
        own, values = pd.factorize(column, use_na_sentinel=False)
        code = pd.factorize(code * len(values) + own)[0].astype(np.int64)
    first = np.full(int(code.max()) + 1, len(code), dtype=np.int64)
    np.minimum.at(first, code, np.arange(len(code)))
    return code, first


def _run(rules: tuple[Rule, ...], frame: pd.DataFrame, *, counts_only: bool = False) -> list[dict[str, Any]]:
    """Return GX's result for each rule, in order."""
    if not rules:
        return []
    batch = _batch_definition().get_batch(batch_parameters={"dataframe": frame})
    wanted: dict[str, Any] = {"result_format": "BASIC"}
    if not counts_only:
        wanted = {
            "result_format": "COMPLETE",
            "unexpected_index_column_names": ["_at"],
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
    import great_expectations as gx

    # This logger sets its own level, and would tell of a temporary folder.
    logging.getLogger("great_expectations.data_context.types.base").setLevel(logging.WARNING)
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False, "metric_calculations": False}
    asset = context.data_sources.add_pandas("node").add_dataframe_asset("readings")
    return asset.add_batch_definition_whole_dataframe("all")
