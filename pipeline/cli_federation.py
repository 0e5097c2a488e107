"""Commands about the federation's record: proofs and repair of the ledger."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from data_schemas.errors import BadInput, CheckFailed, Tampered

LedgerPath = Annotated[Path, typer.Argument(metavar="LEDGER", help="An aggregator's folder, or its ledger.db.")]
Key = Annotated[str | None, typer.Option(help="The aggregator's public key; default: the one in its folder.")]
CheckpointFile = Annotated[
    Path | None, typer.Option("--checkpoint", help="A signed checkpoint of your own; default: the published one.")
]


def register(ledger: typer.Typer) -> None:
    """Add this module's commands to the command line."""
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
