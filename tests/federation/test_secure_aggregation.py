"""Secure aggregation with real nodes, training and messages: the sum is exact, and whoever drops out is left out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict

from aggregator import rounds, secure_round, server_app, settings
from aggregator.embedded_grid import EmbeddedGrid
from aggregator.ledger import read_entries
from aggregator.verification import verify_ledger
from data_schemas.errors import CheckFailed, IsletError
from data_schemas.ledger import CreditEntry, RoundEntry
from data_schemas.messages import HelloTask, SignedUpdate
from hospital_node import client_app, ledger_view, own_rounds
from hospital_node.folder import NodeFolder
from pipeline import masking
from pipeline.commitments import total_hash
from pipeline.robust import stepped
from pipeline.wire import from_record, to_record
from tests.aggregator.small_federation import Watcher
from tests.federation import small_house
from tests.federation.small_house import NAMES, House
from tests.hospital_node import small_node

ROUNDS = 2
SHORT = small_node.plan(rounds=ROUNDS, local__trainable="head", seed=3)
POLICY = {"max_epsilon_training": 8, "max_epsilon_heldout": 8, "min_patients": 1, "aggregation": "secure"}
Undisturbed = tuple[House, rounds.FederationResult, list[tuple[str, str, dict[str, Any], Message]]]
Meddle = Callable[[str, str, dict[str, Any], Message], Message | None]


def build(place: Path) -> House:
    """A federation of five hospitals with patients, whose members have voted for secure aggregation."""
    house = small_house.build(place)
    for home in house.homes.values():
        small_node.fill(home, 6)
    np.savez(house.folder.path / "start.npz", weights=small_node.base_weights(SHORT))
    changed = house.folder.settings.model_copy(
        update={"initial_weights": "start.npz", "retry_pause_s": 0.0, "max_attempts": 2, "hello_timeout_s": 2.0}
    )
    house.folder = settings.AggregatorFolder(house.folder.path, changed)
    house.folder.plan_path.write_text(SHORT.model_dump_json())
    house.sit()
    sitting = house.decide({"action": "privacy-policy", "policy": POLICY}, *NAMES[:4])
    assert [made.accepted for made in sitting.decided] == [True]
    return house


def run(house: House, meddle: Meddle | None = None) -> rounds.FederationResult:
    """Run or resume; meddle sees (hospital, action, body, message) and may answer, or raise, in a node's place."""

    def app(message: Message, context: Context) -> Message:
        name = Path(str(context.node_config["home"])).name
        if meddle is not None:
            body = json.loads(from_record(message.content)[0])
            answer = meddle(name, f"{message.metadata.message_type} {body.get('kind', '')}".strip(), body, message)
            if answer is not None:
                return answer
        return client_app.app(message, context)

    grid = EmbeddedGrid(app, house.homes, workers=2)  # type: ignore[arg-type]
    return server_app.run_folder(grid, house.folder, Watcher())


def closed(house: House) -> list[RoundEntry]:
    return [line.entry for line in read_entries(house.folder.path / "ledger.db") if isinstance(line.entry, RoundEntry)]


def updates_at_home(house: House) -> dict[tuple[str, int], tuple[SignedUpdate, np.ndarray]]:
    """What every hospital trained, in clear, from its own budget book; asserts that each round was paid for once."""
    found: dict[tuple[str, int], tuple[SignedUpdate, np.ndarray]] = {}
    for name, home in house.homes.items():
        with NodeFolder.open(home) as node:
            for signed, update in own_rounds.updates(node.budget()):
                assert (name, signed.manifest.round) not in found
                found[name, signed.manifest.round] = signed, update
    return found


def assert_exact(house: House, result: rounds.FederationResult) -> None:
    """The logged sums and the models are those of the whole numbers at home, bit for bit."""
    home, weights = updates_at_home(house), small_node.base_weights(SHORT)
    for entry in closed(house):
        inside = [home[signed.manifest.node, entry.round] for signed in entry.admitted]
        assert tuple(signed for signed, _ in inside) == entry.admitted
        patients = [signed.manifest.declared_patients for signed, _ in inside]
        whole = [masking.quantised(update, n) for (_, update), n in zip(inside, patients, strict=True)]
        assert entry.sum is not None
        assert total_hash(np.sum(whole, axis=0)) == entry.sum.total_hash
        mean = masking.mean_of(np.sum(whole, axis=0), sum(patients))
        weights, _ = stepped(weights, np.zeros_like(weights), mean, SHORT.server)
    assert (weights == result.last_weights).all()


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory,
) -> Undisturbed:
    """A run of two rounds, and every message that reached a node."""
    house, seen = build(tmp_path_factory.mktemp("secure")), list[tuple[str, str, dict[str, Any], Message]]()

    def look(name: str, action: str, body: dict[str, Any], message: Message) -> None:
        seen.append((name, action, body, message))

    return house, run(house, look), seen


