"""Credit of one epoch from the hospitals' noised releases: weighted median over the others, then largest remainder.

Everything here is integer arithmetic on values rounded once to 1e-9 mg/dL, so whoever holds the releases computes the
same credit to the last micro-credit, on any machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from data_schemas.errors import BadInput
from data_schemas.ledger import CreditLine, CreditMode
from data_schemas.messages import EpochRelease
from pipeline.shapley import EXACT_NODES

# The unit of all arithmetic below: 1e-9 mg/dL.
NANO = 10**9
# Two-sided 95% of a normal distribution.
_Z95 = 1.96
# A node is paid only from this part (numerator, denominator) of the federation's mean score per declared patient on.
FLOOR = (1, 4)
# One scorer alone could write any score it likes.
MIN_SCORERS = 2


@dataclass(frozen=True)
class Score:
    """One scorer's view of one node, or of a model, in 1e-9 mg/dL, and the scorer's weight (held-out patients)."""

    value: int
    margin: int
    weight: int


def credit(
    releases: Sequence[EpochRelease],
    nodes: Sequence[str],
    pot_micro_credits: int,
    declared: Mapping[str, int] | None = None,
) -> tuple[tuple[CreditLine, ...], int]:
    """Lines in the order of `nodes`, and what of the pot nobody earned. Lines and unpaid sum to the pot.

    A node's score is the median of the OTHER, non-abstaining nodes' released Shapley values for it, weighted by their
    declared held-out patients: liars holding less than half of the weight of those others cannot move it beyond honest
    values (with exactly half, they can: a federation of three has no room for a liar).
    No scorer weighs as much as all the others together: the largest is capped just below that, so that no hospital
    alone decides what the others are worth. Credit is the pot times the positive share; a node with fewer than
    MIN_SCORERS scorers gets 0, and so does one below the floor: less than FLOOR of the federation's mean score per
    declared training patient. `declared` are those patients by node; without it there is no floor.

    The interval is the weighted median of the scorers' values -+ 1.96 noise_std. It is conservative for the noise: it
    misses only when scorers of half the weight have noise beyond 1.96 standard deviations on the same side, 5% for a
    single scorer and less for more. It does not cover the choice of held-out patients or disagreement between sites.

    Raises BadInput on a repeated release or node, a missing value, or a pot, noise or weight out of range.
    """
    _check(releases, nodes, pot_micro_credits)
    told = [(release, _all_scores(release)) for release in releases]
    rows = [_score_node(node, told) for node in nodes]
    earned = _above_floor([max(0, score) for score, _, _ in rows], nodes, declared)
    amounts = _largest_remainder(earned, nodes, pot_micro_credits)
    lines = tuple(
        CreditLine(
            node=node,
            shapley_mg_dl=score / NANO,
            interval_low_mg_dl=low / NANO,
            interval_high_mg_dl=high / NANO,
            micro_credits=amount,
        )
        for node, (score, low, high), amount in zip(nodes, rows, amounts, strict=True)
    )
    return lines, pot_micro_credits - sum(amounts)


def credit_by_patients(
    rounds: Sequence[Mapping[str, int]], pot_micro_credits: int
) -> tuple[tuple[CreditLine, ...], int]:
    """Lines by name, and what is left: each round's part of the pot in proportion to the patients declared in it.

    rounds: declared patients of each hospital whose update was admitted.

    The credit that is left under secure aggregation, where no coalition of updates can be scored. It pays for taking
    part with as many patients as members admitted a hospital with, and says nothing of value: every value is 0.
    """
    earned: dict[str, int] = {}
    pot = pot_micro_credits // max(1, len(rounds))
    for patients in rounds:
        names = sorted(patients)
        amounts = _largest_remainder([patients[name] for name in names], names, pot)
        for name, amount in zip(names, amounts, strict=True):
            earned[name] = earned.get(name, 0) + amount
    nothing = {"shapley_mg_dl": 0.0, "interval_low_mg_dl": 0.0, "interval_high_mg_dl": 0.0}
    lines = tuple(CreditLine(node=name, micro_credits=earned[name], **nothing) for name in sorted(earned))
    return lines, pot_micro_credits - sum(earned.values())


def why_unpaid(heldout: Iterable[int]) -> str:
    """Say why no credit can ever be paid among members with so many declared held-out patients; empty when it can.

    Each member is scored by the others, and by MIN_SCORERS of them at least.
    """
    scores = [patients > 0 for patients in heldout]
    if sum(scores) - all(scores) >= MIN_SCORERS:
        return ""
    return f"no credit can be paid: a hospital needs {MIN_SCORERS} others that score it; {sum(scores)} here can score"


def mode_of(admitted: Iterable[int]) -> CreditMode:
    """Name how the hospitals had to score an epoch whose rounds admitted so many updates."""
    exact = max(admitted, default=0) <= EXACT_NODES
    return "exact-shapley-weighted-median" if exact else "sampled-shapley-weighted-median"


def _score_node(node: str, told: Sequence[tuple[EpochRelease, list[Score]]]) -> tuple[int, int, int]:
    """Score, low and high of one node, in 1e-9 mg/dL. told: releases, each with all its scores."""
    scores = [
        said[release.nodes.index(node)]
        for release, said in told
        if release.node != node and said and node in release.nodes
    ]
    if len(scores) < MIN_SCORERS:
        reach = _widest(scores or [score for _, said in told for score in said])
        return 0, -reach, reach
    return settled(scores)


def settled(found: Sequence[Score]) -> tuple[int, int, int]:
    """Weighted median of what at least MIN_SCORERS say, no weight above all the others', and its 95% interval."""
    scores = _capped(found)
    return (
        _weighted_median([(s.value, s.weight) for s in scores]),
        _weighted_median([(s.value - s.margin, s.weight) for s in scores]),
        _weighted_median([(s.value + s.margin, s.weight) for s in scores]),
    )


