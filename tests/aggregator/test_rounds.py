"""The round loop with real messages, signatures, ledger and checkpoints."""

from __future__ import annotations

import logging
import multiprocessing
import signal
from collections import Counter
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from aggregator import epochs, ledger
from aggregator.aggregation import model_hash
from aggregator.progress import RoundSummary
from aggregator.rounds import FederationResult
from aggregator.settings import open_folder
from aggregator.state import hold, hold_sittings
from aggregator.verification import verify_ledger
from data_schemas.errors import BadInput, CheckFailed, IsletError, NodeBusy
from data_schemas.ledger import CreditEntry, ModelEntry, RoundEntry
from pipeline.checkpoint import SignedCheckpoint
from tests.aggregator import small_federation as small

Clean = tuple[Path, FederationResult, small.Watcher]


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Clean:
    """Run a federation that nobody disturbs."""
    path = tmp_path_factory.mktemp("clean")
    small.build(path)
    watcher = small.Watcher()
    return path, small.run(path, watcher), watcher


def kinds(path: Path) -> Counter[tuple[str, int | None]]:
    """How often each entry is in the ledger."""
    return Counter(
        (entry.kind, getattr(entry, "round", None) or getattr(entry, "epoch", None)) for entry in small.entries(path)
    )


def test_an_undisturbed_run_closes_every_round_and_epoch_once(clean: Clean) -> None:
    """Each round, epoch and model has exactly one entry, and all hospitals cosign the final ledger."""
    path, result, watcher = clean
    once = [("plan", None), ("round", 1), ("round", 2), ("round", 3), ("credit", 1), ("credit", 2), ("model", 3)]
    assert kinds(path) == Counter({("member", None): 3} | dict.fromkeys(once, 1))
    assert result.cosigned_by == small.NAMES
    assert [summary.round for summary in watcher.summaries] == [1, 2, 3]
    assert result.rounds == tuple(watcher.summaries)
    assert result.credits == tuple(watcher.credits)
    assert result.resumed_from is None


def test_the_models_are_a_chain_from_the_start_model_to_the_released_one(clean: Clean) -> None:
    """Every round's base is the previous round's model; the released model is the mean of the last two."""
    path, result, _ = clean
    closed = [entry for entry in small.entries(path) if isinstance(entry, RoundEntry)]
    assert closed[0].base_model_hash == model_hash(small.START)
    assert [entry.base_model_hash for entry in closed[1:]] == [entry.new_model_hash for entry in closed[:-1]]
    assert closed[-1].new_model_hash == model_hash(result.last_weights)
    (published,) = [entry for entry in small.entries(path) if isinstance(entry, ModelEntry)]
    assert published.model_hash == result.model_hash == model_hash(result.weights)
    assert not np.array_equal(result.weights, result.last_weights)
    assert published.epsilon_by_node == dict.fromkeys(small.NAMES, 1.5)
    assert published.unit == "patient"


def test_a_round_is_the_patient_weighted_mean_of_what_the_hospitals_sent(clean: Clean) -> None:
    """Round 1 equals start + sum of share * update, computed here by hand."""
    path, result, _ = clean
    first = next(entry for entry in small.entries(path) if isinstance(entry, RoundEntry))
    task = small.TrainTask(
        federation=small.FEDERATION,
        run=result.run,
        round=1,
        plan=small.PLAN,
        base_model_hash=model_hash(small.START),
        deadline_unix=0,
    )
    mean = sum(small.PATIENTS[name] / 100 * small.honest_delta(name, task).astype(float) for name in small.NAMES)
    assert first.new_model_hash == model_hash((small.START.astype(float) + mean).astype(np.float32))


