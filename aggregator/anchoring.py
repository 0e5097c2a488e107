"""The ledger's roots, credit and votes on an EVM chain: an option, off unless somebody runs the command.

A chain keeps the aggregator from showing two histories to two readers who never meet: a root that was anchored stays.
What is written is public, so it is only what the ledger says of roots, credit and votes, under hospitals' names.
`check` is for anybody who holds the ledger: it verifies the ledger first and then compares.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from aggregator.ledger import read_entries
from aggregator.ledger_file import open_ledger_file
from aggregator.verification import verify_ledger
from data_schemas.errors import BadInput, CheckFailed, StorageFailed
from data_schemas.governance import DecisionEntry, VoteEntry
from data_schemas.ledger import CreditEntry, Entry, LedgerEntry
from pipeline import merkle
from pipeline.signing import write_durably

KEY_FILE = "keys/anchor.secp256k1"
_VOTES = {True: 1, False: 2}


@dataclass(frozen=True)
class Chain:
    """A connection to a chain, and the account that pays; an account of None can only read."""

    web3: Any
    account: Any = None


@dataclass
class Record:
    """What a ledger, up to a size, says of credit by node, of votes by proposal and node, and of outcomes."""

    balances: dict[str, int] = field(default_factory=dict)
    votes: dict[tuple[str, str], int] = field(default_factory=dict)
    outcomes: dict[str, int] = field(default_factory=dict)

    def take(self, entry: Entry) -> None:
        """Take in the next entry."""
        match entry:
            case CreditEntry():
                for node, micro_credits in entry.earned().items():
                    self.balances[node] = self.balances.get(node, 0) + micro_credits
            case VoteEntry():
                self.votes[entry.vote.proposal_hash, entry.vote.node] = _VOTES[entry.vote.approve]
            case DecisionEntry():
                self.outcomes[entry.proposal_hash] = _VOTES[entry.accepted]
            case _:
                pass


def connect(url: str, account: Any = None) -> Chain:
    """Connect to a chain's JSON-RPC address. Raises BadInput when nobody answers there or web3 is not installed."""
    try:
        from web3 import HTTPProvider, Web3
    except ImportError as error:
        raise BadInput("anchoring needs web3", "install it: pip install 'islet-fl[anchor]'") from error
    web3 = Web3(HTTPProvider(url))
    if not web3.is_connected():
        raise BadInput(f"no chain answers at {url}", "give the address of a node's JSON-RPC interface")
    return Chain(web3, account)


def account_of(folder: Path) -> Any:
    """Return the aggregator's account on the chain; its key is made at first use, mode 0600, and never shown."""
    from web3 import Account

    path = folder / KEY_FILE
    if not path.exists():
        write_durably(path, bytes(Account.create().key).hex().encode() + b"\n", mode=0o600)
    if path.stat().st_mode & 0o077:
        raise BadInput(f"{path}: other users may read this key", f"Run: chmod 600 {path}")
    try:
        return Account.from_key(path.read_text(encoding="ascii").strip())
    except OSError as error:
        raise StorageFailed(f"{path}: cannot be read ({error.strerror})", "Check owner and mode.") from error
    except ValueError:
        raise BadInput(f"{path}: not a key file", "Restore it from the backup.") from None


def deploy(chain: Chain, origin: str) -> str:
    """Put the contract of one ledger on the chain; returns its address."""
    compiled = _compiled()
    made = chain.web3.eth.contract(abi=compiled["abi"], bytecode=compiled["bytecode"]).constructor(origin)
    return str(_sent(chain, made)["contractAddress"])


def write(chain: Chain, address: str, path: Path, log_key: str) -> int:
    """Anchor a ledger's newest root and write what is new under it; returns the number of transactions.

    What is there already is left out, so a stopped command is simply repeated. Raises CheckFailed when the chain holds
    another history, Tampered when the ledger does not verify.
    """
    contract, report = _contract(chain, address), verify_ledger(path, log_key)
    if wrong := _root_difference(contract, path, report.head.origin):
        raise CheckFailed(f"the chain tells another history: {wrong}", "do not write; ask the other hospitals")
    sent = 0
    if report.head.size > contract.functions.size().call():
        _sent(chain, contract.functions.anchor(report.head.size, report.head.root))
        sent += 1
    for index, call in _calls(contract, path):
        if not contract.functions.recorded(index).call():
            _sent(chain, call)
            sent += 1
    return sent


