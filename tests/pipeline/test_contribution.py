"""Credit follows from the releases alone, to the last micro-credit, and a minority of liars earns nothing by it."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_schemas.errors import BadInput
from data_schemas.messages import EpochRelease
from pipeline.contribution import credit, mode_of, why_unpaid

NODES = ("alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf")
POT = 1_000_000


def _release(
    node: str, values: list[float], patients: int = 20, noise: float = 0.1, nodes: tuple[str, ...] = NODES
) -> EpochRelease:
    return EpochRelease(
        federation="f",
        run="r",
        epoch=1,
        node=node,
        nodes=nodes,
        shapley_mg_dl=tuple(values),
        noise_std_mg_dl=noise,
        declared_heldout_patients=patients,
        abstained=not values,
        spend=None,
        budget_head="0" * 64,
    )


def _honest(truth: list[float], seed: int, noise: float = 0.05, nodes: tuple[str, ...] = NODES) -> list[EpochRelease]:
    draw = np.random.default_rng(seed).normal(truth, noise, (len(nodes), len(truth)))
    return [_release(n, row.tolist(), noise=noise, nodes=nodes) for n, row in zip(nodes, draw, strict=True)]


def test_credit_is_the_positive_share() -> None:
    """Equal scorers who agree give shares in proportion to the positive scores; harm and idleness earn nothing."""
    truth = [3.0, 1.0, 0.0, -2.0, 4.0, 2.0, 0.0]
    lines, unpaid = credit([_release(n, truth) for n in NODES], NODES, POT)

    assert [line.micro_credits for line in lines] == [300_000, 100_000, 0, 0, 400_000, 200_000, 0]
    assert [line.shapley_mg_dl for line in lines] == truth
    assert unpaid == 0


def test_a_node_does_not_score_itself() -> None:
    """Self praise changes nothing."""
    honest = [_release(n, [1.0] * 7) for n in NODES]
    boasting = [_release("alpha", [1e6, 1, 1, 1, 1, 1, 1]), *honest[1:]]

    assert credit(boasting, NODES, POT) == credit(honest, NODES, POT)


@pytest.mark.parametrize("seed", range(5))
def test_liars_below_half_do_not_become_top_earners(seed: int) -> None:
    """Three of eight praise each other and damn the rest: each honest node still earns more than any of them."""
    truth = [1.5, 1.4, 1.6, 1.5, 1.5, -1.0, -1.2, -0.8]
    nodes = (*NODES, "hotel")
    liars = nodes[5:]
    lies = [-1000.0] * 5 + [1000.0] * 3
    honest = _honest(truth, seed, nodes=nodes)
    releases = [_release(r.node, lies, nodes=nodes) if r.node in liars else r for r in honest]
    lines, unpaid = credit(releases, nodes, POT)

    assert [line.micro_credits for line in lines[5:]] == [0, 0, 0]
    assert min(line.micro_credits for line in lines[:5]) > POT // 6
    assert sum(line.micro_credits for line in lines) + unpaid == POT


def test_weights_are_heldout_patients() -> None:
    """A scorer with more held-out patients counts for more."""
    nodes, said = NODES[:5], (9.0, 1.0, 2.0, 3.0, 4.0)
    even = [_release(n, [v] * 5, patients=10, nodes=nodes) for n, v in zip(nodes, said, strict=True)]
    heavy = [*even[:3], _release("delta", [3.0] * 5, patients=20, nodes=nodes), even[4]]

    assert credit(even, nodes, POT)[0][0].shapley_mg_dl == 2.5
    assert credit(heavy, nodes, POT)[0][0].shapley_mg_dl == 3.0


def test_no_scorer_alone_decides() -> None:
    """A hospital with most of the held-out patients moves no score beyond what another hospital says."""
    nodes = NODES[:4]
    others = [_release(n, [v] * 4, patients=3, nodes=nodes) for n, v in zip(nodes[1:], (1.0, 2.0, 3.0), strict=True)]
    giant = _release("alpha", [400.0] * 4, patients=1000, nodes=nodes)

    assert credit([giant, *others], nodes, POT)[0][1].shapley_mg_dl == 3.0


def test_below_the_floor_nothing_is_paid() -> None:
    """A node that adds less than a quarter of the mean per declared patient earns nothing; a small honest one earns."""
    nodes = NODES[:4]
    releases = [_release(n, [1.0, 1.0, 0.1, 0.1], patients=10, nodes=nodes) for n in nodes]
    declared = dict(zip(nodes, (40, 40, 40, 4), strict=True))

    lines, unpaid = credit(releases, nodes, POT, declared)

    assert [line.micro_credits > 0 for line in lines] == [True, True, False, True]
    assert sum(line.micro_credits for line in lines) + unpaid == POT


def test_half_of_the_weight_falls_between_two_values() -> None:
    """When the median falls exactly between two scorers it is their middle."""
    releases = [
        _release("alpha", [0, 0, 1.0], nodes=NODES[:3]),
        _release("bravo", [0, 0, 2.0], nodes=NODES[:3]),
    ]

    assert credit(releases, NODES[:3], POT)[0][2].shapley_mg_dl == 1.5


def test_abstentions_do_not_score() -> None:
    """A node that abstained is scored by the others and scores nobody."""
    releases = [_release(n, [1.0] * 7) for n in NODES[1:]]
    lines, _ = credit([_release("alpha", []), *releases], NODES, POT)

    assert lines == credit(releases, NODES, POT)[0]
    assert lines[0].micro_credits == lines[1].micro_credits + 1  # one seventh, the remainder to the first names


def test_too_few_scorers_earn_nothing() -> None:
    """With one other scorer a node gets 0, and the interval reaches as far as anything known could."""
    releases = [_release(n, [2.0, 3.0], noise=1.0, nodes=NODES[:2]) for n in NODES[:2]]
    lines, unpaid = credit(releases, NODES[:2], POT)

    assert unpaid == POT
    assert [(x.shapley_mg_dl, x.micro_credits) for x in lines] == [(0.0, 0), (0.0, 0)]
    assert (lines[0].interval_low_mg_dl, lines[0].interval_high_mg_dl) == (-3.96, 3.96)
    assert (lines[1].interval_low_mg_dl, lines[1].interval_high_mg_dl) == (-4.96, 4.96)


def test_it_is_said_when_no_credit_can_be_paid() -> None:
    """Two members who score each other can never be paid, nor anybody with one scorer; with two others somebody can."""
    assert "no credit can be paid" in why_unpaid([10, 10])
    assert "no credit can be paid" in why_unpaid([10, 0, 0])
    assert why_unpaid([10, 10, 3]) == why_unpaid([10, 0, 10]) == ""


def test_the_mode_says_how_the_largest_round_was_scored() -> None:
    """Ten admitted updates are scored exactly, eleven from a sample, whatever the other rounds had."""
    assert mode_of([10, 3]) == "exact-shapley-weighted-median"
    assert mode_of([3, 11]) == "sampled-shapley-weighted-median"


def test_nobody_scored() -> None:
    """Without any release everything is unpaid and nothing is claimed."""
    lines, unpaid = credit([], NODES[:2], POT)

    assert unpaid == POT
    assert all(line.micro_credits == 0 and line.interval_high_mg_dl == 0.0 for line in lines)


def test_the_pot_is_unpaid_when_all_did_harm() -> None:
    """Nobody is paid for being the least harmful."""
    lines, unpaid = credit([_release(n, [-1.0] * 7) for n in NODES], NODES, POT)

    assert unpaid == POT
    assert not any(line.micro_credits for line in lines)


def test_remainders_go_to_the_largest_then_by_name() -> None:
    """Seven equal shares of ten micro-credits: the first three names get the remainder, whatever the order."""
    releases = [_release(n, [1.0] * 7) for n in NODES]
    forward, _ = credit(releases, NODES, 10)
    backward, _ = credit(releases, NODES[::-1], 10)

    assert [line.micro_credits for line in forward] == [2, 2, 2, 1, 1, 1, 1]
    assert backward == forward[::-1]


@given(
    st.lists(st.lists(st.floats(-1e6, 1e6), min_size=7, max_size=7), min_size=7, max_size=7),
    st.integers(0, 2**53 - 1),
    st.randoms(use_true_random=False),
)
def test_sums_and_order(table: list[list[float]], pot: int, order: random.Random) -> None:
    """Lines and unpaid always sum to the pot; the order of the releases does not matter; intervals hold the score."""
    releases = [_release(n, row, patients=i + 1) for i, (n, row) in enumerate(zip(NODES, table, strict=True))]
    lines, unpaid = credit(releases, NODES, pot)
    shuffled = order.sample(releases, len(releases))

    assert sum(line.micro_credits for line in lines) + unpaid == pot
    assert all(line.micro_credits >= 0 for line in lines)
    assert credit(shuffled, NODES, pot) == (lines, unpaid)
    assert all(x.interval_low_mg_dl <= x.shapley_mg_dl <= x.interval_high_mg_dl for x in lines)


def test_the_interval_covers_the_noise() -> None:
    """Over 300 noisy epochs the interval holds the noiseless score at least 95% of the time."""
    truth = [1.5, 1.0, 0.5, 0.0, -0.5, 2.0, 0.2]
    held = sum(
        line.interval_low_mg_dl <= t <= line.interval_high_mg_dl
        for seed in range(300)
        for line, t in zip(credit(_honest(truth, seed, 0.3), NODES, POT)[0], truth, strict=True)
    )

    assert held >= 0.95 * 300 * 7


def test_differences_below_a_nano_do_not_matter() -> None:
    """Values are rounded to 1e-9 mg/dL before anything else: another machine's last bit changes no credit."""
    releases = [_release(n, [1.0 / 3, 2.0 / 3, 0.1, 0.2, 0.3, 0.0, 0.0]) for n in NODES]
    nudged = [_release(n, [v + 1e-13 for v in r.shapley_mg_dl]) for n, r in zip(NODES, releases, strict=True)]

    assert credit(nudged, NODES, POT) == credit(releases, NODES, POT)


@pytest.mark.parametrize(
    ("releases", "nodes", "pot", "message"),
    [
        ([_release("alpha", [1.0] * 7)] * 2, NODES, POT, "two releases"),
        ([], ("alpha", "alpha"), POT, "named twice"),
        ([], NODES, -1, "pot"),
        ([], NODES, 2**53, "pot"),
        ([_release("alpha", [1.0] * 6)], NODES, POT, "one value per node"),
        ([_release("alpha", [1.0, 1.0], nodes=("bravo", "bravo"))], NODES, POT, "names a node twice"),
        ([_release("alpha", [1.0] * 7, noise=-1.0)], NODES, POT, "negative noise"),
        ([_release("alpha", [1.0] * 7, patients=-1)], NODES, POT, "negative noise or number"),
    ],
)
def test_malformed_epochs_are_refused(
    releases: list[EpochRelease], nodes: tuple[str, ...], pot: int, message: str
) -> None:
    """Each malformed input is named."""
    with pytest.raises(BadInput, match=message):
        credit(releases, nodes, pot)
