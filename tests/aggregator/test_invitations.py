"""Invitations: made for one hospital, and every way a request is refused before anything is registered."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from aggregator.invitations import invite, redeem
from aggregator.settings import AggregatorFolder
from aggregator.superlink import prepare, programs
from data_schemas.errors import BadInput, CheckFailed
from data_schemas.invitation import Invitation, JoinRequest, SignedJoin
from pipeline.certificates import make_transport_key
from tests.aggregator.small_federation import FEDERATION, build, key_of

NOW = datetime.now(UTC)
TRANSPORT = make_transport_key().public


@pytest.fixture
def folder(tmp_path: Path) -> AggregatorFolder:
    made = build(tmp_path)
    prepare(made)
    return made


def signed(invitation: Invitation, signer: str = "dogwood", **changes: Any) -> SignedJoin:
    values: dict[str, Any] = {
        "federation": invitation.federation,
        "node": invitation.node,
        "public_key": key_of("dogwood").public.hex,
        "transport_key": TRANSPORT,
        "declared_training_patients": 10,
        "declared_heldout_patients": 2,
        "token": invitation.token,
    }
    request = JoinRequest(**{**values, **changes})
    return SignedJoin(request=request, signature=key_of(signer).sign(request))


def test_an_invitation_holds_addresses_and_no_secret_but_its_token(folder: AggregatorFolder) -> None:
    """Nothing of the aggregator's keys or of other hospitals is in it; of the token only a hash is kept."""
    text = invite(folder, "dogwood", NOW).model_dump_json()
    other = invite(folder, "elm", NOW)

    assert other.federation == FEDERATION
    assert other.token not in text
    for name in ("keys/aggregator.ed25519", "keys/superexec.secret"):
        assert (folder.path / name).read_text().strip() not in text
    assert "PRIVATE" not in text
    assert "alder" not in text
    assert other.token not in (folder.path / "invitations" / "elm.json").read_text()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"token": "00" * 32}, "is not valid"),
        ({"node": "elm"}, "is not valid"),
        ({"node": "alder"}, "is not valid"),
        ({"federation": "elsewhere"}, "is not valid"),
        ({"public_key": key_of("alder").public.hex}, "is not valid"),
        ({"transport_key": "ssh-rsa AAAA x"}, "not a P-384 key"),
    ],
)
def test_a_request_that_the_invitation_does_not_allow_is_refused(
    folder: AggregatorFolder, changes: dict[str, Any], why: str
) -> None:
    """A guessed token, another name, another federation, a key that is not the sender's: refused, nothing is logged."""
    invitation = invite(folder, "dogwood", NOW)
    invite(folder, "elm", NOW)
    before = (folder.path / "ledger.db").read_bytes()
    with pytest.raises(CheckFailed, match=why):
        redeem(folder, signed(invitation, **changes), NOW)

    assert (folder.path / "ledger.db").read_bytes() == before


def test_an_expired_and_a_replaced_invitation_are_void(folder: AggregatorFolder) -> None:
    """The end of validity holds, and inviting again replaces the token."""
    old = invite(folder, "dogwood", NOW)
    with pytest.raises(CheckFailed, match="expired"):
        redeem(folder, signed(old), NOW + timedelta(days=15))
    invite(folder, "dogwood", NOW)
    with pytest.raises(CheckFailed, match="not valid"):
        redeem(folder, signed(old), NOW)


def test_a_name_that_cannot_be_a_hospitals_is_refused(folder: AggregatorFolder) -> None:
    """Names are file names too: no way out of the folder."""
    for name in ("../hub", "A", "", "a" * 64):
        with pytest.raises(BadInput, match="cannot be a hospital's name"):
            invite(folder, name, NOW)


def test_the_aggregators_programs_listen_on_the_loopback_address_only(folder: AggregatorFolder) -> None:
    """Nobody but this machine reaches the Control API; what is secret is not on a command line."""
    superlink, superexec, desk = programs(folder)

    assert superlink.command[superlink.command.index("--host") + 1] == "127.0.0.1"
    assert "--enable-supernode-auth" in superlink.command
    assert (folder.path / "keys" / "superexec.secret").read_text() not in " ".join(
        (*superlink.command, *superexec.command, *desk.command)
    )
    for name in ("ca.key", "server.key"):
        assert (folder.path / "tls" / name).stat().st_mode & 0o077 == 0


def test_preparing_again_keeps_every_key(folder: AggregatorFolder) -> None:
    """`islet aggregator up` prepares at each start; hospitals' trust must survive it."""
    names = ("tls/ca.crt", "tls/ca.key", "tls/server.key", "keys/superexec.secret")
    before = [(folder.path / name).read_bytes() for name in names]
    prepare(folder)

    assert [(folder.path / name).read_bytes() for name in names] == before
