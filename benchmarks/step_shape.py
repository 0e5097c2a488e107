"""What a training step is compared on; it imports nothing heavy, so that a peer in another environment can read it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.measuring import peak_megabytes, restart_peak

STEPS, FEATURES, OUTPUTS = 48, 4, 12
CLIP, NOISE = 1.0, 1.0


@dataclass(frozen=True)
class Shape:
    """Sizes of one comparison: windows in a batch, hidden size, layers, windows of each patient."""

    windows: int
    hidden: int
    layers: int
    k: int

    @property
    def patients(self) -> int:
        """Number of examples that are clipped."""
        return self.windows // self.k

    @property
    def cells(self) -> list[str]:
        """The four sizes as text."""
        return [*map(str, (self.windows, self.hidden, self.layers, self.k))]

    @classmethod
    def of(cls, cells: Sequence[str]) -> Shape:
        """Shape of `cells`."""
        return cls(*map(int, cells))


def extra_megabytes(
    make: Callable[[Shape], Callable[[], object]],
    shape: Shape,
    restart: Callable[[], float] = restart_peak,
    peak: Callable[[], float] = peak_megabytes,
) -> float:
    """Growth of this process's resident memory at its highest over a few steps; the model counts, libraries do not.

    restart and peak: what measures another memory in place of that, in MB.
    """
    make(Shape(16, shape.hidden, shape.layers, 1))()  # thread pools and lazy imports are not the step's
    before = restart()
    step = make(shape)
    for _ in range(2):
        step()
    return peak() - before
