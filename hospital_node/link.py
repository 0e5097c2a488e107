"""A node's link to the federation: how it joins, and the programs that keep it connected.

link/transport.key      P-384 key that opens the connection (OpenSSH)             0600
link/transport.pub      its public half
link/ca.crt             certificate of the federation's authority: nobody else is trusted
link/superexec.secret   between SuperNode and SuperExec, on this machine          0600
link/flower/            Flower's own home
link/lock               held while the node runs
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import socket
import ssl
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from data_schemas.canonical import canonical_bytes
from data_schemas.errors import BadInput, CheckFailed, NodeBusy, StorageFailed
from data_schemas.invitation import Invitation, JoinAnswer, JoinRequest, SignedJoin
from hospital_node.folder import NodeFolder
from hospital_node.settings import NodeSettings, write_settings
from pipeline.bundle import bundle_hash
from pipeline.certificates import make_transport_key
from pipeline.signing import write_durably
from pipeline.supervisor import Program

GATE_PATH = Path(__file__).with_name("gate_path")
_ANSWER_S, _MAX_ANSWER_BYTES = 120.0, 64 * 1024
_SECRET = "superexec.secret"  # noqa: S105 a file's name


def settings_after(settings: NodeSettings, invitation: Invitation) -> NodeSettings:
    """Node settings with what the invitation says. Raises BadInput when they are another hospital's or federation's."""
    if (settings.name, settings.federation) != (invitation.node, invitation.federation):
        raise BadInput(
            f"the invitation is for {invitation.node} of {invitation.federation}, this node is {settings.name} of"
            f" {settings.federation}",
            "use the invitation's name, or ask for an invitation for this node",
        )
    if settings.aggregator_public_key not in {None, invitation.aggregator_public_key}:
        raise BadInput("the invitation is signed for another aggregator key", "ask the aggregator which one holds")
    said = {
        "aggregator_public_key": invitation.aggregator_public_key,
        "fleet_address": invitation.fleet_address,
        "approved_bundle": invitation.bundle_hash,
    }
    return settings.model_copy(update=said)


def join(path: Path, invitation: Invitation) -> JoinAnswer:
    """Join with a node folder that exists: keys, certificate, registration, settings. Repeating it is harmless.

    Raises BadInput when Islet here is another than the aggregator's or the desk cannot be reached, CheckFailed when the
    desk refuses.
    """
    if bundle_hash() != invitation.bundle_hash:
        raise BadInput(
            "the aggregator runs another bundle than this Islet has", "install the version that the federation uses"
        )
    with NodeFolder.open(path) as node:
        settings = settings_after(node.settings, invitation)
        _make_link(path, invitation)
        request = JoinRequest(
            federation=settings.federation,
            node=settings.name,
            public_key=node.key.public.hex,
            transport_key=(path / "link" / "transport.pub").read_text(encoding="ascii"),
            declared_training_patients=settings.declared_training_patients,
            declared_heldout_patients=settings.declared_heldout_patients,
            token=invitation.token,
        )
        answer = _ask(invitation, SignedJoin(request=request, signature=node.key.sign(request)))
        write_settings(path / "node.toml", settings)
    return answer


def programs(path: Path, model: Path, host: str, port: int) -> tuple[Program, ...]:
    """SuperNode, SuperExec with the gate, and the forecast endpoint of a node that has joined. port 0: no endpoint.

    Raises BadInput when the node has not joined, or the gate would not be the first on the PATH.
    """
    with NodeFolder.open(path, sitting=True) as node:  # a ClientApp that outlived a killed node may still be at work
        address = node.settings.fleet_address
    link, binaries = path / "link", Path(sys.executable).parent
    if address is None or not (link / "transport.key").exists():
        raise BadInput(f"{path} has not joined a federation", "run `islet node join` with its invitation")
    environment = _environment(path)
    gate = shutil.which("flwr-clientapp", path=environment["PATH"])
    if gate is None or Path(gate).parent != GATE_PATH:
        raise BadInput("the gate of this node cannot be run", f"make {GATE_PATH / 'flwr-clientapp'} executable")
    local, secret = _free_port(), str(link / _SECRET)
    supernode = (
        *(sys.executable, "-m", "hospital_node.supernode", "--superlink", address),
        *("--root-certificates", str(link / "ca.crt")),
        *("--auth-supernode-private-key", str(link / "transport.key"), "--host", "127.0.0.1", "--port", str(local)),
        *("--isolation", "process", "--superexec-auth-secret-file", secret),
    )
    # SuperNode and SuperExec speak on this machine's loopback address only, and SuperExec proves that it is ours.
    superexec = (
        *(str(binaries / "flower-superexec"), "--insecure", "--runtime-api-address", f"127.0.0.1:{local}"),
        *("--superexec-auth-secret-file", secret),
    )
    serve = (
        *(str(binaries / "islet"), "node", "serve", str(path), "--model", str(model)),
        *("--host", host, "--port", str(port)),
    )
    connected = (Program("supernode", supernode, environment), Program("superexec", superexec, environment))
    return connected if port == 0 else (*connected, Program("endpoint", serve, environment))


@contextmanager
def running(path: Path) -> Iterator[None]:
    """Hold a node while its programs run. Raises NodeBusy when they run already."""
    with (path / "link" / "lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise NodeBusy(f"{path} runs already", "stop the other `islet node run` first") from error
        yield


def _make_link(path: Path, invitation: Invitation) -> None:
    link = path / "link"
    try:
        for folder in (link, link / "flower"):
            folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise StorageFailed(f"{link}: cannot be made: {error.strerror}", "Check the disk and its mode.") from error
    if not (link / "transport.pub").exists():
        key = make_transport_key()
        write_durably(link / "transport.key", key.private, mode=0o600)
        write_durably(link / "transport.pub", key.public.encode())
    if not (link / _SECRET).exists():
        write_durably(link / _SECRET, secrets.token_hex(32).encode(), mode=0o600)
    write_durably(link / "ca.crt", invitation.root_certificate.encode())


def _ask(invitation: Invitation, signed: SignedJoin) -> JoinAnswer:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(cadata=invitation.root_certificate)
    except ssl.SSLError as error:
        raise BadInput("the invitation's certificate cannot be read", "ask the aggregator for a new one") from error
    request = urllib.request.Request(  # noqa: S310 the address starts with https, as Invitation demands
        f"{invitation.desk_url}/v1/join", canonical_bytes(signed), {"Content-Type": "application/json"}
    )
    opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=context))
    try:
        with opener.open(request, timeout=_ANSWER_S) as answer:
            return JoinAnswer.model_validate_json(answer.read(_MAX_ANSWER_BYTES))
    except urllib.error.HTTPError as error:
        message, hint = _refusal(error.read(_MAX_ANSWER_BYTES))
        raise CheckFailed(f"the aggregator refused: {message}", hint) from None
    except (OSError, ValidationError) as error:
        reason = getattr(error, "reason", error)
        raise BadInput(
            f"the aggregator at {invitation.desk_url} cannot be reached ({type(reason).__name__})",
            "check that this machine may open connections there; then give the same command again",
        ) from None


def _refusal(body: bytes) -> tuple[str, str]:
    try:
        told = json.loads(body)
        return str(told["message"])[:300], str(told["hint"])[:300]
    except (ValueError, KeyError, TypeError):
        return "it gave no reason", "ask the aggregator"


def _environment(path: Path) -> dict[str, str]:
    binaries = Path(sys.executable).parent
    return {
        **os.environ,
        "PATH": f"{GATE_PATH}:{binaries}:{os.environ.get('PATH', os.defpath)}",
        "FLWR_HOME": str((path / "link" / "flower").resolve()),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "NO_COLOR": "1",
        "ISLET_NODE_HOME": str(path.resolve()),
    }


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
