"""The Merkle tree of RFC 6962 section 2.1 (SHA-256): root, inclusion path, consistency proof, and their checks.

Proof checking is that of RFC 9162 sections 2.1.3.2 and 2.1.4.2. Hashes are 32 raw bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from data_schemas.errors import BadInput

EMPTY_ROOT = hashlib.sha256(b"").digest()
_LEAF = b"\x00"
_NODE = b"\x01"


def leaf_hash(data: bytes) -> bytes:
    """Hash of one entry. The prefix keeps an inner node from posing as an entry."""
    return hashlib.sha256(_LEAF + data).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """Hash of an inner node."""
    return hashlib.sha256(_NODE + left + right).digest()


class Tree:
    """A growing tree that keeps the hash of every complete subtree.

    append is amortised O(1); root and proofs, for this or any earlier size, are O(log^2 n) look-ups.
    """

    def __init__(self, leaf_hashes: Iterable[bytes] = ()) -> None:
        self._levels: list[list[bytes]] = [[]]
        for leaf in leaf_hashes:
            self.append(leaf)

    @property
    def size(self) -> int:
        """Number of leaves."""
        return len(self._levels[0])

    def append(self, leaf: bytes) -> None:
        """Add a leaf hash at the end."""
        self._levels[0].append(leaf)
        for level, hashes in enumerate(self._levels):
            if len(hashes) % 2:
                return
            if level + 1 == len(self._levels):
                self._levels.append([])
            self._levels[level + 1].append(node_hash(hashes[-2], hashes[-1]))

    def leaf(self, index: int) -> bytes:
        """Hash of one leaf."""
        _check_range(index, 0, self.size - 1, "index")
        return self._levels[0][index]

    def root(self, size: int | None = None) -> bytes:
        """MTH(D[0:size]), of the whole tree by default."""
        size = self._size(size)
        return self._subtree(0, size) if size else EMPTY_ROOT

    def inclusion_path(self, index: int, size: int | None = None) -> tuple[bytes, ...]:
        """PATH(index, D[0:size]) of section 2.1.1, from the leaf upwards."""
        size = self._size(size)
        _check_range(index, 0, size - 1, "index")
        path, start, end = list[bytes](), 0, size
        while end - start > 1:
            middle = start + _split(end - start)
            if index < middle:
                path.append(self._subtree(middle, end))
                end = middle
            else:
                path.append(self._subtree(start, middle))
                start = middle
        return tuple(reversed(path))

    def consistency_proof(self, old_size: int, size: int | None = None) -> tuple[bytes, ...]:
        """PROOF(old_size, D[0:size]) of section 2.1.2. Empty when one of the trees is empty or both are the same."""
        size = self._size(size)
        _check_range(old_size, 0, size, "old size")
        if old_size in (0, size):
            return ()
        proof, start, end = list[bytes](), 0, size
        while old_size != end:
            middle = start + _split(end - start)
            if old_size <= middle:
                proof.append(self._subtree(middle, end))
                end = middle
            else:
                proof.append(self._subtree(start, middle))
                start = middle
        if start:
            proof.append(self._subtree(start, end))
        return tuple(reversed(proof))

    def _size(self, size: int | None) -> int:
        if size is None:
            return self.size
        _check_range(size, 0, self.size, "size")
        return size

    def _subtree(self, start: int, end: int) -> bytes:
        """MTH(D[start:end]); every range that section 2.1 splits off starts at a multiple of its left width."""
        count = end - start
        level = count.bit_length() - 1
        if count == 1 << level:
            return self._levels[level][start >> level]
        middle = start + _split(count)
        return node_hash(self._subtree(start, middle), self._subtree(middle, end))


def root(leaf_hashes: Sequence[bytes]) -> bytes:
    """Root of a list of leaf hashes."""
    return Tree(leaf_hashes).root()


def inclusion_path(leaf_hashes: Sequence[bytes], index: int) -> tuple[bytes, ...]:
    """Inclusion path of one leaf of a list."""
    return Tree(leaf_hashes).inclusion_path(index)


def consistency_proof(leaf_hashes: Sequence[bytes], old_size: int) -> tuple[bytes, ...]:
    """Proof that the list's first `old_size` leaves are the tree once seen."""
    return Tree(leaf_hashes).consistency_proof(old_size)


def verify_inclusion(leaf: bytes, index: int, size: int, path: Sequence[bytes], root: bytes) -> bool:
    """Whether the leaf is at this index of the tree with this size and root."""
    if not 0 <= index < size or len(path) != inclusion_length(index, size) or not _all_hashes((leaf, root, *path)):
        return False
    node, last, running = index, size - 1, leaf
    for sibling in path:
        if node % 2 or node == last:
            running = node_hash(sibling, running)
            while node and not node % 2:
                node, last = node >> 1, last >> 1
        else:
            running = node_hash(running, sibling)
        node, last = node >> 1, last >> 1
    return running == root


def verify_consistency(old_size: int, new_size: int, old_root: bytes, new_root: bytes, proof: Sequence[bytes]) -> bool:
    """Whether the new tree holds the old one's entries, unchanged and in order, as its first `old_size`."""
    if not 0 <= old_size <= new_size or not _all_hashes((old_root, new_root, *proof)):
        return False
    if len(proof) != consistency_length(old_size, new_size):
        return False
    if old_size == new_size:
        return old_root == new_root
    if old_size == 0:
        return old_root == EMPTY_ROOT
    return _rebuild(old_size, new_size, old_root, proof) == (old_root, new_root)


def inclusion_length(index: int, size: int) -> int:
    """Count the hashes of an inclusion path: levels shared with the last leaf add one only at left turns."""
    shared = (index ^ (size - 1)).bit_length()
    return shared + (index >> shared).bit_count()


def consistency_length(old_size: int, new_size: int) -> int:
    """Count the hashes of a consistency proof."""
    if old_size in (0, new_size):
        return 0
    # The proof is the path of the old tree's last complete subtree, and that subtree unless it is the old root itself.
    level = (old_size & -old_size).bit_length() - 1
    path = inclusion_length((old_size - 1) >> level, ((new_size - 1) >> level) + 1)
    return path + (old_size != 1 << level)


def _rebuild(old_size: int, new_size: int, old_root: bytes, proof: Sequence[bytes]) -> tuple[bytes, bytes]:
    """Roots of the old and the new tree that the proof leads to (RFC 9162 section 2.1.4.2)."""
    hashes = list(proof) if old_size & (old_size - 1) else [old_root, *proof]
    node, last = old_size - 1, new_size - 1
    while node % 2:
        node, last = node >> 1, last >> 1
    old = new = hashes[0]
    for sibling in hashes[1:]:
        if node % 2 or node == last:
            old, new = node_hash(sibling, old), node_hash(sibling, new)
            while node and not node % 2:
                node, last = node >> 1, last >> 1
        else:
            new = node_hash(new, sibling)
        node, last = node >> 1, last >> 1
    return old, new


def _split(count: int) -> int:
    """Largest power of two below count."""
    return 1 << ((count - 1).bit_length() - 1)


def _all_hashes(values: Sequence[bytes]) -> bool:
    return all(len(value) == 32 for value in values)


def _check_range(value: int, low: int, high: int, what: str) -> None:
    if not low <= value <= high:
        raise BadInput(f"{what} {value} is not between {low} and {high}")
