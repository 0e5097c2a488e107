"""A hospital may ask for more than the federation's suite does, never for less."""

from pathlib import Path

import pytest

from data_schemas.errors import BadInput
from hospital_node.suites import load_suite, suite_of, tighten


def rules(folder: Path, text: str) -> Path:
    (folder / "rules.toml").write_text(text)
    return folder / "rules.toml"


def test_stricter_bounds_replace_those_of_the_suite(tmp_path: Path) -> None:
    """Bounds move inwards, and everything else stays as it is."""
    rules(tmp_path, "[above-sensor-range]\nmax_value = 401\n[below-sensor-range]\nmin_value = 40\n")

    suite, base = suite_of(tmp_path), load_suite()

    changed = {a.name: a.kwargs for a, b in zip(suite.rules, base.rules, strict=True) if a != b}
    assert changed["above-sensor-range"]["max_value"] == 401
    assert changed["below-sensor-range"]["min_value"] == 40
    assert len(changed) == 2


def test_a_node_without_rules_of_its_own_has_islets(tmp_path: Path) -> None:
    """No file, no change."""
    assert suite_of(tmp_path) == load_suite()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[above-sensor-range]\nmax_value = 600", "looser than 501"),
        ("[below-sensor-range]\nmin_value = 20", "looser than 39"),
        ("[mostly-readable]\nmostly = 0.1", "looser than 0.5"),
        ("[below-sensor-range]\nseverity = 'flag'", "stays quarantine"),
        ("[jump]\nseverity = 'quarantine'", "stays flag"),
        ("[jumps]\nmax_value = 1", "no rule 'jumps'"),
        ("[jump]\ncolumn = 'row'", "cannot be set"),
        ("[censored]\nmax_value = 1", "has no bounds"),
        ("[jump", "not TOML"),
    ],
)
def test_what_would_loosen_the_suite_is_refused_with_the_reason(tmp_path: Path, text: str, named: str) -> None:
    """The refusal names the rule and says why, or what can be set."""
    with pytest.raises(BadInput, match=named) as refusal:
        tighten(load_suite(), rules(tmp_path, text))

    assert refusal.value.hint
