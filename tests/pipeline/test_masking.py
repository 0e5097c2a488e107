"""Secure aggregation's arithmetic: sums are exact, masks cancel, shares give secrets, commitments open one way."""

from __future__ import annotations

import secrets
from itertools import combinations

import numpy as np
import pytest

from data_schemas.errors import BadInput
from pipeline import edwards, masking, pedersen, shamir

D = 40


def updates(members: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(5)
    return {f"node-{n}": draw.normal(0, 0.02, D).astype(np.float32) for n in range(members)}


def test_pairwise_masks_cancel_and_hide() -> None:
    """The masked vectors of all members add up to the plain sum, bit for bit; none of them alone is near its own."""
    private = {name: secrets.token_bytes(32) for name in updates(5)}
    public = {name: masking.public_of(key) for name, key in private.items()}
    plain = {name: masking.plain(masking.quantised(u, 30), 7) for name, u in updates(5).items()}
    masked = {
        name: value.plus(
            masking.pairwise(name, private[name], [(n, p) for n, p in public.items() if n != name], "session", D)
        )
        for name, value in plain.items()
    }
    total = masking.plain(np.zeros(D, dtype=np.int64), 0)
    for value in masked.values():
        total = total.plus(value)

    expected = sum(masking.quantised(u, 30) for u in updates(5).values())
    assert (masking.signed(total) == expected).all()
    assert total.blinder == 35
    for name, value in masked.items():
        # Of 40 residues modulo 2^64, chance puts none within 2^40 of the plain value.
        assert (np.abs(masking.signed(value.minus(plain[name]))) > 2**40).all()


def test_the_mean_of_whole_numbers_is_the_mean_of_updates() -> None:
    """Rounding to whole numbers moves a patient-weighted mean by less than 2^-30 per coordinate."""
    given = updates(4)
    patients = dict(zip(given, (8, 30, 200, 1000), strict=True))
    total = sum(masking.quantised(u, patients[name]) for name, u in given.items())
    mean = sum(patients[name] / 1238 * u.astype(float) for name, u in given.items())

    assert np.abs(masking.mean_of(np.asarray(total), 1238) - mean).max() < 2**-30


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e12])
def test_what_cannot_be_added_up_is_refused(value: float) -> None:
    """NaN, infinity and what would overflow in a sum of 256 members never become a whole number."""
    with pytest.raises(BadInput):
        masking.quantised(np.array([0.1, value], dtype=np.float32), 10)


def test_any_threshold_of_shares_gives_the_secret_and_fewer_do_not() -> None:
    """Every subset of three of five shares gives back a 32-byte secret; no pair does."""
    secret = int.from_bytes(b"\xff" * 32, "little")
    shares = shamir.split(secret, masking.coefficients(secrets.token_bytes(32), "test", 2), 5)
    for chosen in combinations(range(1, 6), 3):
        assert shamir.secret_of({place: shares[place - 1] for place in chosen}) == secret
    for chosen in combinations(range(1, 6), 2):
        assert shamir.secret_of({place: shares[place - 1] for place in chosen}) != secret


def test_sealed_shares_open_with_the_agreed_key_alone() -> None:
    """Two sides agree on one key per purpose; another purpose, a flipped bit or a low-order key are refused."""
    mine, yours = secrets.token_bytes(32), secrets.token_bytes(32)
    text = masking.sealed(masking.agreed(mine, masking.public_of(yours), "a to b"), b"share")
    key = masking.agreed(yours, masking.public_of(mine), "a to b")

    assert masking.unsealed(key, text) == b"share"
    for wrong_key, wrong_text in [
        (masking.agreed(yours, masking.public_of(mine), "b to a"), text),
        (key, text[:-1] + ("0" if text[-1] != "0" else "1")),
        (key, "no hex"),
    ]:
        with pytest.raises(BadInput):
            masking.unsealed(wrong_key, wrong_text)
    with pytest.raises(BadInput):
        masking.agreed(mine, "00" * 32, "a to b")


def test_expanded_keys_repeat_and_differ() -> None:
    """A key gives the same mask each time and another key another; ChaCha20's first block is that of RFC 8439."""
    key = secrets.token_bytes(32)
    assert (masking.expand(key, D).vector == masking.expand(key, D).vector).all()
    assert (masking.expand(key, D).vector != masking.expand(secrets.token_bytes(32), D).vector).all()
    # RFC 8439, appendix A.1, test vector 1 (zero key, nonce and counter).
    block = bytes.fromhex(
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
    )
    assert masking.expand(bytes(32), 1).blinder == int.from_bytes(block, "little") % edwards.ORDER


def test_commitments_add_up_and_open_in_one_way() -> None:
    """The sum of commitments opens to the sum of values and blinders, and to nothing that differs from it."""
    values = [masking.quantised(u, 30) for u in updates(3).values()]
    blinders = [secrets.randbelow(edwards.ORDER) for _ in values]
    told = [edwards.encode(pedersen.commit(v, b)) for v, b in zip(values, blinders, strict=True)]
    total, blinder = np.sum(values, axis=0), sum(blinders)

    assert pedersen.opens(told, total, blinder)
    for place, change in ((0, 1), (D - 1, -1), (7, 2**40)):
        wrong = total.copy()
        wrong[place] += change
        assert not pedersen.opens(told, wrong, blinder)
    assert not pedersen.opens(told, total, blinder + 1)
    assert not pedersen.opens(told[:-1], total, blinder)


@pytest.mark.parametrize(("members", "needed"), [(3, 3), (4, 3), (5, 4), (6, 5), (20, 14), (50, 34), (256, 171)])
def test_more_than_two_thirds_must_finish(members: int, needed: int) -> None:
    """The threshold is that of the paper's active adversary."""
    assert masking.threshold(members) == needed
    assert 3 * needed > 2 * members
