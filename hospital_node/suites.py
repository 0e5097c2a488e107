"""The expectation suite: rules with names, severities and reasons, stored as JSON; a hospital may tighten it only."""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from data_schemas.errors import BadInput

Severity = Literal["reject-file", "quarantine", "duplicate", "flag"]
Stage = Literal["reading", "stamp", "series", "cohort"]

SUITE = Path(__file__).parents[1] / "data_schemas" / "expectations" / "cgm.json"
TIGHTENED = "rules.toml"
# Whether a larger bound lets more through.
_LOOSER_IF_LARGER = {"max_value": True, "min_value": False, "mostly": False}


@dataclass(frozen=True, slots=True)
class Rule:
    """One expectation: what GX runs (type, kwargs) and what it means here.

    stage: `reading` rules look at a row alone, `stamp` rules at the rows of one person and second, `series` rules
    at a person's accepted readings in order, `cohort` rules at one row for each person.
    """

    name: str
    severity: Severity
    stage: Stage
    explanation: str
    type: str
    kwargs: dict[str, Any]

    @property
    def of_whole_table(self) -> bool:
        """Whether it needs every row at once: a share of the rows, or something about the table."""
        return "mostly" in self.kwargs or "column" not in self.kwargs or "unique" in self.type


@dataclass(frozen=True, slots=True)
class Suite:
    """The rules in the order in which they claim a row: a row that breaks several is counted under the first."""

    name: str
    rules: tuple[Rule, ...]

    def at(self, stage: Stage) -> tuple[Rule, ...]:
        """Return the rules of one stage."""
        return tuple(rule for rule in self.rules if rule.stage == stage)

    def explanation(self, name: str) -> str:
        """Return why a rule is there; of the store's own rules, what they mean."""
        own = {rule.name: rule.explanation for rule in self.rules}
        return {**_OF_THE_STORE, **own}.get(name, "")


_OF_THE_STORE = {
    "file-already-imported": "The same file, byte for byte, was imported before.",
    "already-stored": "The same person, second and value came in another file before.",
    "conflicts-with-stored": "The store has another value of this person at this second, or within two and a half "
    "minutes one that differs by more than conflicting-neighbour allows. Nothing tells which is right.",
}


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


def suite_of(node: Path) -> Suite:
    """Return the suite of a node: Islet's own, tightened by the node folder's rules.toml if there is one."""
    path = node / TIGHTENED
    return tighten(load_suite(), path) if path.exists() else load_suite()


def tighten(suite: Suite, path: Path) -> Suite:
    """Return the suite with the bounds in a hospital's file: `[rule-name]`, then bounds as in the suite.

    Raises BadInput, with the reason, for a bound that would let through what the suite stops: every hospital relies
    on the others' readings having passed at least these rules.
    """
    try:
        wanted = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"{path.name} cannot be read: {error.strerror}", "check its permissions") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"{path.name} is not TOML: {error}", "see docs/validation.md") from None
    rules = {rule.name: rule for rule in suite.rules}
    for name, bounds in wanted.items():
        if name not in rules or not isinstance(bounds, dict):
            raise BadInput(f"{path.name}: there is no rule {name!r}", f"the rules: {', '.join(rules)}")
        for key, value in bounds.items():
            rules[name] = _tightened(rules[name], key, value, path.name)
    return Suite(suite.name, tuple(rules.values()))


def _tightened(rule: Rule, key: str, value: object, where: str) -> Rule:
    if key == "severity":
        return _more_severe(rule, value, where)
    if key not in _LOOSER_IF_LARGER or isinstance(value, bool) or not isinstance(value, int | float):
        hint = f"give numbers for {', '.join(_LOOSER_IF_LARGER)}, or severity = 'quarantine'"
        raise BadInput(f"{where}: {rule.name}.{key} cannot be set", hint)
    if "value_set" in rule.kwargs or "column" not in rule.kwargs:
        raise BadInput(f"{where}: the rule {rule.name} has no bounds", "only rules with bounds can be tightened")
    own = rule.kwargs.get(key, 1.0 if key == "mostly" else None)
    if own is not None and value != own and (value > own) == _LOOSER_IF_LARGER[key]:
        raise BadInput(
            f"{where}: {rule.name}.{key} = {value} is looser than {own}, which the federation's suite asks for",
            "give a stricter bound or remove the line: the other hospitals rely on the suite as it is",
        )
    return replace(rule, kwargs={**rule.kwargs, key: value})


def _more_severe(rule: Rule, value: object, where: str) -> Rule:
    if value == rule.severity:
        return rule
    if rule.severity == "flag" and value == "quarantine" and rule.stage in {"reading", "stamp"}:
        return replace(rule, severity="quarantine")
    raise BadInput(
        f"{where}: the severity of {rule.name} stays {rule.severity}",
        "a severity cannot be lowered; what is flagged in a series or a cohort names no single row to quarantine",
    )


def _run_by(entry: dict[str, Any]) -> dict[str, Any]:
    return {"type": entry["type"], "kwargs": entry["kwargs"]}


def _known(rule: Rule) -> bool:
    return rule.severity in get_args(Severity) and rule.stage in get_args(Stage)