def test_credit_adds_up_to_the_pot_and_keeps_its_releases(clean: Clean) -> None:
    """Epoch 1 pays for two rounds, epoch 2 for one; lines and unpaid sum to the pot and all releases are on record."""
    _, result, _ = clean
    assert [credit.rounds for credit in result.credits] == [(1, 2), (3,)]
    for credit in result.credits:
        assert credit.pot_micro_credits == 1_000_000 * len(credit.rounds)
        assert (
            sum(line.micro_credits for line in credit.lines) + credit.unpaid_micro_credits == credit.pot_micro_credits
        )
        assert [signed.release.node for signed in credit.releases] == list(small.NAMES)


def test_a_finished_run_is_returned_as_it_is(clean: Clean, tmp_path: Path) -> None:
    """The same command after the end trains nobody, logs nothing new, and gives the same model."""
    path, result, _ = clean
    before = kinds(path)
    trained = (path / "alder" / "diary").read_text()
    again = small.run(path)
    assert (again.model_hash, again.resumed_from) == (result.model_hash, 3)
    assert kinds(path) == before
    assert (path / "alder" / "diary").read_text() == trained


@pytest.mark.parametrize(
    ("behaviour", "code"),
    [
        ("nan", "not-finite"),
        ("shape", "wrong-shape"),
        ("float64", "wrong-dtype"),
        ("huge", "norm-too-large"),
        ("overflow", "norm-too-large"),
        ("copy", "replayed"),
        ("declared", "wrong-declared-patients"),
        ("forged", "bad-signature"),
        ("extra-array", "malformed-reply"),
        ("not-json", "malformed-reply"),
        ("endless-integer", "malformed-reply"),
        ("refuse", "budget-exhausted"),
        ("raise", "node-raised"),
        ("impostor", "not-connected"),
    ],
)
def test_a_bad_hospital_is_on_record_and_the_run_goes_on(tmp_path: Path, behaviour: str, code: str) -> None:
    """Whatever one hospital sends, every round closes without it, with a code, and the model is finite."""
    small.build(tmp_path, {"birch": behaviour})
    result = small.run(tmp_path)
    closed = [entry for entry in small.entries(tmp_path) if isinstance(entry, RoundEntry)]
    assert [[update.code for update in entry.rejected] for entry in closed] == [[code]] * 3
    assert all([signed.manifest.node for signed in entry.admitted] == ["alder", "cedar"] for entry in closed)
    assert np.isfinite(result.weights).all()
    assert "Jane" not in str(small.entries(tmp_path))


def test_a_replayed_update_is_admitted_once(tmp_path: Path) -> None:
    """A hospital that signs the same bytes again in later rounds is admitted in the first round only."""
    small.build(tmp_path, {"birch": "stale"})
    small.run(tmp_path)
    closed = [entry for entry in small.entries(tmp_path) if isinstance(entry, RoundEntry)]
    assert [[update.code for update in entry.rejected] for entry in closed] == [[], ["replayed"], ["replayed"]]


def test_a_slow_hospital_is_left_behind(tmp_path: Path) -> None:
    """A hospital whose answer comes after the ttl is recorded as expired; it is back in the next round."""
    small.build(tmp_path, {"birch": "slow"}, round_timeout_s=1.0)
    small.run(tmp_path)
    closed = [entry for entry in small.entries(tmp_path) if isinstance(entry, RoundEntry)]
    assert [[update.code for update in entry.rejected] for entry in closed] == [["expired"], [], []]


def test_a_busy_hospital_is_asked_again_and_the_others_are_not(tmp_path: Path) -> None:
    """With a full quorum required, a refusal is retried within the round; an admitted hospital trains once a round."""
    small.build(tmp_path, {"birch": "refuse-once"}, min_updates=3)
    small.run(tmp_path)
    assert (tmp_path / "birch" / "diary").read_text().count("train 1") == 2
    assert (tmp_path / "alder" / "diary").read_text().count("train 1") == 1
    assert all(len(entry.admitted) == 3 for entry in small.entries(tmp_path) if isinstance(entry, RoundEntry))


