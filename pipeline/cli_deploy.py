"""Commands of a federation over a network: invite, join, run. Part of the composition root."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data_schemas.errors import BadInput, CheckFailed
from pipeline.cli_node import NodePath, say

if TYPE_CHECKING:
    from data_schemas.invitation import Invitation

AggregatorPath = Annotated[Path, typer.Argument(metavar="AGGREGATOR", help="The aggregator's folder.")]


def register(aggregator: typer.Typer, node: typer.Typer) -> None:
    """Add this module's commands to the command line."""
    aggregator.command("invite")(aggregator_invite)
    aggregator.command("up")(aggregator_up)
    aggregator.command("renew-certificate")(aggregator_renew_certificate)
    node.command("join")(node_join)
    node.command("run")(node_run)


def aggregator_invite(
    path: AggregatorPath,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The hospital's name: a-z, 0-9 and -.")],
    out: Annotated[Path | None, typer.Option(help="File to write; default: NAME.invite.")] = None,
    days: Annotated[float, typer.Option(min=0.001, help="Days until the invitation expires.")] = 14.0,
) -> None:
    """Write an invitation for one hospital; it can be used once, and an older one of that name is void."""
    from aggregator.invitations import invite
    from aggregator.settings import open_folder
    from pipeline.signing import write_durably

    invitation = invite(open_folder(path), name, datetime.now(UTC), days)
    file = out or Path(f"{name}.invite")
    write_durably(file, invitation.model_dump_json(indent=1).encode() + b"\n", mode=0o600)
    say(f"wrote {file}, valid until {invitation.expires_at}; send it to {name} only, over a channel you both trust")


def aggregator_up(path: AggregatorPath) -> None:
    """Run SuperLink, SuperExec and joining desk until stopped; one that ends is started again. Logs are JSON lines."""
    from aggregator.settings import open_folder
    from aggregator.superlink import prepare, programs
    from pipeline.supervisor import supervise

    folder = open_folder(path)
    prepare(folder)
    supervise(programs(folder))


def aggregator_renew_certificate(path: AggregatorPath) -> None:
    """Make a new server certificate; hospitals need not do anything. Restart `islet aggregator up` afterwards."""
    from aggregator.settings import open_folder
    from aggregator.superlink import renew_certificate
    from pipeline.certificates import expires_at

    renew_certificate(open_folder(path))
    until = expires_at((path / "tls" / "server.crt").read_bytes())
    say(f"the server's certificate is valid until {until:%Y-%m-%d}")


def run_deployed(path: Path, out: Path) -> None:
    """Submit the installed bundle, follow it to its end, fetch the model. Raises CheckFailed when the run failed."""
    from aggregator.release import fetch_release
    from aggregator.rounds import run_identity
    from aggregator.server_app import load_initial_weights
    from aggregator.settings import open_folder
    from aggregator.state import StateFolder
    from aggregator.superlink import follow, submit

    folder = open_folder(path)
    run = run_identity(folder.settings.federation, folder.load_plan(), load_initial_weights(folder))
    flower_run, shown, told = submit(folder), "", set[int]()
    say(f"submitted {run} as Flower run {flower_run}; Ctrl-C stops following, not the run")
    for standing in follow(folder, flower_run):
        for summary in StateFolder(folder.state).summaries(run):
            if summary.round not in told:
                told.add(summary.round)
                rejected = "".join(f"  {update.node}: {update.code}" for update in summary.rejected)
                say(f"round {summary.round}/{summary.rounds}: {len(summary.admitted)} updates admitted{rejected}")
        if standing["status"] != shown:
            shown = standing["status"]
            say(f"{shown} {standing['details']}".removesuffix("N/A").rstrip())
    if shown != "finished:completed":
        raise CheckFailed(f"the run ended as {shown}", f"why: {path}/log or the log of `islet aggregator up`")
    say(f"the released model {fetch_release(folder, run, out)[:12]} is in {out}")


def node_join(
    invitation: Annotated[Path, typer.Argument(metavar="INVITATION", help="The file that the aggregator sent.")],
    path: NodePath,
    training: Annotated[int | None, typer.Option(help="Declared number of patients to train on (published).")] = None,
    heldout: Annotated[int | None, typer.Option(help="Declared number of patients held out (published).")] = None,
    exports: Annotated[Path | None, typer.Option(help="Folder of the device exports.")] = None,
    layout: Annotated[str | None, typer.Option(help="Layout of the exports: a name, or a TOML file.")] = None,
    zone: Annotated[str | None, typer.Option(help="IANA time zone of the exports, such as Europe/Madrid.")] = None,
) -> None:
    """Join a federation: keys, certificate, registration and settings in one step. Repeating it is harmless."""
    from data_schemas.invitation import parse_invitation
    from hospital_node.link import join
    from pipeline.cli_node import make_node

    try:
        asked = parse_invitation(invitation.read_text(encoding="utf-8", errors="replace"))
    except OSError as error:
        raise BadInput(f"{invitation} cannot be read", "give the file that the aggregator sent") from error
    if not (path / "node.toml").exists():
        if training is None or heldout is None:
            raise BadInput(
                "how many patients?", "give --training and --heldout, the numbers that the hospital declares"
            )
        make_node(
            path,
            name=asked.node,
            federation=asked.federation,
            training=training,
            heldout=heldout,
            aggregator_key=asked.aggregator_public_key,
            exports=exports,
            layout=layout,
            zone=zone,
        )
    _say_joined(path, asked, join(path, asked).standing)


def _say_joined(path: Path, asked: Invitation, standing: str) -> None:
    say(f"{asked.node} is {'a member' if standing == 'member' else 'registered; the members vote whether it joins'}"
        f" of {asked.federation}")  # fmt: skip
    say(f"a patient may be asked for epsilon {asked.max_epsilon_training:g} in training and "
        f"{asked.max_epsilon_heldout:g} held out; your own ceilings, in node.toml, always hold")  # fmt: skip
    say(f"next: islet node import {path}, then islet node run {path}")


def node_run(
    path: NodePath,
    model: Annotated[Path | None, typer.Option(help="Folder of the model to serve; default: model in NODE.")] = None,
    host: Annotated[str, typer.Option(help="Address that the forecast endpoint listens on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port of the forecast endpoint; 0: no endpoint.")] = 8080,
) -> None:
    """Run SuperNode, SuperExec and forecast endpoint until stopped; one that ends is started again. Logs in JSON."""
    from hospital_node.link import programs, running
    from pipeline.supervisor import supervise

    wanted = programs(path, model or path / "model", host, port)
    with running(path):
        supervise(wanted)
