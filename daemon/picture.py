"""A picture of parts, their anomaly maps and verdicts, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from daemon.messages import VerdictMessage
from pipeline.geometry import MAP_PADDING_CELLS

_COLOURS = {"OK": "#2a9d3f", "NG": "#d62728", "INVALID": "#b8860b"}


@dataclass(frozen=True, slots=True)
class PictureRow:
    """One part of the picture."""

    rgb: NDArray[np.uint8]
    """(height, width, 3)"""
    mask: NDArray[np.bool_]
    """(height, width), where the defect truly is."""
    anomaly_map: NDArray[np.float32]
    """As published by an unpadded model: (map_height, map_width)."""
    truth: str
    verdict: VerdictMessage


def save_picture(rows: Sequence[PictureRow], path: Path) -> None:
    """Draw each part as a column: the part with its regions, its map, the true defect."""
    figure = Figure(figsize=(2.5 * len(rows), 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(3, len(rows), squeeze=False)
    top = max((row.verdict.threshold * 3 for row in rows), default=1.0)
    for column, row in enumerate(rows):
        height, width = row.rgb.shape[:2]
        for axis in axes[:, column]:
            axis.set_xticks([])
            axis.set_yticks([])
        part, heat, truth = axes[:, column]
        verdict = row.verdict
        part.imshow(row.rgb)
        for region in verdict.regions:
            box = (region.x, region.y), region.width, region.height
            part.add_patch(Rectangle(*box, fill=False, edgecolor="#ff2020", linewidth=1.2))
        score = "–" if verdict.score is None else f"{verdict.score:.2f}"
        part.set_title(f"{verdict.verdict}  {score}", color=_COLOURS[verdict.verdict], fontweight="bold")
        heat.imshow(row.rgb.mean(axis=2), cmap="gray")
        cells_y, cells_x = row.anomaly_map.shape
        pad = MAP_PADDING_CELLS
        pad_x, pad_y = pad * width / (cells_x + 2 * pad), pad * height / (cells_y + 2 * pad)
        extent = (pad_x, width - pad_x, height - pad_y, pad_y)
        heat.imshow(row.anomaly_map, cmap="inferno", alpha=0.75, vmin=0, vmax=top, extent=extent)
        heat.set_xlim(0, width)
        heat.set_ylim(height, 0)
        truth.imshow(row.mask, cmap="gray", vmin=0, vmax=1)
        truth.set_xlabel(row.truth.replace("_", " "))
        if column == 0:
            for axis, label in ((part, "part and regions"), (heat, "anomaly map"), (truth, "true defect")):
                axis.set_ylabel(label)
    figure.savefig(path, dpi=110)
