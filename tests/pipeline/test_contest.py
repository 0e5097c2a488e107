"""A challenger wins only beyond the noise, by others' word, and its author is paid exactly what the policy says."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from data_schemas.canonical import content_hash
from data_schemas.governance import (
    Challenge,
    CreditPolicy,
    DecisionEntry,
    FoundingEntry,
    PrivacyPolicy,
    Promote,
    Proposal,
    ProposalEntry,
    Vote,
    VoteEntry,
)
from data_schemas.ledger import (
    ContestEntry,
    CreditEntry,
    Entry,
    MemberEntry,
    ModelEntry,
    PlanEntry,
    RecipeShare,
    RoundEntry,
)
from data_schemas.messages import EpochRelease, SignedRelease, contest_name
from data_schemas.plan import RELATION, TrainingPlan
from pipeline.contest import contest_entry, recipe_shares
from pipeline.contribution import credit
from pipeline.ledger_rules import Replay, fault
from pipeline.signing import PrivateKey
from pipeline.terms import Terms
from tests.hospital_node.small_node import plan

NAMES = ("alder", "birch", "cedar", "dogwood")
KEYS = {name: PrivateKey.from_seed(name.encode().ljust(32, b".")) for name in NAMES}
NOW = "2026-01-01T00:00:00+00:00"
OLD, NEW, NEWER = "a" * 64, "b" * 64, "c" * 64
FIRST, RIVAL, LATER = plan(name="first"), plan(name="rival"), plan(name="later")
POT = 1001


def release(node: str, improvement: float, *, noise: float = 0.1, abstained: bool = False) -> EpochRelease:
    """A release of two hospitals' values and a contest's."""
    return EpochRelease(
        federation="f",
        run="rival",
        epoch=1,
        node=node,
        nodes=("alder", "birch", contest_name(NEW, OLD)),
        shapley_mg_dl=() if abstained else (0.3, 0.2, improvement),
        noise_std_mg_dl=noise,
        declared_heldout_patients=5,
        abstained=abstained,
        spend=None,
        budget_head="0" * 64,
    )


def contest(*improvements: tuple[str, float]) -> ContestEntry:
    """Settle birch's challenge from these hospitals' values."""
    return contest_entry("rival", "birch", NEW, OLD, [release(node, value) for node, value in improvements])


def test_the_entrant_has_no_say_and_the_median_of_the_others_decides() -> None:
    """Neither its praise nor one liar's damning moves the result; scores are on record by name."""
    told = contest(("cedar", 0.5), ("birch", 99.0), ("alder", 0.4), ("dogwood", -99.0))
    assert [score.node for score in told.scores] == ["alder", "cedar", "dogwood"]
    assert told.improvement_mg_dl == 0.4
    assert told.won


@pytest.mark.parametrize(("improvement", "won"), [(0.196, False), (0.197, True), (-1.0, False)])
def test_a_challenger_wins_only_beyond_the_noise(improvement: float, won: bool) -> None:
    """The lower end of the 95% interval must lie above zero: 1.96 times the noise's 0.1 mg/dL."""
    assert contest(("alder", improvement), ("cedar", improvement), ("dogwood", improvement)).won is won


def test_one_scorer_is_too_few() -> None:
    """A single other hospital could write any score it likes; those that abstain do not count."""
    silent = release("cedar", 0.0, abstained=True)
    told = contest_entry("rival", "birch", NEW, OLD, [release("alder", 5.0), silent])
    assert (told.won, told.improvement_mg_dl) == (False, 0.0)


def test_each_round_pays_the_author_of_its_time_in_whole_micro_credits() -> None:
    """Rounded down in each round, so that data never gets less than its part; without an author all is for data."""
    nobody = Terms(champion=OLD, entrant=None, author=None, permille=333)
    birch, cedar = (nobody.model_copy(update={"author": name}) for name in ("birch", "cedar"))
    shares = recipe_shares([nobody, birch, birch, cedar], POT)
    assert shares == (RecipeShare(node="birch", micro_credits=666), RecipeShare(node="cedar", micro_credits=333))
    assert recipe_shares([birch.model_copy(update={"permille": 0})], POT) == ()


def decided(action: Challenge | Promote, replay: Replay, by: str) -> Iterator[Entry]:
    """A proposal that all vote for."""
    members = replay.charter.member_set
    proposal = Proposal(
        federation="f", action=action, proposed_by=by, member_set=members, expires_at="2027-01-01T00:00:00+00:00"
    )
    yield ProposalEntry(proposal=proposal, signature=KEYS[by].sign(proposal))
    for node in NAMES[:3]:
        vote = Vote(federation="f", proposal_hash=content_hash(proposal), node=node, member_set=members, approve=True)
        yield VoteEntry(vote=vote, signature=KEYS[node].sign(vote))
    yield DecisionEntry(proposal_hash=content_hash(proposal), accepted=True)


def closed(run: TrainingPlan) -> Iterator[Entry]:
    """A run's plan and its one round, in which nobody's update was admitted."""
    yield PlanEntry(run=run.name, plan_hash=content_hash(run))
    base = content_hash([run.name, 0])
    yield RoundEntry(
        run=run.name,
        round=1,
        plan_hash=content_hash(run),
        base_model_hash=base,
        new_model_hash=base,
        admitted=(),
        rejected=(),
    )


