"""Curves of a training run as a picture."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["draw_curves"]

_BOOK = re.compile(r"book(\d+)_(\w+)")
_SKIPPED = {"step", "split", "hours", "alarms", "steps_per_second"}


def draw_curves(history: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw every figure of ``metrics.jsonl`` over the steps; one panel for each.

    Layers of a probe share a panel, and so do the codebooks of a quantizer, as they are in training.

    Parameters
    ----------
    history : sequence of dict
        Lines of the file.
    path : Path
        The PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: dict[str, dict[str, tuple[list[int], list[float]]]] = {}
    for line in history:
        for name, value in line.items():
            if name in _SKIPPED or not isinstance(value, int | float) or not math.isfinite(value):
                continue
            if book := _BOOK.fullmatch(name):
                if line["split"] != "train":
                    continue
                panel, curve = f"{book[2]} of codebooks", f"book {book[1]}"
            else:
                panel, _, layer = name.partition("_layer")
                curve = f"layer {layer.replace('_', ' ')}" if layer else line["split"]
            steps, values = panels.setdefault(panel, {}).setdefault(curve, ([], []))
            steps.append(line["step"])
            values.append(value)
    if not panels:
        return
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.8 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for index, (panel, curves) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, index + 1)
        for curve, (steps, values) in curves.items():
            axes.plot(steps, values, label=curve, linewidth=1.2, marker="." if len(steps) < 40 else None)
        axes.set_title(panel.replace("_", " "), fontsize=9)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
        if len(curves) > 1:
            axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)
