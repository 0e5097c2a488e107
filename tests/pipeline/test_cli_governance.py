"""`islet federation`: what a person types to propose, vote, attest, enter and look, on one machine and on two."""

from __future__ import annotations

import json
import zipfile
from datetime import UTC, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner

from aggregator.state import hold_sittings
from data_schemas.canonical import bytes_hash, content_hash
from data_schemas.errors import IsletError
from data_schemas.governance import Challenge
from pipeline.bundle import code_hash
from pipeline.cli import app
from pipeline.plans import load_plan
from tests.federation import small_house
from tests.federation.small_house import House

PLANS = Path(__file__).parents[2] / "data_schemas" / "plans"


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> House:
    """A federation of five that has the present time."""
    monkeypatch.chdir(tmp_path)
    made = small_house.build(tmp_path)
    made.now = datetime.now(UTC)
    made.sit()
    return made


def islet(*arguments: object) -> str:
    """Run a command that must succeed; return what it printed."""
    done = CliRunner().invoke(app, ["federation", *map(str, arguments)])
    assert done.exit_code == 0, done.output
    return done.output


def fails(*arguments: object) -> IsletError:
    """Run a command that must fail with one of our errors."""
    done = CliRunner().invoke(app, ["federation", *map(str, arguments)])
    assert isinstance(done.exception, IsletError), done.output
    return done.exception


def test_propose_vote_and_status_on_one_machine(house: House) -> None:
    """With the aggregator's folder at hand each command is entered at once, and the third yes decides."""
    here, folder = ("--aggregator", house.folder.path), house.folder.path
    said = islet("propose", house.homes["alder"], "pause", "--values", '{"paused": true}', *here)
    assert "entered 1" in said
    shown = islet("status", folder)
    assert "pause (paused True) by alder: 0 yes, 0 no of 5; needs more than half; open" in shown
    name = next(iter(house.charter().open))[:8]
    for voter in ("birch", "cedar"):
        assert "decided" not in islet("vote", house.homes[voter], name, "--yes", *here)
    assert "decided" not in islet("vote", house.homes["elm"], name, "--no", *here)
    assert f"decided {name}" in islet("vote", house.homes["dogwood"], name, "--yes", *here)
    assert "PAUSED" in islet("status", folder)
    assert "PAUSED" in islet("status", house.homes["dogwood"])
    assert "PAUSED" not in islet("status", house.homes["alder"])  # it hears of it at the next sitting
    everybody = [word for home in house.homes.values() for word in ("--node", home)]
    islet("sit", folder, *everybody)
    assert "PAUSED" in islet("status", house.homes["alder"])


def test_one_standing_run_is_enough(house: House) -> None:
    """While one holds the sittings, a second is refused before anything is sent to the SuperLink."""
    with hold_sittings(house.folder.state):
        assert "standing run" in fails("sit", house.folder.path).message


def test_the_same_commands_on_two_machines(house: House, tmp_path: Path) -> None:
    """At home the statement is signed and waits; it enters with a sitting, or as a file; a replay is refused."""
    assert "signed" in islet("propose", house.homes["alder"], "remove", "--values", '{"node": "elm"}')
    assert "waiting   a signed proposal" in islet("status", house.homes["alder"])
    file = next((house.homes["alder"] / "outbox").iterdir())
    sent = tmp_path / "by-mail.json"
    sent.write_bytes(file.read_bytes())
    assert "entered by-mail.json" in islet("enter", house.folder.path, sent)
    again = fails("enter", house.folder.path, sent)
    assert (again.exit_code, "made-before" in again.message) == (2, True)
    everybody = [word for home in house.homes.values() for word in ("--node", home)]
    islet("sit", house.folder.path, *everybody)
    assert "waiting" not in islet("status", house.homes["alder"])
    name = next(iter(house.charter().open))[:10]
    files = []
    for voter in ("alder", "birch", "cedar"):
        islet("vote", house.homes[voter], name, "--yes")
        files += list((house.homes[voter] / "outbox").iterdir())
    assert "accepted" in islet("enter", house.folder.path, *files)


def test_attest_and_rotate_key(house: House) -> None:
    """An attestation is in the ledger once; a key is proposed without anybody typing it."""
    here = ("--aggregator", house.folder.path)
    assert "entered 1" in islet("attest", house.homes["alder"], *here)
    assert "holds this already" in islet("attest", house.homes["alder"], *here)
    assert house.charter().attested["alder"].epsilon_training == 0
    islet("propose", house.homes["elm"], "rotate-key", *here)
    action = next(iter(house.charter().open.values())).action.model_dump()
    assert (action["action"], action["node"], len(action["public_key"])) == ("rotate-key", "elm", 64)


def test_wrong_use_says_what_to_do(house: House, tmp_path: Path) -> None:
    """Values that do not fit, an unknown proposal, a file that is none, a node without a ledger: errors with hints."""
    home = house.homes["alder"]
    assert "needs other values" in fails("propose", home, "remove").message
    assert "needs other values" in fails("propose", home, "abolish").message
    assert "JSON object" in fails("propose", home, "pause", "--values", "paused").message
    assert "0 open proposals" in fails("vote", home, "abc", "--yes").message
    note = tmp_path / "note.json"
    note.write_text(json.dumps({"kind": "vote"}))
    assert "no signed statement" in fails("enter", house.folder.path, note).message
    from tests.hospital_node.small_node import make_node

    lonely = make_node(tmp_path / "lonely")
    error = fails("propose", lonely, "pause", "--values", '{"paused": true}')
    assert "follows no ledger" in error.message
    assert "--aggregator-key" in error.hint


def test_a_challenger_is_entered_from_its_plan_and_its_wheel(house: House, tmp_path: Path) -> None:
    """The proposal carries the calibrated plan and the hash of the code, installed or in the wheel that is given."""
    home, here, wheel = house.homes["alder"], ("--aggregator", house.folder.path), tmp_path / "rival.whl"
    text = (PLANS / "epsilon-2.toml").read_text().replace("1_000_000", "1_000")
    plan, other = tmp_path / "rival.toml", tmp_path / "other.toml"
    plan.write_text(text)
    other.write_text(text.replace("learning_rate = 0.05", "learning_rate = 0.04"))
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("pipeline/forecaster.py", "HIDDEN = 24\n")

    assert "entered 1" in islet("propose", home, "challenge", "--plan", plan, *here)
    assert "entered 1" in islet("propose", home, "challenge", "--plan", other, "--wheel", wheel, *here)

    made = [proposal.action for proposal in house.charter().open.values()]
    installed, brought = (action for action in made if isinstance(action, Challenge))
    assert (installed.plan, installed.code_hash) == (load_plan(plan), code_hash())
    assert brought.plan == load_plan(other)
    assert brought.code_hash == content_hash({"pipeline/forecaster.py": bytes_hash(b"HIDDEN = 24\n")})
    again = fails("propose", house.homes["birch"], "challenge", "--plan", plan, *here)
    assert "run before" in again.message
    assert "is no wheel" in fails("propose", home, "challenge", "--plan", plan, "--wheel", plan).message
    assert "needs other values" in fails("propose", home, "challenge").message
    assert "cannot read plan" in fails("propose", home, "challenge", "--plan", tmp_path / "none.toml").message
