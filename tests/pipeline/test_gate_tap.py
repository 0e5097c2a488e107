"""The LSTM layer and its book-keeping: exact gradients of every patient, and the very sum that Opacus would clip."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import pytest
import torch
from opacus import GradSampleModule
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

import pipeline.private_training  # noqa: F401  (registers the samplers)
from pipeline import book_keeping
from pipeline.book_keeping import Book, add_clipped_gradients, parts_of
from pipeline.gate_tap import GateTap, last_hidden, last_hidden_recorded, run_stack


class Shape(NamedTuple):
    """Sizes of a case; one is patients = 1, many are odd."""

    patients: int
    windows: int
    steps: int
    features: int
    hidden: int
    outputs: int


SHAPES = [
    Shape(4, 3, 9, 7, 6, 12),
    Shape(1, 5, 7, 3, 5, 2),
    Shape(3, 1, 1, 1, 1, 1),
    Shape(5, 1, 31, 2, 3, 1),
    Shape(2, 17, 2, 4, 33, 3),
]


class Model(nn.Module):
    """Layers, a linear head, and the three ways to run them. Patients come first, or second where `book` is used."""

    def __init__(self, shape: Shape, layers: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(1)
        below = [shape.features] + [shape.hidden] * (layers - 1)
        self.taps = nn.ModuleList(GateTap(features, shape.hidden) for features in below)
        self.head = nn.Linear(shape.hidden, shape.outputs)
        self.double()
        with torch.no_grad():
            for p in self.parameters():
                p.uniform_(-0.8, 0.8, generator=draw)
        self.book: Book | None = None

    def forward(self, x: Tensor) -> Tensor:
        """X [..., T, F] to outputs [..., O]."""
        taps = list(self.taps)
        if self.book is None:
            return self.head(last_hidden(x, taps))
        hidden, pairs = last_hidden_recorded(x, taps)
        for tap, pair in zip(taps, pairs, strict=True):
            self.book.note_tap(tap, *pair)
        return self.head(hidden)

    def looped(self, x: Tensor) -> Tensor:
        """Run the textbook LSTM over x [N,T,F] one step at a time, for autograd to differentiate."""
        sequence = list(x.unbind(1))
        for tap in self.taps:
            hidden = cell = x.new_zeros(len(x), tap.hidden_size)
            for t, seen in enumerate(sequence):
                gates = seen @ tap.weight_ih.T + hidden @ tap.weight_hh.T + tap.bias
                i, f, g, o = gates.split(tap.hidden_size, dim=1)
                cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
                hidden = o.sigmoid() * cell.tanh()
                sequence[t] = hidden
        return self.head(sequence[-1])


def data(shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs [P,k,T,F], targets and mask [P,k,O]; one window of everybody has no target at all."""
    draw = torch.Generator().manual_seed(2)
    lead = (shape.patients, shape.windows)
    x = torch.randn(*lead, shape.steps, shape.features, generator=draw, dtype=torch.float64)
    y = torch.randn(*lead, shape.outputs, generator=draw, dtype=torch.float64)
    mask = torch.rand(*lead, shape.outputs, generator=draw) < 0.7
    mask[:, -1] = shape.windows == 1
    return x, y, mask


