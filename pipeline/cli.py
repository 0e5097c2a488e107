"""The command line: each command parses, calls one function of a room, and prints. Errors end with what to do.

Exit codes: 0 done; 1 a check ran and failed; 2 wrong use or bad input, and nothing was changed.
"""

from __future__ import annotations

import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data_schemas.errors import BadInput, IsletError
from pipeline import (
    cli_anchor,
    cli_deploy,
    cli_federation,
    cli_governance,
    cli_models,
    cli_participation,
    cli_review,
)
from pipeline.cli_node import NodePath, make_node, node, say

if TYPE_CHECKING:
    from hospital_node.budget import Cohort
    from hospital_node.folder import NodeFolder

app = typer.Typer(
    name="islet",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
    help="Hospitals train one glucose forecaster together; no reading leaves a hospital.",
)
aggregator = typer.Typer(no_args_is_help=True, help="The federation's aggregator: rounds and credit.")
ledger = typer.Typer(no_args_is_help=True, help="The credit ledger: verify, show, export.")
app.add_typer(node, name="node")
app.add_typer(aggregator, name="aggregator")
app.add_typer(ledger, name="ledger")
ledger.add_typer(cli_anchor.app, name="anchor")
cli_federation.register(ledger)
cli_governance.register(app, aggregator)
cli_deploy.register(aggregator, node)
cli_models.register(app)
cli_review.register(app)
cli_participation.register(node)

AggregatorPath = Annotated[Path, typer.Argument(metavar="AGGREGATOR", help="The aggregator's folder.")]
NodePaths = Annotated[list[Path], typer.Option("--node", help="A node folder on this machine; repeat for each.")]
LedgerPath = Annotated[Path, typer.Argument(metavar="LEDGER", help="An aggregator's folder, or its ledger.db.")]


def main() -> None:
    """Run the command line; an expected error becomes a message, a hint and an exit code."""
    try:
        app()
    except IsletError as error:
        hint = f"  what to do: {error.hint}\n" if error.hint else ""
        sys.stderr.write(f"error: {error.message}\n{hint}")
        raise SystemExit(error.exit_code) from None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


# --- node -------------------------------------------------------------------------------------------------------


@node.command("init")
def node_init(
    path: NodePath,
    name: Annotated[str, typer.Option(help="The hospital's name in the federation: a-z, 0-9 and -.")],
    federation: Annotated[str, typer.Option(help="The federation's name.")],
    training: Annotated[int, typer.Option(help="Declared number of patients to train on (published).")],
    heldout: Annotated[int, typer.Option(help="Declared number of patients held out (published).")],
    aggregator_key: Annotated[
        str | None, typer.Option(help="The aggregator's public key, from its invitation.")
    ] = None,
    exports: Annotated[Path | None, typer.Option(help="Folder of the device exports.")] = None,
    layout: Annotated[
        str | None, typer.Option(help="Layout of the exports: a name, or the path of a TOML file.")
    ] = None,
    zone: Annotated[str | None, typer.Option(help="IANA time zone of the exports, such as Europe/Madrid.")] = None,
) -> None:
    """Make a node folder: settings, keys, store and budget book."""
    make_node(
        path,
        name=name,
        federation=federation,
        training=training,
        heldout=heldout,
        aggregator_key=aggregator_key,
        exports=exports,
        layout=layout,
        zone=zone,
    )
    say(f"made node {name} in {path}; next: islet node import {path}")


@node.command("status")
def node_status(path: NodePath) -> None:
    """Show who the node is, what it holds and what its patients have spent."""
    from hospital_node.folder import NodeFolder
    from hospital_node.ledger_view import alarm, removed
    from hospital_node.statements import refused
    from hospital_node.store import Store

    with NodeFolder.open(path) as home:
        counts, book = Store(home.store).counts(), home.budget()
        say(f"node {home.settings.name} of federation {home.settings.federation}")
        say(f"public key  {home.key.public.hex}")
        say(f"store       {counts.readings:,} readings of {counts.patients:,} patients")
        say(f"declared    {home.settings.declared_training_patients} training, "
            f"{home.settings.declared_heldout_patients} held-out patients")  # fmt: skip
        for name, code in refused(home):
            say(f"refused     {name}: {code}")
        if (raised := alarm(home)) is not None:
            say(f"ALARM       {raised}; this node trains no further")
        for cohort, ceiling in _ceilings(home).items():
            say(f"privacy     {cohort}: patient-level epsilon {book.spent(cohort):.2f} of {ceiling:.2f}")
        if removed(home):
            say("REMOVED     the members voted this hospital out; see `islet federation status`")


