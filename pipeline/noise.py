"""Where a private round takes its randomness from: the system's cryptographic generator, or a seed for tests."""

from __future__ import annotations

import math
import os
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


class NoiseSource(Protocol):
    """Where a private round takes its randomness from: noise, the Poisson sample, and the windows of each patient."""

    def normal(self, count: int) -> Tensor:
        """Draw standard Gaussians, float64[count]."""
        ...

    def uniform(self, count: int) -> Tensor:
        """Draws from [0, 1), float64[count]."""
        ...


class SeededNoise:
    """Repeatable randomness for tests and demos: whoever knows the seed can remove the noise, so it protects nobody."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, count: int) -> Tensor:
        """Draw standard Gaussians, float64[count]."""
        return torch.randn(count, dtype=torch.float64, generator=self._generator)

    def uniform(self, count: int) -> Tensor:
        """Draws from [0, 1), float64[count]."""
        return torch.rand(count, dtype=torch.float64, generator=self._generator)


class SecureNoise:
    """Randomness of the operating system's cryptographic generator; nothing repeats and no seed exists.

    A Gaussian is half the sum of four, as in Opacus's secure mode, which hides the gaps of floating point
    numbers (Holohan and Braghin 2021).
    """

    def normal(self, count: int) -> Tensor:
        """Draw standard Gaussians, float64[count], by Box and Muller from 53-bit uniforms."""
        pairs = 2 * count
        draws = self._unit(2 * pairs)
        radius = np.sqrt(-2.0 * np.log(1.0 - draws[:pairs]))
        angle = 2.0 * math.pi * draws[pairs:]
        gaussians = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)]).reshape(4, count)
        return torch.from_numpy(gaussians.sum(axis=0) / 2.0)

    def uniform(self, count: int) -> Tensor:
        """Draws from [0, 1), float64[count]."""
        return torch.from_numpy(self._unit(count))

    @staticmethod
    def _unit(count: int) -> npt.NDArray[np.float64]:
        words = np.frombuffer(os.urandom(8 * count), dtype=np.uint64)
        return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
