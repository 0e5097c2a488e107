"""Clipped sums of per-patient gradients from one backward pass (book-keeping: Bu et al. 2022, arXiv:2210.00038).

Each layer notes its inputs and its output; one backward pass finds the gradients of the outputs and of nothing else;
norms and the clipped sum are matrix products of the two. Patients are in the last dimension before the features:
inputs [..., P, D], outputs [..., P, G]; everything before belongs to one patient and is summed inside its gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.gate_tap import GateTap, at_once

# Added to a norm before dividing, as Opacus does.
_NORM_EPSILON = 1e-6
# A product [patients, D, G] is formed for so many numbers at a time: 4 MB, so that it stays in the cache.
_PRODUCT_NUMBERS = 1 << 20
# Windows go through the LSTM in parts whose gates, steps x windows x 4 hidden_size numbers, fill 12 MB: that takes less
# memory, and what one step writes is still in the cache when the next reads it.
_PART_NUMBERS = 3 << 20
# Passing over one number in memory costs about as much as so many multiplications in a matrix product.
_PASS_COST = 8


@dataclass(frozen=True, slots=True)
class Entry:
    """One layer's line in the book: inputs [S,P,D] with a column of ones where the bias is, output [..., P, G]."""

    layer: GateTap | nn.Linear
    inputs: Tensor
    output: Tensor


