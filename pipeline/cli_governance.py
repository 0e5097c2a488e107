"""Commands of the members: sign proposals, votes and attestations at home; hold sittings; see what was decided."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from data_schemas.errors import BadInput

if TYPE_CHECKING:
    from aggregator.assembly import Sitting
    from aggregator.ledger import Ledger
    from data_schemas.governance import DecisionEntry

federation = typer.Typer(no_args_is_help=True, help="What the members decide: propose, vote, attest, status.")


def register(app: typer.Typer, aggregator: typer.Typer) -> None:
    """Add this module's commands to the command line."""
    app.add_typer(federation, name="federation")
    aggregator.command("serve")(aggregator_serve)


NodePath = Annotated[Path, typer.Argument(metavar="NODE", help="Node folder of the hospital that signs.")]
AggregatorPath = Annotated[Path, typer.Argument(metavar="AGGREGATOR", help="The aggregator's folder.")]
Here = Annotated[
    Path | None, typer.Option("--aggregator", help="Aggregator folder, where it is on this machine: enter at once.")
]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@federation.command("propose")
def federation_propose(
    path: NodePath,
    action: Annotated[
        str,
        typer.Argument(
            metavar="ACTION",
            help="admit, remove, rotate-key, privacy-policy, credit-policy, promote, roll-back, pause or challenge.",
        ),
    ],
    values: Annotated[
        str, typer.Option("--values", help="The action's fields as JSON; docs/governance.md has an example of each.")
    ] = "{}",
    days: Annotated[float, typer.Option(min=0.0001, max=3650, help="Days until the proposal expires.")] = 14.0,
    plan: Annotated[
        Path | None, typer.Option(help="challenge: the challenger's plan, TOML, or the JSON of a calibrated one.")
    ] = None,
    wheel: Annotated[
        Path | None, typer.Option(help="challenge: the wheel that nodes install for it; default: what is installed.")
    ] = None,
    aggregator: Here = None,
) -> None:
    """Sign a proposal; it goes out with the node's next cosignature."""
    from hospital_node import ledger_view, statements
    from hospital_node.folder import NodeFolder
    from hospital_node.identity import propose_new_key

    try:
        given = dict(json.loads(values))
    except (ValueError, TypeError) as error:
        raise BadInput("--values is not a JSON object", "docs/governance.md has an example of each action") from error
    if plan is not None:
        given |= _challenger(plan, wheel)
    _meet(aggregator, [path])
    with NodeFolder.open(path, sitting=True) as node:
        charter, now = ledger_view.decided(node), datetime.now(UTC)
        if action == "rotate-key" and not given:
            file = propose_new_key(node, charter, days, now)
        else:
            file = statements.propose(node, charter, {**given, "action": action}, days, now)
        typer.echo(f"signed {file}")
    _meet(aggregator, [path])


@federation.command("vote")
def federation_vote(
    path: NodePath,
    proposal: Annotated[str, typer.Argument(metavar="PROPOSAL", help="The proposal's hash, or how it begins.")],
    approve: Annotated[bool, typer.Option("--yes/--no", help="For or against.")],
    aggregator: Here = None,
) -> None:
    """Sign a vote; it goes out with the node's next cosignature."""
    from hospital_node import ledger_view, statements
    from hospital_node.folder import NodeFolder

    _meet(aggregator, [path])
    with NodeFolder.open(path, sitting=True) as node:
        file = statements.vote(node, ledger_view.decided(node), proposal, datetime.now(UTC), approve=approve)
        typer.echo(f"signed {file}")
    _meet(aggregator, [path])


@federation.command("attest")
def federation_attest(path: NodePath, aggregator: Here = None) -> None:
    """Sign what the privacy budget book holds: its head and what both cohorts have spent."""
    from hospital_node import ledger_view, statements
    from hospital_node.folder import NodeFolder

    _meet(aggregator, [path])
    with NodeFolder.open(path, sitting=True) as node:
        file = statements.attest(node, ledger_view.decided(node), datetime.now(UTC))
        typer.echo(f"signed {file}" if file else "the ledger holds this already")
    _meet(aggregator, [path])


@federation.command("enter")
def federation_enter(
    path: AggregatorPath,
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Signed statements, from nodes' outboxes.")],
) -> None:
    """Enter signed statements that came as files; exit 2, naming the code, when one is refused."""
    from pydantic import TypeAdapter, ValidationError

    from aggregator.governance import decide, enter
    from data_schemas.governance import Statement

    for file in files:
        try:
            statement: Statement = TypeAdapter(Statement).validate_json(file.read_bytes())
        except (OSError, ValidationError) as error:
            raise BadInput(f"{file} is no signed statement", "give files of a node's outbox") from error
        with _ledger(path) as book:
            enter(book, statement, _now())
            typer.echo(f"entered {file.name}")
            _tell_decided(decide(book, _now()))


