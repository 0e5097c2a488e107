"""Checkpoints are those of the C2SP specifications, and a witness is never talked into a fork."""

from __future__ import annotations

import base64

import pytest

from data_schemas.errors import BadInput, CheckFailed
from pipeline import merkle
from pipeline.checkpoint import (
    Checkpoint,
    NoteSignature,
    SignedCheckpoint,
    add_cosignatures,
    cosign,
    empty,
    extends,
    key_id,
    sign,
    verify_cosignature,
    verify_note,
)
from pipeline.signing import PrivateKey, verify

LOG = PrivateKey.from_seed(b"L" * 32)
WITNESS = PrivateKey.from_seed(b"W" * 32)
ORIGIN = "islet.example/federation"
LEAVES = [merkle.leaf_hash(bytes([i])) for i in range(20)]


def _head(size: int, leaves: list[bytes] = LEAVES, origin: str = ORIGIN) -> Checkpoint:
    return Checkpoint(origin, size, merkle.root(leaves[:size]).hex())


def _proof(old: int, new: int, leaves: list[bytes] = LEAVES) -> list[str]:
    return [h.hex() for h in merkle.consistency_proof(leaves[:new], old)]


def test_key_id_of_the_go_note_package() -> None:
    """The published example key of the original note implementation has its published id and signature."""
    vkey = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
    name, identity, encoded = vkey.split("+", 2)
    public = base64.b64decode(encoded)[1:]
    text = "If you think cryptography is the answer to your problem,\nthen you don't know what your problem is.\n"
    line = NoteSignature.from_text(
        "— PeterNeumann x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM="
    )

    assert key_id(name, public).hex() == identity == line.key_id.hex()
    assert verify(public.hex(), text.encode(), line.signature.hex())


def test_the_specification_example_parses() -> None:
    """The example of tlog-cosignature is read and written back byte for byte."""
    note = (
        "example.com/behind-the-sofa\n20852163\nCsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=\n\n"
        "— example.com/behind-the-sofa Az3grlgtzPICa5OS8npVmf1Myq/5IZniMp+ZJurmRDeOoRDe4URYN7u5/"
        "Zhcyv2q1gGzGku9nTo+zyWE+xeMcTOAYQ8=\n"
        "— witness.example.com/w1 jWbPPwAAAABkGFDLEZMHwSRaJNiIDoe9DYn/zXcrtPHeolMI5OWXEhZCB9dlrDJsX3b2oyin1nPZ"
        "qhf5nNo0xUe+mbIUBkBIfZ+qnA==\n"
    )
    signed = SignedCheckpoint.from_text(note)

    assert signed.to_text() == note
    assert signed.checkpoint.size == 20852163
    assert int.from_bytes(signed.signatures[1].signature[:8], "big") == 1679315147


def test_text_round_trip() -> None:
    """Text and checkpoint are two forms of one value."""
    for size in (0, 1, 20):
        assert Checkpoint.from_text(_head(size).to_text()) == _head(size)


ROOT64 = base64.b64encode(bytes(32)).decode()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lines; origin, size and root are needed"),
        (f"o\n1\n{ROOT64}", "does not end with a newline"),
        ("o\n1\n", "2 lines"),
        (f"o\n1\n{ROOT64}\nextension\n", "extension lines"),
        (f"\n1\n{ROOT64}\n", "origin is empty"),
        (f"a b\n1\n{ROOT64}\n", "origin contains a space"),
        (f"a+b\n1\n{ROOT64}\n", "plus sign"),
        (f"o\n01\n{ROOT64}\n", "without leading zeros"),
        (f"o\n-1\n{ROOT64}\n", "decimal number"),
        (f"o\n١\n{ROOT64}\n", "decimal number"),
        (f"o\n9999999999999999999\n{ROOT64}\n", "2\\^63"),
        ("o\n1\n!!!!\n", "root is not base64"),
        ("o\n1\nAAAA\n", "root has 3 bytes, not 32"),
        (f"o\n1\n{ROOT64[:-2]}B=\n", "canonical base64"),
    ],
)
def test_each_malformed_checkpoint_is_named(text: str, message: str) -> None:
    """Every malformed case has its own message, and no raw ValueError leaks."""
    with pytest.raises(BadInput, match=message):
        Checkpoint.from_text(text)


@pytest.mark.parametrize(
    ("tail", "message"),
    [
        ("", "no blank line"),
        ("\n", "does not end with a newline"),
        ("\n- name AAAAAAA=\n", "em dash"),
        ("\n— name\n", "no signature after"),
        ("\n—  AAAAAAA=\n", "key name is empty"),
        ("\n— a+b AAAAAAA=\n", "plus sign"),
        ("\n— name ????\n", "not base64"),
        ("\n— name AAAAAA==\n", "shorter than its key id"),
        ("\n— name AAAAAAA=", "does not end with a newline"),
        ("\n— name AAAAAAA=\r\n", "control characters"),
        ("\n" + "— name AAAAAAA=\n" * 4097, "more than 4096"),
    ],
)
def test_each_malformed_note_is_named(tail: str, message: str) -> None:
    """Every malformed note has its own message."""
    with pytest.raises(BadInput, match=message):
        SignedCheckpoint.from_text(_head(3).to_text() + tail)


