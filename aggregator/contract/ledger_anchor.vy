# pragma version ~=0.4.3
"""
@title Ledger anchor
@notice Roots of one federation's ledger, and what the ledger says of credit and votes, where nobody can take it back.
        Only the aggregator writes; the chain keeps it from writing two histories. Whether what it wrote is what the
        hospitals cosigned is checked off the chain, against a verified ledger.
"""

event Anchored:
    size: indexed(uint256)
    root: bytes32

event Credited:
    entry: indexed(uint256)
    node: String[63]
    micro_credits: uint256

event Voted:
    proposal: indexed(bytes32)
    node: String[63]
    approve: bool

event Decided:
    proposal: indexed(bytes32)
    accepted: bool

aggregator: public(immutable(address))
origin: public(String[200])
# Number of entries under the newest root, and the root at every anchored size.
size: public(uint256)
roots: public(HashMap[uint256, bytes32])
# Ledger entries whose credit, vote or decision is written here.
recorded: public(HashMap[uint256, bool])
# By node name: micro-credits. By proposal and node name: 0 none, 1 yes, 2 no. By proposal: 0 open, 1 accepted, 2 not.
balances: public(HashMap[String[63], uint256])
votes: public(HashMap[bytes32, HashMap[String[63], uint256]])
outcomes: public(HashMap[bytes32, uint256])


@deploy
def __init__(origin: String[200]):
    aggregator = msg.sender
    self.origin = origin


@external
def anchor(size: uint256, root: bytes32):
    """
    @notice Set the root of the first `size` entries. A log only grows: no size is ever written twice.
    """
    assert msg.sender == aggregator, "only the aggregator writes"
    assert size > self.size, "a log only grows"
    self.size = size
    self.roots[size] = root
    log Anchored(size=size, root=root)


@external
def credit(entry: uint256, nodes: DynArray[String[63], 64], amounts: DynArray[uint256, 64]):
    """
    @notice Add an epoch's credit, from the ledger entry of this number.
    """
    self._record(entry)
    assert len(nodes) == len(amounts), "one amount per node"
    for i: uint256 in range(len(nodes), bound=64):
        self.balances[nodes[i]] += amounts[i]
        log Credited(entry=entry, node=nodes[i], micro_credits=amounts[i])


@external
def vote(entry: uint256, proposal: bytes32, node: String[63], approve: bool):
    """
    @notice Write a member's vote, from the ledger entry of this number. One hospital, one vote.
    """
    self._record(entry)
    assert self.votes[proposal][node] == 0, "the member has voted before"
    self.votes[proposal][node] = 1 if approve else 2
    log Voted(proposal=proposal, node=node, approve=approve)


@external
def decide(entry: uint256, proposal: bytes32, accepted: bool):
    """
    @notice Write the outcome of a proposal, from the ledger entry of this number.
    """
    self._record(entry)
    assert self.outcomes[proposal] == 0, "the proposal was decided before"
    self.outcomes[proposal] = 1 if accepted else 2
    log Decided(proposal=proposal, accepted=accepted)


@internal
def _record(entry: uint256):
    assert msg.sender == aggregator, "only the aggregator writes"
    assert entry < self.size, "the entry is not anchored yet"
    assert not self.recorded[entry], "the entry was recorded before"
    self.recorded[entry] = True
