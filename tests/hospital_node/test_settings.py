"""A node's settings: read from TOML, overridden by the environment, refused by name."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from data_schemas.errors import BadInput
from hospital_node.settings import NodeSettings, Source, read_settings, write_settings

MINIMAL = """
name = "north"
federation = "trial"
declared_training_patients = 40
declared_heldout_patients = 10
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "node.toml"
    path.write_text(text)
    return path


def test_settings_survive_writing_and_reading(tmp_path: Path) -> None:
    """What is written is read back equal, awkward characters included, in a file only its owner may read."""
    settings = NodeSettings(
        name="north",
        federation='trial "two" \\ ü',
        aggregator_public_key="ab" * 32,
        sources=(
            Source(path="/exports/a b", layout="dexcom", zone="Europe/Madrid"),
            Source(path="/exports/c", layout="libre"),
        ),
        declared_training_patients=40,
        declared_heldout_patients=10,
        heldout_fraction=0.25,
        seed=7,
    )

    write_settings(tmp_path / "node.toml", settings)

    assert settings == read_settings(tmp_path / "node.toml", {})
    assert stat.S_IMODE((tmp_path / "node.toml").stat().st_mode) == 0o600


def test_environment_wins_over_the_file(tmp_path: Path) -> None:
    """ISLET_NODE_* replaces a setting of the file; the node's home and other variables are no settings."""
    environment = {"ISLET_NODE_MAX_EPSILON_TRAINING": "2.5", "ISLET_NODE_HOME": "/node", "PATH": "/bin"}

    settings = read_settings(written(tmp_path, MINIMAL), environment)

    assert settings.max_epsilon_training == 2.5
    assert settings.heldout_fraction == 0.2


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("max_epsilon_trainning = 3.0", "max_epsilon_trainning"),
        ("max_epsilon_training = -1.0", "max_epsilon_training"),
        ("max_epsilon_heldout = nan", "max_epsilon_heldout"),
        ("heldout_fraction = 1.5", "heldout_fraction"),
        ('aggregator_public_key = "xyz"', "aggregator_public_key"),
        ('[[sources]]\npath = "/e"\nlayout = "libre"\nzone = "Mars/Olympus"', "sources.0.zone"),
        ('[[sources]]\npath = "/e"\nlayuot = "libre"', "sources.0.layout"),
    ],
)
def test_a_wrong_setting_is_refused_by_its_name(tmp_path: Path, line: str, named: str) -> None:
    """An unknown key or a value out of range is BadInput that names the key."""
    with pytest.raises(BadInput, match=named):
        read_settings(written(tmp_path, MINIMAL + line + "\n"), {})


@pytest.mark.parametrize("variable", ["ISLET_NODE_MIN_PATIENTS", "ISLET_NODE_MIN_PATIENT"])
def test_a_wrong_variable_is_refused_by_its_name(tmp_path: Path, variable: str) -> None:
    """A bad value in the environment, or a variable that is no setting, is BadInput that names the variable."""
    with pytest.raises(BadInput, match=variable):
        read_settings(written(tmp_path, MINIMAL), {variable: "many"})


def test_a_missing_setting_or_file_is_refused(tmp_path: Path) -> None:
    """A file without a needed setting, a file that is not TOML and no file at all are BadInput."""
    with pytest.raises(BadInput, match="federation"):
        read_settings(written(tmp_path, 'name = "north"\n'), {})
    with pytest.raises(BadInput, match="TOML"):
        read_settings(written(tmp_path, "name = north\n"), {})
    with pytest.raises(BadInput, match="no such"):
        read_settings(tmp_path / "absent.toml", {})
