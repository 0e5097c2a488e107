"""The expectation suite's rules on single rows and neighbours, for rows that come one at a time.

Great Expectations takes seconds to load and looks at whole tables. A post of a few readings is judged by the same
rules: their names and thresholds are read from the same JSON.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

from data_schemas.errors import BadInput
from hospital_node.validation import Suite, load_suite

# column of the suite -> what it is of a single row.
_COLUMNS = ("glucose_mg_dl", "minutes_ahead_of_now", "year")
_BESIDE = "difference_within_150_s_mg_dl"
_BETWEEN = "expect_column_values_to_be_between"
_NOT_IN_SET = "expect_column_values_to_not_be_in_set"


@dataclass(frozen=True, slots=True)
class _Limit:
    name: str
    column: str
    low: float
    high: float
    codes: frozenset[float] = frozenset()

    def holds(self, value: float) -> bool:
        """Whether a value is within the limits and is none of the codes."""
        return self.low <= value <= self.high and value not in self.codes


@dataclass(frozen=True, slots=True)
class RowRules:
    """Limits in the suite's order; the first that a row breaks claims it."""

    limits: tuple[_Limit, ...]
    beside_limit: _Limit

    def broken(self, time_s: int, glucose_mg_dl: float, now_s: float) -> str | None:
        """Return the rule that a row breaks by itself, or None."""
        measured = {
            "glucose_mg_dl": glucose_mg_dl,
            "minutes_ahead_of_now": (time_s - now_s) / 60,
            "year": datetime.fromtimestamp(max(time_s, 0), tz=UTC).year,
        }
        return next((r.name for r in self.limits if not r.holds(measured[r.column])), None)

    def beside(self, glucose_mg_dl: float, near: Iterable[float]) -> str | None:
        """Return the rule on readings within two and a half minutes, if one of them differs by too much, or None."""
        worst = max((abs(glucose_mg_dl - other) for other in near), default=0.0)
        return self.beside_limit.name if worst > self.beside_limit.high else None


def row_rules(suite: Suite | None = None) -> RowRules:
    """Read the rules from the suite (None: Islet's own). Raises BadInput when it lacks one that is needed here."""
    limits = [
        _Limit(
            rule.name,
            str(rule.kwargs["column"]),
            float(rule.kwargs.get("min_value", "-inf")),
            float(rule.kwargs.get("max_value", "inf")),
            frozenset(map(float, rule.kwargs.get("value_set", ()))),
        )
        for rule in (suite or load_suite()).rules
        if rule.type in (_BETWEEN, _NOT_IN_SET) and rule.severity == "quarantine"
    ]
    alone = tuple(limit for limit in limits if limit.column in _COLUMNS)
    beside = [limit for limit in limits if limit.column == _BESIDE]
    if {limit.column for limit in alone} != set(_COLUMNS) or not beside:
        raise BadInput("the suite lacks limits on glucose, time or neighbours", "use the suite that comes with Islet")
    return RowRules(alone, beside[0])
