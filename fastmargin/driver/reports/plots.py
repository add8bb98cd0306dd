"""Pictures of a run, as PNG: training curves, ROC, angles to the own class, the margin, and time per part of a step.

The histograms of theta are those of the ArcFace paper (arXiv 1801.07698v1, figure 4c): at the start they
center on 90 degrees, at the end on the angle that the margin leaves. The target logit over theta is its figure 4b.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from fastmargin.driver.training.stopwatch import PARTS
from fastmargin.margins.base import Margin

COLORS = {"model": "tab:blue", "raw_pixels": "tab:orange"}
STAGES = {"start": "tab:orange", "middle": "tab:green", "end": "tab:blue"}
LENGTHS = {0.05: "5 % are shorter", 0.5: "median", 0.95: "5 % are longer"}  # quantiles of the embeddings' norms
DPI = 110
FEW = 30  # up to so many records, each point has a marker

Records = Sequence[Mapping[str, Any]]  # lines of train.jsonl
Curve = tuple[NDArray[np.float64], NDArray[np.float64]]  # FAR [p], TAR [p]


def plot_loss(
    path: Path,
    records: Records,
    score: str,  # what `target_score` is
) -> None:
    """Loss and mean target score over the steps, and the step at which the margin reaches its full size.

    Where records have an objective, it is drawn above the loss, which then is that of the head alone.
    """
    curves = {"loss": "loss (nats)", "target_score": f"mean target {score}"}
    if all("objective" in record for record in records):
        curves = {"objective": "objective", **curves, "loss": "head loss (nats)"}
    figure = Figure(figsize=(8, 3 * len(curves)), layout="constrained")
    panels = figure.subplots(len(curves), 1, sharex=True)
    for axes, (key, title) in zip(panels, curves.items(), strict=True):
        line(axes, records, [record[key] for record in records])
        axes.set_ylabel(title)
    panels[-1].set_xlabel("step")
    margins = [record["margin"] for record in records]
    if margins and None not in margins and margins[0] < max(margins):
        full = records[margins.index(max(margins))]["step"]
        for axes in panels:
            axes.axvline(full, color="gray", linestyle=":", label=f"margin reaches {max(margins):g}")
        panels[0].legend()
    save(figure, path, "Training", *panels)


def plot_terms(path: Path, records: Records) -> None:
    """Each further term of the loss, before its weight."""
    names = list(records[-1]["terms"])
    figure = Figure(figsize=(8, 1 + 2 * len(names)), layout="constrained")
    panels = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
    for axes, name in zip(panels, names, strict=True):
        line(axes, records, [record["terms"][name] for record in records])
        axes.set_ylabel(name)
    panels[-1].set_xlabel("step")
    save(figure, path, "Terms of the loss, before their weights", *panels)


def plot_schedule(path: Path, records: Records) -> None:
    """Learning rate, and the margin if it is one number."""
    curves = {"learning rate": "lr", "margin m": "margin"}
    shown = {title: values for title, key in curves.items() if None not in (values := [r[key] for r in records])}
    figure = Figure(figsize=(8, 1 + 2 * len(shown)), layout="constrained")
    panels = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (title, values) in zip(panels, shown.items(), strict=True):
        line(axes, records, values)
        axes.set_ylabel(title)
        axes.set_ylim(bottom=min(0, *values))
    panels[-1].set_xlabel("step")
    save(figure, path, "Schedule", *panels)


def plot_mining(
    path: Path,
    records: Records,
    titles: Mapping[str, str],  # of the shares to draw, by name in a record
) -> None:
    figure = Figure(figsize=(8, 2.5), layout="constrained")
    axes = figure.subplots()
    for (key, title), color in zip(titles.items(), COLORS.values(), strict=True):
        line(axes, records, [record[key] for record in records], color)
        axes.lines[-1].set_label(title)
    axes.set(xlabel="step", ylabel="share", ylim=(0, 1.02))
    axes.legend()
    save(figure, path, "Mining", axes)


def plot_timing(
    path: Path,
    records: Records,  # with "seconds"
) -> None:
    """Milliseconds per step, by part, over the steps."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    steps = [0, *(record["step"] for record in records)]  # a record covers the steps before it
    parts = [[1000 * record["seconds"][part] for record in (records[0], *records)] for part in PARTS]
    axes.stackplot(steps, parts, labels=PARTS, step="pre")
    axes.set(xlabel="step", ylabel="milliseconds a step", xlim=(0, steps[-1]))
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="upper left", bbox_to_anchor=(1, 1))
    save(figure, path, "Time of a step", axes)


