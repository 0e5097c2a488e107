"""Commands that write a ledger's roots, credit and votes to an EVM chain, and compare: an option (extra `anchor`)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Anchor a ledger on an EVM chain, or compare it with one.")
FolderPath = Annotated[Path, typer.Argument(metavar="AGGREGATOR", help="An aggregator's folder.")]
Rpc = Annotated[str, typer.Option(help="JSON-RPC address of a node of the chain.")]
Contract = Annotated[str, typer.Option(help="Address of the contract.")]


@app.command("deploy")
def anchor_deploy(path: FolderPath, rpc: Rpc) -> None:
    """Put this ledger's contract on a chain; the account that pays is made at first use and must be funded."""
    from aggregator.anchoring import Chain, account_of, connect, deploy
    from aggregator.settings import open_folder

    folder = open_folder(path)
    web3 = connect(rpc).web3
    account = account_of(path)
    typer.echo(f"account {account.address}")
    typer.echo(f"contract {deploy(Chain(web3, account), folder.settings.federation)}")


@app.command("write")
def anchor_write(path: FolderPath, rpc: Rpc, contract: Contract) -> None:
    """Anchor the newest root, and write the credit and votes under it that are not there yet."""
    from aggregator.anchoring import Chain, account_of, connect, write
    from aggregator.settings import open_folder

    key = open_folder(path).key().public.hex
    sent = write(Chain(connect(rpc).web3, account_of(path)), contract, path / "ledger.db", key)
    typer.echo(f"{sent} transactions")


@app.command("check")
def anchor_check(
    ledger: Annotated[Path, typer.Argument(metavar="LEDGER", help="A ledger.db, or an aggregator's folder.")],
    rpc: Rpc,
    contract: Contract,
    key: Annotated[str, typer.Option(help="Public key of the aggregator: 64 hex digits.")],
) -> None:
    """Verify a ledger and compare roots, balances, votes and outcomes on the chain with it."""
    from aggregator.anchoring import check, connect

    size = check(connect(rpc), contract, ledger / "ledger.db" if ledger.is_dir() else ledger, key)
    typer.echo(f"the chain agrees with the ledger: {size} entries are anchored")
