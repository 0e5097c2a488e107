"""Keys sign, verify, and never leak or get lost."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_schemas.canonical import canonical_bytes
from data_schemas.errors import BadInput, StorageFailed
from pipeline.signing import PrivateKey, PublicKey, verify, write_durably

KEY = PrivateKey.from_seed(bytes(range(32)))


def test_rfc_8032_first_vector() -> None:
    """The first vector of RFC 8032 section 7.1 gives its public key and signature."""
    key = PrivateKey.from_seed(bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60"))
    signature = (
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e06522490155"
        "5fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b"
    )

    assert key.public.hex == "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
    assert key.sign_bytes(b"") == signature
    assert verify(key.public.hex, b"", signature)


@given(st.dictionaries(st.text(), st.integers(-(2**52), 2**52) | st.text()))
def test_signature_of_a_value_is_over_its_canonical_bytes(value: dict[str, int | str]) -> None:
    """sign(value) verifies against the value's RFC 8785 bytes, whatever the order of its keys."""
    reordered = dict(reversed(value.items()))

    assert verify(KEY.public.hex, canonical_bytes(reordered), KEY.sign(value))


@pytest.mark.parametrize("position", [0, 1, 31, 32, 63])
def test_a_changed_signature_fails(position: int) -> None:
    """One flipped bit in any part of the signature is refused."""
    raw = bytearray.fromhex(KEY.sign_bytes(b"message"))
    raw[position] ^= 1

    assert not KEY.public.verify(b"message", raw.hex())


def test_a_changed_message_or_key_fails() -> None:
    """A signature holds for one message and one key."""
    signature = KEY.sign_bytes(b"message")

    assert KEY.public.verify(b"message", signature)
    assert not KEY.public.verify(b"messagf", signature)
    assert not PrivateKey.generate().public.verify(b"message", signature)


@pytest.mark.parametrize(
    "change", [str.upper, lambda s: s[:-2], lambda s: s + "00", lambda s: s[:2] + " " + s[2:], lambda _: ""]
)
def test_other_spellings_of_a_signature_fail(change: object) -> None:
    """Only 128 lower-case hex digits are a signature: one signature has one spelling."""
    signature = KEY.sign_bytes(b"message")

    assert callable(change)
    assert not verify(KEY.public.hex, b"message", change(signature))
    assert not verify(change(KEY.public.hex), b"message", signature)


def test_a_malformed_public_key_is_refused() -> None:
    """PublicKey names the expected form."""
    with pytest.raises(BadInput, match="64 lower-case hex digits"):
        PublicKey("xyz")


def test_generated_keys_differ() -> None:
    """Two generated keys are not the same."""
    assert PrivateKey.generate() != PrivateKey.generate()


def test_the_seed_does_not_show() -> None:
    """Neither repr nor str of a key contains its seed."""
    assert KEY.seed.hex() not in repr(KEY) + str(KEY)
    assert repr(KEY.seed) not in repr(KEY)


def test_save_and_load(tmp_path: Path) -> None:
    """A saved key is readable by its owner only and loads as the same key."""
    path = tmp_path / "node.ed25519"
    KEY.save(path)

    assert path.stat().st_mode & 0o777 == 0o600
    assert PrivateKey.load(path) == KEY
    assert os.listdir(tmp_path) == ["node.ed25519"]  # noqa: PTH208 - temporary files start with a dot


def test_save_never_overwrites(tmp_path: Path) -> None:
    """An existing key stays."""
    path = tmp_path / "node.ed25519"
    KEY.save(path)

    with pytest.raises(BadInput, match="already there"):
        PrivateKey.generate().save(path)
    assert PrivateKey.load(path) == KEY


@pytest.mark.parametrize("content", [b"", b"zz" * 32, b"ab" * 31, b"ab" * 33, "é".encode() * 32])
def test_load_refuses_a_malformed_file(tmp_path: Path, content: bytes) -> None:
    """A file that is no key is refused, and its content does not show."""
    path = tmp_path / "node.ed25519"
    write_durably(path, content, mode=0o600)

    with pytest.raises(BadInput, match="not a key file") as caught:
        PrivateKey.load(path)
    assert not content or content.decode() not in caught.value.message + caught.value.hint


def test_load_refuses_a_shared_file(tmp_path: Path) -> None:
    """A key that other users may read is refused with the command that mends it."""
    path = tmp_path / "node.ed25519"
    KEY.save(path)
    path.chmod(0o640)

    with pytest.raises(BadInput, match="other users") as caught:
        PrivateKey.load(path)
    assert "chmod 600" in caught.value.hint


def test_load_names_a_missing_file(tmp_path: Path) -> None:
    """A missing key is an error that says so."""
    with pytest.raises(BadInput, match="no such key file"):
        PrivateKey.load(tmp_path / "absent")


def test_a_seed_of_another_length_is_refused() -> None:
    """A seed has 32 bytes."""
    with pytest.raises(BadInput, match="not 31"):
        PrivateKey.from_seed(bytes(31))


def test_a_refused_write_keeps_the_old_file(tmp_path: Path) -> None:
    """When the disk takes only a part of the new content, the old content stays and nothing else is left."""
    path = tmp_path / "file"
    write_durably(path, b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(StorageFailed, match="not written"):
            write_durably(path, bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_importing_signing_does_not_import_cryptography() -> None:
    """The library is loaded at the first signature, not at `islet --help`."""
    code = "import sys, pipeline.signing; sys.exit('cryptography' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