def _all_scores(release: EpochRelease) -> list[Score]:
    """One score per node of the release; none when it abstained or no held-out patient stands behind it."""
    if release.abstained or release.declared_heldout_patients == 0:
        return []
    noise, weight = release.noise_std_mg_dl, release.declared_heldout_patients
    return [score_of(value, noise, weight) for value in release.shapley_mg_dl]


def score_of(value_mg_dl: float, noise_std_mg_dl: float, weight: int) -> Score:
    """Read a released value: rounded once to 1e-9 mg/dL, with the margin that its noise leaves at 95%."""
    return Score(_nano(value_mg_dl), _nano(_Z95 * noise_std_mg_dl), weight)


def _widest(scores: Sequence[Score]) -> int:
    """Farthest that any of the scores could reach from zero: all that is known of a node too few have scored."""
    return max((abs(s.value) + s.margin for s in scores), default=0)


def _above_floor(scores: Sequence[int], nodes: Sequence[str], declared: Mapping[str, int] | None) -> list[int]:
    """Scores with those below the floor set to 0: who claims many patients must add something per patient."""
    if declared is None:
        return list(scores)
    patients = [declared.get(node, 0) for node in nodes]
    total, claimed = sum(scores), sum(patients)
    return [
        score if FLOOR[1] * score * claimed >= FLOOR[0] * total * own else 0
        for score, own in zip(scores, patients, strict=True)
    ]


def _capped(scores: Sequence[Score]) -> list[Score]:
    """Scores whose largest weight is below the sum of the others' (equal to it where there are two scorers)."""
    ordered = sorted((s.weight for s in scores), reverse=True)
    rest = sum(ordered[1:])
    cap = rest - 1 if len(ordered) > MIN_SCORERS else rest
    return [replace(s, weight=min(s.weight, cap)) for s in scores]


def _weighted_median(values: Sequence[tuple[int, int]]) -> int:
    """Value at half of the total weight; between two values when half falls exactly between them (rounded down)."""
    ordered = sorted(values)
    total = sum(weight for _, weight in ordered)
    below = 0
    for position, (value, weight) in enumerate(ordered):
        below += weight
        if 2 * below == total:
            return (value + ordered[position + 1][0]) // 2
        if 2 * below > total:
            return value
    raise BadInput("a median needs at least one value with a weight")


def _largest_remainder(shares: Sequence[int], names: Sequence[str], pot: int) -> list[int]:
    """Integer parts of the pot in proportion to the shares (Hamilton's method), ties by name; zeros when no share."""
    total = sum(shares)
    if total == 0:
        return [0] * len(shares)
    amounts = [pot * share // total for share in shares]
    order = sorted(range(len(shares)), key=lambda i: (-(pot * shares[i] % total), names[i]))
    for i in order[: pot - sum(amounts)]:
        amounts[i] += 1
    return amounts


def _nano(value: float) -> int:
    return round(value * NANO)


def _check(releases: Sequence[EpochRelease], nodes: Sequence[str], pot: int) -> None:
    if not 0 <= pot < 2**53:  # canonical JSON has no larger integers
        raise BadInput("the pot of an epoch is not between 0 and 2^53 - 1 micro-credits")
    if len(set(nodes)) != len(nodes):
        raise BadInput("a node is named twice in the epoch")
    if len({r.node for r in releases}) != len(releases):
        raise BadInput("a node has two releases in the epoch")
    for r in releases:
        if len(set(r.nodes)) != len(r.nodes):
            raise BadInput(f"the release of {r.node} names a node twice")
        if len(r.shapley_mg_dl) != (0 if r.abstained else len(r.nodes)):
            raise BadInput(f"the release of {r.node} does not have one value per node")
        if r.noise_std_mg_dl < 0 or r.declared_heldout_patients < 0:
            raise BadInput(f"the release of {r.node} has a negative noise or number of patients")
