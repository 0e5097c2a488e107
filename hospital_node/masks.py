"""What a node remembers of rounds under secure aggregation: one secret for each, and what it has agreed to.

    masks/<task>.json     seed of an attempt's keys and masks, and the hashes of what this node was shown; mode 0600

Everything secret of an attempt is derived from its seed, so a message that comes again is answered as before. The seed
of a new attempt replaces the old one; once the node has agreed to a list of survivors there is no other attempt: two
sums of the same updates would give away whoever is in one of them only. So the file stays when its seed is forgotten.
"""

from __future__ import annotations

import secrets
from pathlib import Path

from pydantic import ValidationError

from data_schemas.canonical import canonical_bytes
from data_schemas.errors import StorageFailed, Tampered
from data_schemas.frozen import Frozen
from data_schemas.messages import RefusalCode, TrainTask
from data_schemas.secure import Session
from hospital_node.ceilings import Declined, require
from hospital_node.folder import NodeFolder
from pipeline.charter import Charter
from pipeline.signing import write_durably

# A round's sum may be asked for again while the aggregator may have lost it: its newest checkpoints.
_KEEP_ROUNDS = 3


class MaskState(Frozen):
    """One attempt at one round. roster, peers, confirmed: hashes of the first such list that this node answered to.

    seed: 64 hex digits; empty once it is forgotten.
    """

    session: Session
    run: str
    round: int
    seed: str
    roster: str | None = None
    peers: str | None = None
    confirmed: str | None = None


def begin(node: NodeFolder, task: TrainTask, attempt: str) -> MaskState:
    """Return the state of this attempt, new where there was none. Declined once another one was agreed to."""
    session = Session(task_id=task.task_id, attempt=attempt)
    known = _read(_file(node, session))
    if known is not None and known.session == session:
        return known
    require(known is None or (known.confirmed is None and bool(known.seed)), RefusalCode.SUM_CONFIRMED)
    state = MaskState(session=session, run=task.run, round=task.round, seed=secrets.token_hex(32))
    _write(node, state)
    return state


def held(node: NodeFolder, session: Session) -> MaskState:
    """Return the state of an attempt that this node has begun; Declined for any other."""
    state = _read(_file(node, session))
    if state is None or state.session != session or not state.seed:
        raise Declined(RefusalCode.SESSION_MISMATCH)
    return state


def settle(node: NodeFolder, state: MaskState, what: str, value: str) -> MaskState:
    """Remember the hash of a list that is shown for the first time; Declined for another than the first."""
    known = getattr(state, what)
    require(known in (None, value), RefusalCode.SESSION_MISMATCH)
    if known is None:
        state = state.model_copy(update={what: value})
        _write(node, state)
    return state


def forget(node: NodeFolder, charter: Charter) -> None:
    """Forget the secrets of rounds that need not be asked about again."""
    done = {model.run for model in charter.models.values()}
    newest: dict[str, int] = {}
    for run, number in charter.rounds:
        newest[run] = max(number, newest.get(run, 0))
    for path in _folder(node).glob("*.json"):
        state = _read(path)
        if state is None or not state.seed:
            continue
        if state.run in done or newest.get(state.run, 0) >= state.round + _KEEP_ROUNDS:
            _write(node, state.model_copy(update={"seed": ""}))


def _folder(node: NodeFolder) -> Path:
    return node.path / "masks"


def _file(node: NodeFolder, session: Session) -> Path:
    return _folder(node) / f"{session.task_id[:32]}.json"


def _read(path: Path) -> MaskState | None:
    try:
        return MaskState.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise Tampered(path.name, 0, "not the state of a round", "The round cannot be taken part in.") from error


def _write(node: NodeFolder, state: MaskState) -> None:
    try:
        _folder(node).mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise StorageFailed(f"masks: {error.strerror}", "Check the disk and the folder's mode.") from error
    write_durably(_file(node, state.session), canonical_bytes(state) + b"\n", mode=0o600)
