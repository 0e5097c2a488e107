"""Great Expectations runs the suite's rules here, and nowhere else.

A rule about one column says the same of equal values. A judge asks GX about each different value once, in all the parts
of an import, so that millions of readings cost what hundreds of values do. A rule about a whole table gets the table.
GX results hold raw values, so they stay inside this module.
"""

from __future__ import annotations

import functools
import logging
import os
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pandas as pd

from data_schemas.errors import BadInput
from hospital_node.suites import Rule, Stage, Suite

Bool: TypeAlias = npt.NDArray[np.bool_]
Int: TypeAlias = npt.NDArray[np.int64]

_NOT_NULL = "expect_column_values_to_not_be_null"


class Judge:
    """One suite, and what GX said of the values it has seen. For one import: verdicts depend on the suite alone."""

    def __init__(self, suite: Suite) -> None:
        self.suite = suite
        self._columns: dict[tuple[Stage, str], _Column] = {}

    def broken(self, stage: Stage, measured: pd.DataFrame) -> list[tuple[Rule, bool, Bool]]:
        """Return each rule of a stage, in the suite's order, whether it holds, and which rows break it.

        A rule about the whole table breaks no single row. Raises BadInput when a rule cannot run on these columns.
        """
        rules = self.suite.at(stage)
        nothing = np.zeros(len(measured), dtype=np.bool_)
        if not len(measured):
            return [(rule, True, nothing) for rule in rules]
        whole = tuple(rule for rule in rules if rule.of_whole_table)
        of_values = self._of_values(stage, tuple(rule for rule in rules if not rule.of_whole_table), measured)
        found = {name: (not bad.any(), bad) for name, bad in of_values.items()}
        for rule, result in zip(whole, _run_whole(whole, measured), strict=True):
            found[rule.name] = (result["success"], nothing)
        return [(rule, *found[rule.name]) for rule in rules]

    def _of_values(self, stage: Stage, rules: tuple[Rule, ...], measured: pd.DataFrame) -> dict[str, Bool]:
        """Return, for each rule about one column, which rows break it."""
        looks: list[tuple[_Column, Int, pd.Index]] = []
        unseen: list[tuple[_Column, pd.Series]] = []
        for name in dict.fromkeys(rule.kwargs["column"] for rule in rules):
            own = tuple(rule for rule in rules if rule.kwargs["column"] == name)
            column = self._columns.setdefault((stage, name), _Column(name, own))
            codes, values = column.values_in(measured)
            new = column.unseen(values)
            if new.any():
                first = np.full(len(values), len(measured), dtype=np.int64)
                np.minimum.at(first, codes, np.arange(len(measured)))
                unseen.append((column, measured[name].iloc[first[new]].set_axis(values[new])))
            looks.append((column, codes, values))
        _ask(unseen)
        return {name: bad for column, codes, values in looks for name, bad in column.broken(codes, values).items()}


class _Column:
    """The rules about one column, and their verdicts on the values seen so far."""

    def __init__(self, name: str, rules: tuple[Rule, ...]) -> None:
        self.name, self.rules = name, rules
        # Where only absence matters, there are two values.
        self._absence = all(rule.type == _NOT_NULL for rule in rules)
        self._values: pd.Index | None = None
        self._bad = np.zeros((0, len(rules)), dtype=np.bool_)

    def values_in(self, measured: pd.DataFrame) -> tuple[Int, pd.Index]:
        """Return the code of each row's value, and the different values."""
        column = measured[self.name].isna() if self._absence else measured[self.name]
        codes, values = pd.factorize(column, use_na_sentinel=False)
        return codes.astype(np.int64), pd.Index(values)

    def unseen(self, values: pd.Index) -> Bool:
        """Which of the values have no verdict yet."""
        if self._values is None:
            return np.ones(len(values), dtype=np.bool_)
        return ~np.asarray(values.isin(self._values), dtype=np.bool_)

    def learn(self, values: pd.Index, bad: Bool) -> None:
        """Add verdicts, [values, rules]."""
        self._values = values if self._values is None else self._values.append(values)
        self._bad = np.concatenate([self._bad, bad])

    def broken(self, codes: Int, values: pd.Index) -> dict[str, Bool]:
        """Return which rows break each rule."""
        known = values if self._values is None else self._values
        at = known.get_indexer(values)[codes]
        return {rule.name: self._bad[at, number] for number, rule in enumerate(self.rules)}


def _ask(unseen: list[tuple[_Column, pd.Series]]) -> None:
    """Have GX judge the unseen values of all columns in one table; each series is indexed by its values."""
    rows = max((len(series) for _, series in unseen), default=0)
    if not rows:
        return
    # Shorter columns repeat their first value: a rule looks at its own column alone.
    at = np.arange(rows)
    table = {c.name: s.iloc[np.where(at < len(s), at, 0)].reset_index(drop=True) for c, s in unseen}
    rules = tuple(rule for column, _ in unseen for rule in column.rules)
    # A name of its own for the row's number: the suite's columns keep theirs.
    results = iter(_run(rules, pd.DataFrame(table).assign(_at=at)))
    for column, series in unseen:
        bad = np.zeros((rows, len(column.rules)), dtype=np.bool_)
        for number in range(len(column.rules)):
            bad[[entry["_at"] for entry in next(results)["result"].get("unexpected_index_list") or []], number] = True
        column.learn(series.index, bad[: len(series)])


def _run_whole(rules: tuple[Rule, ...], measured: pd.DataFrame) -> list[dict[str, Any]]:
    """Return GX's result for rules about the whole table, in order; a rule about one column is given that column."""
    # GX hashes every table that it is given.
    return [
        _run((rule,), measured[[rule.kwargs["column"]]] if "column" in rule.kwargs else measured, counts_only=True)[0]
        for rule in rules
    ]


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
