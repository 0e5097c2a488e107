"""A round stays on the device that its model is moved to. Without a GPU torch's `meta` device stands in.

It has shapes and no values. Every operation is watched: none may mix it with a tensor that was left behind on the CPU.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline import fitting
from pipeline.forecaster import Forecaster, ForecasterSpec
from pipeline.noise import SecureNoise
from pipeline.private_training import LocalPlan, _PrivateRound

SPEC = ForecasterSpec(hidden_size=4)
PLAN = LocalPlan(
    steps=1,
    learning_rate=0.1,
    sample_rate=0.5,
    noise_multiplier=1.0,
    max_grad_norm=0.1,
    windows_per_patient=2,
    horizon_curves=2,
)


class OneDevice(TorchDispatchMode):
    """Fails where an operation other than a move gets tensors of two devices; single numbers may come from the CPU."""

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at the arguments, then run the operation."""
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor) and leaf.dim()]
        if "copy" not in func.__name__ and len({t.device for t in tensors}) > 1:
            raise AssertionError(f"{func.__name__} mixes devices")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("trainable", ["all", "head"])
def test_a_step_runs_wholly_on_the_models_device(
    trainable: Literal["all", "head"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward, backward, clip, noise, smoothing and step of a model on another device leave nothing on the CPU."""
    model = Forecaster(SPEC).to("meta")
    one = _PrivateRound(model, replace(PLAN, trainable=trainable), 10, SecureNoise())
    monkeypatch.setattr(one, "optimizers", lambda: one.private)
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda _self: True)  # the one question asked of a value
    k, patients = PLAN.windows_per_patient, 3
    batch = [torch.empty(k, patients, *rest, device="meta") for rest in ((24, SPEC.features), (12,), (12,), ())]

    with OneDevice():
        one.training_step((batch[0], batch[1], batch[2], batch[3]), 0)

    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.device.type for p in trained} == {p.grad.device.type for p in trained if p.grad is not None} == {"meta"}


def test_a_gpu_is_taken_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one place that decides says the first GPU, and else the CPU."""
    for there, name in ((True, "cuda:0"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)

        assert str(fitting.training_device()) == name
