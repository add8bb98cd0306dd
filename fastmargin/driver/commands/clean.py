"""Clean a data set with the network of a run: find images far from their identity and identities close to another.

    e_i = f(image_i) / ||f(image_i)||,    c_k = s / ||s||, s = sum of e_i over the images of identity k

    images.csv     the images of each identity by <e_i, c_k>, worst first (ArcFace, arXiv 1801.07698v1, 3.1.1: those too
                   far from the feature center of their identity are removed, those near the threshold checked by hand)
    remove.txt     the images with a cosine below a threshold, one a line, the worst of all identities first; a line
                   that begins with a double quote is a path with control characters, such as line breaks, in JSON
    pairs.csv      the pairs of identities whose centers have at least a given cosine: one person under two names?
    overlap.csv    the same for these identities and those of another data set, such as a test set, whose people should
                   not be trained on (ArcFace 3.4: cosine above 0.45; AM-Softmax 4.2)

An image is part of its own center: among n images, one unlike all others still has a cosine of about 1 / n, and the two
images of an identity of two have the same. Identities that the run held out are cleaned like the others. Images are
embedded identity by identity: memory holds all centers, and one block of images or the largest identity.

In the CSVs a name or path that a spreadsheet would read as a formula, as it begins with = + - @, has an apostrophe
before it.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastmargin.driver.config import GLYPHS, CleanConfig
from fastmargin.driver.data.identities import Identities
from fastmargin.driver.log import UNSAFE, Log, on_one_line
from fastmargin.driver.reports import contact_sheet
from fastmargin.driver.training import run_folder
from fastmargin.driver.training.backbone import Backbone, adapted, embed_images, load, load_backbone
from fastmargin.ops.common import rank_in_group, unit_rows
from fastmargin.ops.nontarget_lse import nontarget_lse

BLOCK = 4096  # images embedded, and centers compared, at a time
NEAREST = 8  # nearest centers searched for each; twice as many, again and again, while all of them are close
SHARES = (0.01, 0.05, 0.5)  # quantiles of the images' cosines that are printed: they help to choose --below
MOST = 1_000_000  # pairs of identities: nobody looks at more

IMAGES = ("name", "images", "rank", "cosine", "image")
PAIRS = ("name", "images", "other", "other_images", "cosine")


class DataSet(NamedTuple):
    identities: Identities
    names: Sequence[str]  # [C] as printed
    sizes: Tensor  # [C] int64, number of images
    centers: Tensor  # [C, d] unit
    cosines: Tensor  # [N] of an image and the center of its identity


class Close(NamedTuple):
    """Pairs of a row and a center, in order of falling cosine."""

    row: Tensor  # [n] int64
    center: Tensor  # [n] int64
    cosine: Tensor  # [n]


def clean(where: Path, out: Path, options: CleanConfig, log: Log, model: str | None = None) -> None:
    """Writes the lists named above into a new or empty folder and prints the first lines of each.

    model: as for `train.train`. ValueError for a folder that holds no run or no checkpoint, an `out` that is not
    empty, a source that is no data, and more than MOST pairs between two sets or MOST / 2 within one.
    """
    run_folder.check_unused(out)
    backbone = load_backbone(where, log, model, options.device)
    ours = adapted(backbone, options.source)
    theirs = None if options.against is None else adapted(backbone, options.against)
    loaded = [(config.source, load(backbone, config, log)) for config in (ours, theirs) if config is not None]
    given, *others = (describe(backbone, source, identities) for source, identities in loaded)
    out.mkdir(parents=True, exist_ok=True)
    rank_images(given, out, options, log)
    pairs = close(given.centers, given.centers, torch.arange(len(given.sizes)), options.above)
    once = pairs.row < pairs.center
    list_pairs("pairs", Close(*(part[once] for part in pairs)), given, given, out, options, log)
    for other in others:
        pairs = close(given.centers, other.centers, torch.full_like(given.sizes, -1), options.above)
        list_pairs("overlap", pairs, given, other, out, options, log)
    log(f"lists: {out}")


def describe(backbone: Backbone, source: str, identities: Identities) -> DataSet:
    shown = contact_sheet.caption if source == GLYPHS else on_one_line
    names = list(map(shown, identities.names))
    centers, cosines = find_centers(backbone.network, identities, backbone.config.dim)
    return DataSet(identities, names, identities.labels.bincount(), centers, cosines)


def find_centers(network: nn.Module, identities: Identities, dim: int) -> tuple[Tensor, Tensor]:  # [C, d], [N]
    """The center of each identity, and the cosine of each image and the center of its own.

    ValueError if an embedding is not finite.
    """
    labels = identities.labels
    centers, cosines = torch.empty(identities.num_classes, dim), torch.empty(len(labels))
    with tqdm(total=len(labels), unit="image", disable=not sys.stderr.isatty()) as bar:
        for rows in whole_identities(labels):
            x, _ = unit_rows(embed_images(network, identities.images[rows]))
            if not x.isfinite().all():
                raise ValueError("the network gives embeddings that are not finite")
            own, inverse = labels[rows].unique(return_inverse=True)
            centers[own] = unit_rows(x.new_zeros(len(own), dim).index_add_(0, inverse, x))[0]
            cosines[rows] = (x * centers[labels[rows]]).sum(1)
            bar.update(len(rows))
    return centers, cosines


def whole_identities(labels: Tensor) -> list[np.ndarray]:  # [N] -> [n] int64 each
    """The numbers of all images in blocks of about BLOCK; no identity is split."""
    ends = labels.bincount().cumsum(0)
    cuts = ends[:-1][((ends - 1) // BLOCK).diff() > 0]
    return np.split(labels.argsort(stable=True).numpy(), cuts.tolist())


def close(
    rows: Tensor,  # [R, d] unit
    centers: Tensor,  # [C, d] unit
    itself: Tensor,  # [R] int64, the center that the row is itself; -1: it is none of them
    above: float,
) -> Close:
    """All pairs of a row and a center other than itself with a cosine of `above` or more. No R x C array is made.

    Where rows and centers are the same, every pair is there in both orders. ValueError for more than MOST pairs.
    """
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    todo, k, count = torch.arange(len(rows)), NEAREST, 0
    while len(todo):
        crowded = []
        for part in todo.split(BLOCK):
            nearest = nontarget_lse(rows[part], centers, itself[part], topk=k)
            cosine, center = nearest.topk_values, nearest.topk_classes
            complete = cosine[:, -1] < above  # the k nearest hold all that are close
            row, rank = ((cosine >= above) & complete[:, None]).nonzero(as_tuple=True)
            found.append((part[row], center[row, rank], cosine[row, rank]))
            crowded.append(part[~complete])
            count += len(row)
        todo = torch.cat(crowded)
        if count + k * len(todo) > MOST:
            raise ValueError(
                f"above is {above}, and more than {MOST // 2} pairs of identities are; want a higher cosine"
            )
        k *= 2
    row, center, cosine = (torch.cat(parts) for parts in zip(*found, strict=True))
    order = cosine.argsort(descending=True, stable=True)
    return Close(row[order], center[order], cosine[order])


def rank_images(given: DataSet, out: Path, options: CleanConfig, log: Log) -> None:
    """Writes images.csv and, with a threshold, remove.txt."""
    worst = given.cosines.argsort(stable=True)
    labels, title = given.identities.labels, given.identities.title
    run_folder.write_csv(out / "images.csv", IMAGES, image_rows(given, worst[labels[worst].argsort(stable=True)]))
    quantiles = zip(SHARES, np.quantile(given.cosines.numpy(), SHARES), strict=True)
    log(
        f"{len(labels)} images of {len(given.sizes)} identities: cosine to the center of the identity below "
        f"{', '.join(f'{cosine:.3f} for {share:.0%}' for share, cosine in quantiles)}; the worst:"
    )
    for row in worst[: options.limit].tolist():
        log(f"{given.cosines[row]:8.3f}  {given.names[int(labels[row])]}  {on_one_line(title(row))}")
    if options.below is not None:
        remove = worst[given.cosines[worst] < options.below]
        with run_folder.replaced(out / "remove.txt") as file:
            file.writelines(f"{as_line(title(row))}\n" for row in remove.tolist())
        emptied = int((labels[remove].bincount(minlength=len(given.sizes)) == given.sizes).sum())
        log(
            f"below {options.below}: {len(remove)} images of {len(labels[remove].unique())} identities, "
            f"{emptied} of which have no others"
        )


def as_line(title: str) -> str:
    """A title for a file with one a line: a JSON string where it could be taken for something else."""
    return json.dumps(title) if UNSAFE.search(title) or title.startswith('"') else title


def image_rows(
    given: DataSet,
    order: Tensor,  # [N] images, those of an identity together, worst first
) -> Iterator[tuple[object, ...]]:
    """The columns IMAGES of each image."""
    labels = given.identities.labels[order]
    rank = rank_in_group(labels) + 1
    columns = (labels, given.sizes[labels], rank, given.cosines[order], order)
    for label, size, nth, cosine, row in zip(*(column.numpy() for column in columns), strict=True):
        yield given.identities.names[label], size, nth, f"{cosine:.6f}", given.identities.title(row)


def list_pairs(
    stem: str, pairs: Close, given: DataSet, other: DataSet, out: Path, options: CleanConfig, log: Log
) -> None:
    """Writes a CSV of the pairs and prints its first lines."""
    columns = (pairs.row, given.sizes[pairs.row], pairs.center, other.sizes[pairs.center], pairs.cosine)
    rows = list(zip(*(column.tolist() for column in columns), strict=True))
    ours, theirs = given.identities.names, other.identities.names
    named = ((ours[one], size, theirs[two], its, f"{cosine:.6f}") for one, size, two, its, cosine in rows)
    run_folder.write_csv(out / f"{stem}.csv", PAIRS, named)
    log(f"{stem} of identities with a cosine of {options.above} or more: {len(rows)}")
    for one, size, two, its, cosine in rows[: options.limit]:
        log(f"{cosine:8.3f}  {given.names[one]} / {other.names[two]}  ({size} and {its} images)")
