"""The ledger on a real local EVM chain, in process and in a process of its own: what is there stays and agrees.

Runs where web3 and a chain are installed (`make anchor`); elsewhere it is skipped.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("web3")

from aggregator import anchoring
from aggregator.anchoring import Chain
from aggregator.ledger import Ledger
from data_schemas.canonical import content_hash
from data_schemas.errors import BadInput, CheckFailed
from data_schemas.governance import (
    CreditPolicy,
    DecisionEntry,
    FoundingEntry,
    Pause,
    PrivacyPolicy,
    Proposal,
    ProposalEntry,
    Vote,
    VoteEntry,
)
from data_schemas.ledger import Entry
from pipeline.charter import Charter
from tests.aggregator.test_verification import KEY, KEYS, NODES, NOW, ORIGIN, _credit, _round, _story

FEDERATION = "test"
# The chain in this process raises its own error where one behind an address answers with one that web3 translates.
REFUSED = (CheckFailed, pytest.importorskip("eth_tester.exceptions").TransactionFailed)


def paused() -> list[Entry]:
    """Two of three hospitals vote for a pause, one against, and it is decided."""
    privacy = PrivacyPolicy(max_epsilon_training=8, max_epsilon_heldout=8, min_patients=1)
    founding = FoundingEntry(
        federation=FEDERATION, privacy=privacy, credit=CreditPolicy(max_pot_micro_credits_per_round=10**6)
    )
    charter = Charter()
    for member in _story()[:3]:
        assert charter.take_entry(member, NOW) == ""
    bound: dict[str, Any] = {"federation": FEDERATION, "member_set": charter.member_set}
    ends = "2026-12-31T00:00:00+00:00"
    proposal = Proposal(action=Pause(paused=True), proposed_by="clinic-a", expires_at=ends, **bound)
    name = content_hash(proposal)
    votes = [Vote(proposal_hash=name, node=node, approve=node != "clinic-b", **bound) for node in NODES[::-1]]
    cast = [VoteEntry(vote=vote, signature=KEYS[vote.node].sign(vote)) for vote in votes]
    signed = ProposalEntry(proposal=proposal, signature=KEYS["clinic-a"].sign(proposal))
    return [founding, signed, *cast, DecisionEntry(proposal_hash=name, accepted=True)]


def logged(folder: Path, entries: list[Entry]) -> Path:
    folder.mkdir(exist_ok=True)
    ledger = Ledger(folder / "ledger.db", KEY, ORIGIN)
    for entry in entries[ledger.size :]:
        ledger.append(entry, NOW)
    ledger.checkpoint()
    ledger.close()
    return folder / "ledger.db"


STORY = [*_story()[:3], *paused(), *_story()[3:7]]


@pytest.fixture(params=["in process", "anvil"])
def chain(request: pytest.FixtureRequest) -> Iterator[Chain]:
    """A fresh chain and a funded account on it."""
    from web3 import Account, EthereumTesterProvider, HTTPProvider, Web3

    account = Account.from_key("0x" + "11" * 32)
    if request.param == "in process":
        web3 = Web3(EthereumTesterProvider())
        rich = web3.eth.accounts[0]
        web3.eth.wait_for_transaction_receipt(
            web3.eth.send_transaction({"from": rich, "to": account.address, "value": 10**19})
        )
        yield Chain(web3, account)
        return
    anvil = shutil.which("anvil")
    if anvil is None:
        pytest.skip("anvil is not on the path")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([anvil, "--host", "127.0.0.1", "--port", str(port), "--silent"])
    try:
        web3 = Web3(HTTPProvider(f"http://127.0.0.1:{port}"))
        for _ in range(300):
            if web3.is_connected():
                break
            time.sleep(0.2)
        web3.provider.make_request("anvil_setBalance", [account.address, hex(10**19)])
        yield Chain(anchoring.connect(f"http://127.0.0.1:{port}").web3, account)
    finally:
        process.terminate()
        process.wait()


def fund(chain: Chain, address: str) -> None:
    """Pay another account."""
    web3, payer = chain.web3, chain.account
    payment = {
        "to": address,
        "value": 10**18,
        "gas": 21_000,
        "gasPrice": 2 * web3.eth.gas_price,
        "nonce": web3.eth.get_transaction_count(payer.address),
        "chainId": web3.eth.chain_id,
    }
    sent = web3.eth.send_raw_transaction(payer.sign_transaction(payment).raw_transaction)
    web3.eth.wait_for_transaction_receipt(sent)


def test_roots_credit_and_votes_are_there_and_agree(chain: Chain, tmp_path: Path) -> None:
    """What the ledger says is on the chain; writing again writes nothing; what is new later follows."""
    path = logged(tmp_path / "log", STORY)
    address = anchoring.deploy(chain, ORIGIN)

    assert anchoring.write(chain, address, path, KEY.public.hex) == 6  # root, three votes, decision, credit
    assert anchoring.write(chain, address, path, KEY.public.hex) == 0
    assert anchoring.check(chain, address, path, KEY.public.hex) == len(STORY)
    ask = anchoring._contract(chain, address).functions
    proposal = bytes.fromhex(STORY[-5].proposal_hash)
    assert [ask.votes(proposal, node).call() for node in NODES] == [1, 2, 1]
    assert ask.outcomes(proposal).call() == 1
    assert [ask.balances(line.node).call() for line in STORY[-1].lines] == [x.micro_credits for x in STORY[-1].lines]
    logged(tmp_path / "log", [*STORY, _round(3), _round(4), _credit(2)])
    assert anchoring.write(chain, address, path, KEY.public.hex) == 2
    assert anchoring.check(chain, address, path, KEY.public.hex) == len(STORY) + 3
    assert sum(ask.balances(node).call() for node in NODES) == 2 * 10**6


def test_another_history_is_neither_written_nor_believed(chain: Chain, tmp_path: Path) -> None:
    """A rewritten ledger, a shorter one and another log's contract are refused; the first history stays."""
    path, address = logged(tmp_path / "log", STORY), anchoring.deploy(chain, ORIGIN)
    anchoring.write(chain, address, path, KEY.public.hex)
    other = logged(tmp_path / "other", [*STORY[:3], *STORY[9:], _round(3)])
    rewritten = logged(tmp_path / "rewritten", [*STORY[:-1], _round(3), _round(4), _credit(2, rounds=(3, 4))])
    for wrong in (other, rewritten):
        for act in (anchoring.write, anchoring.check):
            with pytest.raises(CheckFailed, match=r"root of the first|entries are anchored"):
                act(chain, address, wrong, KEY.public.hex)
    with pytest.raises(CheckFailed, match="contract of another"):
        anchoring.check(chain, anchoring.deploy(chain, "another"), path, KEY.public.hex)
    with pytest.raises(BadInput, match="no contract"):
        anchoring.check(chain, chain.account.address, path, KEY.public.hex)
    assert anchoring.check(chain, address, path, KEY.public.hex) == len(STORY)


