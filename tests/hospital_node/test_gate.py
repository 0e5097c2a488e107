"""The gate: which bundles a hospital answers to, and that Flower still has the two functions it replaces."""

import inspect
import shutil
from pathlib import Path

from data_schemas.canonical import bytes_hash
from hospital_node.gate import approved
from hospital_node.link import GATE_PATH
from hospital_node.settings import write_settings
from tests.hospital_node.small_node import settings


def test_only_the_approved_bytes_pass(tmp_path: Path) -> None:
    """One hash is approved; one byte more, no approval, and settings that cannot be read all refuse."""
    write_settings(tmp_path / "node.toml", settings(approved_bundle=bytes_hash(b"bundle")))
    assert approved(tmp_path, b"bundle")
    assert not approved(tmp_path, b"bundle ")

    write_settings(tmp_path / "node.toml", settings())
    assert not approved(tmp_path, b"bundle")

    (tmp_path / "node.toml").write_text("name = ")
    assert not approved(tmp_path, b"bundle")
    assert not approved(tmp_path / "absent", b"bundle")


def test_flower_unpacks_and_loads_a_bundle_with_the_functions_that_the_gate_replaces() -> None:
    """Were they renamed, the gate would stop with an AttributeError; were they no longer used, this would fail."""
    from flwr.supernode.runtime import run_clientapp as runtime

    source = inspect.getsource(runtime.run_clientapp)

    assert "install_from_fab(fab.content" in source
    assert "load_client_app_fn = get_load_client_app_fn(" in source
    assert "exec(" not in source


def test_the_gate_can_be_found_as_flowers_command() -> None:
    """The file is executable, so that a PATH that begins with its folder leads to it."""
    assert shutil.which("flwr-clientapp", path=str(GATE_PATH)) == str(GATE_PATH / "flwr-clientapp")