def test_the_sum_is_exact_and_every_hospital_checks_it(
    undisturbed: Undisturbed,
) -> None:
    """Five hospitals, two rounds: logged sums and models are exact, each hospital was shown each sum, no alarm."""
    house, result, seen = undisturbed
    assert_exact(house, result)
    assert [[s.manifest.node for s in entry.admitted] for entry in closed(house)] == [list(NAMES)] * ROUNDS
    assert [entry.sum.roster for entry in closed(house) if entry.sum] == [5, 5]
    assert sum(action == "query.secure check" for _, action, _, _ in seen) == 5 * ROUNDS
    for home in house.homes.values():
        with NodeFolder.open(home) as node:
            assert ledger_view.alarm(node) is None
    assert result.cosigned_by == NAMES


def test_the_ledger_verifies_and_credit_follows_declared_patients(
    undisturbed: Undisturbed,
) -> None:
    """`islet ledger verify` understands such rounds; the pot is shared by declared patients, and nobody is scored."""
    house, result, seen = undisturbed
    report = verify_ledger(house.folder.path / "ledger.db", house.folder.key().public.hex, every_signature=True)
    assert report.counts["round"] == ROUNDS
    assert [credit.mode for credit in result.credits] == ["declared-patients"]
    (credit,) = result.credits
    assert isinstance(credit, CreditEntry)
    assert [(line.node, line.micro_credits) for line in credit.lines] == [(name, 400) for name in NAMES]
    assert credit.unpaid_micro_credits == 0
    assert not any(action.startswith(("evaluate", "query.release")) for _, action, _, _ in seen)


def test_no_update_and_no_hash_of_one_leaves_a_hospital(
    undisturbed: Undisturbed,
) -> None:
    """Neither ledger nor aggregator's folder holds any hospital's update, or a hash that a guess could be tried on."""
    house, _, _ = undisturbed
    held = b"".join(path.read_bytes() for path in house.folder.path.rglob("*") if path.is_file())
    for signed, update in updates_at_home(house).values():
        whole = masking.quantised(update, signed.manifest.declared_patients)
        for secret in (update.tobytes(), whole.tobytes(), total_hash(whole).encode()):
            assert secret not in held
        moved = np.flatnonzero(update)
        assert update[moved[:8]].tobytes() not in held


def dropping(names: set[str], action: str, round_number: int = 1) -> Meddle:
    """Hospitals that fail at one step of one round."""
    at = {"number": 0}

    def meddle(name: str, told: str, body: dict[str, Any], _message: Message) -> None:
        if "train" in body:
            at["number"] = body["train"]["round"]
        if name in names and told == action and at["number"] == round_number:
            raise OSError("gone")

    return meddle


@pytest.mark.slow
@pytest.mark.parametrize(
    "action", ["query.secure advertise", "query.secure seal", "train.masked mask", "query.secure confirm"]
)
def test_one_of_five_may_drop_out_at_every_step(tmp_path: Path, action: str) -> None:
    """Gone before its masked update, a hospital is left out and its masks are removed; gone after, it is in the sum."""
    house = build(tmp_path)
    result = run(house, dropping({"birch"}, action))
    first, second = closed(house)
    inside = action == "query.secure confirm"
    assert ("birch" in {signed.manifest.node for signed in first.admitted}) == inside
    assert [(out.node, out.code) for out in first.rejected] == ([] if inside else [("birch", "node-raised")])
    assert len(second.admitted) == 5
    assert_exact(house, result)


@pytest.mark.slow
def test_too_few_survivors_stop_the_round_and_cost_nothing_twice(tmp_path: Path) -> None:
    """Three of five is too few: the run stops and says who is missing. Resumed, nobody trains a round again."""
    house = build(tmp_path)
    with pytest.raises(IsletError, match=r"round 2 has 3 of the 4 updates .*birch: node-raised.*elm: node-raised"):
        run(house, dropping({"birch", "elm"}, "train.masked mask", 2))
    before = updates_at_home(house)
    assert len(before) == 8

    assert_exact(house, run(house))
    after = updates_at_home(house)
    assert {key: after[key][0] for key in before} == {key: before[key][0] for key in before}


