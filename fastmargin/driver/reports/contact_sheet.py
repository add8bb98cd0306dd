"""The contact sheet of mined doppelgangers: images of a class above those of its nearest wrong class."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray
from torch import Tensor

from fastmargin.driver.data.identities import Identities
from fastmargin.driver.reports.plots import save

NAME = 13  # characters of a name that are shown
COLUMNS, ROWS, EXAMPLES = 4, 7, 6  # pairs across and down, images of each identity


class Pair(NamedTuple):
    one: int  # class
    other: int  # its mined doppelganger
    score: float


def mined_pairs(
    classes: Tensor,  # [C, k] int64, -1: empty
    scores: Tensor,  # [C, k], -inf: empty
    limit: int = COLUMNS * ROWS,
) -> list[Pair]:
    """The most similar pairs of a class and one of its doppelgangers, best first, each pair once."""
    pairs: dict[frozenset[int], Pair] = {}
    doppelgangers, k = classes.flatten(), classes.shape[1]
    for i in scores.flatten().argsort(descending=True, stable=True).tolist():
        one, other = i // k, int(doppelgangers[i])
        if other < 0 or len(pairs) == limit:
            break
        pairs.setdefault(frozenset((one, other)), Pair(one, other, float(scores[one, i % k])))
    return list(pairs.values())


def plot_doppelgangers(path: Path, pairs: Sequence[Pair], identities: Identities, *, glyphs: bool, plain: bool) -> None:
    """A contact sheet: in each cell some images of one identity above those of its doppelganger."""
    rows = max(1, -(-len(pairs) // COLUMNS))
    gaps = ConstrainedLayoutEngine(wspace=0.06, hspace=0.02)  # space between the cells
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
        f"The number: the largest {'logit' if plain else 'cosine'} of an image of the one and the weight of the other.",
    )


def strip(identities: Identities, label: int) -> NDArray[np.uint8]:  # [H + 2, EXAMPLES * W] or [..., 3]
    """EXAMPLES images of one identity side by side, evenly spread over all it has; blanks where it has fewer."""
    own = np.flatnonzero(identities.labels.numpy() == label)
    chosen = identities.images[own[np.unique(np.linspace(0, len(own) - 1, EXAMPLES).round().astype(int))]].numpy()
    blank = np.zeros((EXAMPLES - len(chosen), *chosen.shape[1:]), np.uint8)
    row = np.concatenate([*chosen, *blank], axis=1)
    return np.pad(row, [(1, 1), *[(0, 0)] * (row.ndim - 1)])


def shortened(name: str) -> str:
    """The last characters of a long name, which tell more than the first; ? for what DejaVu Sans cannot draw."""
    drawn = "".join(character if drawable(character) else "?" for character in name)
    return drawn if len(drawn) <= NAME else f"…{drawn[1 - NAME :]}"


def caption(name: str) -> str:
    """The first character of a name, if DejaVu Sans can draw it, its code point, and the number of further ones."""
    drawn = f"{name[0]} " if drawable(name[0]) else ""
    more = f"+{len(name) - 1}" if len(name) > 1 else ""
    return f"{drawn}U+{ord(name[0]):04X}{more}"


def drawable(character: str) -> bool:
    return get_font(findfont("DejaVu Sans")).get_char_index(ord(character)) > 0