def _ceilings(home: NodeFolder) -> dict[Cohort, float]:
    return {"training": home.settings.max_epsilon_training, "heldout": home.settings.max_epsilon_heldout}


@node.command("budget")
def node_budget(
    path: NodePath,
    as_json: Annotated[bool, typer.Option("--json", help="Every release's event, to add up anew.")] = False,
) -> None:
    """Verify the privacy budget book and show what was spent, by whom it was asked, and what is left."""
    from hospital_node.budget import exported, render
    from hospital_node.folder import NodeFolder

    with NodeFolder.open(path) as home:
        book = home.budget()
        book.verify()
        say(json.dumps(exported(book), indent=1) if as_json else render(book, _ceilings(home)))


@node.command("key")
def node_key(
    path: NodePath,
    patient: Annotated[str, typer.Option(help="Pseudonym the key may ask about; 'all' for every patient.")] = "all",
    writes: Annotated[bool, typer.Option("--writes", help="The key may also add readings.")] = False,
    operator: Annotated[
        bool, typer.Option("--operator", help="The key may also pause the node, or leave the federation.")
    ] = False,
    listed: Annotated[bool, typer.Option("--list", help="List the keys by id; make none.")] = False,
    revoke: Annotated[str | None, typer.Option(metavar="ID", help="Revoke a key by its id; make none.")] = None,
) -> None:
    """Make an API key for the forecast endpoint; it is shown once and only its hash is kept. Or list, or revoke."""
    from hospital_node.api_keys import create_key, read_keys, revoke_key

    if not (path / "node.toml").exists():
        raise BadInput(f"{path} is not a node folder", "make one with `islet node init`")
    # No lock on the node: a key must be revocable while it trains.
    if revoke is not None:
        revoke_key(path, revoke)
        say(f"revoked key {revoke}; a running endpoint refuses it from its next request on")
    elif listed:
        for key in read_keys(path):
            may = "operates" if key.operates else "writes" if key.writes else "reads"
            say(f"{key.key_id}  {key.created_at:%Y-%m-%d %H:%M}  {may:<8}  {key.scope}")
    else:
        say(create_key(path, patient, time.time(), writes=writes, operates=operator)[1])


