"""Shapley values of a game from coalition utilities (Shapley 1953; FedSV, Wang et al. 2020): exact, or from a sample.

Up to EXACT_NODES every coalition is scored. Above, COALITIONS of them are, drawn from a public seed, so that all draw
the same: the smallest and the largest in full, of the rest a sample in pairs of a coalition and its complement, and
the values are those of the weighted regression whose solution over all coalitions is the Shapley value (Charnes et al.
1988; Covert and Lee 2021, "Improving KernelSHAP"). Which coalitions are left out follows from the seed alone, never
from a utility: a sampler that stops where utilities stop to change (truncation in GTG-Shapley, Liu et al. 2022) would
let one patient's readings move what is computed for another, and a release's sensitivity would not be its clip.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from math import comb, factorial

import numpy as np
import numpy.typing as npt

from data_schemas.errors import BadInput

EXACT_NODES = 10
# Coalitions scored above EXACT_NODES: as many as ten nodes have.
COALITIONS = 1 << EXACT_NODES
# Up to here the coalitions of one node and their complements are among them in full, so no node is left to chance.
MAX_NODES = 64


@dataclass(frozen=True)
class Game:
    """Coalitions to score, bool[m, n], the first empty and the last full, and the map from utilities to values."""

    coalitions: npt.NDArray[np.bool_]
    to_values: npt.NDArray[np.float64]

    def values(self, utilities: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Value of each node: float64[..., m] -> float64[..., n]; they sum to utility(all) - utility(none).

        Linear in the utilities, so values of rounds, or of patients, may be added before or after.
        """
        # Columns of the map sum to zero: taking the empty coalition off changes nothing but the rounding error.
        values: npt.NDArray[np.float64] = (utilities - utilities[..., :1]) @ self.to_values
        return values


def game_of(nodes: int, seed: bytes) -> Game:
    """Choose the coalitions of a round among `nodes`; above EXACT_NODES they follow from the public seed."""
    if not 1 <= nodes <= MAX_NODES:
        raise BadInput(f"Shapley values are for 1 to {MAX_NODES} nodes, not {nodes}", "Let fewer nodes into a round.")
    if nodes <= EXACT_NODES:
        return Game(coalition_masks(nodes), _shapley_map(nodes))
    return _sampled_game(nodes, seed)


def coalition_masks(nodes: int) -> npt.NDArray[np.bool_]:
    """List every coalition: bool[2^n, n]. Row r holds node i when bit i of r is set: row 0 is empty, the last full."""
    return (np.arange(2**nodes)[:, None] >> np.arange(nodes) & 1).astype(np.bool_)


def clip_rows(vectors: npt.NDArray[np.float64], clip: float) -> npt.NDArray[np.float64]:
    """Scale rows longer than `clip` back to it: float64[P, n] -> float64[P, n], every L2 norm <= clip.

    A row with a NaN or an infinity becomes zero: the bound must hold for whatever one patient's data produce, and an
    error here would itself tell something about a patient.
    """
    if not (np.isfinite(clip) and clip > 0):
        raise BadInput("the clip is a positive number")
    finite = np.where(np.isfinite(vectors).all(axis=-1, keepdims=True), vectors, 0.0)
    # Dividing by the largest element first keeps the squares from overflowing.
    largest = np.maximum(np.abs(finite).max(axis=-1, keepdims=True, initial=0.0), np.finfo(np.float64).tiny)
    unit = finite / largest
    norm = np.linalg.norm(unit, axis=-1, keepdims=True)
    # A few rounding errors below the clip, so that the bound holds in floating point as well.
    bound = clip * (1 - 1e-14)
    with np.errstate(over="ignore"):
        over = norm * largest > bound
    return np.where(over, unit * (bound / np.where(over, norm, 1.0)), finite)


