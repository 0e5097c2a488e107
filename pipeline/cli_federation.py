"""Commands about the federation's record: proofs and repair of the ledger; proposals, votes and their outcome."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data_schemas.errors import BadInput, CheckFailed, Tampered

if TYPE_CHECKING:
    from aggregator.ledger import Ledger

LedgerPath = Annotated[Path, typer.Argument(metavar="LEDGER", help="An aggregator's folder, or its ledger.db.")]
Key = Annotated[str | None, typer.Option(help="The aggregator's public key; default: the one in its folder.")]
CheckpointFile = Annotated[
    Path | None, typer.Option("--checkpoint", help="A signed checkpoint of your own; default: the published one.")
]


federation = typer.Typer(no_args_is_help=True, help="What the members decide: propose, vote, status.")


def register(app: typer.Typer, ledger: typer.Typer) -> None:
    """Add this module's commands to the command line."""
    app.add_typer(federation, name="federation")
    for name, command in (("prove", ledger_prove), ("verify-proof", ledger_verify_proof), ("fsck", ledger_fsck)):
        ledger.command(name)(command)


def _ledger_file(path: Path) -> Path:
    file = path / "ledger.db" if path.is_dir() else path
    if not file.exists():
        raise BadInput(f"there is no ledger at {file}", "give an aggregator's folder, or its ledger.db")
    return file


def _public_key(file: Path, given: str | None) -> str:
    from aggregator.settings import KEY_FILE
    from pipeline.signing import PrivateKey

    return given or PrivateKey.load(file.parent / KEY_FILE).public.hex


def _text(path: Path | None) -> str | None:
    if path is None:
        return None
    if not path.is_file():
        raise BadInput(f"{path}: no such checkpoint", "give a file with a signed checkpoint, such as checkpoint.txt")
    return path.read_text(encoding="utf-8", errors="replace")


def ledger_prove(
    path: LedgerPath,
    index: Annotated[int, typer.Argument(metavar="INDEX", help="Number of the entry, as `islet ledger show` has it.")],
    out: Annotated[Path, typer.Option(help="File to write the proof to.")],
    checkpoint: CheckpointFile = None,
) -> None:
    """Write a proof that an entry is in the ledger; it is checked offline, without the ledger."""
    from aggregator.ledger_fsck import prove
    from data_schemas.canonical import canonical_bytes
    from pipeline.signing import write_durably

    proof = prove(_ledger_file(path), index, _text(checkpoint))
    write_durably(out, canonical_bytes(proof) + b"\n")
    typer.echo(
        f"entry {index} under the checkpoint of {proof.receipt.tree_size} entries: "
        f"{len(proof.receipt.path)} hashes, written to {out}"
    )


def ledger_verify_proof(
    proof: Annotated[Path, typer.Argument(metavar="PROOF", help="File that `islet ledger prove` wrote.")],
    key: Annotated[str, typer.Option(help="The aggregator's public key.")],
    checkpoint: CheckpointFile = None,
    cosigner: Annotated[
        list[str] | None, typer.Option(help="NAME=KEY of a hospital that must have cosigned; repeat for each.")
    ] = None,
) -> None:
    """Check a proof offline against a checkpoint and the aggregator's public key; exit 1 naming what does not hold."""
    from aggregator.verification import show_entry
    from pipeline.inclusion import parse_proof, verify_proof

    if not proof.is_file():
        raise BadInput(f"{proof}: no such proof", "give the file that `islet ledger prove` wrote")
    keys = dict(named.partition("=")[::2] for named in cosigner or [])
    shown = verify_proof(parse_proof(proof.read_bytes()), key, _text(checkpoint), keys)
    typer.echo(f"proved: entry {shown.entry.index} is among the {shown.checkpoint.size} of {shown.checkpoint.origin}")
    typer.echo(show_entry(shown.entry))
    checked = ", ".join(shown.checked_cosigners) or "nobody (give --cosigner NAME=KEY)"
    typer.echo(f"cosigned, as the note says: {', '.join(shown.claimed_cosigners) or 'nobody'}; checked: {checked}")


