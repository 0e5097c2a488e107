"""The right edge of a growing Merkle tree: enough to add leaves and to know the root, without the leaves before.

RFC 6962 section 2.1; pipeline.merkle.Tree is the same tree with every hash kept.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.merkle import EMPTY_ROOT, node_hash


@dataclass(frozen=True)
class Frontier:
    """size: number of leaves; peaks: roots of the complete subtrees that make up the tree, the largest first."""

    size: int = 0
    peaks: tuple[bytes, ...] = ()

    def plus(self, leaf: bytes) -> Frontier:
        """Return the tree with one more leaf hash."""
        peaks, count = [*self.peaks, leaf], self.size
        while count % 2:
            right = peaks.pop()
            peaks.append(node_hash(peaks.pop(), right))
            count //= 2
        return Frontier(self.size + 1, tuple(peaks))

    def root(self) -> bytes:
        """MTH(D[0:size])."""
        if not self.peaks:
            return EMPTY_ROOT
        folded = self.peaks[-1]
        for left in reversed(self.peaks[:-1]):
            folded = node_hash(left, folded)
        return folded
