"""MLflow follows the members: the version that they voted champion gets the alias."""

from __future__ import annotations

import logging
from pathlib import Path

from aggregator.registry_store import DATABASE, RegistryFailed

_log = logging.getLogger("islet.aggregator")


def crown(root: Path, model_hash: str) -> bool:
    """Give the alias `champion` to a model in the store under root/mlruns; whether it has it now.

    No store, or one out of order, stops nothing: the ledger has decided, and the next sitting tries again.
    """
    if not (root / DATABASE).exists():
        return False
    from aggregator.registry import Registry

    try:
        return Registry(root).crown(model_hash) is not None
    except RegistryFailed as error:
        _log.warning("MLflow's alias does not follow the vote yet: %s", error.message)
        return False
