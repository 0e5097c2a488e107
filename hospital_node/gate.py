"""The gate at the node: whatever bundle the server sends, the ClientApp that runs is the one installed here.

Flower's SuperExec starts `flwr-clientapp` by name; a node's PATH leads to ours (hospital_node/gate_path). It fetches
the message as Flower's does, but never unpacks or imports the bundle: it compares the SHA-256 of its bytes with the
one that the hospital approved when it joined, and then runs the installed ClientApp, or refuses. The hash does not
cover the run configuration: the ClientApp reads none. The ceilings of the node's settings hold whatever a task
says.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_schemas.canonical import bytes_hash
from data_schemas.errors import IsletError
from hospital_node.client_app import app
from hospital_node.settings import read_settings
from hospital_node.task_record import note

if TYPE_CHECKING:
    from collections.abc import Callable

    from flwr.clientapp import ClientApp


def main() -> None:
    """Run one task as `flwr-clientapp`. The two functions replaced are pinned with Flower's version, and checked."""
    from flwr.clientapp.client_app import LoadClientAppError
    from flwr.supernode.cli import flwr_clientapp
    from flwr.supernode.runtime import run_clientapp as runtime

    home = Path(os.environ.get("ISLET_NODE_HOME", ""))

    def admit(content: bytes, **_options: Any) -> None:
        if not approved(home, content):
            note(home, "warning", f"refused bundle {bytes_hash(content)[:16]}: this hospital has not approved it")
            # Flower answers this error with a fixed text; of another it would send the words.
            raise LoadClientAppError

    def installed(**_options: Any) -> Callable[..., ClientApp]:
        return lambda *_names: app

    for name, ours in (("install_from_fab", admit), ("get_load_client_app_fn", installed)):
        getattr(runtime, name)
        setattr(runtime, name, ours)
    flwr_clientapp()


def approved(home: Path, bundle: bytes) -> bool:
    """Whether the hospital's settings approve these bytes; settings that cannot be read approve nothing."""
    try:
        wanted = read_settings(home / "node.toml").approved_bundle
    except IsletError:
        return False
    return wanted is not None and wanted == bytes_hash(bundle)
