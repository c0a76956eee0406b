"""Histograms of oriented gradients as pictures: one little star of strokes per cell.

Legend: K bins, h, w cells.
"""

from __future__ import annotations

import math

import numpy as np


def orientation_glyphs(histograms: np.ndarray, cell_pixels: int = 16, full: float = 1.0) -> np.ndarray:
    """A stroke per bin and cell, along the edge that the bin stands for; the heavier, the brighter.

    Bin k of K holds gradients whose angle atan2(gx, gy), taken without sign, lies in
    [k pi / K, (k + 1) pi / K) (MaskFeat). An edge runs across its gradient, and so does the stroke.

    Args:
        histograms: float (K, h, w); values below 0, which a prediction may have, count as 0. NaN marks a
            cell that is not there.
        cell_pixels: side of a cell's square in the picture, at least 5.
        full: the value that is drawn at full brightness; histograms of L2 norm 1 reach 1.

    Returns:
        float32 (h cell_pixels, w cell_pixels) in [0, 1]; cells that are not there are NaN.
    """
    num_bins, height, width = histograms.shape
    missing = np.isnan(histograms).any(axis=0)
    weights = np.clip(np.where(missing, 0.0, histograms), 0.0, None)
    strokes = np.stack([_stroke(_edge_angle(k, num_bins), cell_pixels) for k in range(num_bins)])
    lit = np.zeros((height, width, cell_pixels, cell_pixels), dtype=np.float32)
    for weight, stroke in zip(np.minimum(weights / full, 1), strokes, strict=True):
        # Where strokes cross, the heavier one is seen.
        lit = np.maximum(lit, weight[:, :, None, None].astype(np.float32) * stroke)
    lit[missing] = np.nan
    return lit.transpose(0, 2, 1, 3).reshape(height * cell_pixels, width * cell_pixels)


def _edge_angle(index: int, num_bins: int) -> float:
    """Direction of the edges in the middle of a bin: radians from the x axis towards y, downwards."""
    # The bin's angle t is measured from the y axis: its gradient is (sin t, cos t), its edge (cos t, -sin t).
    return -(index + 0.5) * math.pi / num_bins


def _stroke(angle: float, side: int) -> np.ndarray:
    """A line through the middle of a square, one pixel wide with soft flanks: float32 (side, side)."""
    centre = np.arange(side, dtype=np.float32) + 0.5 - side / 2
    x, y = centre[None, :], centre[:, None]
    off = np.abs(-math.sin(angle) * x + math.cos(angle) * y)
    along = np.abs(math.cos(angle) * x + math.sin(angle) * y)
    # A margin keeps the strokes of neighbouring cells apart.
    return (np.clip(1.25 - off, 0, 1) * np.clip(side / 2 - 0.5 - along, 0, 1)).astype(np.float32)
