"""What the log says of a hospital's own updates, held against its budget book."""

from pathlib import Path

from data_schemas.ledger import RejectedUpdate, RoundEntry
from data_schemas.messages import SignedUpdate, TrainTask
from hospital_node import local_round, own_rounds
from hospital_node.folder import NodeFolder
from tests.hospital_node.small_node import NOW, base_weights, fill, make_node, plan, train_task


def closed(task: TrainTask, *admitted: SignedUpdate, rejected: tuple[RejectedUpdate, ...] = ()) -> RoundEntry:
    return RoundEntry(
        run=task.run,
        round=task.round,
        plan_hash="0" * 64,
        base_model_hash=task.base_model_hash,
        new_model_hash="1" * 64,
        admitted=admitted,
        rejected=rejected,
    )


def test_an_update_is_known_in_whatever_order_rounds_were_asked_for(tmp_path: Path) -> None:
    """An aggregator that lost a checkpoint asks for round 1 after round 2; both stand, and only these."""
    weights = base_weights(plan())
    tasks = [train_task(plan(), weights, round=number) for number in (2, 1)]
    fill(make_node(tmp_path / "north"), patients=14)
    with NodeFolder.open(tmp_path / "north") as node:
        answers = [local_round.train(node, task, weights, NOW) for task in tasks]
        updates = [answer[0] for answer in answers if isinstance(answer, tuple)]
        second, first = (closed(task, update) for task, update in zip(tasks, updates, strict=True))

        assert own_rounds.fault(node, [first, second]) is None
        assert own_rounds.fault(node, [second]) is None
        assert own_rounds.fault(node, [closed(tasks[0])]) == (closed(tasks[0]), own_rounds.SKIPPED)
        why = RejectedUpdate(node="north", update_hash=None, code="expired")
        assert own_rounds.fault(node, [closed(tasks[0], rejected=(why,))]) is None
        stolen = updates[0].model_copy(
            update={"manifest": updates[0].manifest.model_copy(update={"update_hash": "2" * 64})}
        )
        assert own_rounds.fault(node, [closed(tasks[0], stolen)]) == (closed(tasks[0], stolen), own_rounds.FOREIGN)
