"""The clipped sum itself, where gradients stop being numbers and where parameters have no gradient yet."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline.book_keeping import Book, add_clipped_gradients


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_patient_without_a_finite_gradient_adds_exactly_nothing(bad: float) -> None:
    """Of three patients the one whose loss is not finite is left out; the sum is that of the other two, clipped."""
    torch.manual_seed(0)
    inputs, scale = torch.randn(2, 3, 4), torch.tensor([1.0, bad, 1.0])
    sums = []
    for chosen in ([0, 1, 2], [0, 2]):
        layer, book = nn.Linear(4, 2), Book()
        nn.init.ones_(layer.weight)
        nn.init.zeros_(layer.bias)
        book.watch(layer)
        losses = layer(inputs[:, chosen]).sum(dim=(0, 2)) * scale[chosen]
        add_clipped_gradients(book.take(), losses.sum(), 0.5)
        sums.append(torch.cat([layer.weight.grad.flatten(), layer.bias.grad]))

    torch.testing.assert_close(sums[0], sums[1])
    assert bool(sums[0].isfinite().all())
    assert 0 < float(sums[0].norm()) <= 2 * 0.5 * (1 + 1e-5)


@pytest.mark.parametrize("nearly", [1e-2, 1e-3, 1e-4, 1e-5])
def test_terms_that_cancel_are_no_way_around_the_clip(nearly: float) -> None:
    """Two huge terms of a patient's gradient leave a remainder far above the clip that float32 cannot see in its norm.

    A hostile base model may bring that about. What the patient adds is within the clip all the same.
    """
    torch.manual_seed(0)
    layer, book = nn.Linear(32, 64), Book()
    book.watch(layer)
    once, arriving = 1e4 * torch.randn(1, 20, 32), 1e4 * torch.randn(1, 20, 64)
    inputs, weights = torch.cat([once, once * (1 + nearly * torch.randn(1, 20, 32))]), torch.cat([arriving, -arriving])

    for patient in range(20):
        alone = slice(patient, patient + 1)
        layer.zero_grad()
        losses = layer(inputs[:, alone]) * weights[:, alone]
        add_clipped_gradients(book.take(), losses.sum(), 0.5)

        assert float(torch.cat([layer.weight.grad.flatten(), layer.bias.grad]).norm()) <= 0.5 * (1 + 1e-3)


def test_a_layer_that_needs_no_gradient_is_not_noted() -> None:
    """Forward passes outside training leave no line in the book."""
    layer, book = nn.Linear(4, 2), Book()
    book.watch(layer)

    with torch.no_grad():
        layer(torch.zeros(2, 3, 4))

    assert book.take() == []
