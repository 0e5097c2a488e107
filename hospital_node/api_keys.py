"""Keys of the apps that may ask this node for forecasts.

A key is 256 random bits, shown once; the node keeps its SHA-256 in keys/api_keys.json (0600). A plain hash is enough:
nobody can guess 256 random bits, so there is nothing for a slow hash to slow down.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from pydantic import Field, ValidationError

from data_schemas.canonical import canonical_bytes
from data_schemas.errors import BadInput
from data_schemas.frozen import Frozen
from data_schemas.messages import Hex32
from pipeline.signing import write_durably

KEY_PREFIX = "islet_"
KEY_BYTES = 32
ALL_PATIENTS = "all"


class ApiKey(Frozen):
    """What the node keeps of a key. scope: `all`, or the pseudonym of the one patient whose readings it may use.

    writes: whether it may add readings. operates: whether it may pause the node or leave the federation. nightscout:
    SHA-256 of the hexadecimal SHA-1 of the secret, which is what a Nightscout uploader sends in its place; keys made
    before there was such a thing have none.
    """

    key_id: str = Field(pattern=r"^[0-9a-f]{8}$")
    sha256: Hex32 = Field(pattern=r"^[0-9a-f]{64}$")
    scope: str = Field(pattern=r"^[A-Za-z0-9._-]{1,128}$")
    created_at: datetime
    writes: bool = False
    operates: bool = False
    nightscout: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")

    def allows(self, pseudonym: str) -> bool:
        """Whether this key may see forecasts of this patient's stored readings."""
        return self.scope in (ALL_PATIENTS, pseudonym)


class _KeyFile(Frozen):
    keys: tuple[ApiKey, ...] = ()


def create_key(
    node_home: Path, scope: str, now_s: float, *, writes: bool = False, operates: bool = False
) -> tuple[ApiKey, str]:
    """Add a key and return it with its secret text: the only time that text exists outside the app.

    writes: the key may also add readings; operates: it may turn the hospital's switch on the clinic's page.

    Raises BadInput for a scope that cannot be a pseudonym, and for one patient's key that would operate the node.
    """
    if operates and scope != ALL_PATIENTS:
        raise BadInput("a key that operates the node is for all patients", "leave out the pseudonym")
    secret = KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)
    try:
        key = ApiKey(
            key_id=secrets.token_hex(4),
            sha256=_hash(secret),
            scope=scope,
            created_at=datetime.fromtimestamp(now_s, tz=UTC),
            writes=writes,
            operates=operates,
            nightscout=_hash(nightscout_secret(secret)),
        )
    except ValidationError as error:
        raise BadInput(
            "the scope of an API key is `all` or one pseudonym", "list the pseudonyms of the node"
        ) from error
    with _locked(node_home):
        _write(node_home, (*read_keys(node_home), key))
    return key, secret


def revoke_key(node_home: Path, key_id: str) -> None:
    """Remove a key; a running endpoint notices at its next request. Raises BadInput when there is no such key."""
    with _locked(node_home):
        keys = read_keys(node_home)
        kept = tuple(key for key in keys if key.key_id != key_id)
        if len(kept) == len(keys):
            raise BadInput("there is no API key with this id", "`islet node key NODE --list` shows the ids")
        _write(node_home, kept)


def read_keys(node_home: Path) -> tuple[ApiKey, ...]:
    """Read the node's keys, oldest first; none when no key was ever made. Raises BadInput for a damaged file."""
    try:
        raw = key_file(node_home).read_bytes()
    except FileNotFoundError:
        return ()
    try:
        return _KeyFile.model_validate(json.loads(raw)).keys
    except ValueError:
        raise BadInput(
            "keys/api_keys.json is damaged", "restore it, or remove it and create new keys for every app"
        ) from None


def find_key(keys: tuple[ApiKey, ...], presented: str) -> ApiKey | None:
    """Return the key whose secret was presented, comparing against every key in constant time."""
    digest = _hash(presented)
    found = None
    for key in keys:
        if hmac.compare_digest(key.sha256, digest):
            found = key
    return found


class KeyRing:
    """The node's keys as a running endpoint sees them: read again whenever the file changes."""

    def __init__(self, node_home: Path) -> None:
        self._home, self._file = node_home, str(key_file(node_home))
        self._seen: tuple[tuple[int, int, int] | None, tuple[ApiKey, ...]] = (None, ())

    def find(self, presented: str) -> ApiKey | None:
        """Return the key whose secret was presented, or None."""
        return find_key(self._keys(), presented)

    def find_nightscout(self, presented: str) -> ApiKey | None:
        """Return the key whose secret, or whose secret's SHA-1, a Nightscout uploader presented, or None."""
        digest, found = _hash(presented.lower()), None
        for key in self._keys():
            if key.nightscout is not None and hmac.compare_digest(key.nightscout, digest):
                found = key
        return found or self.find(presented)

    def by_id(self, key_id: str) -> ApiKey | None:
        """Return the key with this id while it is not revoked."""
        return next((key for key in self._keys() if key.key_id == key_id), None)

    def _keys(self) -> tuple[ApiKey, ...]:
        version = self._version()
        if version is None:
            return ()
        if version != self._seen[0]:
            self._seen = (version, read_keys(self._home))
        return self._seen[1]

    def _version(self) -> tuple[int, int, int] | None:
        """Identity of the file: every write makes a new inode."""
        try:
            status = os.stat(self._file)  # noqa: PTH116 at every request: a path object costs as much as the look
        except FileNotFoundError:
            return None
        return status.st_ino, status.st_mtime_ns, status.st_size


def key_file(node_home: Path) -> Path:
    """Where the node keeps the hashes of its API keys."""
    return node_home / "keys" / "api_keys.json"


def nightscout_secret(secret: str) -> str:
    """What a Nightscout uploader sends in its `api-secret` header for this secret: SHA-1, in hexadecimal."""
    # Not for strength: the protocol asks for SHA-1. The secret has 256 random bits.
    return hashlib.sha1(secret.encode(), usedforsecurity=False).hexdigest()


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _write(node_home: Path, keys: tuple[ApiKey, ...]) -> None:
    write_durably(key_file(node_home), canonical_bytes(_KeyFile(keys=keys)), mode=0o600)


@contextmanager
def _locked(node_home: Path) -> Iterator[None]:
    """One writer at a time; the node itself may go on training, so its own lock is left alone."""
    folder = key_file(node_home).parent
    if not folder.is_dir():
        raise BadInput(f"{node_home} is not a node folder", "make one with `islet node init`")
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