@pytest.mark.slow
def test_a_killed_aggregator_goes_on_with_the_very_sum(tmp_path: Path) -> None:
    """Once survivors are on disk there is no other attempt: the resumed round has the same updates, unmasked later."""
    house = build(tmp_path)
    with pytest.raises(IsletError, match="cannot be unmasked: fewer than 4"):
        run(house, dropping({"birch", "elm"}, "query.secure unmask"))
    asked: list[str] = []

    def look(_name: str, action: str, body: dict[str, Any], _message: Message) -> None:
        asked.append(f"{action} {body['train']['round'] if 'train' in body else ''}")

    assert_exact(house, run(house, look))
    assert "train.masked mask 1" not in asked
    assert asked.count("train.masked mask 2") == 5


def test_a_hospital_agrees_to_one_list_of_survivors_only(undisturbed: Undisturbed) -> None:
    """Another list, shares without two thirds' signatures, another attempt, and the update in plain are refused."""
    house, _, seen = undisturbed
    kept = {action: (body, message) for name, action, body, message in seen if name == "birch"}

    def again(action: str, kind: str = "", **changes: Any) -> str:
        body, message = kept[action]
        record = to_record(HelloTask(federation="trial"), from_record(message.content)[1])
        record.config_records["body"]["json"] = json.dumps({**body, **changes}).encode()
        grid = EmbeddedGrid(client_app.app, {"birch": house.homes["birch"]})
        (reply,) = grid.send_and_receive([Message(record, 2, kind or message.metadata.message_type, ttl=60)])
        answer = json.loads(from_record(reply.content)[0])
        return str(answer.get("code", answer["kind"]))

    confirm, unmask = kept["query.secure confirm"][0], kept["query.secure unmask"][0]
    fewer = {name: told for name, told in confirm["survivors"].items() if name != "alder"}
    assert again("query.secure confirm", survivors=fewer) == "session-mismatch"
    assert again("query.secure unmask") == "unmasked"
    assert again("query.secure unmask", signatures=dict(list(unmask["signatures"].items())[:3])) == "session-mismatch"
    assert again("query.secure unmask", confirm={**confirm, "survivors": fewer}) == "session-mismatch"
    assert again("train.masked mask", peers=list(NAMES[:4])) == "session-mismatch"
    assert again("train.masked mask") == "masked-update"
    task = kept["train.masked mask"][0]["train"]
    kept["plain"] = task, kept["train.masked mask"][1]
    assert again("plain", "train") == "other-aggregation"
    assert again("query.secure advertise", attempt="0" * 64) == "sum-confirmed"
    # Seeds are forgotten by now, and what was agreed to is not.
    assert again("query.secure unmask") == "session-mismatch"
    assert again("query.secure advertise", attempt="1" * 64) == "sum-confirmed"


def lying_step(patch: pytest.MonkeyPatch) -> str:
    """The aggregator steps further than the sum says."""
    honest = masking.mean_of
    patch.setattr(masking, "mean_of", lambda total, patients: 1.5 * honest(total, patients))
    return "its model is not the step by its sum"


def lying_sum(patch: pytest.MonkeyPatch) -> str:
    """The aggregator adds something of its own, and does not care that it opens no commitment."""
    honest = masking.signed
    patch.setattr(masking, "signed", lambda masked: honest(masked) + 1)
    patch.setattr(secure_round, "adds_up", lambda *_told: True)
    return "its sum is not what the hospitals committed to"


@pytest.mark.slow
@pytest.mark.parametrize("lie", [lying_step, lying_sum])
def test_a_lying_aggregator_raises_the_alarm_at_every_hospital(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lie: Callable[[pytest.MonkeyPatch], str]
) -> None:
    """A sum that opens no commitments, or a model that is not its step: no hospital trains another round."""
    house = build(tmp_path)
    with monkeypatch.context() as patch:
        told = lie(patch)
        with pytest.raises(IsletError, match=r"round 2 has 0 of the 3 updates .*alarm"):
            run(house)
    for home in house.homes.values():
        with NodeFolder.open(home) as node:
            assert told in str(ledger_view.alarm(node))


@pytest.mark.slow
def test_a_hospital_that_commits_to_something_else_stops_the_round(tmp_path: Path) -> None:
    """The aggregator finds that the sum opens no commitments before it becomes a model; nothing is logged."""
    house = build(tmp_path)

    def meddle(name: str, action: str, _body: dict[str, Any], message: Message) -> Message | None:
        if (name, action) != ("birch", "train.masked mask"):
            return None
        context = Context(1, 2, {"home": str(house.homes[name])}, RecordDict(), {})
        body, arrays = from_record(client_app.app(message, context).content)
        arrays["masked"][3] += np.uint64(1)
        record = to_record(HelloTask(federation="trial"), arrays)
        record.config_records["body"]["json"] = body
        return Message(record, reply_to=message)

    with pytest.raises(CheckFailed, match="not what its hospitals committed to"):
        run(house, meddle)
    assert closed(house) == []
