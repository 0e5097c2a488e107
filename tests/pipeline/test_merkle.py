"""The Merkle tree is that of RFC 6962, its proofs hold for every size and nothing else passes."""

from __future__ import annotations

import itertools

import pytest

from data_schemas.errors import BadInput
from pipeline import merkle

# The inputs and roots that Certificate Transparency implementations share.
CT_INPUTS = ["", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f"]
CT_ROOTS = {
    0: "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    1: "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    2: "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    3: "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    8: "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
}
SIZES = range(1, 34)
LEAVES = [merkle.leaf_hash(bytes([i])) for i in range(33)]


def _definition(leaves: list[bytes]) -> bytes:
    """MTH as section 2.1 writes it."""
    if not leaves:
        return merkle.EMPTY_ROOT
    if len(leaves) == 1:
        return leaves[0]
    split = 1
    while 2 * split < len(leaves):
        split *= 2
    return merkle.node_hash(_definition(leaves[:split]), _definition(leaves[split:]))


ROOTS = [_definition(LEAVES[:n]) for n in range(34)]


@pytest.mark.parametrize("size", CT_ROOTS)
def test_known_roots(size: int) -> None:
    """The well-known eight inputs have their well-known roots."""
    leaves = [merkle.leaf_hash(bytes.fromhex(data)) for data in CT_INPUTS[:size]]

    assert merkle.root(leaves).hex() == CT_ROOTS[size]


def test_root_of_every_size_is_the_definition() -> None:
    """The growing tree, at each size and looking back from the largest, has the root that the definition gives."""
    tree = merkle.Tree(LEAVES)

    assert [tree.root(n) for n in range(34)] == ROOTS
    assert [merkle.root(LEAVES[:n]) for n in range(34)] == ROOTS


def test_known_inclusion_path() -> None:
    """The path of RFC 6962 section 2.1.3: d3 in a tree of 7 is [c, g, l... ] as drawn there."""
    a, b, c, d, e, f, j = LEAVES[:7]
    node = merkle.node_hash
    g, h, i = node(a, b), node(c, d), node(e, f)

    assert merkle.inclusion_path(LEAVES[:7], 0) == (b, h, node(i, j))
    assert merkle.inclusion_path(LEAVES[:7], 3) == (c, g, node(i, j))
    assert merkle.inclusion_path(LEAVES[:7], 4) == (f, j, node(g, h))
    assert merkle.inclusion_path(LEAVES[:7], 6) == (i, node(g, h))


def test_known_consistency_proofs() -> None:
    """The proofs of RFC 6962 section 2.1.3 for old sizes 3, 4 and 6 of 7."""
    a, b, c, d, e, f, j = LEAVES[:7]
    node = merkle.node_hash
    g, h, i = node(a, b), node(c, d), node(e, f)

    assert merkle.consistency_proof(LEAVES[:7], 3) == (c, d, g, node(i, j))
    assert merkle.consistency_proof(LEAVES[:7], 4) == (node(i, j),)
    assert merkle.consistency_proof(LEAVES[:7], 6) == (i, j, node(g, h))


@pytest.mark.parametrize("size", SIZES)
def test_every_leaf_is_proved_and_no_other(size: int) -> None:
    """Each leaf's path verifies at its place; another leaf, place, root, order or length does not."""
    root = ROOTS[size]
    for index in range(size):
        path = merkle.inclusion_path(LEAVES[:size], index)
        leaf = LEAVES[index]

        assert merkle.verify_inclusion(leaf, index, size, path, root)
        assert not merkle.verify_inclusion(bytes(32), index, size, path, root)
        assert not merkle.verify_inclusion(leaf, index, size, path, bytes(32))
        assert not merkle.verify_inclusion(leaf, index, size, (*path, bytes(32)), root)
        assert not merkle.verify_inclusion(leaf, index, size, path[1:], root) or not path
        assert not any(
            merkle.verify_inclusion(leaf, other, size, path, root) for other in range(size) if other != index
        )
        for position in range(len(path)):
            changed = (*path[:position], bytes(32), *path[position + 1 :])
            assert not merkle.verify_inclusion(leaf, index, size, changed, root)


@pytest.mark.parametrize("size", SIZES)
def test_every_older_tree_is_proved_and_no_other(size: int) -> None:
    """Each older size is proved consistent; another root, size or proof is not."""
    for old in range(size + 1):
        proof = merkle.consistency_proof(LEAVES[:size], old)

        assert merkle.verify_consistency(old, size, ROOTS[old], ROOTS[size], proof)
        assert not merkle.verify_consistency(old, size, bytes(32), ROOTS[size], proof)
        assert not merkle.verify_consistency(old, size, ROOTS[old], ROOTS[size], (*proof, bytes(32)))
        assert not merkle.verify_consistency(size + 1, size, ROOTS[old], ROOTS[size], proof)
        if old > 0:
            assert not merkle.verify_consistency(old, size, ROOTS[old], bytes(32), proof)
            assert not merkle.verify_consistency(old - 1, size, ROOTS[old], ROOTS[size], proof)
        for position in range(len(proof)):
            changed = (*proof[:position], bytes(32), *proof[position + 1 :])
            assert not merkle.verify_consistency(old, size, ROOTS[old], ROOTS[size], changed)


def test_a_rewritten_past_has_no_proof() -> None:
    """No proof that the log can build makes a tree with one changed old leaf extend the old tree."""
    forged = [*LEAVES[:2], merkle.leaf_hash(b"forged"), *LEAVES[3:]]
    for old, size in itertools.combinations(range(3, 20), 2):
        proof = merkle.consistency_proof(forged[:size], old)

        assert not merkle.verify_consistency(old, size, ROOTS[old], merkle.root(forged[:size]), proof)


def test_proof_lengths_are_known_before_hashing() -> None:
    """The counted length of every proof is its length, so that a proof of another length is refused unhashed."""
    for size in SIZES:
        for index in range(size):
            assert merkle.inclusion_length(index, size) == len(merkle.inclusion_path(LEAVES[:size], index))
            assert merkle.consistency_length(index, size) == len(merkle.consistency_proof(LEAVES[:size], index))


def test_hashes_of_another_length_are_refused() -> None:
    """Only 32-byte hashes are hashed: shifting bytes between neighbours is not another spelling of a proof."""
    path = merkle.inclusion_path(LEAVES[:3], 0)

    assert not merkle.verify_inclusion(LEAVES[0], 0, 3, (path[0][:-1], path[0][-1:] + path[1]), ROOTS[3])


def test_an_inner_node_is_not_a_leaf() -> None:
    """An entry with the bytes of an inner node has another hash than the node."""
    left, right = LEAVES[:2]

    assert merkle.leaf_hash(left + right) != merkle.node_hash(left, right)


def test_a_large_tree_keeps_all_its_proofs() -> None:
    """A tree of 100,000 entries, grown one by one, still proves old entries and old sizes."""
    tree = merkle.Tree()
    roots = {}
    for number in range(100_000):
        tree.append(merkle.leaf_hash(number.to_bytes(4, "big")))
        if tree.size in {1, 777, 65_536, 99_999}:
            roots[tree.size] = tree.root()

    for old, root in roots.items():
        assert tree.root(old) == root
        assert merkle.verify_consistency(old, 100_000, root, tree.root(), tree.consistency_proof(old))
    for index in (0, 65_535, 65_536, 99_999):
        assert merkle.verify_inclusion(tree.leaf(index), index, 100_000, tree.inclusion_path(index), tree.root())


@pytest.mark.parametrize(("index", "size"), [(-1, 3), (3, 3), (0, 0), (0, 4)])
def test_a_path_outside_the_tree_is_refused(index: int, size: int) -> None:
    """An index or size that the tree does not have is an error, not a wrong proof."""
    with pytest.raises(BadInput, match="is not between"):
        merkle.Tree(LEAVES[:3]).inclusion_path(index, size)
