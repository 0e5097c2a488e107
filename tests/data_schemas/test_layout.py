"""What a layout declares, and how a wrong one is refused."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from data_schemas.errors import BadInput
from data_schemas.layout import LAYOUTS, Identity, Layout, known_layouts, load_layout


def test_every_layout_that_ships_loads_under_its_own_name() -> None:
    """The name inside a layout file is the name by which it is asked for."""
    assert {"canonical", "clarity", "fhir", "libreview", "ohio"} <= set(known_layouts())
    assert [load_layout(name).name for name in known_layouts()] == list(known_layouts())


def test_an_unknown_layout_is_refused_with_the_known_ones() -> None:
    """Whoever misspells a layout reads which ones there are."""
    with pytest.raises(BadInput, match="unknown layout 'dexcom'") as refusal:
        load_layout("dexcom")

    assert all(name in refusal.value.hint for name in known_layouts())


def test_a_clinic_brings_its_own_layout_as_a_file(tmp_path: Path) -> None:
    """A path that ends in .toml is read from there."""
    own = tmp_path / "ours.toml"
    text = (LAYOUTS / "duke.toml").read_text()
    own.write_text(text.replace('name = "duke"', 'name = "ours"'))

    assert load_layout(own).name == "ours"
    assert load_layout(str(own)).zone == "America/New_York"


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("name = ", "not TOML"),
        ('name = "x"', "title"),
        ((LAYOUTS / "duke.toml").read_text() + "colour = 1", "colour"),
        ((LAYOUTS / "mostoles.toml").read_text().replace("origin_date = 2012-01-02", ""), "origin_date"),
        ((LAYOUTS / "duke.toml").read_text().replace("?P<patient>", ""), "patient"),
    ],
)
def test_a_broken_layout_file_is_refused_with_the_place(tmp_path: Path, content: str, named: str) -> None:
    """The refusal names the field that is missing, unknown or contradictory."""
    broken = tmp_path / "broken.toml"
    broken.write_text(content)

    with pytest.raises(BadInput, match=named):
        load_layout(broken)


def test_a_layout_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    """A wrong path is the reader's mistake, not a crash."""
    with pytest.raises(BadInput, match="cannot be read"):
        load_layout(tmp_path / "none.toml")


def test_a_layout_cannot_be_changed_and_identity_has_one_place() -> None:
    """Layouts are frozen; identity is in the file name or in a column, never in both or neither."""
    layout = load_layout("duke")
    with pytest.raises(ValidationError, match="frozen"):
        layout.zone = "UTC"  # type: ignore[misc]
    for wrong in ({}, {"file_pattern": "(?P<patient>.)", "columns": ("patient",)}):
        with pytest.raises(ValidationError, match="give columns, or text_patterns"):
            Identity.model_validate(wrong)
    assert Layout.model_validate(layout.model_dump()) == layout


def test_a_layout_extends_one_of_islets_own_and_says_only_what_differs(tmp_path: Path) -> None:
    """Three lines settle the date order of an account; everything else stays as in the layout that comes with Islet."""
    (tmp_path / "ours.toml").write_text(
        'extends = "libreview"\nname = "ours"\n[time]\norder = "declared"\nformats = ["%d-%m-%Y %H:%M"]\n'
    )

    ours, base = load_layout(tmp_path / "ours.toml"), load_layout("libreview")

    assert (ours.name, ours.time.order, ours.time.formats) == ("ours", "declared", ("%d-%m-%Y %H:%M",))
    assert (ours.glucose, ours.identity, ours.time.columns) == (base.glucose, base.identity, base.time.columns)


def test_a_layout_that_extends_nothing_known_is_refused(tmp_path: Path) -> None:
    """The refusal lists what can be extended."""
    (tmp_path / "ours.toml").write_text('extends = "elsewhere"\n')

    with pytest.raises(BadInput, match="extends an unknown layout") as refusal:
        load_layout(tmp_path / "ours.toml")

    assert "libreview" in refusal.value.hint