def check(chain: Chain, address: str, path: Path, log_key: str) -> int:
    """Compare root, balances, votes and outcomes with a verified ledger; returns the anchored size.

    Raises CheckFailed naming the first difference.
    """
    contract, report = _contract(chain, address), verify_ledger(path, log_key)
    size = int(contract.functions.size().call())
    wrong = _root_difference(contract, path, report.head.origin) or _record_difference(
        contract, read_entries(path)[:size], report.members
    )
    if wrong:
        raise CheckFailed(f"chain and ledger differ: {wrong}", "one of them was rewritten; ask the other hospitals")
    return size


def _root_difference(contract: Any, path: Path, origin: str) -> str:
    """Say how name, size or root on the chain differ from the ledger's; empty when they do not."""
    size, named = contract.functions.size().call(), contract.functions.origin().call()
    if named != origin:
        return f"it is the contract of {named}"
    with open_ledger_file(path) as file:
        tree = merkle.Tree(bytes(row[0]) for row in file.rows("SELECT leaf FROM entries ORDER BY idx"))
    if size > tree.size:
        return f"{size} entries are anchored, the ledger has {tree.size}"
    same = not size or contract.functions.roots(size).call() == tree.root(size)
    return "" if same else f"the root of the first {size} entries"


def _record_difference(contract: Any, entries: Sequence[LedgerEntry], members: Sequence[str]) -> str:
    """Say which balance, vote or outcome differs; what is under the root and not written yet counts as nothing."""
    told, ask = Record(), contract.functions
    kept = [line for line in entries if isinstance(line.entry, CreditEntry | VoteEntry | DecisionEntry)]
    for line in kept:
        if ask.recorded(line.index).call():
            told.take(line.entry)
    for node in members:
        if ask.balances(node).call() != told.balances.get(node, 0):
            return f"the credit of {node}"
    for proposal in {line.entry.proposal_hash for line in kept if isinstance(line.entry, DecisionEntry)}:
        name = bytes.fromhex(proposal)
        if ask.outcomes(name).call() != told.outcomes.get(proposal, 0):
            return f"the outcome of {proposal[:12]}"
        for node in members:
            if ask.votes(name, node).call() != told.votes.get((proposal, node), 0):
                return f"the vote of {node} on {proposal[:12]}"
    return ""


def _calls(contract: Any, path: Path) -> Iterator[tuple[int, Any]]:
    """What the contract keeps of each entry, with the entry's number."""
    ask = contract.functions
    for line in read_entries(path):
        match line.entry:
            case CreditEntry() as paid:
                earned = paid.earned()
                yield line.index, ask.credit(line.index, list(earned), list(earned.values()))
            case VoteEntry() as cast:
                proposal = bytes.fromhex(cast.vote.proposal_hash)
                yield line.index, ask.vote(line.index, proposal, cast.vote.node, cast.vote.approve)
            case DecisionEntry() as decided:
                yield line.index, ask.decide(line.index, bytes.fromhex(decided.proposal_hash), decided.accepted)
            case _:
                pass


def _contract(chain: Chain, address: str) -> Any:
    if not chain.web3.is_checksum_address(address) or not chain.web3.eth.get_code(address):
        raise BadInput(
            f"there is no contract at {address}", "give the address that `islet ledger anchor deploy` printed"
        )
    return chain.web3.eth.contract(address=address, abi=_compiled()["abi"])


def _sent(chain: Chain, call: Any) -> Any:
    """Sign, send and wait for a transaction; returns its receipt.

    Raises CheckFailed when the contract refuses, BadInput when the chain does.
    """
    from web3.exceptions import ContractLogicError, Web3RPCError

    web3, account = chain.web3, chain.account
    try:
        built = call.build_transaction(
            {"from": account.address, "nonce": web3.eth.get_transaction_count(account.address, "pending")}
        )
        signed = account.sign_transaction(built)
        receipt = web3.eth.wait_for_transaction_receipt(web3.eth.send_raw_transaction(signed.raw_transaction))
    except ContractLogicError as error:
        raise CheckFailed(f"the contract refused: {error.message}", "see docs/anchoring.md") from error
    except Web3RPCError as error:
        raise BadInput(f"the chain refused: {error.message}", f"is the account {account.address} funded?") from error
    if receipt["status"] != 1:
        raise CheckFailed("the chain did not take the transaction", "is the account funded?")
    return receipt


def _compiled() -> dict[str, Any]:
    """ABI and bytecode, compiled from ledger_anchor.vy; a test compiles the source again and compares."""
    text = files("aggregator").joinpath("contract/ledger_anchor.json").read_text(encoding="utf-8")
    compiled: dict[str, Any] = json.loads(text)
    return compiled
