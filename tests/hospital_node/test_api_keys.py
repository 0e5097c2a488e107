"""API keys: shown once, kept as a hash, limited to their scope, revocable at once."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from data_schemas.errors import BadInput
from hospital_node.api_keys import ALL_PATIENTS, KeyRing, create_key, find_key, key_file, read_keys, revoke_key

NOW = 1_800_000_000.0


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "keys").mkdir(mode=0o700)
    return tmp_path


def test_only_the_hash_is_kept(home: Path) -> None:
    """The file holds no secret, is readable by its owner only, and the secret has 256 bits."""
    key, secret = create_key(home, ALL_PATIENTS, NOW)
    text = key_file(home).read_text()
    assert secret not in text
    assert secret.removeprefix("islet_") not in text
    assert len(secret.removeprefix("islet_")) == 43  # 32 bytes in unpadded base64
    assert stat.S_IMODE(key_file(home).stat().st_mode) == 0o600
    assert json.loads(text)["keys"][0]["sha256"] == key.sha256


def test_a_key_is_found_by_its_secret_alone(home: Path) -> None:
    """Each secret finds its own key; anything else, the stored hash included, finds none."""
    first, first_secret = create_key(home, ALL_PATIENTS, NOW)
    second, second_secret = create_key(home, "0123456789abcdef", NOW)
    keys = read_keys(home)
    assert keys == (first, second)
    assert find_key(keys, first_secret) == first
    assert find_key(keys, second_secret) == second
    for wrong in ("", first_secret[:-1], first.sha256, second_secret.upper()):
        assert find_key(keys, wrong) is None


def test_scope_limits_a_key(home: Path) -> None:
    """A key for one patient allows that patient only; a key for all allows everybody."""
    everybody, _ = create_key(home, ALL_PATIENTS, NOW)
    one, _ = create_key(home, "0123456789abcdef", NOW)
    assert everybody.allows("fedcba9876543210")
    assert one.allows("0123456789abcdef")
    assert not one.allows("fedcba9876543210")
    assert not one.allows("all")


def test_revoked_key_stops_working_in_a_running_ring(home: Path) -> None:
    """A ring that knew a key forgets it as soon as the file says so, and learns new ones."""
    ring = KeyRing(home)
    assert ring.find("islet_anything") is None
    first, first_secret = create_key(home, ALL_PATIENTS, NOW)
    assert ring.find(first_secret) == first
    second, second_secret = create_key(home, ALL_PATIENTS, NOW)
    revoke_key(home, first.key_id)
    assert ring.find(first_secret) is None
    assert ring.find(second_secret) == second
    key_file(home).unlink()
    assert ring.find(second_secret) is None


def test_misuse_says_what_to_do(home: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """An impossible scope, an unknown id, a damaged file and a folder that is no node are bad input with a hint."""
    with pytest.raises(BadInput, match="scope"):
        create_key(home, "no such scope", NOW)
    with pytest.raises(BadInput, match="no API key with this id"):
        revoke_key(home, "00000000")
    with pytest.raises(BadInput, match="not a node folder"):
        create_key(tmp_path_factory.mktemp("empty"), ALL_PATIENTS, NOW)
    key_file(home).write_text("{")
    with pytest.raises(BadInput, match="damaged") as caught:
        read_keys(home)
    assert caught.value.hint


def test_only_a_key_for_everybody_operates_the_node(home: Path) -> None:
    """A patient's key can never pause the node or leave the federation."""
    with pytest.raises(BadInput, match="for all patients"):
        create_key(home, "0123456789abcdef", NOW, operates=True)
    assert create_key(home, ALL_PATIENTS, NOW, operates=True)[0].operates
    assert not create_key(home, ALL_PATIENTS, NOW, writes=True)[0].operates