def test_a_signed_note_verifies() -> None:
    """The log's note gives its checkpoint back."""
    assert verify_note(sign(_head(7), LOG), LOG.public.hex) == _head(7)


def test_a_changed_note_fails() -> None:
    """Another size under the same signature is refused, as is the note of another key."""
    note = sign(_head(7), LOG)

    with pytest.raises(CheckFailed, match="signature on the checkpoint is wrong"):
        verify_note(note.replace("\n7\n", "\n8\n"), LOG.public.hex)
    with pytest.raises(CheckFailed, match="not signed by the log's key"):
        verify_note(note, WITNESS.public.hex)
    with pytest.raises(BadInput, match="64 lower-case hex"):
        verify_note(note, "no key")


def test_unknown_signatures_are_ignored() -> None:
    """A signature of an unknown key, even under the log's name, neither helps nor hinders."""
    stranger = SignedCheckpoint.from_text(sign(_head(7), WITNESS)).signatures[0].to_text()
    note = add_cosignatures(sign(_head(7), LOG), [stranger])

    assert verify_note(note, LOG.public.hex) == _head(7)


def test_a_cosignature_verifies_with_its_time() -> None:
    """A witness's line, added to the note, proves who saw this head and when."""
    line = cosign(_head(7), WITNESS, "clinic-a", 1_790_000_000)
    note = add_cosignatures(sign(_head(7), LOG), [line])

    assert verify_note(note, LOG.public.hex) == _head(7)
    assert SignedCheckpoint.from_text(note).signatures[1].to_text() == line
    assert verify_cosignature(_head(7), line, "clinic-a", WITNESS.public.hex) == 1_790_000_000


def test_a_cosignature_signs_the_specified_message() -> None:
    """The signed bytes are the two header lines and the note text, and the key type is 0x04."""
    parsed = NoteSignature.from_text(cosign(_head(7), WITNESS, "clinic-a", 1679315147))
    message = b"cosignature/v1\ntime 1679315147\n" + _head(7).to_text().encode()

    assert verify(WITNESS.public.hex, message, parsed.signature[8:].hex())
    assert parsed.key_id == key_id("clinic-a", WITNESS.public.raw, b"\x04") != key_id("clinic-a", WITNESS.public.raw)


def test_a_cosignature_holds_for_one_head_name_key_and_time() -> None:
    """Another head, name, key or time makes it invalid."""
    line = cosign(_head(7), WITNESS, "clinic-a", 1_790_000_000)
    parsed = NoteSignature.from_text(line)
    later = NoteSignature(
        parsed.name, parsed.key_id, (1_790_000_001).to_bytes(8, "big") + parsed.signature[8:]
    ).to_text()
    short = NoteSignature(parsed.name, parsed.key_id, parsed.signature[8:]).to_text()

    for checkpoint, text, name, public, message in [
        (_head(8), line, "clinic-a", WITNESS, "is wrong"),
        (_head(7), later, "clinic-a", WITNESS, "is wrong"),
        (_head(7), short, "clinic-a", WITNESS, "wrong length"),
        (_head(7), line, "clinic-b", WITNESS, "not from the key"),
        (_head(7), line, "clinic-a", LOG, "not from the key"),
    ]:
        with pytest.raises(CheckFailed, match=message):
            verify_cosignature(checkpoint, text, name, public.public.hex)


@pytest.mark.parametrize("time", [0, -1, 2**63])
def test_a_cosignature_needs_a_time(time: int) -> None:
    """A witness states a time that the format can hold."""
    with pytest.raises(BadInput, match="seconds since 1970"):
        cosign(_head(7), WITNESS, "clinic-a", time)


def test_growth_extends() -> None:
    """Every honest growth, from nothing and from itself too, is accepted."""
    for old in range(21):
        for new in range(old, 21):
            assert extends(_head(old) if old else empty(ORIGIN), _head(new), _proof(old, new))


def test_a_fork_signed_with_the_real_key_is_refused() -> None:
    """A rewritten log is refused by a witness even when the real key signed it and the proof is the log's best."""
    forged = [*LEAVES[:4], merkle.leaf_hash(b"forged"), *LEAVES[5:]]
    fork = verify_note(sign(_head(9, forged), LOG), LOG.public.hex)

    assert not extends(_head(6), fork, _proof(6, 9, forged))
    assert not extends(_head(6), fork, _proof(6, 9))
    assert not extends(_head(9), fork, [])


def test_a_shorter_or_other_log_is_refused() -> None:
    """A cut log, a log of another name and a malformed proof do not extend what was seen."""
    assert not extends(_head(9), _head(6), _proof(6, 9))
    assert not extends(_head(6), _head(9, origin="other.example"), _proof(6, 9))
    assert not extends(_head(6), _head(9), [h.upper() for h in _proof(6, 9)])
    assert not extends(_head(6), _head(9), _proof(5, 9))
    assert not extends(_head(6), _head(9), [])
