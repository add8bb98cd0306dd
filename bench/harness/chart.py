"""The chart of a machine's figures: how many times as fast as eager each contestant is, one panel per shape."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.measure import FORWARD, FORWARD_BACKWARD
from matplotlib.axes import Axes
from matplotlib.figure import Figure

FLOOR, OURS, OTHERS = "0.78", "tab:blue", "tab:orange"


def speeds(record: Mapping[str, Any]) -> dict[str, float]:
    """How many times as fast as eager, in forward + backward if that was measured, else in forward."""
    measure = largest(record)
    return {name: f[measure]["times_eager"] for name, f in record["contestants"].items() if measure in f}


def largest(record: Mapping[str, Any]) -> str:
    return FORWARD_BACKWARD if FORWARD_BACKWARD in record["contestants"]["eager"] else FORWARD


def color(name: str) -> str:
    return FLOOR if "product" in name else OURS if "fastmargin" in name else OTHERS


def draw(path: Path, machine: str, records: Sequence[Mapping[str, Any]]) -> None:
    names = list(dict.fromkeys(name for record in records for name in speeds(record)))
    names.sort(key=lambda name: "product" in name)
    figure = Figure(figsize=(12, 1.5 + 0.24 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(records), sharey=True, squeeze=False)[0]
    for axes, record in zip(panels, records, strict=True):
        draw_shape(axes, record, names)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    figure.suptitle(f"Speed of a head relative to eager PyTorch with the same loss; {machine}", fontsize=12)
    figure.supxlabel("times as fast as eager; gray: floors, the matrix products alone", fontsize=10)
    figure.savefig(path, dpi=100)


def draw_shape(axes: Axes, record: Mapping[str, Any], names: Sequence[str]) -> None:
    values = speeds(record)
    positions = [names.index(name) for name in values]
    axes.axvline(1, color="black", linewidth=0.8, linestyle="--", zorder=0)
    bars = axes.barh(positions, list(values.values()), color=[color(name) for name in values])
    for label in axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=9):
        label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})
    axes.set_title("B = {B:,}, d = {d:,}\nC = {C:,}\n".format(**record) + largest(record), fontsize=10)
    axes.set_xlim(0, 1.2 * max(values.values()))
    axes.spines[["top", "right"]].set_visible(False)
