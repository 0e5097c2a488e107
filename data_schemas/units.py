"""Constants of nature and of sensors. Every quantity carries its unit in its name."""

from __future__ import annotations

# Molar mass of glucose 180.156 g/mol, so 1 mmol/L is 18.0156 mg/dL.
MG_DL_PER_MMOL_L = 18.0156
# The range that continuous glucose sensors report; readings beyond it are clamped by the devices.
SENSOR_MIN_MG_DL = 40.0
SENSOR_MAX_MG_DL = 400.0
GRID_MINUTES = 5
HORIZON_MINUTES: tuple[int, ...] = tuple(range(5, 65, 5))
QUANTILES: tuple[float, ...] = (0.05, 0.25, 0.50, 0.75, 0.95)
# The delta of every (epsilon, delta) statement, far below 1 / (patients in any cohort).
DELTA = 1e-5
RESEARCH_LABEL = "Research use. Dosing decisions should not be made based on this output."


def mg_dl(mmol_l: float) -> float:
    """Convert a glucose concentration from mmol/L to mg/dL."""
    return mmol_l * MG_DL_PER_MMOL_L


def mmol_l(mg_dl: float) -> float:
    """Convert a glucose concentration from mg/dL to mmol/L."""
    return mg_dl / MG_DL_PER_MMOL_L