@node.command("serve")
def node_serve(
    path: NodePath,
    model: Annotated[
        Path | None, typer.Option(help="Folder of an exported model; only for a node that follows no ledger.")
    ] = None,
    challenger: Annotated[
        Path | None, typer.Option(help="Folder of another model, to be compared on the clinic's page.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8080,
) -> None:
    """Serve forecasts until stopped, from the model that the members decided. Research use only."""
    from hospital_node.endpoint import serve

    if not (path / "node.toml").exists():
        raise BadInput(f"{path} is not a node folder", "make one with `islet node init`")
    serve(
        path,
        model,
        host,
        port,
        ready=lambda running: say(f"serving forecasts at {running.url}"),
        challenger=challenger,
    )


# --- aggregator -------------------------------------------------------------------------------------------------


@aggregator.command("init")
def aggregator_init(
    path: AggregatorPath,
    federation: Annotated[str, typer.Option(help="The federation's name.")],
    plan: Annotated[Path, typer.Option(help="The training plan's TOML file.")],
    address: Annotated[
        str | None, typer.Option(help="HOST:PORT where hospitals reach the reverse proxy; default: this machine only.")
    ] = None,
    port: Annotated[int, typer.Option(help="Loopback port of the SuperLink; the joining desk has the next.")] = 8000,
) -> None:
    """Make an aggregator folder: keys, certificates, calibrated plan, settings."""
    from aggregator.superlink import prepare
    from pipeline.demo import found

    fleet, desk = address or f"127.0.0.1:{port}", address or f"127.0.0.1:{port + 1}"
    folder = found(path, federation, plan, port=port, fleet_address=fleet, desk_address=desk)
    prepare(folder)
    say(f"made the aggregator of {federation} in {path}; public key {folder.key().public.hex}")


@aggregator.command("admit")
def aggregator_admit(path: AggregatorPath, nodes: NodePaths) -> None:
    """Enter hospitals into the ledger as members."""
    from aggregator.settings import open_folder
    from pipeline.demo import admit

    admit(open_folder(path), nodes)
    say(f"{len(nodes)} hospitals are members")


@aggregator.command("run")
def aggregator_run(
    path: AggregatorPath,
    nodes: Annotated[
        list[Path] | None,
        typer.Option("--node", help="A node folder on this machine, in one process; repeat for each."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the exported model.")] = Path("model"),
) -> None:
    """Run, or resume, the federation's training over connected hospitals, and fetch the model; exit 1 if it failed.

    It needs `islet aggregator up`. With --node it trains over nodes on this machine instead, without any network.
    """
    from pipeline.demo import train_federation

    if nodes:
        train_federation(path, nodes, out, say)
    else:
        cli_deploy.run_deployed(path, out)


@aggregator.command("status")
def aggregator_status(path: AggregatorPath) -> None:
    """Show members, rounds and credit as the ledger tells them."""
    from aggregator.governance import replay
    from aggregator.ledger import read_entries
    from aggregator.settings import open_folder
    from pipeline.contribution import why_unpaid

    folder = open_folder(path)
    state = replay(read_entries(path / "ledger.db"))
    say(f"federation {folder.settings.federation}: {len(state.members)} members")
    for name, member in state.members.items():
        say(f"  {name:<14} {member.declared_training_patients:>4} training, "
            f"{member.declared_heldout_patients:>3} held-out patients")  # fmt: skip
    if why := why_unpaid(member.declared_heldout_patients for member in state.members.values()):
        say(f"  {why}")
    for run in state.plans:
        rounds = [number for (of, number) in state.rounds if of == run]
        say(f"run {run}: {len(rounds)} of {folder.load_plan().rounds} rounds closed")
    for (run, epoch), credit in state.credits.items():
        lines = ", ".join(f"{line.node} {line.micro_credits / 1e6:.2f}" for line in credit.lines)
        say(f"credit of {run} epoch {epoch}: {lines}")


# --- ledger -----------------------------------------------------------------------------------------------------


def _ledger_file(path: Path) -> Path:
    file = path / "ledger.db" if path.is_dir() else path
    if not file.exists():
        raise BadInput(f"there is no ledger at {file}", "give an aggregator's folder, or its ledger.db")
    return file


@ledger.command("verify")
def ledger_verify(
    path: LedgerPath,
    key: Annotated[
        str | None, typer.Option(help="The aggregator's public key; default: the one in its folder.")
    ] = None,
    witness: Annotated[
        list[Path] | None, typer.Option(help="A node folder whose cosigned checkpoint must hold.")
    ] = None,
) -> None:
    """Check signatures, order, tree, checkpoints, cosignatures and credits; exit 1 naming what is wrong."""
    from aggregator.settings import KEY_FILE
    from aggregator.verification import render_verification, verify_ledger
    from hospital_node.witness import witnessed_note
    from pipeline.signing import PrivateKey

    file = _ledger_file(path)
    public = key or PrivateKey.load(file.parent / KEY_FILE).public.hex
    witnessed = [note for home in witness or [] if (note := witnessed_note(home))]
    say(render_verification(verify_ledger(file, public, witnessed)))


@ledger.command("show")
def ledger_show(path: LedgerPath) -> None:
    """List the entries, a line each."""
    from aggregator.ledger import read_entries
    from aggregator.verification import show_entry

    for entry in read_entries(_ledger_file(path)):
        say(show_entry(entry))


@ledger.command("export")
def ledger_export(path: LedgerPath, out: Annotated[Path, typer.Option(help="JSON lines file to write.")]) -> None:
    """Write entries and checkpoint as JSON lines, for an auditor."""
    from aggregator.verification import export

    say(f"{export(_ledger_file(path), out):,} entries written to {out}")


# --- the rest ---------------------------------------------------------------------------------------------------


@app.command("demo")
def demo_command(
    out: Annotated[Path, typer.Option(help="Folder for nodes, aggregator, model and report.")] = Path("demo-run"),
    rounds: Annotated[int | None, typer.Option(min=1, help="Federated rounds; default: the demo plan's.")] = None,
    epsilon: Annotated[float | None, typer.Option(help="Patient-level epsilon at delta 1e-5; default 8.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Makes the run repeatable; public data only.")] = 1,
) -> None:
    """Six hospitals train one private forecaster on real data: nodes, rounds, credit, registry, endpoint, report."""
    from pipeline.demo import run_demo

    run_demo(out, rounds, epsilon, seed, say)


@app.command("version")
def version_command() -> None:
    """Print the version."""
    from importlib.metadata import version

    say(version("islet-fl"))