@federation.command("sit")
def federation_sit(
    path: AggregatorPath,
    nodes: Annotated[
        list[Path] | None,
        typer.Option("--node", help="A node folder on this machine; repeat for each."),
    ] = None,
    every: Annotated[
        float | None,
        typer.Option(min=0.2, max=3600, help="Go on until stopped, with so many seconds between sittings."),
    ] = None,
    registry: Annotated[Path, typer.Option(help="Folder that holds mlruns/, if there is one.")] = Path(),
) -> None:
    """Hold a sitting: show nodes the ledger, take in what they signed, count votes, hand over the champion.

    Without --node a standing run is started at the aggregator's SuperLink (`islet aggregator up`), for nodes elsewhere.
    """
    from aggregator.settings import open_folder
    from aggregator.state import hold_sittings
    from aggregator.superlink import submit
    from pipeline.demo_votes import hold_sitting, meeting

    if not nodes:
        folder = open_folder(path)
        with hold_sittings(folder.state):
            pass  # free: the run itself holds them from its start on
        flower_run = submit(folder, every or 30.0)
        typer.echo(f"a sitting every {every or 30.0:g} s, as Flower run {flower_run}, beside any run that trains")
        return
    with meeting(open_folder(path), nodes) as table:
        while True:
            _tell(hold_sitting(table, registry))
            if every is None:
                return
            time.sleep(every)


def aggregator_serve(
    path: AggregatorPath,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8090,
) -> None:
    """Serve the federation's page until stopped: members, proposals, credits, rounds, the ledger's verification."""
    from aggregator.federation_page import serve
    from aggregator.settings import open_folder

    serve(open_folder(path), host, port, ready=lambda address: typer.echo(f"the federation's page is at {address}"))


@federation.command("status")
def federation_status(
    path: Annotated[Path, typer.Argument(metavar="FOLDER", help="An aggregator's folder, or a node's.")],
) -> None:
    """Show members, policy, open proposals and decisions, as the ledger or the node's copy of it tells them."""
    from pipeline.charter_text import render

    if (path / "node.toml").exists():
        from hospital_node import ledger_view, statements
        from hospital_node.folder import NodeFolder

        with NodeFolder.open(path, sitting=True) as node:
            typer.echo(render(ledger_view.decided(node, whole=True), _now()))
            for statement in statements.waiting(node):
                typer.echo(f"  waiting   a signed {statement.kind}: it goes out with the next cosignature")
            for name, code in statements.refused(node):
                typer.echo(f"  refused   {name}: {code}")
        return
    from aggregator.governance import decide

    with _ledger(path) as book:
        decide(book, _now())
        typer.echo(render(book.charter(), _now()))


def _challenger(plan: Path, wheel: Path | None) -> dict[str, Any]:
    from pipeline.bundle import code_hash, wheel_hash
    from pipeline.plans import load_calibrated, load_plan

    read = load_plan(plan) if plan.suffix == ".toml" else load_calibrated(plan)
    return {"plan": read.model_dump(mode="json"), "code_hash": wheel_hash(wheel) if wheel else code_hash()}


def _meet(aggregator: Path | None, nodes: Sequence[Path], registry: Path = Path()) -> None:
    """Hold a sitting with nodes of this machine, by the same messages as with any other."""
    from aggregator.settings import open_folder
    from pipeline.demo_votes import hold_sitting, meeting

    if aggregator is not None:
        with meeting(open_folder(aggregator), nodes) as table:
            _tell(hold_sitting(table, registry))


def _tell(sitting: Sitting) -> None:
    for node, codes in sitting.refused.items():
        for name, code in codes.items():
            typer.echo(f"refused {name[:16]} of {node}: {code}")
    if sitting.entered:
        typer.echo(f"entered {sitting.entered} signed by members")
    _tell_decided(sitting.decided)
    if sitting.installed:
        typer.echo(f"champion {(sitting.champion or '')[:12]} is at {', '.join(sitting.installed)}")


def _tell_decided(decided: Sequence[DecisionEntry]) -> None:
    for made in decided:
        typer.echo(f"decided {made.proposal_hash[:12]}: {'accepted' if made.accepted else 'rejected'}")


@contextmanager
def _ledger(path: Path) -> Iterator[Ledger]:
    from aggregator.settings import open_folder

    book = open_folder(path).open_ledger()
    try:
        yield book
    finally:
        book.close()
