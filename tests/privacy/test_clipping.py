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


def test_a_layer_that_needs_no_gradient_is_not_noted() -> None:
    """Forward passes outside training leave no line in the book."""
    layer, book = nn.Linear(4, 2), Book()
    book.watch(layer)

    with torch.no_grad():
        layer(torch.zeros(2, 3, 4))

    assert book.take() == []
