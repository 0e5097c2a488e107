"""Validation: the Great Expectations suite in data_schemas/expectations decides which readings are accepted.

The JSON is what runs: rules, thresholds and severities are there; this module has the rows measured and judged, and
keeps the account.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pandas as pd

from data_schemas.errors import BadInput
from data_schemas.reading import Flag, QualityReport, Readings, ValidReadings
from data_schemas.units import SENSOR_MAX_MG_DL, SENSOR_MIN_MG_DL
from hospital_node.judgement import Judge
from hospital_node.measures import measure_people, measure_reading, measure_series, measure_stamp, seconds_of
from hospital_node.suites import SUITE, Rule, Severity, Stage, Suite, load_suite

__all__ = ["SUITE", "Rule", "Suite", "check", "flag_cohort", "load_suite", "render_report", "validate"]
_CHANNELS = ("carbs_g", "bolus_u", "basal_u_per_h", "heart_rate")


def validate(
    readings: Readings, suite: Suite, now: datetime | None = None
) -> tuple[ValidReadings, pd.DataFrame, QualityReport]:
    """Return accepted readings, quarantined rows (canonical columns and the `rule` each broke) and the account.

    now: what "in the future" is measured against; None takes the clock. The report is always balanced. Raises
    BadInput when a rule of severity reject-file is broken.
    """
    judge = Judge(suite)
    valid, quarantined, report, people = check(readings, judge, now or datetime.now(UTC))
    return valid, quarantined, replace(report, flagged=report.flagged | flag_cohort(people, judge))


def check(
    readings: Readings, judge: Judge, now: datetime
) -> tuple[ValidReadings, pd.DataFrame, QualityReport, pd.DataFrame]:
    """Return what validate() does, but for the cohort's rules, and one row for each person (measure_people).

    For a part of an import that holds everything of the people in it; a judge serves all parts of one import.
    """
    frame = readings.frame.reset_index(drop=True)
    first, odd = _claims(judge, "reading", measure_reading(frame, now))
    left = frame.drop(index=first.index) if len(first) else frame
    second, odder = _claims(judge, "stamp", measure_stamp(left))
    rule_of = pd.concat([first, second])
    is_copy = rule_of.isin(_names(judge.suite, "duplicate"))
    dropped, held = rule_of[is_copy], rule_of[~is_copy]
    accepted = _keep_doses(left, dropped.index)
    accepted = _in_order(_clamp(accepted.drop(index=second.index) if len(second) else accepted))
    quarantined = frame.loc[held.index].assign(rule=held).sort_values("row", ignore_index=True)
    people = measure_people(accepted)
    report = QualityReport(
        rows_in=readings.rows_in,
        accepted=len(accepted),
        quarantined=_count(held),
        duplicates=_count(dropped),
        flagged=odd | odder | _claims(judge, "series", measure_series(accepted))[1],
        patients=len(people),
    )
    return ValidReadings(accepted), quarantined, report, people


def flag_cohort(people: pd.DataFrame, judge: Judge) -> dict[str, int]:
    """Return how many people break each rule about people; a rule about all of them together counts 1."""
    return _claims(judge, "cohort", people)[1]


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


def _in_order(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the rows by person and time, with new numbers."""
    person, second = pd.factorize(frame["patient"], sort=True)[0], seconds_of(frame)
    if (np.diff(person) < 0).any() or ((np.diff(person) == 0) & (np.diff(second) < 0)).any():
        frame = frame.iloc[np.lexsort((second, person))]
    return frame.reset_index(drop=True)


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
    clamped = glucose.clip(SENSOR_MIN_MG_DL, SENSOR_MAX_MG_DL)
    return frame.assign(glucose_mg_dl=clamped, flags=(frame["flags"] | low | high).astype("int32"))


def _claims(judge: Judge, stage: Stage, measured: pd.DataFrame) -> tuple[pd.Series, dict[str, int]]:
    """Return the name of the first rule that claims a row, for the rows that one claims, and the counts of the flags.

    A flag about the whole table counts 1. Raises BadInput when the file as a whole is rejected.
    """
    claim = np.full(len(measured), -1, dtype=np.int64)
    judged = judge.broken(stage, measured)
    flagged = {
        rule.name: int(not holds) if rule.of_whole_table else int(broken.sum())
        for rule, holds, broken in judged
        if rule.severity == "flag" and not holds
    }
    for number, (rule, holds, broken) in reversed(list(enumerate(judged))):
        if rule.severity == "reject-file" and not holds:
            raise BadInput(f"the export breaks the rule {rule.name}", rule.explanation)
        if rule.severity in {"quarantine", "duplicate"}:
            claim[broken] = number
    claimed = np.flatnonzero(claim >= 0)
    names = np.array([rule.name for rule, _, _ in judged], dtype=object)
    return pd.Series(names[claim[claimed]], index=measured.index[claimed], dtype="str"), flagged
