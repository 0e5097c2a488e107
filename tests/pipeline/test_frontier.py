"""The edge of a tree knows the root of the whole tree."""

from __future__ import annotations

from pipeline.frontier import Frontier
from pipeline.merkle import Tree, leaf_hash


def test_every_size_has_the_root_of_the_whole_tree() -> None:
    """From no leaf to 130, one more at a time: the same root as the tree that keeps every hash, with few peaks."""
    tree, edge = Tree(), Frontier()
    for number in range(131):
        assert (edge.size, edge.root()) == (number, tree.root())
        assert len(edge.peaks) == number.bit_count()
        leaf = leaf_hash(str(number).encode())
        tree.append(leaf)
        edge = edge.plus(leaf)
