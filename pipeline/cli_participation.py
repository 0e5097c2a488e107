"""The hospital's switch on the command line: pause, resume, leave. Part of the composition root."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from data_schemas.errors import BadInput
from pipeline.cli_node import NodePath, say

_BY = "command line"


def register(node: typer.Typer) -> None:
    """Add the commands to `islet node`."""
    for name, command in (("pause", node_pause), ("resume", node_resume), ("leave", node_leave)):
        node.command(name)(command)


def node_pause(path: NodePath) -> None:
    """Take no part for now: tasks are answered with the code node-paused; the node stays a witness of the ledger."""
    from hospital_node.participation import pause

    _known(path)
    say(f"paused since {pause(path, time.time(), _BY).since}; a round that has begun is finished")


def node_resume(path: NodePath) -> None:
    """Take part again."""
    from hospital_node.participation import resume

    _known(path)
    say(f"taking part again since {resume(path, time.time(), _BY).since}")


def node_leave(
    path: NodePath,
    confirm: Annotated[str, typer.Option(help="The node's name, to show that it is meant: leaving is for good.")],
) -> None:
    """Leave the federation for good; signs the statement that is handed to the others."""
    from hospital_node.participation import STATEMENT, leave
    from hospital_node.settings import read_settings

    _known(path)
    if confirm != (name := read_settings(path / "node.toml").name):
        raise BadInput(f"--confirm must be this node's name, {name}", "leaving cannot be taken back")
    signed = leave(path, time.time(), _BY)
    say(f"left {signed.leaving.federation} at {signed.leaving.at}; the signed statement is in {path / STATEMENT}")


def _known(path: NodePath) -> None:
    if not (path / "node.toml").exists():
        raise BadInput(f"{path} is not a node folder", "make one with `islet node init`")