def paid(run: str, algorithm: tuple[RecipeShare, ...] = ()) -> CreditEntry:
    """Credit of a run's one round to alder and birch; what is left of the pot is theirs."""
    found = [release(node, 0.5).model_copy(update={"run": run}) for node in NAMES]
    for_data = POT - sum(share.micro_credits for share in algorithm)
    lines, unpaid = credit(found, ("alder", "birch"), for_data, dict.fromkeys(NAMES, 9))
    return CreditEntry(
        run=run,
        epoch=1,
        rounds=(1,),
        mode="exact-shapley-weighted-median",
        pot_micro_credits=POT,
        unpaid_micro_credits=unpaid,
        lines=lines,
        releases=tuple(SignedRelease(release=told, signature="") for told in found),
        algorithm=algorithm,
    )


def published(run: str, model_hash: str) -> ModelEntry:
    """A run's model."""
    told = {"unit": "patient", "relation": RELATION, "delta": 1e-5, "epsilon_by_node": {}}
    return ModelEntry.model_validate({"run": run, "round": 1, "model_hash": model_hash, **told})


def take(replay: Replay, *entries: Entry) -> str:
    """Take entries in; what is wrong with the first that is."""
    return next((wrong for entry in entries if (wrong := fault(entry, replay, at=NOW))), "")


@pytest.fixture
def replay() -> Replay:
    """Four members, a fifth of the pot for recipes, a champion, and the run of a challenger by birch."""
    made = Replay(signatures=False)
    policy = CreditPolicy(max_pot_micro_credits_per_round=POT, algorithm_permille=200)
    privacy = PrivacyPolicy(max_epsilon_training=8, max_epsilon_heldout=8, min_patients=1)
    members = [
        MemberEntry(
            node=name, public_key=KEYS[name].public.hex, declared_training_patients=9, declared_heldout_patients=5
        )
        for name in NAMES
    ]
    assert take(made, FoundingEntry(federation="f", privacy=privacy, credit=policy), *members) == ""
    assert take(made, *closed(FIRST), published("first", OLD), *decided(Promote(model_hash=OLD), made, "alder")) == ""
    assert take(made, *decided(Challenge(plan=RIVAL, code_hash="0" * 64), made, "birch")) == ""
    assert take(made, *closed(RIVAL), paid("rival"), published("rival", NEW)) == ""
    return made


def test_an_auditor_recomputes_the_contest(replay: Replay) -> None:
    """Other scores, another result, another entrant or champion, or a second settlement break the rules."""
    releases = [release(node, 0.5) for node in NAMES]
    true = contest_entry("rival", "birch", NEW, OLD, releases)
    assert true.won
    for false in (
        {"won": False},
        {"improvement_mg_dl": 0.6},
        {"scores": true.scores[1:]},
        {"entrant": "cedar"},
        {"champion_hash": NEWER},
        {"model_hash": OLD},
    ):
        trial = Replay(**{**vars(replay), "charter": replay.charter.copy(), "contested": dict(replay.contested)})
        assert take(trial, true.model_copy(update=false)) != ""
    assert take(replay, true) == ""
    assert "settled before" in take(replay, true)


def test_the_recipes_author_is_paid_while_it_is_champion(replay: Replay) -> None:
    """From the promotion on, to the last micro-credit; the ledger takes no other split."""
    assert take(replay, contest_entry("rival", "birch", NEW, OLD, [release(node, 0.5) for node in NAMES])) == ""
    assert replay.charter.author is None
    assert take(replay, *decided(Promote(model_hash=NEW), replay, "cedar"), *closed(LATER)) == ""
    assert replay.charter.author == "birch"
    wrong = "what the recipe earns does not follow from the policy"
    assert take(replay, paid("later")) == wrong
    assert take(replay, paid("later", (RecipeShare(node="cedar", micro_credits=200),))) == wrong
    assert take(replay, paid("later", (RecipeShare(node="birch", micro_credits=200),))) == ""
    assert sum(replay.micro_credits.values()) + replay.unpaid == 2 * POT
    del replay.charter.members["birch"]
    assert replay.charter.author is None


def test_nobody_claims_a_recipe_that_is_known(replay: Replay) -> None:
    """A plan that was entered or run before, or that costs more than the policy, cannot be entered."""
    dear = LATER.model_copy(update={"privacy": LATER.privacy.model_copy(update={"epsilon": 9.0})})
    rich = LATER.model_copy(update={"credit": LATER.credit.model_copy(update={"pot_micro_credits_per_round": POT + 1})})
    for known in (RIVAL, FIRST, dear, rich):
        entry = next(decided(Challenge(plan=known, code_hash="0" * 64), replay, "cedar"))
        assert take(replay, entry).startswith("no-effect")
    first = next(decided(Challenge(plan=LATER, code_hash="0" * 64), replay, "cedar"))
    assert take(replay, first) == ""
    assert take(replay, next(decided(Challenge(plan=LATER, code_hash="1" * 64), replay, "alder"))).startswith("no-eff")