def _sampled_game(nodes: int, seed: bytes) -> Game:
    masks, weights = _paired_sample(nodes, seed, (COALITIONS - 2) // 2)
    both = np.concatenate([masks, ~masks])
    inner = both.astype(np.float64)
    weighted = np.concatenate([weights, weights])[:, None] * inner
    # Minimise the weighted squares of u(S) - sum of S's values, with all values summing to u(all): Lagrange.
    solved = np.linalg.solve(inner.T @ weighted, np.concatenate([weighted.T, np.ones((nodes, 1))], axis=1))
    free, pull = solved[:, :-1], solved[:, -1:] / solved[:, -1].sum()
    rows = np.concatenate([free - pull * free.sum(axis=0), pull], axis=1)
    ends = np.zeros((1, nodes), dtype=np.bool_)
    return Game(np.concatenate([ends, both, ~ends]), np.concatenate([np.zeros((1, nodes)), rows.T]))


def _paired_sample(nodes: int, seed: bytes, pairs: int) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float64]]:
    """One coalition of each pair, bool[pairs, n], and its weight: the kernel's mass of its size, shared by the drawn.

    The kernel gives all coalitions of size s together the mass (n - 1) / (s (n - s)). Sizes are taken in full from the
    smallest on while their share of the mass pays for it.
    """
    sizes = range(1, nodes // 2 + 1)
    mass = {s: (nodes - 1) / (s * (nodes - s)) for s in sizes}
    count = {s: comb(nodes, s) // (2 if 2 * s == nodes else 1) for s in sizes}
    drawn: dict[int, int] = {}
    left, left_mass = pairs, sum(mass.values())
    for s in sizes:
        drawn[s] = min(count[s], left if s == sizes[-1] else round(left * mass[s] / left_mass))
        left, left_mass = left - drawn[s], left_mass - mass[s]
    masks = np.zeros((sum(drawn.values()), nodes), dtype=np.bool_)
    chosen = [c for s in sizes for c in _of_size(nodes, s, drawn[s], drawn[s] == count[s], seed)]
    for row, members in zip(masks, chosen, strict=True):
        row[list(members)] = True
    weights = np.concatenate([np.full(drawn[s], mass[s] / max(drawn[s], 1)) for s in sizes])
    return masks, weights


def _of_size(nodes: int, size: int, number: int, whole: bool, seed: bytes) -> list[tuple[int, ...]]:
    """`number` different coalitions of a size, no two of them complements: all there are, or the seed's choice.

    SHAKE-256 of the seed gives every try a number per node; the `size` nodes with the smallest are its members.
    """
    halves = 2 * size == nodes
    if whole:
        return [c for c in combinations(range(nodes), size) if not halves or 0 in c]
    found: dict[tuple[int, ...], None] = {}
    tries = 0
    while len(found) < number:
        stream = hashlib.shake_256(seed + bytes([size, tries])).digest(8 * nodes * number)
        for keys in np.frombuffer(stream, dtype="<u8").reshape(number, nodes):
            members = np.zeros(nodes, dtype=np.bool_)
            members[np.argsort(keys, kind="stable")[:size]] = True
            if halves and not members[0]:
                members = ~members
            found[tuple(np.flatnonzero(members).tolist())] = None
        tries += 1
    return list(found)[:number]


@lru_cache(maxsize=EXACT_NODES + 1)
def _shapley_map(nodes: int) -> npt.NDArray[np.float64]:
    """float64[2^n, n]: +(s-1)!(n-s)!/n! where the node is in a coalition of s, -s!(n-s-1)!/n! where it is not."""
    masks = coalition_masks(nodes)
    with_node = np.array(
        [0.0] + [factorial(s - 1) * factorial(nodes - s) / factorial(nodes) for s in range(1, nodes + 1)]
    )
    without = np.append(with_node[1:], 0.0)
    sizes = masks.sum(axis=1)
    weights: npt.NDArray[np.float64] = np.where(masks, with_node[sizes][:, None], -without[sizes][:, None])
    return weights