def test_a_hospital_that_was_busy_scores_all_the_same(tmp_path: Path, clean: Clean) -> None:
    """Who was busy for a moment is asked again, so credit does not hang on it; the others are not."""
    small.build(tmp_path, {"birch": "score-busy"})
    assert small.run(tmp_path).credits == clean[1].credits
    assert (tmp_path / "birch" / "diary").read_text().count("score 1") == 2
    assert (tmp_path / "alder" / "diary").read_text().count("score 1") == 1


def test_without_a_quorum_the_run_stops_with_names_and_reasons_and_can_go_on(tmp_path: Path, clean: Clean) -> None:
    """Too few updates end the run with every missing hospital and its code; once mended it ends like a clean run."""
    small.build(tmp_path, {"birch": "refuse", "cedar": "nan"}, min_updates=3)
    with pytest.raises(IsletError, match=r"round 1 has 1 of the 3 .*birch: budget-exhausted, cedar: not-finite"):
        small.run(tmp_path)
    for name in ("birch", "cedar"):
        (tmp_path / name / "behaviour").unlink()
    assert small.run(tmp_path).model_hash == clean[1].model_hash


def test_a_disconnected_hospital_is_named(tmp_path: Path) -> None:
    """A member whose node is not there is recorded as not connected."""
    small.build(tmp_path)
    small.run(tmp_path, names=("alder", "cedar"))
    closed = [entry for entry in small.entries(tmp_path) if isinstance(entry, RoundEntry)]
    assert [(r.node, r.code) for entry in closed for r in entry.rejected] == [("birch", "not-connected")] * 3


def test_a_stranger_takes_no_part(tmp_path: Path) -> None:
    """A connected node that is no member is never asked to train."""
    small.build(tmp_path, members=("alder", "birch"))
    small.run(tmp_path)
    assert not (tmp_path / "cedar" / "diary").exists()


def test_more_updates_required_than_members_is_refused_before_anything_happens(tmp_path: Path) -> None:
    """A quorum that can never be reached is bad input, not an endless wait."""
    small.build(tmp_path, members=("alder",))
    with pytest.raises(BadInput, match="1 members"):
        small.run(tmp_path)


def test_an_observer_that_fails_loses_no_round(tmp_path: Path, caplog: pytest.LogCaptureFixture, clean: Clean) -> None:
    """An outage of a display is reported and the run ends with the same model."""

    class Broken:
        def round_closed(self, _summary: RoundSummary) -> None:
            raise ConnectionError("tracking server is down")

        def epoch_closed(self, _credit: CreditEntry) -> None:
            raise ConnectionError("tracking server is down")

    small.build(tmp_path)
    assert small.run(tmp_path, Broken()).model_hash == clean[1].model_hash
    assert "observer Broken failed (ConnectionError)" in caplog.text


def test_two_aggregators_never_share_a_folder(tmp_path: Path) -> None:
    """The second process on a state folder is told so and changes nothing."""
    folder = small.build(tmp_path)
    with hold(folder.state), pytest.raises(NodeBusy, match="another aggregator"):
        small.run(tmp_path)


def test_forged_releases_and_missing_cosigners_cost_only_their_owner(tmp_path: Path) -> None:
    """A wrongly signed release is left out of the credit; a witness that refuses is missing from the cosigners."""
    small.build(tmp_path, {"birch": "forged-release", "cedar": "no-cosign"})
    result = small.run(tmp_path)
    assert [s.release.node for s in result.credits[0].releases] == ["alder", "cedar"]
    assert result.cosigned_by == ("alder", "birch")


@pytest.mark.parametrize("lie", sorted(small.LIES))
def test_a_release_that_says_what_cannot_be_is_left_out(tmp_path: Path, lie: str) -> None:
    """Impossible values, less noise than the plan adds, other numbers, no cost: the credit goes without it."""
    small.build(tmp_path, {"birch": lie})
    result = small.run(tmp_path)
    assert [s.release.node for s in result.credits[0].releases] == ["alder", "cedar"]


