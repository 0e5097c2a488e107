"""Error grids: how dangerous is the difference between a reference and an estimate of glucose.

Both functions give every point of the plane exactly one zone, 0..4 for A..E; a point on a boundary belongs to the
safer zone of the Parkes grid and, for the Clarke grid, to the zone that the inequality in the code says.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

FloatArray: TypeAlias = npt.NDArray[np.floating]
Zones: TypeAlias = npt.NDArray[np.int8]
Vertices: TypeAlias = tuple[tuple[float, float], ...]

ZONE_NAMES = ("A", "B", "C", "D", "E")

# Boundaries of the Parkes grid for type 1 diabetes in mg/dL, (reference, estimate) per vertex; the last segment of
# each continues straight on. Source: Parkes et al., Diabetes Care 2000;23(8):1143-8, coordinates as tabulated by
# Pfützner et al., J Diabetes Sci Technol 2013;7(5):1275-81, table 1. The n-th boundary is where the n-th worse zone
# begins.
PARKES_UPPER: tuple[Vertices, ...] = (
    ((0, 50), (30, 50), (140, 170), (280, 380), (430, 550)),
    ((0, 60), (30, 60), (50, 80), (70, 110), (260, 550)),
    ((0, 100), (25, 100), (50, 125), (80, 215), (125, 550)),
    ((0, 150), (35, 155), (50, 550)),
)
PARKES_LOWER: tuple[Vertices, ...] = (
    ((50, 0), (50, 30), (170, 145), (385, 300), (550, 450)),
    ((120, 0), (120, 30), (260, 130), (550, 250)),
    ((250, 0), (250, 40), (550, 150)),
)


def clarke_zones(reference: FloatArray, estimate: FloatArray) -> Zones:
    """Zones of the Clarke grid, int8 of the inputs' common shape; both inputs in mg/dL.

    Definition (Clarke et al., Diabetes Care 1987;10(5):622-8, in the inequalities in common use): A: within 20% of
    the reference, or both below 70. E: reference <= 70 and estimate >= 180, or the reverse. C: reference 70..290 and
    estimate >= reference + 110, or reference 130..180 and estimate <= 7/5 reference - 182. D: reference >= 240 and
    estimate 70..180, or reference <= 70 and estimate in 70..180 (for references above 175/3 only where estimate >=
    6/5 reference). B: everything else. Where inequalities overlap the order A, E, C, D, B decides.
    """
    ref, est = np.broadcast_arrays(np.asarray(reference, dtype=np.float64), np.asarray(estimate, dtype=np.float64))
    a = (np.abs(est - ref) <= 0.2 * ref) | ((ref < 70) & (est < 70))
    e = ((ref <= 70) & (est >= 180)) | ((ref >= 180) & (est <= 70))
    c = ((ref >= 70) & (ref <= 290) & (est >= ref + 110)) | ((ref >= 130) & (ref <= 180) & (est <= 1.4 * ref - 182))
    middle = (est >= 70) & (est <= 180)
    d = ((ref >= 240) & middle) | ((ref <= 175 / 3) & middle) | ((ref <= 70) & (est <= 180) & (est >= 1.2 * ref))
    zones: Zones = np.select([a, e, c, d], [0, 4, 2, 3], default=1).astype(np.int8)
    return zones


def parkes_zones(reference: FloatArray, estimate: FloatArray) -> Zones:
    """Zones of the Parkes (consensus) grid for type 1 diabetes, int8 of the inputs' common shape; both inputs in mg/dL.

    The zone is the number of boundaries that the point lies beyond; see PARKES_UPPER and PARKES_LOWER.
    """
    ref, est = np.broadcast_arrays(np.asarray(reference, dtype=np.float64), np.asarray(estimate, dtype=np.float64))
    zones: Zones = np.zeros(ref.shape, dtype=np.int8)
    for boundary in PARKES_UPPER:
        zones += est > _follow(boundary, ref)
    lower: Zones = np.zeros(ref.shape, dtype=np.int8)
    for boundary in PARKES_LOWER:
        lower += ref > _follow(tuple((y, x) for x, y in boundary), est)
    return np.maximum(zones, lower)


def _follow(boundary: Vertices, at: FloatArray) -> npt.NDArray[np.float64]:
    """Height of the polyline at these abscissas, continued straight beyond its last vertex."""
    (x1, y1), (x2, y2) = boundary[-2:]
    far = max(10_000.0, 2 * x2)
    beyond = (far, y2 + (y2 - y1) / (x2 - x1) * (far - x2))
    x, y = zip(*boundary, beyond, strict=True)
    height: npt.NDArray[np.float64] = np.interp(at, x, y)
    return height