def test_a_false_balance_on_the_chain_is_found(chain: Chain, tmp_path: Path) -> None:
    """Credit that the aggregator wrote without a ledger entry behind it does not pass the comparison."""
    path, address = logged(tmp_path / "log", STORY), anchoring.deploy(chain, ORIGIN)
    anchoring.write(chain, address, path, KEY.public.hex)
    ask = anchoring._contract(chain, address).functions
    anchoring._sent(chain, ask.credit(0, ["clinic-b"], [5]))

    with pytest.raises(CheckFailed, match="the credit of clinic-b"):
        anchoring.check(chain, address, path, KEY.public.hex)


def test_the_contract_refuses_what_it_must(chain: Chain, tmp_path: Path) -> None:
    """Strangers, shrinking logs, entries that are not anchored, repeated entries and second votes."""
    from web3 import Account

    path, address = logged(tmp_path / "log", STORY), anchoring.deploy(chain, ORIGIN)
    anchoring.write(chain, address, path, KEY.public.hex)
    ask = anchoring._contract(chain, address).functions
    proposal = bytes.fromhex(STORY[-5].proposal_hash)
    refused = [
        (ask.anchor(len(STORY), b"\1" * 32), "a log only grows"),
        (ask.credit(len(STORY), ["clinic-a"], [1]), "not anchored yet"),
        (ask.credit(len(STORY) - 1, ["clinic-a"], [1]), "recorded before"),
        (ask.credit(0, ["clinic-a"], []), "one amount per node"),
        (ask.vote(0, proposal, "clinic-a", True), "voted before"),
        (ask.decide(0, proposal, False), "decided before"),
    ]
    for call, why in refused:
        with pytest.raises(REFUSED, match=why):
            anchoring._sent(chain, call)
    stranger = Chain(chain.web3, Account.from_key("0x" + "22" * 32))
    fund(chain, stranger.account.address)
    with pytest.raises(REFUSED, match="only the aggregator writes"):
        anchoring._sent(stranger, ask.anchor(len(STORY) + 1, b"\1" * 32))


def test_the_shipped_bytecode_is_the_source() -> None:
    """Compiling the contract gives the very bytes that are deployed."""
    vyper = pytest.importorskip("vyper")
    folder = files("aggregator").joinpath("contract")
    shipped = json.loads(folder.joinpath("ledger_anchor.json").read_text())
    source = folder.joinpath("ledger_anchor.vy").read_text()

    made = vyper.compile_code(source, output_formats=["abi", "bytecode"])
    assert (made["bytecode"], json.loads(json.dumps(made["abi"]))) == (shipped["bytecode"], shipped["abi"])


def test_the_account_is_made_once_and_kept_secret(tmp_path: Path) -> None:
    """The aggregator's account stays the same; a key file that others may read is refused."""
    (tmp_path / "keys").mkdir()
    first = anchoring.account_of(tmp_path)

    assert anchoring.account_of(tmp_path).address == first.address
    (tmp_path / anchoring.KEY_FILE).chmod(0o644)
    with pytest.raises(BadInput, match="other users"):
        anchoring.account_of(tmp_path)
