"""Made-up people for the privacy tests."""

from __future__ import annotations

import numpy as np

from pipeline.windows import Series, Windows, WindowSpec, cut_windows


def cohort(patients: int, hours: int = 6) -> Windows:
    """Cut windows of waves with a phase of each person's own, one reading every 5 minutes."""
    draw = np.random.default_rng(0)
    times = np.arange(0, hours * 3600, 300, dtype=np.int64)
    glucose = [120 + 30 * np.sin(times / 2400 + draw.uniform(0, 6)) for _ in range(patients)]
    series = Series(
        tuple(f"p{i:03d}" for i in range(patients)),
        np.arange(patients + 1, dtype=np.int64) * len(times),
        np.tile(times, patients),
        np.concatenate([*glucose, []]).astype(np.float32),
    )
    return cut_windows(series, WindowSpec(history_minutes=60, max_jumps=1000))
