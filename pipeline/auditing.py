"""One-run privacy audits: what a mechanism's epsilon is at least, seen from how well its output betrays canaries.

The game (Steinke, Nasr and Jagielski 2023, "Privacy Auditing with One (1) Training Run"): each of m canaries joins the
data by a fair coin of its own; whoever sees the output guesses for some of them whether they are in, and abstains for
the rest. A private mechanism allows only so many right guesses, so too many refute its claim. Two bounds follow:

- `one_run_bound`: their Theorem 5.2 with the constants of its proof; it holds for every (epsilon, delta)-DP mechanism.
- `gaussian_bound`: the recursion of Mahloujifar, Melis and Chaudhuri 2024 (arXiv 2410.22235) for the trade-off function
  of a Gaussian mechanism. Sharper, and formal only where the mechanism is of that shape: a detector.

Pure: no training happens here. An audit refutes, it never proves: a bound below the claim means nothing was caught.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

CONFIDENCE = 0.95
# Shares of the canaries that are guessed at, the surest ones first; the bounds pay for having several tries.
SHARES = (0.1, 0.3, 1.0)
_NORMAL = NormalDist()
_LARGEST_EPSILON = 60.0


@dataclass(frozen=True, slots=True)
class Guesses:
    """How a guesser fared: `made` guesses about `canaries` fair coins, `right` of them right."""

    canaries: int
    made: int
    right: int

    def __post_init__(self) -> None:
        if not 0 <= self.right <= self.made <= self.canaries or self.canaries < 1:
            raise ValueError("right guesses are some of the guesses made, and those some of the canaries")


@dataclass(frozen=True, slots=True)
class AuditBounds:
    """Lower bounds of epsilon at one delta and 95% confidence, over all of SHARES, and the fullest set of guesses."""

    one_run: float
    gaussian: float
    guesses: Guesses


def guess(scores: npt.NDArray[np.float64], included: npt.NDArray[np.bool_], made: int) -> Guesses:
    """Guess the highest of scores float64[m] as included and the lowest as not, half of `made` each."""
    order = np.argsort(scores, kind="stable")
    half = made // 2
    right = int(included[order[len(order) - half :]].sum()) + int((~included[order[:half]]).sum())
    return Guesses(len(scores), 2 * half, right)


def audit(scores: npt.NDArray[np.float64], included: npt.NDArray[np.bool_], delta: float) -> AuditBounds:
    """Bounds from canaries' scores float64[m] and coins bool[m]; the error probability is shared among SHARES."""
    tries = [guess(scores, included, int(share * len(scores))) for share in SHARES]
    level = (1 - CONFIDENCE) / len(tries)
    return AuditBounds(
        one_run=max(one_run_bound(t, delta, level) for t in tries),
        gaussian=max(gaussian_bound(t, delta, level) for t in tries),
        guesses=tries[-1],
    )


def one_run_p_value(guesses: Guesses, epsilon: float, delta: float) -> float:
    """Probability, at most, that an (epsilon, delta)-DP mechanism allows so many right guesses.

    Theorem 5.2: P[Bin >= v] + 2 m delta max_i P[v > Bin >= v - i] / i, Bin of `made` coins that fall right with
    probability e^epsilon / (1 + e^epsilon).
    """
    chance = _binomial(guesses.made, 1.0 / (1.0 + math.exp(-epsilon)))
    tail = float(chance[guesses.right :].sum())
    below = np.cumsum(chance[: guesses.right][::-1])
    slip = float((below / np.arange(1, len(below) + 1)).max()) if len(below) else 0.0
    return min(1.0, tail + 2.0 * guesses.canaries * delta * slip)


def one_run_bound(guesses: Guesses, delta: float, level: float = 1 - CONFIDENCE) -> float:
    """Largest epsilon that these guesses refute at this level, for any mechanism; 0 when they refute none."""
    return _last_refuted(lambda epsilon: one_run_p_value(guesses, epsilon, delta) < level, _LARGEST_EPSILON)


def refutes_gaussian(guesses: Guesses, mu: float, level: float) -> bool:
    """Whether a mu-GDP mechanism gives so many right guesses with probability below `level`.

    With p_i the chance of exactly i right guesses, r_i = sum_{j>=i} j p_j / m and h_i = sum_{j>=i} (made - j) p_j / m.
    Flipping the coin of a canary turns a right guess among i into a wrong one among i - 1, so f-DP asks for
    h_{i-1} >= fbar^{-1}(r_i). Assume P[at least `right`] = level, take everything as small as that allows, walk down to
    i = 0: were r_0 + h_0 = made / m exceeded, the assumption was impossible.
    """
    made, m = guesses.made, guesses.canaries
    r = level * guesses.right / m
    h = level * (made - guesses.right) / m
    for i in range(guesses.right - 1, -1, -1):
        before, h = h, max(h, _NORMAL.cdf(_NORMAL.inv_cdf(r) - mu))
        r += i / (made - i) * (h - before)
        if r + h > made / m:
            return True
    return False


def gaussian_bound(guesses: Guesses, delta: float, level: float = 1 - CONFIDENCE) -> float:
    """Epsilon at delta of the largest mu that these guesses refute for Gaussian mechanisms; 0 when they refute none."""
    return gaussian_epsilon(_last_refuted(lambda mu: refutes_gaussian(guesses, mu, level), 12.0), delta)


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Epsilon of mu-GDP at delta (Dong, Roth and Su 2022, Corollary 1)."""

    def delta_at(epsilon: float) -> float:
        loss = epsilon / mu
        return _NORMAL.cdf(mu / 2 - loss) - math.exp(epsilon) * _NORMAL.cdf(-mu / 2 - loss)

    return 0.0 if mu <= 0 else _last_refuted(lambda epsilon: delta_at(epsilon) > delta, 200.0)


def caught(bounds: AuditBounds, claimed_epsilon: float) -> bool:
    """Whether either bound stands above the claim."""
    return max(bounds.one_run, bounds.gaussian) > claimed_epsilon


def spread(values: Sequence[float]) -> str:
    """Write several runs' bounds as "low to high"."""
    low, high = min(values), max(values)
    return f"{low:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} to {high:.2f}"


def _binomial(count: int, chance: float) -> npt.NDArray[np.float64]:
    """float64[count + 1]: chances of 0, 1, ... count hits."""
    hits = np.arange(count + 1)
    ways = np.array([math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) for k in hits])
    chances: npt.NDArray[np.float64] = np.exp(ways + hits * math.log(chance) + (count - hits) * math.log1p(-chance))
    return chances


def _last_refuted(refuted: Callable[[float], bool], high: float) -> float:
    """Largest value in [0, high] that is refuted, to 1e-4; refutation holds for everything below one that it holds."""
    low = 0.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low
