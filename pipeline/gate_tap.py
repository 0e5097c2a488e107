"""An LSTM layer made for per-patient gradients: one pass forward, one pass backward, no graph per cell.

A GateTap owns the weights and sees a whole sequence at once; a core without parameters runs the recurrence and has
its back-propagation through time written by hand. What the backward pass leaves at a tap is exactly dL/d(gate
pre-activation) at every step, and its inputs are (x_t, 1, h_{t-1}), so a patient's weight gradient is a sum of
outer products, as for a linear layer applied to a sequence.

Inside, time comes first and features last. What does not recur is worked out for a few steps at once, as many as stay
in the processor's cache, and a trace is written over on the way back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

# Numbers of gates, steps x windows x 4 hidden_size, whose derivatives are worked out at once: one megabyte.
_BLOCK_NUMBERS = 1 << 18
# On a GPU few large kernels beat many that stay in a cache: up to about two gigabytes of its memory.
_GPU_TIMES = 64


def at_once(numbers: int, where: Tensor) -> int:
    """How many numbers to work out at once on the device of `where`, for so many on a CPU."""
    return numbers if where.device.type == "cpu" else _GPU_TIMES * numbers


class GateTap(nn.Module):
    """Owner of one LSTM layer's weights; gates in the order i, f, g, o, as in torch.

    It is linear in its weights given (x, h_prev), so the gradient of one patient is the sum over its windows and
    time steps of an outer product of what reaches the output with (x, 1, h_prev).
    """

    def __init__(self, features: int, hidden_size: int) -> None:
        super().__init__()
        self.features, self.hidden_size = features, hidden_size
        self.weight_ih = nn.Parameter(torch.zeros(4 * hidden_size, features))
        self.weight_hh = nn.Parameter(torch.zeros(4 * hidden_size, hidden_size))
        self.bias = nn.Parameter(torch.zeros(4 * hidden_size))

    def forward(self, x: Tensor, h_prev: Tensor) -> Tensor:
        """X [..., T, F] and h_prev [..., T, H] to gate pre-activations [..., T, 4H]."""
        return functional.linear(x, self.weight_ih, self.bias) + functional.linear(h_prev, self.weight_hh)

    def joined(self) -> Tensor:
        """Weights in the order of a trace's inputs, [F+1+H, 4H], apart from autograd."""
        return torch.cat([self.weight_ih, self.bias.unsqueeze(1), self.weight_hh], dim=1).detach().t().contiguous()

    def split(self, joined: Tensor) -> dict[nn.Parameter, Tensor]:
        """Split a gradient [F+1+H, 4H], rows in the order of a trace's inputs, into those of the three parameters."""
        weight_ih, bias, weight_hh = torch.split(joined, [self.features, 1, self.hidden_size])
        return {self.weight_ih: weight_ih.t(), self.weight_hh: weight_hh.t(), self.bias: bias[0]}


@dataclass(frozen=True, slots=True)
class Trace:
    """What the recurrence of one layer leaves for its backward pass.

    inputs [T+1,N,F+1+H]: x_t, 1 and h_{t-1} of every step; the last row holds the last hidden state alone.
    gates [T,N,4H] after activation. cells [T+1,N,H]. squashed [T,N,H]: tanh of the cells.
    """

    inputs: Tensor
    gates: Tensor
    cells: Tensor
    squashed: Tensor

    @property
    def hidden(self) -> Tensor:
        """h_t of every step, [T,N,H]: a view."""
        return self.inputs[1:, :, -self.cells.shape[2] :]


@torch.no_grad()
def run_layer(x: Tensor, tap: GateTap) -> Trace:
    """Run one layer over x [T,N,F] from a zero state."""
    steps, count, features = x.shape
    size = tap.hidden_size
    weights = tap.joined()
    # tanh(a) = 2 sigmoid(2a) - 1: one pass over all four gates
    weights[:, 2 * size : 3 * size].mul_(2.0)
    inputs = x.new_empty(steps + 1, count, features + 1 + size)
    inputs[:steps, :, :features] = x
    inputs[:, :, features] = 1.0
    inputs[0, :, features + 1 :] = 0.0
    gates, cells = x.new_empty(steps, count, 4 * size), x.new_empty(steps + 1, count, size)
    cells[0] = 0.0
    trace = Trace(inputs, gates, cells, x.new_empty(steps, count, size))
    seen, now, cell, hidden, squashed = (part.unbind() for part in (inputs, gates, cells, trace.hidden, trace.squashed))
    enter, forget, update, leave = (part.unbind() for part in gates.chunk(4, dim=2))
    minus_one = x.new_tensor(-1.0)
    for t in range(steps):
        torch.mm(seen[t], weights, out=now[t]).sigmoid_()
        torch.add(minus_one, update[t], alpha=2.0, out=update[t])
        torch.mul(forget[t], cell[t], out=cell[t + 1]).addcmul_(enter[t], update[t])
        torch.tanh(cell[t + 1], out=squashed[t])
        torch.mul(squashed[t], leave[t], out=hidden[t])
    return trace


def run_stack(x: Tensor, taps: Sequence[GateTap]) -> tuple[Trace, ...]:
    """Run layers on top of each other over x [T,N,F]."""
    traces: list[Trace] = []
    for tap in taps:
        traces.append(run_layer(traces[-1].hidden if traces else x, tap))
    return tuple(traces)