def test_nodes_that_are_not_there_yet_are_waited_for_but_not_for_ever(tmp_path: Path) -> None:
    """With too few members connected the run waits hello_timeout_s per try and then names the absent ones."""
    small.build(tmp_path, hello_timeout_s=0.2, max_attempts=2)
    with pytest.raises(IsletError, match="birch: not-connected, cedar: not-connected"):
        small.run(tmp_path, names=("alder",))


def test_cosignatures_are_in_the_published_checkpoint(clean: Clean) -> None:
    """checkpoint.txt of a finished run covers the whole ledger and carries every hospital's line."""
    path, _, _ = clean
    published = SignedCheckpoint.from_text((path / "aggregator" / "checkpoint.txt").read_text())
    assert published.checkpoint.size == len(small.entries(path))
    assert {signature.name for signature in published.signatures} == {small.FEDERATION, *small.NAMES}


@pytest.mark.parametrize("step", [6, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_any_point_the_same_command_ends_with_the_same_model(tmp_path: Path, clean: Clean, step: int) -> None:
    """After kill -9 anywhere in the run, the next run has the same weights and one entry per round and epoch."""
    spawn = multiprocessing.get_context("forkserver")
    spawn.set_forkserver_preload(["tests.aggregator.small_federation"])
    for deadly in count(step, step):
        path = tmp_path / str(deadly)
        path.mkdir()
        small.build(path)
        doomed = spawn.Process(target=small.run_until, args=(path, deadly))
        doomed.start()
        doomed.join(60)
        if doomed.exitcode == 0:
            break
        assert doomed.exitcode == -signal.SIGKILL, f"event {deadly}"
        result = small.run(path)
        assert result.model_hash == clean[1].model_hash, f"event {deadly}"
        assert np.array_equal(result.last_weights, clean[1].last_weights), f"event {deadly}"
        assert kinds(path) == kinds(clean[0]), f"event {deadly}"
        assert result.cosigned_by == small.NAMES, f"event {deadly}"
    # 3 greetings, 3 rounds of 3 updates and scores, 2 epochs and the end, files and entries before and after.
    assert deadly > 55


@pytest.mark.parametrize("damage", ["torn arrays", "torn record", "changed record", "no arrays"])
def test_a_damaged_newest_checkpoint_is_skipped_and_its_round_repeated(
    tmp_path: Path, clean: Clean, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    """The round before is used, the lost round comes out as the ledger says, and nothing is logged twice."""
    small.build(tmp_path)
    small.run(tmp_path)
    (newest,) = (tmp_path / "aggregator" / "state").glob("*/round-00003.json")
    arrays = newest.with_suffix(".npz")
    match damage:
        case "torn arrays":
            arrays.write_bytes(arrays.read_bytes()[:-100])
        case "torn record":
            newest.write_bytes(newest.read_bytes()[:-100])
        case "changed record":
            newest.write_bytes(newest.read_bytes().replace(b'"epsilon_after":1.5', b'"epsilon_after":0.5', 1))
        case "no arrays":
            arrays.unlink()
    with caplog.at_level(logging.WARNING):
        result = small.run(tmp_path)
    assert "round-00003.json is damaged" in caplog.text
    assert (result.resumed_from, result.model_hash) == (2, clean[1].model_hash)
    assert kinds(tmp_path) == kinds(clean[0])
    assert len(result.rounds) == 3


def test_a_lost_round_is_repeated_with_the_hospitals_that_are_on_record(tmp_path: Path, clean: Clean) -> None:
    """When a round was logged without a hospital and its checkpoint is lost, the hospital stays out of it."""
    small.build(tmp_path, {"birch": "refuse"})
    first = small.run(tmp_path)
    (newest,) = (tmp_path / "aggregator" / "state").glob("*/round-00003.npz")
    newest.unlink()
    (tmp_path / "birch" / "behaviour").unlink()
    assert small.run(tmp_path).model_hash == first.model_hash
    assert kinds(tmp_path) == kinds(clean[0])


def test_a_ledger_restored_from_an_old_copy_is_noticed(tmp_path: Path) -> None:
    """A ledger shorter than the newest checkpoint remembers stops the run with what to restore."""
    folder = small.build(tmp_path)
    old = (folder.path / "ledger.db").read_bytes()
    small.run(tmp_path)
    (folder.path / "ledger.db").write_bytes(old)
    (folder.path / ledger.CHECKPOINT_FILE).unlink()
    with pytest.raises(CheckFailed, match="the checkpoint of round 3 saw"):
        small.run(tmp_path)


def test_the_flower_server_app_runs_the_folder_it_is_given(tmp_path: Path, clean: Clean) -> None:
    """ServerApp and embedded grid together: the run config names the folder, and the outcome is the same.

    Sixteen numbers are no forecaster, so the release at the very end refuses them; the ledger has the run by then.
    """
    from flwr.app import Context, RecordDict

    from aggregator.server_app import app

    folder = small.build(tmp_path)
    context = Context(1, 1, {}, RecordDict(), {"aggregator-folder": str(folder.path)})
    with pytest.raises(BadInput, match="float32"):
        app(grid=small.grid(tmp_path), context=context)
    (published,) = [entry for entry in small.entries(tmp_path) if isinstance(entry, ModelEntry)]
    assert published.model_hash == clean[1].model_hash
    assert open_folder(folder.path).settings == folder.settings


def test_a_server_app_without_a_folder_says_what_to_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that names no folder is refused with the setting to give."""
    from flwr.app import Context, RecordDict

    from aggregator.server_app import app

    small.build(tmp_path)
    monkeypatch.delenv("ISLET_AGGREGATOR_HOME", raising=False)
    with pytest.raises(BadInput) as refused:
        app(grid=small.grid(tmp_path), context=Context(1, 1, {}, RecordDict(), {}))
    assert "aggregator-folder" in refused.value.hint


def test_a_server_app_that_holds_sittings_is_the_only_one(tmp_path: Path) -> None:
    """The run holds them for as long as it goes on: another ends with the reason, and a run that trains does not."""
    from flwr.app import Context, RecordDict

    from aggregator.server_app import app

    folder = small.build(tmp_path)
    context = Context(1, 1, {}, RecordDict(), {"aggregator-folder": str(folder.path), "sit-every-s": 5.0})
    with hold_sittings(folder.state):
        with pytest.raises(NodeBusy, match="standing run"):
            app(grid=small.grid(tmp_path), context=context)
        assert len(small.run(tmp_path).rounds) == folder.load_plan().rounds


def test_credit_survives_hospitals_that_score_nothing(tmp_path: Path) -> None:
    """An epoch with one usable release pays nobody, and the pot stays on record as unpaid."""
    small.build(tmp_path, dict.fromkeys(("birch", "cedar"), "forged-release"))
    small.run(tmp_path)
    epochs = [entry for entry in small.entries(tmp_path) if isinstance(entry, CreditEntry)]
    assert len(epochs) == 2
    assert all(epoch.unpaid_micro_credits == epoch.pot_micro_credits for epoch in epochs)


def test_a_round_of_too_many_updates_is_neither_scored_nor_paid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scoring costs the square of the federation: above the limit nobody is asked to score or to release."""
    monkeypatch.setattr(epochs, "MOST_SCORED", 2)
    small.build(tmp_path)
    result = small.run(tmp_path)

    assert all(credit.releases == () for credit in result.credits)
    assert all(credit.unpaid_micro_credits == credit.pot_micro_credits for credit in result.credits)
    assert "score" not in (tmp_path / "alder" / "diary").read_text()
    folder = open_folder(tmp_path / "aggregator")
    report = verify_ledger(folder.path / "ledger.db", folder.key().public.hex, every_signature=True)
    assert not any(report.micro_credits.values())