def plot_roc(
    path: Path,
    curves: Mapping[str, Curve],  # "model", "raw_pixels"
) -> None:
    figure = Figure(figsize=(8, 6), layout="constrained")
    axes = figure.subplots()
    for name, (far, tar) in curves.items():
        axes.plot(far, tar, color=COLORS[name], label=name.replace("_", " "))
    axes.set(xscale="log", xlim=(1e-5, 1), ylim=(0, 1.01))
    axes.set(xlabel="false accept rate (FAR)", ylabel="true accept rate (TAR)")
    axes.legend(loc="lower right")
    save(figure, path, "Verification of identities never trained on", axes)


def plot_theta(
    path: Path,
    cosines: Mapping[str, Tensor],  # "start", "middle", "end": [n] cosines of rows and their own class
) -> None:
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name, values in cosines.items():
        theta = np.degrees(np.arccos(values.double().clamp(-1, 1).numpy()))
        label = f"{name}: median {np.median(theta):.0f}°, n = {len(theta)}"
        axes.hist(theta, bins=list(range(0, 181, 2)), density=True, alpha=0.6, color=STAGES[name], label=label)
    axes.set(xlim=(0, 130), xlabel="angle θ between an image and its own class (degrees)")
    axes.set_ylabel("share of the images per degree")
    axes.legend()
    save(figure, path, "Angles in the course of training", axes)


@torch.no_grad()
def plot_psi(
    path: Path,
    margin: Margin,
    norms: Tensor,  # [N] of embeddings, before scaling
) -> None:
    """psi(theta), which replaces the target's cosine, beside cos(theta); for several norms if it depends on them.

    If each class has its own margin, that of class 0; if margins are random, their mean.
    """
    margin = deepcopy(margin).eval()
    theta = torch.linspace(0, torch.pi, 721, dtype=torch.float64)
    cos, first = theta.cos(), torch.zeros(len(theta), dtype=torch.int64)
    lengths = norms.double().quantile(torch.tensor(list(LENGTHS), dtype=torch.float64)).tolist()
    curves = [margin(cos, torch.full_like(cos, length), first) for length in lengths]
    names = [f"ψ(θ), norm {length:.3g} ({what})" for length, what in zip(lengths, LENGTHS.values(), strict=True)]
    if all(curve.equal(curves[0]) for curve in curves):
        curves, names = curves[:1], ["ψ(θ)"]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot(theta.rad2deg(), cos, color="gray", linestyle=":", label="cos θ")
    for curve, name in zip(curves, names, strict=True):
        axes.plot(theta.rad2deg(), curve, label=name)
    axes.set(
        xlim=(0, 180), xlabel="angle θ between an image and its own class (degrees)", ylabel="target before scaling"
    )
    axes.legend()
    lam = f", λ = {margin.lam:.3g}" if margin.lam else ""
    save(figure, path, f"{margin}{lam}", axes)


def line(axes: Axes, records: Records, values: Sequence[float], color: str = COLORS["model"]) -> None:
    """A number over the steps, with markers in a short run."""
    steps = [record["step"] for record in records]
    axes.plot(steps, values, color=color, marker="." if len(steps) <= FEW else "")


def save(figure: Figure, path: Path, title: str, *framed: Axes) -> None:
    for axes in framed:
        axes.grid(alpha=0.3)
    figure.suptitle(title, fontsize=12)
    figure.savefig(path, dpi=DPI)