def _back_through_time(trace: Trace, weight_hh: Tensor, d_last: Tensor | None, d_every: Tensor | None) -> Tensor:
    """Complete back-propagation through time of one layer: dL/d(gate pre-activation) [T,N,4H], written over the gates.

    d_last: gradient of the last hidden state [N,H]; d_every: gradients of all of them [T,N,H]; None is zero.
    """
    steps, count, size = trace.squashed.shape
    d_cell = torch.zeros_like(trace.cells[0])
    d_hidden = d_cell.clone() if d_last is None else d_last.clone()
    length = max(1, at_once(_BLOCK_NUMBERS, d_cell) // (4 * size * max(count, 1)))
    for begin in range((steps - 1) // length * length, -1, -length):
        block = slice(begin, min(begin + length, steps))
        to_cell, forget = _derivatives(trace, block)
        inner = trace.gates[block].view(-1, count, 4, size)[:, :, :3].unbind()
        leave, gates = trace.gates[block, :, 3 * size :].unbind(), trace.gates[block].unbind()
        for t in range(len(gates) - 1, -1, -1):
            if d_every is not None:
                d_hidden.add_(d_every[begin + t])
            d_cell.addcmul_(d_hidden, to_cell[t])
            inner[t].mul_(d_cell.unsqueeze(1))
            leave[t].mul_(d_hidden)
            if begin + t:
                torch.mm(gates[t], weight_hh, out=d_hidden)
                d_cell.mul_(forget[t])
    return trace.gates


def _derivatives(trace: Trace, block: slice) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Put derivatives in place of the gates: of the cell by i, f and g, of the hidden state by o, before activation.

    Returns, for each step of the block, the derivative [N,H] of the hidden state by the cell, and the forget gate.
    """
    through_tanh, through_sigmoid = torch.ops.aten.tanh_backward, torch.ops.aten.sigmoid_backward
    enter, forget, update, leave = trace.gates[block].chunk(4, dim=2)
    squashed, kept = trace.squashed[block], forget.clone()
    to_cell = through_tanh(leave, squashed)
    by_enter = through_sigmoid(update, enter)
    through_tanh(enter, update, grad_input=update)
    enter.copy_(by_enter)
    through_sigmoid(trace.cells[block], forget, grad_input=forget)
    through_sigmoid(squashed, leave, grad_input=leave)
    return to_cell.unbind(), kept.unbind()


class _LastHidden(torch.autograd.Function):
    """The last hidden state as a function of the gate pre-activations of every layer."""

    @staticmethod
    def forward(
        ctx: Any, traces: tuple[Trace, ...], weights: tuple[tuple[Tensor, Tensor], ...], *_pre_activations: Tensor
    ) -> Tensor:
        """Pre-activations [T,N,4H] of each layer only carry the graph; their values are those of the traces."""
        ctx.traces, ctx.weights = traces, weights
        return traces[-1].hidden[-1].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of the last hidden state [N,H] to gradients of the pre-activations; works once."""
        if ctx.traces is None:
            raise RuntimeError("the trace was consumed: run the forward pass again before another backward pass")
        out: list[Tensor] = []
        last: Tensor | None = grads[0]
        every: Tensor | None = None
        for trace, (weight_ih, weight_hh) in zip(reversed(ctx.traces), reversed(ctx.weights), strict=True):
            out.insert(0, _back_through_time(trace, weight_hh, last, every))
            if len(out) < len(ctx.traces):
                last, every = None, out[0] @ weight_ih
        ctx.traces = None
        return (None, None, *out)


def _weights(taps: Sequence[GateTap]) -> tuple[tuple[Tensor, Tensor], ...]:
    return tuple((tap.weight_ih.detach(), tap.weight_hh.detach()) for tap in taps)


def last_hidden(x: Tensor, taps: Sequence[GateTap]) -> Tensor:
    """X [..., T, F] to the last hidden state of the top layer [..., H], each tap called once on its whole sequence.

    The way for hooks on the taps, as Opacus sets them, and for ordinary autograd: gradients reach the weights.
    """
    flat = x.reshape(-1, *x.shape[-2:])
    traces = run_stack(flat.transpose(0, 1), taps)
    lead, steps = x.shape[:-2], x.shape[-2]
    carriers: list[Tensor] = []
    for trace, tap in zip(traces, taps, strict=True):
        seen = trace.inputs[:steps].transpose(0, 1).reshape(*lead, steps, -1)
        pre_activations = tap(seen[..., : tap.features], seen[..., tap.features + 1 :])
        carriers.append(pre_activations.reshape(*flat.shape[:2], -1).transpose(0, 1))
    hidden: Tensor = _LastHidden.apply(traces, _weights(taps), *carriers)  # type: ignore[no-untyped-call]
    return hidden.reshape(*lead, -1)


def last_hidden_recorded(x: Tensor, taps: Sequence[GateTap]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """X [..., T, F] to the last hidden state [..., H] and, for each tap, its inputs and its output.

    The way for book-keeping: outputs are leaves, [T, ..., 4H], whose gradients are all that a backward pass has to
    find; inputs are [T, ..., F+1+H]. Nothing is multiplied twice and no gradient of a weight is formed.
    """
    lead, steps = x.shape[:-2], x.shape[-2]
    traces = run_stack(x.reshape(-1, *x.shape[-2:]).transpose(0, 1), taps)
    carriers = [trace.gates.detach().requires_grad_() for trace in traces]
    hidden: Tensor = _LastHidden.apply(traces, _weights(taps), *carriers)  # type: ignore[no-untyped-call]
    pairs = [
        (trace.inputs[:steps].reshape(steps, *lead, -1), gates) for trace, gates in zip(traces, carriers, strict=True)
    ]
    return hidden.reshape(*lead, -1), pairs
