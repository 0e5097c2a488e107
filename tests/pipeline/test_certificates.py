"""A federation's authority, its server's certificate, and transport keys, as a TLS library takes them."""

import socket
import ssl
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest

from data_schemas.errors import BadInput
from pipeline.certificates import (
    Credentials,
    expires_at,
    is_transport_key,
    make_authority,
    make_server_certificate,
    make_transport_key,
)

NOW = datetime.now(UTC)


def handshake(folder: Path, server: Credentials, trusted: bytes, host: str) -> str:
    """Open a TLS connection on the loopback interface; the version agreed on, or the error's reason."""
    (folder / "server.crt").write_bytes(server.certificate)
    (folder / "server.key").write_bytes(server.key)
    listening = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    listening.load_cert_chain(folder / "server.crt", folder / "server.key")
    asking = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    asking.load_verify_locations(cadata=trusted.decode())
    with socket.create_server(("127.0.0.1", 0)) as server_socket:

        def accept() -> None:
            connection = server_socket.accept()[0]
            try:
                listening.wrap_socket(connection, server_side=True).close()
            except OSError:
                connection.close()

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            with (
                socket.create_connection(server_socket.getsockname()) as raw,
                asking.wrap_socket(raw, server_hostname=host) as connection,
            ):
                return str(connection.version())
        except ssl.SSLCertVerificationError as error:
            return str(error.verify_message)
        finally:
            thread.join(10)


def test_a_client_that_trusts_the_authority_connects_by_name_and_by_address(tmp_path: Path) -> None:
    """The certificate holds for every name it was made for, and for no other."""
    authority = make_authority("north", NOW)
    server = make_server_certificate(authority, ("hub.example.org", "127.0.0.1", "::1"), NOW)

    assert handshake(tmp_path, server, authority.certificate, "127.0.0.1") == "TLSv1.3"
    assert handshake(tmp_path, server, authority.certificate, "hub.example.org") == "TLSv1.3"
    assert "mismatch" in handshake(tmp_path, server, authority.certificate, "other.example.org")


def test_another_federations_authority_is_not_trusted(tmp_path: Path) -> None:
    """Two authorities of the same name are two authorities."""
    server = make_server_certificate(make_authority("north", NOW), ("127.0.0.1",), NOW)

    assert "unable to get local issuer" in handshake(
        tmp_path, server, make_authority("north", NOW).certificate, "127.0.0.1"
    ) or "self-signed" in handshake(tmp_path, server, make_authority("north", NOW).certificate, "127.0.0.1")


def test_a_certificate_lasts_13_months_and_an_authority_ten_years() -> None:
    """The end of a certificate can be read from it."""
    authority = make_authority("north", NOW)
    server = make_server_certificate(authority, ("127.0.0.1",), NOW)

    assert (expires_at(server.certificate) - NOW).days in {396, 397}
    assert (expires_at(authority.certificate) - NOW).days in {3649, 3650}


def test_an_authority_whose_halves_do_not_fit_is_refused() -> None:
    """A key that was restored beside another certificate signs nothing."""
    one, other = make_authority("north", NOW), make_authority("north", NOW)

    with pytest.raises(BadInput, match="not its certificate's"):
        make_server_certificate(Credentials(one.certificate, other.key), ("127.0.0.1",), NOW)
    with pytest.raises(BadInput, match="cannot be read"):
        make_server_certificate(Credentials(b"no", b"no"), ("127.0.0.1",), NOW)


def test_transport_keys_are_recognised_and_their_secret_does_not_show() -> None:
    """A P-384 line is a transport key; an RSA line, a cut line and free text are not."""
    key = make_transport_key()

    assert is_transport_key(key.public)
    assert not is_transport_key(key.public[:-9])
    assert not is_transport_key("ssh-rsa AAAAB3NzaC1yc2E= x")
    assert not is_transport_key("glucose 123")
    assert "PRIVATE" not in repr(key)
    assert "PRIVATE" in key.private.decode()
