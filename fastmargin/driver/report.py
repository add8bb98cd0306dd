"""Pictures of a run, as PNG: loss and target cosine, ROC, angles to the own class, mined look-alikes.

The histograms of theta are those of the ArcFace paper (arXiv 1801.07698v1, figure 4c): at the start they
centre on 90 degrees, at the end on the angle that the margin leaves.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray
from torch import Tensor

from fastmargin.driver.data import Identities

COLORS = {"model": "tab:blue", "raw_pixels": "tab:orange", "start": "tab:orange", "end": "tab:blue"}
DPI = 110
NAME = 13  # characters of a name
COLUMNS, ROWS, EXAMPLES = 4, 7, 6  # of the contact sheet: pairs across and down, images of each identity

RUN = {
    "tar@1e-2": "TAR at FAR 1e-2",
    "tar@1e-3": "TAR at FAR 1e-3",
    "rank1": "rank-1",
    "accuracy": "10-fold accuracy",
}
EMBEDDINGS = {
    "tar@1e-2": "TAR at FAR 1e-2",
    "tar@1e-3": "TAR at FAR 1e-3",
    "tar@1e-4": "TAR at FAR 1e-4",
    "rank1": "rank-1",
    "dir@1e-2": "open set: DIR at FAR 1e-2, rank 1",
    "accuracy": "10-fold accuracy, insightface",
    "inter": "distance between classes, mean",
    "intra": "distance to the class mean, mean",
}
PAIRS = {
    "accuracy_insightface": "10-fold accuracy, insightface",
    "accuracy_sphereface": "10-fold accuracy, sphereface",
    "accuracy_euclidean": "10-fold accuracy, euclidean",
    "val@1e-3": "VAL at FAR 1e-3",
    "tar@1e-2": "TAR at FAR 1e-2",
    "tar@1e-3": "TAR at FAR 1e-3",
}

Curve = tuple[NDArray[np.float64], NDArray[np.float64]]  # FAR [p], TAR [p]


class Pair(NamedTuple):
    one: int  # class
    other: int  # its mined doppelganger
    score: float


def draw(
    pictures: Path,
    *,
    records: Sequence[Mapping[str, Any]],
    curves: Mapping[str, Curve],
    cosines: Mapping[str, Tensor],
    pairs: Sequence[Pair],
    identities: Identities,
    glyphs: bool,
) -> None:
    """All pictures into the folder; without cosines (a plain layer) there is no theta.png.

    Glyphs are drawn black on white and called by code point, other images are shown as they are.
    """
    pictures.mkdir(exist_ok=True)
    angles = {name: values for name, values in cosines.items() if len(values)}
    plot_loss(pictures / "loss.png", records, "cosine" if angles else "logit")
    plot_roc(pictures / "roc.png", curves)
    if angles:
        plot_theta(pictures / "theta.png", angles)
    plot_doppelgangers(pictures / "doppelgangers.png", pairs, identities, glyphs)


def plot_loss(
    path: Path,
    records: Sequence[Mapping[str, Any]],
    score: str,  # what `target_score` is
) -> None:
    """Loss and mean target score over the steps, and where the margin has reached its full size."""
    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    steps = [record["step"] for record in records]
    above.plot(steps, [record["loss"] for record in records], color=COLORS["model"])
    above.set_ylabel("loss (nats)")
    below.plot(steps, [record["target_score"] for record in records], color=COLORS["model"])
    below.set(ylabel=f"mean target {score}", xlabel="step")
    margins = [record["margin"] for record in records]
    if margins and None not in margins and margins[0] < max(margins):
        full, label = steps[margins.index(max(margins))], f"margin reaches {max(margins):g}"
        for axes in (above, below):
            axes.axvline(full, color="grey", linestyle=":", label=label)
        above.legend()
    save(figure, path, "Training", above, below)


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
    cosines: Mapping[str, Tensor],  # "start", "end": [n] cosines of rows and their own class
) -> None:
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name, values in cosines.items():
        theta = np.degrees(np.arccos(values.double().clamp(-1, 1).numpy()))
        label = f"{name}: median {np.median(theta):.0f}°, n = {len(theta)}"
        axes.hist(theta, bins=list(range(0, 181, 2)), density=True, alpha=0.6, color=COLORS[name], label=label)
    axes.set(xlim=(0, 130), xlabel="angle θ between an image and its own class (degrees)")
    axes.set_ylabel("share of the images per degree")
    axes.legend()
    save(figure, path, "Angles at the start and at the end of training", axes)


def mined_pairs(
    classes: Tensor,  # [C, k] int64, -1: empty
    scores: Tensor,  # [C, k], -inf: empty
    limit: int = COLUMNS * ROWS,
) -> list[Pair]:
    """The most similar pairs of a class and one on its list, best first, each pair once."""
    pairs: dict[frozenset[int], Pair] = {}
    listed, k = classes.flatten(), classes.shape[1]
    for place in scores.flatten().argsort(descending=True, stable=True).tolist():
        one, other = place // k, int(listed[place])
        if other < 0 or len(pairs) == limit:
            break
        pairs.setdefault(frozenset((one, other)), Pair(one, other, float(scores[one, place % k])))
    return list(pairs.values())


def plot_doppelgangers(path: Path, pairs: Sequence[Pair], identities: Identities, glyphs: bool) -> None:
    """A contact sheet: in each cell some images of one identity above those of its doppelganger."""
    rows = max(1, -(-len(pairs) // COLUMNS))
    gaps = ConstrainedLayoutEngine(wspace=0.06, hspace=0.02)  # the four strips of a row stay apart
    figure = Figure(figsize=(13, 0.8 + 1.45 * rows), layout=gaps)
    grid = figure.subplots(rows, COLUMNS, squeeze=False).flat
    for axes, pair in zip(grid, pairs, strict=False):
        cell = np.concatenate([strip(identities, pair.one), strip(identities, pair.other)])
        axes.imshow(cell, cmap="gray_r" if glyphs else "gray", vmin=0, vmax=255, interpolation="nearest")
        name = caption if glyphs else shortened
        names = " / ".join(name(identities.names[label]) for label in (pair.one, pair.other))
        axes.set_title(f"{names}   {pair.score:.2f}", fontsize=10, parse_math=False)
    for axes in figure.axes:
        axes.set_axis_off()
    save(
        figure,
        path,
        "Most similar pairs mined while training: a class above, its doppelganger below.\n"
        "The number is the largest cosine of an image of the one to the weight of the other.",
    )


def strip(identities: Identities, label: int) -> NDArray[np.uint8]:  # [H + 2, EXAMPLES * W] or [..., 3]
    """Images of one identity side by side, spread over all it has; fewer are followed by blanks."""
    own = np.flatnonzero(identities.labels.numpy() == label)
    chosen = identities.images[own[np.unique(np.linspace(0, len(own) - 1, EXAMPLES).round().astype(int))]].numpy()
    blank = np.zeros((EXAMPLES - len(chosen), *chosen.shape[1:]), np.uint8)
    row = np.concatenate([*chosen, *blank], axis=1)
    return np.pad(row, [(1, 1), *[(0, 0)] * (row.ndim - 1)])


def shortened(name: str) -> str:
    """The end of a long name, which tells more than its beginning; ? for what DejaVu Sans cannot draw."""
    drawn = "".join(character if drawable(character) else "?" for character in name)
    return drawn if len(drawn) <= NAME else f"…{drawn[1 - NAME :]}"


def caption(name: str) -> str:
    """First character of an identity, where DejaVu Sans can draw it, its code point, and how many more."""
    drawn = f"{name[0]} " if drawable(name[0]) else ""
    more = f"+{len(name) - 1}" if len(name) > 1 else ""
    return f"{drawn}U+{ord(name[0]):04X}{more}"


def drawable(character: str) -> bool:
    return get_font(findfont("DejaVu Sans")).get_char_index(ord(character)) > 0


def save(figure: Figure, path: Path, title: str, *framed: Axes) -> None:
    for axes in framed:
        axes.grid(alpha=0.3)
    figure.suptitle(title, fontsize=12)
    figure.savefig(path, dpi=DPI)


def progress(record: Mapping[str, Any]) -> str:
    return (
        f"loss {record['loss']:.3f}, target score {record['target_score']:.3f}, "
        f"{record['images_per_second']:.0f} images/s"
    )


def table(metrics: Mapping[str, Any]) -> str:
    """The metrics of the model beside those of raw pixels, as text."""
    model, raw = metrics["model"], metrics["raw_pixels"]
    heading = f"{model['identities']} identities never trained on, {model['images']} images"
    return lines(heading, {"model": model, "raw pixels": raw}, RUN)


def lines(
    heading: str,
    columns: Mapping[str, Mapping[str, Any]],  # numbers by key; None: not resolvable
    titles: Mapping[str, str],  # of the keys that are shown
) -> str:
    """A table as text: a row for each title, a column for each set of numbers."""
    first = max(map(len, titles.values())) + 2
    widths = {name: max(10, len(name) + 2) for name in columns}
    rows = [heading, " " * first + "".join(f"{name:>{width}}" for name, width in widths.items())]
    for key, title in titles.items():
        cells = (f"{number(columns[name][key]):>{width}}" for name, width in widths.items())
        rows.append(f"{title:{first}}" + "".join(cells))
    unresolved = any(numbers[key] is None for numbers in columns.values() for key in titles)
    return "\n".join(rows + ["-: not resolvable, of too few pairs or identities"] * unresolved)


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