def ledger_fsck(
    path: LedgerPath,
    key: Key = None,
    rebuild_to: Annotated[
        Path | None, typer.Option("--rebuild", help="New ledger.db to write from what verifies, in a new folder.")
    ] = None,
) -> None:
    """Rebuild everything from the entries and compare, every signature included; exit 1 naming what is wrong."""
    from aggregator.ledger_fsck import rebuild
    from aggregator.verification import render_verification, verify_ledger

    file = _ledger_file(path)
    public, broken = _public_key(file, key), None
    try:
        typer.echo(render_verification(verify_ledger(file, public, every_signature=True)))
    except Tampered as error:
        if rebuild_to is None:
            raise
        broken = error
        typer.echo(f"found: {error.message}")
    if rebuild_to is None:
        return
    rebuilt = rebuild(file, public, rebuild_to)
    typer.echo(
        f"rebuilt {rebuild_to}: {rebuilt.entries} entries, {rebuilt.checkpoints} checkpoints, "
        f"{rebuilt.cosignatures} cosignatures" + (f"; it ends before {rebuilt.stopped}" if rebuilt.stopped else "")
    )
    if broken is not None:
        raise CheckFailed("the ledger was damaged", f"compare {rebuild_to} with the hospitals' checkpoints")


# --- federation -------------------------------------------------------------------------------------------------

NodePath = Annotated[Path, typer.Option("--node", help="Node folder of the hospital that signs.")]
AggregatorPath = Annotated[Path, typer.Argument(metavar="AGGREGATOR", help="The aggregator's folder.")]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@federation.command("propose")
def federation_propose(
    path: AggregatorPath,
    action: Annotated[
        str,
        typer.Argument(
            metavar="ACTION",
            help="admit, remove, rotate-key, privacy-policy, credit-policy, promote, roll-back or pause.",
        ),
    ],
    node: NodePath,
    values: Annotated[
        str, typer.Option("--values", help="The action's fields as JSON; docs/governance.md has an example of each.")
    ] = "{}",
    days: Annotated[float, typer.Option(min=0.001, help="Days until the proposal expires.")] = 14.0,
) -> None:
    """Sign a proposal with the hospital's key and enter it into the ledger."""
    from pydantic import ValidationError

    from aggregator.governance import enter
    from data_schemas.canonical import content_hash
    from data_schemas.governance import Proposal, ProposalEntry
    from hospital_node.folder import NodeFolder

    with _open_ledger(path) as book, NodeFolder.open(node) as home:
        expires = datetime.now(UTC) + timedelta(days=days)
        try:
            given = json.loads(values)
            proposal = Proposal.model_validate(
                {
                    "federation": home.settings.federation,
                    "action": {**given, "action": action},
                    "proposed_by": home.settings.name,
                    "member_set": book.charter().member_set,
                    "expires_at": expires.isoformat(timespec="seconds"),
                }
            )
        except (ValueError, TypeError, ValidationError) as error:
            raise BadInput(f"{action} needs other values", "docs/governance.md has an example of each") from error
        enter(book, ProposalEntry(proposal=proposal, signature=home.key.sign(proposal)), _now())
        typer.echo(f"proposed {content_hash(proposal)[:12]}; the members vote with: islet federation vote")


@federation.command("vote")
def federation_vote(
    path: AggregatorPath,
    proposal: Annotated[str, typer.Argument(metavar="PROPOSAL", help="The proposal's hash, or how it begins.")],
    node: NodePath,
    approve: Annotated[bool, typer.Option("--yes/--no", help="For or against.")],
) -> None:
    """Sign a vote with the hospital's key and enter it; a proposal that is thereby settled is decided."""
    from aggregator.governance import decide, enter
    from data_schemas.governance import Vote, VoteEntry
    from hospital_node.folder import NodeFolder

    with _open_ledger(path) as book, NodeFolder.open(node) as home:
        found = [name for name in book.charter().open if name.startswith(proposal)]
        if len(found) != 1:
            raise BadInput(f"{len(found)} open proposals begin with {proposal}", "see `islet federation status`")
        vote = Vote(
            federation=home.settings.federation,
            proposal_hash=found[0],
            node=home.settings.name,
            member_set=book.charter().member_set,
            approve=approve,
        )
        enter(book, VoteEntry(vote=vote, signature=home.key.sign(vote)), _now())
        typer.echo(f"{home.settings.name} voted {'yes' if approve else 'no'} on {found[0][:12]}")
        for made in decide(book, _now()):
            typer.echo(f"decided {made.proposal_hash[:12]}: {'accepted' if made.accepted else 'rejected'}")


@federation.command("status")
def federation_status(path: AggregatorPath) -> None:
    """Show members, policy, open proposals and decisions; proposals that have expired are decided first."""
    from aggregator.governance import decide, render_status, replay

    with _open_ledger(path) as book:
        decide(book, _now())
        typer.echo(render_status(replay(book.entries()), _now()))


@contextmanager
def _open_ledger(path: Path) -> Iterator[Ledger]:
    from aggregator.settings import open_folder

    book = open_folder(path).open_ledger()
    try:
        yield book
    finally:
        book.close()