class Book:
    """What the trainable layers of a model saw and put out since `take` was last called."""

    def __init__(self) -> None:
        self._entries: list[Entry] = []

    def note_tap(self, tap: GateTap | nn.Linear, inputs: Tensor, output: Tensor) -> None:
        """Inputs [T, ..., P, F+1+H] and the leaf output [T, N, 4H] of an LSTM layer, or of what adapts one."""
        self._entries.append(Entry(tap, inputs.reshape(-1, *inputs.shape[-2:]), output))

    def watch(self, layer: nn.Linear) -> None:
        """Note a linear layer with a bias each time it runs."""
        layer.register_forward_hook(self._note_linear)

    def _note_linear(self, layer: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        if isinstance(layer, nn.Linear) and output.requires_grad:
            seen = arguments[0].detach().reshape(-1, *output.shape[-2:-1], layer.in_features)
            self._entries.append(Entry(layer, torch.cat([seen, torch.ones_like(seen[..., :1])], dim=-1), output))

    def take(self) -> list[Entry]:
        """Hand over the entries and start a new page."""
        entries, self._entries = self._entries, []
        return entries


def parts_of(x: Tensor, hidden_size: int) -> Iterator[slice]:
    """Cut the patients of x [k,P,T,F] into ranges small enough for one pass; patients are independent of each other."""
    windows, patients, steps, _ = x.shape
    size = max(1, at_once(_PART_NUMBERS, x) // (windows * steps * 4 * hidden_size))
    for at in range(0, patients, size):
        yield slice(at, at + size)


def add_clipped_gradients(entries: list[Entry], total_loss: Tensor, max_grad_norm: float) -> None:
    """Add to each parameter's `grad` the sum over patients of their gradients, clipped over all parameters together.

    total_loss: the sum over patients of their losses. A patient's factor is min(1, max_grad_norm / (norm + 1e-6)), as
    in Opacus. A patient whose gradient is not finite (a hostile or broken model) contributes nothing, so the
    sensitivity bound holds.
    """
    outputs = torch.autograd.grad(total_loss, [entry.output for entry in entries])
    arriving = [grad.reshape(*entry.inputs.shape[:2], -1) for entry, grad in zip(entries, outputs, strict=True)]
    pairs = [(entry.inputs, grad) for entry, grad in zip(entries, arriving, strict=True)]
    patients = pairs[0][0].shape[1]
    # whole products are kept between norm and sum where they are small: then each is formed once
    numbers = at_once(_PRODUCT_NUMBERS, total_loss)
    step = max(1, min(patients, numbers // max(i.shape[2] * g.shape[2] for i, g in pairs)))
    for at in range(0, patients, step):
        part = [(i[:, at : at + step], g[:, at : at + step]) for i, g in pairs]
        _add_part(entries, part, max_grad_norm)


def _add_part(entries: list[Entry], pairs: list[tuple[Tensor, Tensor]], max_grad_norm: float) -> None:
    products = [_product(*pair) if _direct(*pair) else None for pair in pairs]
    squares = [_square_norms(*pair, product) for pair, product in zip(pairs, products, strict=True)]
    norms = torch.stack(squares).sum(dim=0).clamp(min=0).sqrt()
    factors = (max_grad_norm / (norms + _NORM_EPSILON)).clamp(max=1.0)
    if not bool(norms.isfinite().all()):
        pairs, products, factors = _finite_only(pairs, products, factors, norms.isfinite())
    for entry, pair, product in zip(entries, pairs, products, strict=True):
        for parameter, summed in _named(entry.layer, _weighted_sum(*pair, product, factors)):
            parameter.grad = summed.clone() if parameter.grad is None else parameter.grad.add_(summed)


def _finite_only(
    pairs: list[tuple[Tensor, Tensor]], products: list[Tensor | None], factors: Tensor, finite: Tensor
) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor | None], Tensor]:
    """Drop patients whose gradient is not finite: zero times infinity would not be zero."""
    kept = [(i[:, finite], g[:, finite]) for i, g in pairs]
    return kept, [None if p is None else p[finite] for p in products], factors[finite]


def _direct(inputs: Tensor, arriving: Tensor) -> bool:
    """Whether forming each patient's gradient [D,G] is cheaper than its norm from Gram matrices (Li et al. 2021)."""
    steps, _, width = inputs.shape
    gates = arriving.shape[2]
    return steps * steps * (width + gates) > _PASS_COST * width * gates


def _product(inputs: Tensor, arriving: Tensor) -> Tensor:
    """Gradient of every patient, [P,D,G]."""
    return torch.bmm(inputs.permute(1, 2, 0), arriving.transpose(0, 1))


def _square_norms(inputs: Tensor, arriving: Tensor, product: Tensor | None) -> Tensor:
    if product is not None:
        norms: Tensor = torch.linalg.vector_norm(product.flatten(1), dim=1)
        return norms.square()
    rows, grads = inputs.transpose(0, 1), arriving.transpose(0, 1)
    squares = (torch.bmm(rows, rows.transpose(1, 2)) * torch.bmm(grads, grads.transpose(1, 2))).sum(dim=(1, 2))
    # Where large terms cancel, rounding may hide what is left of them. A hostile model can arrange that, so the largest
    # error that rounding can make is added: the norm is never too small, nor are the scaled terms too large to add up.
    largest = (rows.norm(dim=2) * grads.norm(dim=2)).sum(dim=1)
    rounding = (rows.shape[2] + grads.shape[2]) * torch.finfo(rows.dtype).eps / 2
    bounds: Tensor = squares.clamp(min=0) + rounding * largest.square()
    return bounds


def square_norms(inputs: Tensor, arriving: Tensor) -> Tensor:
    """Squared norm of each patient's gradient, [P], by the cheaper way. inputs [S,P,D], arriving [S,P,G]."""
    return _square_norms(inputs, arriving, _product(inputs, arriving) if _direct(inputs, arriving) else None)


def _weighted_sum(inputs: Tensor, arriving: Tensor, product: Tensor | None, factors: Tensor) -> Tensor:
    """Sum of the patients' gradients times their factors, [D,G]."""
    if product is not None:
        return (factors @ product.flatten(1)).view(product.shape[1:])
    scaled = inputs * factors.unsqueeze(1)
    return scaled.flatten(0, 1).t() @ arriving.flatten(0, 1)


def _named(layer: GateTap | nn.Linear, joined: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    if isinstance(layer, GateTap):
        yield from layer.split(joined).items()
    else:
        yield layer.weight, joined[:-1].t()
        yield layer.bias, joined[-1]
