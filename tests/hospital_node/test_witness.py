"""The hospital as a witness: it cosigns one growing history and remembers it."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_schemas.canonical import canonical_bytes
from data_schemas.errors import Tampered
from data_schemas.messages import Cosigned, CosignTask, Refusal, RefusalCode, WitnessState
from hospital_node import witness
from hospital_node.folder import NodeFolder
from pipeline import checkpoint, merkle
from pipeline.checkpoint import Checkpoint
from pipeline.signing import PrivateKey
from tests.hospital_node.small_node import FEDERATION, make_node

AGGREGATOR = PrivateKey.from_seed(b"a" * 32)
AT = 1_800_000_000


@pytest.fixture
def node_path(tmp_path: Path) -> Path:
    return make_node(tmp_path / "north", aggregator_public_key=AGGREGATOR.public.hex)


def log(entries: int, fork: int | None = None) -> list[str]:
    """Make a log of so many entries, signed by the aggregator; from entry `fork` on it tells another story."""
    lines = []
    for index in range(entries):
        run = f"{'other' if fork is not None and index >= fork else 'run'}-{index}"
        entry = {"kind": "plan", "run": run, "plan_hash": "0" * 64}
        content = {"index": index, "recorded_at": "2026-01-01T00:00:00+00:00", "entry": entry}
        lines.append(canonical_bytes({**content, "signature": AGGREGATOR.sign(content)}).decode())
    return lines


def head_of(lines: list[str], origin: str = "ledger/one") -> Checkpoint:
    tree = merkle.Tree(merkle.leaf_hash(line.encode()) for line in lines)
    return Checkpoint(origin, tree.size, tree.root().hex())


def task(lines: list[str], old_size: int, key: PrivateKey = AGGREGATOR, origin: str = "ledger/one") -> CosignTask:
    note = checkpoint.sign(head_of(lines, origin), key)
    return CosignTask(federation=FEDERATION, checkpoint=note, old_size=old_size, entries=tuple(lines[old_size:]))


def asked(path: Path, question: CosignTask) -> Cosigned | WitnessState | Refusal:
    with NodeFolder.open(path) as node:
        return witness.cosign(node, question, AT)


def test_a_growing_log_is_cosigned(node_path: Path) -> None:
    """Each extension gets a cosignature that the node's public key verifies."""
    with NodeFolder.open(node_path) as node:
        public = node.key.public.hex
    for old_size, size in ((0, 3), (3, 3), (3, 8)):
        answer = asked(node_path, task(log(size), old_size))

        assert isinstance(answer, Cosigned)
        assert checkpoint.verify_cosignature(head_of(log(size)), answer.cosignature, "north", public) == AT


def test_a_witness_says_where_it_stands(node_path: Path) -> None:
    """A proof from another size than the witness's own gets that size back, also when the log shrank."""
    asked(node_path, task(log(5), 0))

    assert WitnessState(size=5) == asked(node_path, task(log(8), 2))
    assert WitnessState(size=5) == asked(node_path, task(log(3), 3))
    assert isinstance(asked(node_path, task(log(8), 5)), Cosigned)


def test_a_fork_is_never_cosigned(node_path: Path) -> None:
    """A rewritten history, another log, a smaller log and a foreign signature are refused; the memory stays."""
    asked(node_path, task(log(5), 0))
    before = (node_path / "witness.json").read_bytes()
    rewritten = log(8, fork=4)
    forks = (
        task(rewritten, 5),
        task(log(5, fork=2), 5),
        task(log(8), 5, origin="ledger/two"),
        task(log(3), 5),
        task(log(8), 5, key=PrivateKey.from_seed(b"b" * 32)),
    )

    for fork in forks:
        assert Refusal(code=RefusalCode.LEDGER_FORK) == asked(node_path, fork)
    assert before == (node_path / "witness.json").read_bytes()


def test_what_is_no_checkpoint_or_not_ours_is_refused(node_path: Path, tmp_path: Path) -> None:
    """A malformed note, another federation, and an aggregator whose key the hospital never entered are refused."""
    good = task(log(5), 0)
    stranger = make_node(tmp_path / "south", name="south")

    assert Refusal(code=RefusalCode.MALFORMED_TASK) == asked(node_path, good.model_copy(update={"checkpoint": "x"}))
    for path, question in ((node_path, good.model_copy(update={"federation": "other"})), (stranger, good)):
        assert Refusal(code=RefusalCode.UNKNOWN_FEDERATION) == asked(path, question)


def test_it_remembers_before_it_answers(node_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the disk refuses, there is no cosignature; when the signing fails, the checkpoint is remembered already."""

    def fail(*_: object) -> str:
        raise RuntimeError("killed here")

    monkeypatch.setattr(checkpoint, "cosign", fail)
    with pytest.raises(RuntimeError):
        asked(node_path, task(log(5), 0))
    monkeypatch.undo()

    assert WitnessState(size=5) == asked(node_path, task(log(8, fork=2), 0))
    assert Refusal(code=RefusalCode.LEDGER_FORK) == asked(node_path, task(log(8, fork=2), 5))


def test_a_damaged_memory_is_not_an_empty_one(node_path: Path) -> None:
    """A witness.json that cannot be read stops the witness instead of letting it start anew."""
    asked(node_path, task(log(5), 0))
    (node_path / "witness.json").write_text("{}")

    with pytest.raises(Tampered, match=r"witness\.json"):
        asked(node_path, task(log(5), 0))
