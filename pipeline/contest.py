"""A challenger against the champion, and what the champion's recipe earns: from what is in the ledger, by anybody.

The contest is one more value in the release that pays a run's last epoch: how much better the challenger's model
forecasts than the champion, per held-out person. It is clipped and noised with the rest, so it costs nobody anything
more. The scorers are the other hospitals than the entrant; their weighted median decides, and only beyond its noise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from data_schemas.ledger import ContestEntry, ContestScore, RecipeShare
from data_schemas.messages import EpochRelease, contest_name
from pipeline.contribution import MIN_SCORERS, NANO, score_of, settled
from pipeline.terms import Terms


def scores_of(releases: Iterable[EpochRelease], name: str, entrant: str) -> tuple[ContestScore, ...]:
    """What each hospital but the entrant released under a contest's name, in the order of their names."""
    found = [
        ContestScore(
            node=release.node,
            improvement_mg_dl=release.shapley_mg_dl[release.nodes.index(name)],
            noise_std_mg_dl=release.noise_std_mg_dl,
            declared_heldout_patients=release.declared_heldout_patients,
        )
        for release in releases
        if release.node != entrant and not release.abstained and release.declared_heldout_patients
        if name in release.nodes
    ]
    return tuple(sorted(found, key=lambda score: score.node))


def contest_entry(
    run: str, entrant: str, model_hash: str, champion_hash: str, releases: Iterable[EpochRelease]
) -> ContestEntry:
    """Settle a contest from the releases of the run's last epoch. With fewer than MIN_SCORERS scores nobody wins."""
    scores = scores_of(releases, contest_name(model_hash, champion_hash), entrant)
    middle, low, high = _settled(scores)
    return ContestEntry(
        run=run,
        entrant=entrant,
        model_hash=model_hash,
        champion_hash=champion_hash,
        scores=scores,
        improvement_mg_dl=middle / NANO,
        interval_low_mg_dl=low / NANO,
        interval_high_mg_dl=high / NANO,
        won=low > 0,
    )


def recipe_shares(terms: Iterable[Terms], round_micro_credits: int) -> tuple[RecipeShare, ...]:
    """Split off an epoch's pot what goes to recipes; terms: of each of its rounds, which have equal parts of the pot.

    A round pays the thousandths that the members' policy named when it closed, to whoever entered the recipe that the
    champion ran then. Rounded down in each round; all else of the pot is for data.
    """
    earned: Counter[str] = Counter()
    for closed in terms:
        if closed.author is not None:
            earned[closed.author] += round_micro_credits * closed.permille // 1000
    return tuple(RecipeShare(node=node, micro_credits=earned[node]) for node in sorted(earned) if earned[node])


def _settled(scores: Sequence[ContestScore]) -> tuple[int, int, int]:
    if len(scores) < MIN_SCORERS:
        return 0, 0, 0
    return settled([score_of(s.improvement_mg_dl, s.noise_std_mg_dl, s.declared_heldout_patients) for s in scores])