def loss(out: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    """Masked squared error of each window [...]."""
    return ((out - y).square() * mask).sum(-1)


def looped_gradients(shape: Shape, layers: int) -> list[dict[str, Tensor]]:
    """Gradient of each patient, alone, by autograd through the loop."""
    model, (x, y, mask) = Model(shape, layers), data(shape)
    out = []
    for patient in range(shape.patients):
        model.zero_grad()
        loss(model.looped(x[patient]), y[patient], mask[patient]).mean().backward()
        out.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    return out


def book_kept(shape: Shape, layers: int, clip: float, chosen: slice = slice(None)) -> dict[str, Tensor]:
    """Clipped sum over the chosen patients."""
    model = Model(shape, layers)
    model.book = Book()
    model.book.watch(model.head)
    x, y, mask = (part[chosen].transpose(0, 1) for part in data(shape))
    add_clipped_gradients_of(model, x, y, mask, clip)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def add_clipped_gradients_of(model: Model, x: Tensor, y: Tensor, mask: Tensor, clip: float) -> None:
    assert model.book is not None
    total = loss(model(x), y, mask).mean(dim=0).sum()
    add_clipped_gradients(model.book.take(), total, clip)


def hooked(shape: Shape, layers: int, kind: type[nn.Module] = GradSampleModule) -> Model:
    """Run the model under Opacus's own hooks, one backward pass done."""
    model, (x, y, mask) = Model(shape, layers), data(shape)
    options = {"use_ghost_clipping": True, "max_grad_norm": 1.0} if kind is not GradSampleModule else {}
    kind(model, batch_first=True, loss_reduction="sum", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss(model(x), y, mask).mean(dim=1).sum().backward()
    return model


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ghost", [False, True])
def test_per_patient_gradients_equal_looped_autograd(
    shape: Shape, layers: int, ghost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opacus's hooks, book-keeping of one patient, by either way, and the loop agree to 1e-10 in float64."""
    monkeypatch.setattr(book_keeping, "_PASS_COST", 1e9 if ghost else 0.0)
    reference = looped_gradients(shape, layers)
    model = hooked(shape, layers)
    for patient, gradients in enumerate(reference):
        alone = book_kept(shape, layers, 1e12, slice(patient, patient + 1))
        assert gradients.keys() == alone.keys()
        for name, p in model.named_parameters():
            assert (p.grad_sample[patient] - gradients[name]).abs().max() < 1e-10
            assert (alone[name] - gradients[name]).abs().max() < 1e-10


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ghost", [False, True])
def test_clipped_sum_equals_opacus(shape: Shape, layers: int, ghost: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a threshold that clips some patients and not others, the sum is that of Opacus's own optimizer."""
    monkeypatch.setattr(book_keeping, "_PASS_COST", 1e9 if ghost else 0.0)
    model = hooked(shape, layers)
    norms = torch.stack([p.grad_sample.flatten(1).norm(dim=1) for p in model.parameters()]).norm(dim=0)
    clip = float(norms.median()) * 0.999
    private = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0), noise_multiplier=0.0, max_grad_norm=clip, expected_batch_size=1
    )
    private.clip_and_accumulate()
    got = book_kept(shape, layers, clip)
    for name, p in model.named_parameters():
        assert (got[name] - p.summed_grad).abs().max() < 1e-10


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_norm_sampler_equals_the_gradients_norms(shape: Shape, layers: int) -> None:
    """Opacus's ghost clipping on this layer finds the norms of the gradients it would have formed."""
    model = hooked(shape, layers, GradSampleModuleFastGradientClipping)
    for name, p in model.named_parameters():
        want = torch.stack([gradients[name].norm() for gradients in looped_gradients(shape, layers)])
        assert (p._norm_sample - want).abs().max() < 1e-10


def test_parts_give_the_same_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patients may go through in parts, and products may be formed a few at a time."""
    shape = SHAPES[0]
    whole = book_kept(shape, 2, 0.5)
    monkeypatch.setattr(book_keeping, "_PART_NUMBERS", 2 * shape.windows * shape.steps * 4 * shape.hidden)
    monkeypatch.setattr(book_keeping, "_PRODUCT_NUMBERS", 1)
    model = Model(shape, 2)
    model.book = Book()
    model.book.watch(model.head)
    x, y, mask = (part.transpose(0, 1) for part in data(shape))
    parts = list(parts_of(x, shape.hidden))
    assert parts == [slice(0, 2), slice(2, 4)]
    for part in parts:
        add_clipped_gradients_of(model, x[:, part], y[:, part], mask[:, part], 0.5)
    for name, p in model.named_parameters():
        assert (p.grad - whole[name]).abs().max() < 1e-12


def test_nobody_has_no_parts() -> None:
    """An empty Poisson sample asks for no pass at all."""
    assert list(parts_of(torch.zeros(3, 0, 9, 7), 6)) == []


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_left_out(poison: float) -> None:
    """One patient whose gradient is NaN or infinite adds exactly nothing; the others are as without that patient."""
    shape = SHAPES[0]
    model = Model(shape, 1)
    model.book = Book()
    model.book.watch(model.head)
    x, y, mask = (part.transpose(0, 1) for part in data(shape))
    y = y.clone()
    y[:, 0] = poison
    add_clipped_gradients_of(model, x, y, torch.ones_like(mask), 0.5)
    kept = Model(shape, 1)
    kept.book = Book()
    kept.book.watch(kept.head)
    add_clipped_gradients_of(kept, x[:, 1:], y[:, 1:], torch.ones_like(mask[:, 1:]), 0.5)
    for got, want in zip(model.parameters(), kept.parameters(), strict=True):
        assert torch.isfinite(got.grad).all()
        assert (got.grad - want.grad).abs().max() < 1e-12


@pytest.mark.parametrize("layers", [1, 2])
def test_values_equal_torch_lstm(layers: int) -> None:
    """The recurrence gives the hidden states of torch's own LSTM with the same weights, at every step."""
    shape = SHAPES[0]
    model, (x, _, _) = Model(shape, layers), data(shape)
    own = nn.LSTM(shape.features, shape.hidden, layers, batch_first=True).double()
    with torch.no_grad():
        weights = [
            w for tap in model.taps for w in (tap.weight_ih, tap.weight_hh, tap.bias, torch.zeros_like(tap.bias))
        ]
        for target, source in zip(own.parameters(), weights, strict=True):
            target.copy_(source)
        want, _ = own(x.flatten(0, 1))
        got = run_stack(x.flatten(0, 1).transpose(0, 1), list(model.taps))[-1].hidden.transpose(0, 1)
    assert (got - want).abs().max() < 1e-12


def test_a_second_backward_pass_is_refused() -> None:
    """The backward pass writes over the trace, so using it again raises instead of giving wrong gradients."""
    shape = SHAPES[0]
    hidden = last_hidden(data(shape)[0], list(Model(shape, 1).taps))
    hidden.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="consumed"):
        hidden.sum().backward()
